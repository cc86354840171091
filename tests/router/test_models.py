"""What the router reads of a model, and how models follow the registry."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import threading
import time

import msgspec
import pytest

from kvstore.threads import OsThreads
from services.router.errors import ApiError
from services.router.text import ModelDirectory, ModelTokenizer, TokenizerPool
from services.router.text.models import ModelSource, load_model_files
from services.router.text.tokenizer import TokenizerError, load_chat_templates
from tests.router.fake_worker import FakeWorker, endless
from tests.router.harness import until


@pytest.fixture
def copy(model_directory, tmp_path):
    """A model directory to change."""
    return shutil.copytree(model_directory, tmp_path / "model")


def record(path, names=("m",), **options):
    return FakeWorker(endless([300]), model_names=names, model_path=str(path), **options).record()


@pytest.fixture
async def directory():
    models = ModelDirectory("", "", True, OsThreads(), time.monotonic, time.time)
    yield models
    await models.close()


async def test_models_appear_with_their_worker_and_one_that_is_away_may_come_back(directory, model_directory):
    directory.follow((record(model_directory, ("a", "b"), max_model_len=100),))
    with pytest.raises(ApiError) as loading:
        directory.get("a")
    assert loading.value.status == 503
    await until(lambda: directory.names() == ["a", "b"])
    assert directory.get("a").max_model_len == 100
    assert directory.get(None).name == "a"  # one model, two names
    directory.follow(())
    assert directory.names() == []
    with pytest.raises(ApiError) as gone:
        directory.get("a")
    assert gone.value.status == 503
    with pytest.raises(ApiError) as unknown:
        directory.get("c")
    assert unknown.value.status == 404


async def test_a_router_that_has_just_started_does_not_deny_that_there_is_a_model(model_directory):
    """SDKs try again after a 503, and never after a 404."""
    models = ModelDirectory("", "", True, OsThreads(), time.monotonic, time.time, grace_s=1000.0)

    def status(name):
        with pytest.raises(ApiError) as caught:
            models.get(name)
        assert (caught.value.status == 503) == (caught.value.retry_after_s is not None)
        return caught.value.status

    assert status("a") == 503, "nothing is known yet"
    models.follow((record(model_directory, ("a",)),))
    await until(lambda: models.names() == ["a"])
    assert status("b") == 503, "it may be on its way"
    models._grace_s = 0.0
    assert status("b") == 404
    models.follow((), (msgspec.structs.replace(record(model_directory, ("b",)), phase="loading the model"),))
    assert [status(name) for name in ("a", "b", "c")] == [503, 503, 404]
    await models.close()


async def test_a_model_that_the_router_is_to_serve_exists_even_before_it_has_a_worker():
    models = ModelDirectory("", "", True, OsThreads(), time.monotonic, time.time, frozenset({"b"}))
    with pytest.raises(ApiError) as wanted:
        models.get("b")
    with pytest.raises(ApiError) as other:
        models.get("a")
    assert (wanted.value.status, other.value.status) == (503, 404)
    await models.close()


async def test_files_are_loaded_while_a_worker_starts_and_served_when_it_serves(directory, model_directory):
    serving = record(model_directory)
    directory.follow((), (msgspec.structs.replace(serving, phase="loading the model"),))
    await until(lambda: bool(directory._files))
    assert directory.names() == []
    directory.follow((serving,))
    assert directory.names() == ["m"]


async def test_a_model_promises_what_its_smallest_worker_holds(directory, model_directory):
    directory.follow((record(model_directory, max_model_len=100), record(model_directory, max_model_len=50)))
    await until(lambda: directory.names() == ["m"])
    assert directory.get("m").max_model_len == 50


async def test_among_several_models_the_client_must_choose(directory, model_directory, fallback_directory):
    directory.follow((record(model_directory), record(fallback_directory, ("other",))))
    await until(lambda: directory.names() == ["m", "other"])
    with pytest.raises(ApiError) as caught:
        directory.get(None)
    assert (caught.value.status, caught.value.param) == (400, "model")


async def test_a_client_that_names_no_model_may_come_back_while_none_is_served(directory, model_directory):
    for records in ((), (record(model_directory),), ()):
        directory.follow(records)
        with pytest.raises(ApiError) as caught:
            directory.get(None)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 2)


async def test_prefill_workers_alone_serve_nothing(directory, model_directory):
    worker = FakeWorker(endless([300]), model_path=str(model_directory))
    directory.follow((worker.record("prefill"),))
    assert directory.names() == []


async def test_only_the_names_asked_for(model_directory):
    models = ModelDirectory("", "", True, OsThreads(), time.monotonic, time.time, frozenset({"b"}))
    models.follow((record(model_directory, ("a", "b")),))
    await until(lambda: models.names() == ["b"])
    with pytest.raises(ApiError) as caught:
        models.get("a")
    assert caught.value.status == 404
    await models.close()


async def test_a_model_that_cannot_be_loaded_is_said_so_and_harms_no_other(
    directory, model_directory, tmp_path, caplog
):
    directory.follow((record(tmp_path, ("broken",)), record(model_directory)))
    await until(lambda: directory.names() == ["m"] and "cannot be served" in caplog.text)
    assert "no tokenizer.json" in caplog.text


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer_config.json", json.dumps({"chat_template": [{"template": "x"}]}), "`name` and `template`"),
        ("tokenizer_config.json", json.dumps({"chat_template": 5}), "`name` and `template`"),
        ("chat_template.jinja", "{% if %}", "chat template cannot be parsed"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
        ("config.json", json.dumps({"text_config": [1]}), "AttributeError"),  # nobody expected that
    ],
)
async def test_whatever_is_wrong_with_a_model_s_files_is_said_and_tried_again(
    directory, copy, monkeypatch, file, content, words
):
    monkeypatch.setattr("services.router.text.models._FIRST_RETRY_S", 0.01)
    good = (copy / file).read_bytes() if (copy / file).exists() else None
    (copy / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    directory.follow((record(copy),))
    await until(lambda: words in directory.not_loaded().get("m", ""))
    with pytest.raises(ApiError, match=words) as caught:
        directory.get("m")
    assert (caught.value.status, caught.value.code) == (503, "model_not_loaded")
    (copy / file).unlink()
    if good is not None:
        (copy / file).write_bytes(good)
    await until(lambda: directory.names() == ["m"])
    assert directory.not_loaded() == {}


async def test_a_panic_of_the_library_does_not_end_the_loading(directory, model_directory, monkeypatch):
    class Panic(BaseException):
        """As pyo3 has it."""

    def panic(*_):
        raise Panic("index out of bounds")

    monkeypatch.setattr("services.router.text.models.ModelTokenizer", panic)
    directory.follow((record(model_directory),))
    await until(lambda: "Panic: index out of bounds" in directory.not_loaded().get("m", ""))


async def test_a_worker_that_comes_and_goes_does_not_fill_the_threads(directory, model_directory, monkeypatch):
    gate, calls = threading.Event(), []

    def slow(*arguments):
        calls.append(arguments)
        gate.wait(10)
        return load_model_files(*arguments)

    monkeypatch.setattr("services.router.text.models.load_model_files", slow)
    for _ in range(5):
        directory.follow((record(model_directory),))
        await until(lambda: calls)
        directory.follow(())
    directory.follow((record(model_directory),))
    gate.set()
    await until(lambda: directory.names() == ["m"])
    assert len(calls) == 1


async def test_tokenizer_and_template_are_of_the_worker_s_revision(directory, model_directory, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(model_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    own = msgspec.structs.replace(record("org/model"), revision="v2")
    directory.follow((own, msgspec.structs.replace(own, tokenizer_path="org/other", served_model_names=("n",))))
    await until(lambda: directory.names() == ["m", "n"])
    # A revision is one of the model's repository; another tokenizer has its own.
    assert sorted(asked, key=str) == [("org/model", "v2"), ("org/model", "v2"), ("org/other", None)]


def test_reads_sizes_and_ends_of_sequence_from_both_files(copy):
    (copy / "config.json").write_text(json.dumps({"vocab_size": 1000, "eos_token_id": 3}))
    (copy / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [7, 8], "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "do_sample": True})
    )
    files = load_model_files(ModelSource(str(copy), str(copy)), "", use_defaults=True)
    assert files.vocab_size == 1000
    assert files.eos_token_ids == {1, 3, 7, 8}  # 1: the tokenizer's own
    assert files.sampling_defaults == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}
    assert load_model_files(ModelSource(str(copy), str(copy)), "", use_defaults=False).sampling_defaults == {}


def test_defaults_that_are_no_numbers_are_passed_over(copy, caplog):
    (copy / "generation_config.json").write_text(json.dumps({"temperature": "hot", "top_p": -1, "top_k": None}))
    assert load_model_files(ModelSource(str(copy), str(copy)), "", use_defaults=True).sampling_defaults == {}
    assert "temperature='hot'" in caplog.text


def test_templates_come_from_wherever_models_keep_them(copy, tmp_path):
    def rendered(override=""):
        templates = load_chat_templates(copy, {}, override)
        return {name: template.render([{"role": "user", "content": "x"}]) for name, template in templates.items()}

    config = {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == {"default": "D", "tool_use": "T"}
    (copy / "chat_template.jinja").write_text("J")
    assert rendered()["default"] == "J"
    (tmp_path / "mine.jinja").write_text("M")
    assert rendered(str(tmp_path / "mine.jinja")) == {"default": "M"}
    assert rendered("{{ messages[0].content }}!") == {"default": "x!"}
    with pytest.raises(TokenizerError, match="no-such-file"):
        rendered("no-such-file")


def test_a_broken_file_is_named(copy):
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be loaded"):
        ModelTokenizer(copy)
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        load_chat_templates(copy, {}, "")
    with pytest.raises(TokenizerError, match="is not a directory"):
        load_model_files(ModelSource("/no/such/model", "/no/such/model"), "", True)


# ---- the tokenizer ------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["tokenizer", "fallback_tokenizer"])
@pytest.mark.parametrize("text", ["Hello world", " hello", "naïve 你好 🙂", "a\nb\tc", "<s>x</s>"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(request, fixture, text):
    tokenizer = request.getfixturevalue(fixture)
    (token_ids,) = tokenizer.encode([text], False)
    content = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids).decode()
    assert content.removeprefix(" ") == text.removeprefix(" ")  # the mark of a first word is a space


def test_a_part_of_a_character_is_shown_as_such(tokenizer):
    (token_ids,) = tokenizer.encode(["\U0001f980"], False)
    assert len(token_ids) > 1
    assert {tokenizer.token_text(token_id) for token_id in token_ids} == {"\ufffd"}
    assert tokenizer.token_bytes(10**6) == b""


def test_special_tokens(tokenizer):
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.is_special(tokenizer.encode(["</s>"], False)[0][0])


async def test_the_pool_is_bounded_even_when_callers_give_up():
    pool = TokenizerPool(OsThreads(), 1, 1)
    gate = threading.Event()
    running = asyncio.create_task(pool.run(lambda go_on: gate.wait(10)))
    waiting = asyncio.create_task(pool.run(lambda go_on: 5))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait([running])
    with pytest.raises(ApiError) as caught:  # the thread is busy all the same
        await pool.run(lambda go_on: 6)
    assert caught.value.status == 429
    gate.set()
    assert await waiting == 5
    assert await pool.run(lambda go_on: 7) == 7
    pool.close()


async def test_a_panic_in_the_pool_is_an_error_like_any_other():
    class Panic(BaseException):
        """As the tokenizers library raises it."""

    def panics(go_on):
        raise Panic("index out of range")

    pool = TokenizerPool(OsThreads(), 1, 1)
    with pytest.raises(RuntimeError, match="index out of range"):
        await pool.run(panics)
    assert await pool.run(lambda go_on: 5) == 5
    pool.close()


def test_served_models_are_immutable(model_directory):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_model_files(ModelSource(str(model_directory), str(model_directory)), "", True).vocab_size = 5
