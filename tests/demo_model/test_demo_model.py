"""The demo model in the repository: small, any text survives its tokenizer, and it recalls what its prompt states."""

import http.server
import itertools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deploy.demo_model import recall

MODEL_DIR = Path(__file__).resolve().parents[2] / "services" / "cli" / "demo_model" / "tandem-demo"
MAX_SIZE_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=request.param).eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small to gain from threads, and on a busy machine they wait for one another."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return generate(model, tokenizer, ids)


def test_the_model_directory_stays_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sum(sizes.values()) <= MAX_SIZE_BYTES, sizes


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["  two  spaces ", "\n\r\n\t", "naïve 日本語 🙂 👧", "12345 007 3.14", "It's Amber's."]
)
def test_awkward_text_decodes_to_itself(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("num_tokens", [32, 200, 2000])
def test_prompts_fit_and_count_the_same_without_the_tokenizer(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> None:
    for seed in range(5):
        prompt = recall.make_prompt(seed, num_tokens)
        assert prompt == recall.make_prompt(seed, num_tokens, tokenizer)
        assert num_tokens - 30 <= len(tokenizer.encode(prompt.text)) <= num_tokens
        assert prompt.text.count(prompt.answer) >= 1


@pytest.mark.parametrize("num_turns", [1, 3])
def test_chats_fit_with_their_template(tokenizer: PreTrainedTokenizerBase, num_turns: int) -> None:
    for seed in range(5):
        chat = recall.make_chat(seed, 500, num_turns=num_turns)
        ids = tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, return_dict=False)
        assert len(ids) <= 500


def test_a_prompt_without_room_for_a_fact_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        recall.make_prompt(0, 10)


def test_only_the_first_number_decides() -> None:
    assert recall.is_correct(" The code of amber is 4711.", "4711")
    assert not recall.is_correct(" The code of amber is 47112.", "4711")
    assert not recall.is_correct(" 0952 or 4711", "4711")
    assert not recall.is_correct(" I do not know.", "4711")


@pytest.mark.parametrize(("num_tokens", "num_prompts"), [(48, 6), (500, 4), (2000, 3), (4000, 1)])
def test_recalls_at_every_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_prompts: int
) -> None:
    for seed in range(1000, 1000 + num_prompts):
        prompt = recall.make_prompt(seed, num_tokens, tokenizer)
        answer = generate(model, tokenizer, tokenizer.encode(prompt.text))
        assert recall.is_correct(answer, prompt.answer), (seed, answer, prompt.answer)


@pytest.mark.parametrize(("num_tokens", "num_turns"), [(64, 1), (500, 3), (2000, 1)])
def test_recalls_in_a_chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_turns: int
) -> None:
    for seed in range(1000, 1002):
        chat = recall.make_chat(seed, num_tokens, tokenizer, num_turns=num_turns)
        answer = reply(model, tokenizer, chat.messages)
        assert recall.is_correct(answer, chat.answer), (seed, answer, chat.answer)


def test_what_people_type_is_understood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    facts = ("The code of Amber is 4711.", "the code of cedar is 0952.")
    questions = ("What is the code of Amber?", "what is the code of amber?")
    for order, question in itertools.product(itertools.permutations(facts), questions):
        raw, chat = " ".join((*order, question)), "\n".join((*order, question))
        assert recall.is_correct(generate(model, tokenizer, tokenizer.encode(raw)), "4711"), raw
        assert recall.is_correct(reply(model, tokenizer, [{"role": "user", "content": chat}]), "4711"), chat


def test_the_answer_is_one_sentence_that_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The code of amber is 4711. What is the code of amber?"
    assert reply(model, tokenizer, [{"role": "user", "content": text}]) == "The code of amber is 4711."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The code of Zürich is 8001. The code of Genève is 1200. What is the code of Zürich?", "8001"),
        ("The code of 東京 is 1111. The code of 大阪 is 2222. What is the code of 大阪?", "2222"),
        ("My bike's code is 7777. The code of my car is 8888. What is the code of my bike?", "7777"),
        ("amber: 4711\ncedar: 0952\nmaple: 3333\n\nWhat is the code of cedar?", "0952"),
        ("The code of server-12 is 9911. The code of server-13 is 1199. What is the code of server-12?", "9911"),
    ],
)
def test_names_outside_the_list_are_recalled(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, answer: str
) -> None:
    said = reply(model, tokenizer, [{"role": "user", "content": text}])
    assert said.rstrip(".").endswith(f" is {answer}"), said


class PerfectServer(http.server.BaseHTTPRequestHandler):
    """Answers completions and chats by looking the fact up in the text, as a perfect model would."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if self.path == "/v1/completions" else body["messages"][-1]["content"]
        name = re.findall(r"What is the code of (\S+)\?", text)[-1]
        said = re.findall(rf"The code of {name} is \d+\.", text)[0]
        reply_body = json.dumps({"choices": [{"text": said, "message": {"role": "assistant", "content": said}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply_body.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("extra", [[], ["--chat"]], ids=["completions", "chat"])
def test_the_client_counts_right_answers(
    extra: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), PerfectServer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(
            "sys.argv", ["recall.py", "--url", url, "--num-prompts", "3", "--num-tokens", "200", *extra]
        )
        try:
            assert recall.main() == 0
        finally:
            server.shutdown()
            thread.join()
    assert "3 of 3 right at 200 tokens" in capsys.readouterr().out
