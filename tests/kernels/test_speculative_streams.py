"""With guesses and without: on kernels that are exact to the bit the streams are the same, drawn ones and log
probabilities, too, whatever happens to their requests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.api import FinishReason, Request, RequestUpdate, SampledToken, SamplingParams
from services.engine.config import EngineConfig
from services.engine.native import Engine
from services.engine.native.attention import ForwardBatch
from services.engine.native.kernels.choice import KernelChoice
from services.engine.native.model import model
from services.engine.native.model.model import LoadedModel, load_model
from services.rates import Rates
from tests.draft_models import damp_upper_layers, write_draft
from tests.engine_contract.test_engine_contract import copy
from tests.hf_models import EOS_TOKEN_IDS, random_prompts, reference_greedy, write_model
from tests.kernels.conftest import Libraries

TRANSFER = b"a transfer's id."
FEW = (5, 9, 77)
"""Tokens that may be said: so few that the text repeats itself, and guesses come true."""


@dataclass(frozen=True)
class Models:
    """One that says the tokens, and one of its lower layers, which often guesses them."""

    model: LoadedModel
    draft: LoadedModel


@pytest.fixture(scope="module")
def models(libraries: Libraries, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    num_threads = torch.get_num_threads()
    directory = write_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", dtype="bfloat16", seed=3)
    lower = write_draft(directory.parent / "draft", directory, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "choose_kernels", lambda wanted: KernelChoice(libraries("portable"), "as the test says"))
        yield Models(load_model(str(directory), num_threads=1), load_model(str(lower), num_threads=1))
    torch.set_num_threads(num_threads)


def make_engine(
    models: Models | LoadedModel, method: str = "ngram", num_blocks: int = 60, **settings: object
) -> Engine:
    """By its clock all steps take equally long: guesses cost nothing."""
    ticks = itertools.count()
    defaults = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 48, "num_speculative_tokens": 7}
    loaded = models if isinstance(models, LoadedModel) else models.model
    config = EngineConfig("a model", speculative_method=method, prompt_lookup_min=1, **{**defaults, **settings})  # type: ignore[arg-type]
    return Engine(loaded, config, num_blocks, clock=lambda: float(next(ticks)), num_host_slots=0)


def drafting_engine(models: Models, num_blocks: int = 60, **settings: object) -> Engine:
    """One with a draft model, whose passes take a hundredth of a step by what it believes; its clock stands still."""
    defaults = {"block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 48, "num_speculative_tokens": 7}
    config = EngineConfig(
        "a model",
        speculative_method="draft_model",
        speculative_model="its draft",
        **{**defaults, **settings},  # type: ignore[arg-type]
    )
    engine = Engine(models.model, config, num_blocks, clock=lambda: 0.0, draft=models.draft)
    assert engine._drafting is not None
    engine._drafting.draft.rates.rates = Rates(**{name: value / 100 for name, value in asdict(Rates()).items()})
    return engine


@dataclass
class Stream:
    """What one request has put out."""

    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None

    def hears(self, update: RequestUpdate) -> None:
        assert self.finish_reason is None
        self.tokens += update.new_tokens
        assert update.num_output_tokens == len(self.tokens)
        self.finish_reason, self.stop_token_id = update.finish_reason, update.stop_token_id


def alone(engine: Engine, prompt: list[int], sampling: SamplingParams) -> Stream:
    stream = Stream()
    engine.add_request(Request("alone", prompt, sampling))
    while engine.has_work:
        for update in engine.step().updates:
            stream.hears(update)
    return stream


def drawn_sampling(source: random.Random) -> SamplingParams:
    """Parameters of every kind, such that most texts repeat themselves."""
    chosen: dict[str, object] = {
        "max_tokens": source.randint(1, 60),
        "temperature": source.choice([0.0, 0.0, 0.3, 1.0]),
        "seed": source.randrange(100),
        "ignore_eos": source.random() < 0.7,
        "logprobs": source.choice([None, None, 0, 3]),
        "top_p": source.choice([1.0, 1.0, 0.6]),
        "top_k": source.choice([0, 0, 2]),
    }
    if source.random() < 0.8:
        chosen["allowed_token_ids"] = (*FEW, *EOS_TOKEN_IDS[: source.randint(0, 1)])
    if source.random() < 0.3:
        chosen |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1}
    if source.random() < 0.3:
        chosen |= {"stop_token_ids": (source.choice(FEW),), "min_tokens": source.randint(0, chosen["max_tokens"])}  # type: ignore[call-overload]
    return SamplingParams(**chosen)  # type: ignore[arg-type]


@dataclass(eq=False)
class Life:
    """A request, from engine to engine."""

    prompt: list[int]
    sampling: SamplingParams
    expected: Stream
    stream: Stream = field(default_factory=Stream)
    request: Request | None = None
    num_attempts: int = 0


class World:
    """One engine that guesses, one that prefills for it, and requests that come, go, move and are handed over."""

    def __init__(self, models: Models, seed: int, make: Callable[..., Engine]) -> None:
        self.random = random.Random(seed)
        self.plain = make_engine(models, "off", num_blocks=200)
        self.prefill = make_engine(models, num_blocks=60)
        self.engine = make(models, num_blocks=self.random.choice([12, 16, 40]))
        self.lives: dict[str, Life] = {}
        self.num_born = 0

    def run(self, num_turns: int) -> None:
        for _ in range(num_turns):
            self.random.choice([*6 * [self.step], self.born, self.born, self.abort, self.resume])()
        while self.engine.has_work or self.lives:
            self.step()
        assert self.engine.load().num_free_blocks == self.engine.load().num_blocks

    def born(self) -> None:
        if len(self.lives) > 5:
            return
        source = self.random
        pattern = source.choices(FEW, k=source.randint(1, 6))
        prompt = (pattern * 40)[: source.randint(1, 70)] + source.choices(range(3, 400), k=source.randint(0, 4))
        sampling = drawn_sampling(source)
        self.num_born += 1
        life = Life(prompt, sampling, alone(self.plain, prompt, sampling))
        self.begin(life, f"r{self.num_born}")

    def begin(self, life: Life, name: str) -> None:
        life.num_attempts += 1
        said = tuple(token.token_id for token in life.stream.tokens)
        life.request = Request(f"{name}.{life.num_attempts}", life.prompt, life.sampling, resumed_token_ids=said)
        self.lives[life.request.request_id] = life
        if self.random.random() < 0.5:
            self.engine.add_request(life.request)
        else:
            self.hand_over(life)

    def hand_over(self, life: Life) -> None:
        """The other engine computes the context and the first token; this one goes on from its blocks."""
        assert life.request is not None
        order = replace(life.request, hold_blocks=True, transfer_id=TRANSFER)
        self.prefill.add_request(order)
        lent, last = [], None
        while self.prefill.has_work:
            for last in self.prefill.step().updates:
                lent += last.blocks
        assert last is not None
        granted = []
        self.engine.reserve(life.request, granted.append)
        while not granted:
            self.step()
        (room,) = granted
        copy(self.prefill, [each.block_id for each in lent], self.engine, room.block_ids)
        proofs = [each.proof for each in lent]
        self.hears(self.engine.add_prefilled(life.request, room.block_ids, proofs, last.new_tokens[0]))
        self.prefill.release_blocks([each.block_id for each in lent])

    def step(self) -> None:
        for update in self.engine.step().updates:
            self.hears(update)
        self.engine.check_integrity()

    def hears(self, update: RequestUpdate) -> None:
        life = self.lives[update.request.request_id]
        life.stream.hears(update)
        assert life.stream.tokens == life.expected.tokens[: len(life.stream.tokens)]
        if life.stream.finish_reason is not None:
            assert life.stream == life.expected
            del self.lives[update.request.request_id]

    def abort(self) -> None:
        if self.lives:
            name = self.random.choice(list(self.lives))
            assert self.engine.abort(name)
            del self.lives[name]

    def resume(self) -> None:
        """One goes on from what it has said, elsewhere or here."""
        if not self.lives:
            return
        name = self.random.choice(list(self.lives))
        left = self.engine.suspend(name, TRANSFER)
        if left is None:
            return
        life = self.lives.pop(name)
        assert left.num_output_tokens == len(life.stream.tokens)
        assert life.request is not None
        num_computed = len(life.prompt) + left.num_output_tokens - 1
        assert len(left.blocks) in (0, -(-num_computed // 16))
        self.engine.release_blocks([each.block_id for each in left.blocks])
        self.begin(life, name.partition(".")[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [make_engine, drafting_engine])
def test_no_token_differs_whatever_happens(models: Models, make: Callable[..., Engine], seed: int) -> None:
    world = World(models, seed, make)
    world.run(100)
    stats = world.engine.stats
    assert stats.num_accepted_tokens > 20
    assert stats.num_draft_tokens > stats.num_accepted_tokens, "no guess was wrong"
    assert world.num_born > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
@pytest.mark.parametrize("make", [make_engine, drafting_engine])
def test_no_token_differs_whatever_happens_at_length(models: Models, make: Callable[..., Engine], seed: int) -> None:
    World(models, seed, make).run(400)


def test_a_draft_model_draws_what_the_model_will(models: Models) -> None:
    """Being the same model, it guesses every token, drawn ones, too, beside whatever parameters."""
    engine = drafting_engine(Models(models.model, models.model))
    samplings = [
        SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.5, max_tokens=40, ignore_eos=True, seed=4, top_p=0.9, logprobs=2),
        SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, repetition_penalty=1.3, presence_penalty=0.5),
    ]
    expected = [alone(make_engine(models, "off"), [5, 9, 77, 20], each) for each in samplings]
    streams = {f"r{i}": Stream() for i in range(3)}
    for name, sampling in zip(streams, samplings, strict=True):
        engine.add_request(Request(name, [5, 9, 77, 20], sampling))
    while engine.has_work:
        for update in engine.step().updates:
            streams[update.request.request_id].hears(update)
    assert list(streams.values()) == expected
    assert engine.stats.num_accepted_tokens == engine.stats.num_draft_tokens > 60


def test_a_draft_model_reads_what_it_lacks_of_a_handed_over_prompt(models: Models) -> None:
    prompt = [5 + i % 90 for i in range(200)]
    sampling = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    same = Models(models.model, models.model)
    world = World(same, 1, drafting_engine)
    world.engine = drafting_engine(same, num_blocks=60)
    life = Life(prompt, sampling, alone(world.plain, prompt, sampling))
    life.request = Request("r", prompt, sampling)
    world.lives["r"] = life
    world.hand_over(life)
    while world.lives:
        world.step()
    stats = world.engine.stats
    assert stats.num_prompt_tokens == 0, "the model computed nothing of the prompt"
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 40


def test_a_draft_model_that_computes_no_numbers_changes_nothing(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, sampling = [5, 9, 77] * 12, SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True, seed=1)
    expected = alone(make_engine(models, "off"), prompt, sampling)
    engine, num_broken = drafting_engine(models), 0
    assert engine._drafting is not None
    draft = engine._drafting.draft

    def broken(self: LoadedModel, batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        nonlocal num_broken
        if self is not models.draft:
            return self.computation.forward(batch, kv_cache)
        logits = self.computation.forward(batch, kv_cache)
        if len(logits) and num_broken < 3:
            num_broken += 1
            logits[:] = torch.nan
            kv_cache[int(batch.slot_mapping[0]) // 16] = torch.nan
        return logits

    monkeypatch.setattr(LoadedModel, "forward", broken)
    assert alone(engine, prompt, sampling) == expected
    assert num_broken == 3
    assert bool(draft.kv_cache.isfinite().all()), "what is no number would spoil whoever gets the block next"
    assert engine.stats.num_draft_tokens > 0


def test_the_prefix_cache_holds_the_same_blocks_and_proofs_with_and_without_guesses(models: Models) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, allowed_token_ids=FEW)
    kept = []
    for engine in (make_engine(models, "off"), make_engine(models), drafting_engine(models)):
        engine.add_request(Request("r", [5, 9, 77] * 10, sampling))
        hashes = []
        while engine.has_work:
            output = engine.step()
            hashes.append(engine.cached_hashes())
            computed = [update.num_computed_tokens for update in output.updates]
            assert len(hashes[-1]) == max(computed) // 16, "a block is findable before its tokens are certain, or later"
        ids = [block.slot for each in hashes[-1] if (block := engine.pool.find(each)) is not None]
        kept.append(dict(zip(hashes[-1], engine.pool.proofs(ids), strict=True)))
        assert engine.recheck(hashes[-1]) == 0
    assert len(kept[0]) == 8
    assert kept[0] == kept[1] == kept[2]


def test_what_a_wrong_guess_leaves_is_no_danger_to_the_right_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model computes no numbers of a guess, its place is cleared: torch multiplies what it masks by zero."""
    by_torch = load_model(str(write_model(tmp_path / "llama3", "llama3", seed=3)), num_threads=1, cpu_kernels="torch")
    prompt = [5, 9, 77] * 12  # which leaves room for guesses in its last block
    sampling = SamplingParams(temperature=5.0, max_tokens=30, ignore_eos=True, allowed_token_ids=FEW, seed=1)
    expected = alone(make_engine(by_torch, "off"), prompt, sampling)
    forward, num_broken = by_torch.forward, 0

    def broken(batch: ForwardBatch, kv_cache: Tensor) -> Tensor:
        """As of a model that overflows at each last guess of the first sequence."""
        nonlocal num_broken
        logits = forward(batch, kv_cache)
        if batch.num_queries(0) == 4:
            num_broken += 1
            logits[3] = torch.nan
            slot = int(batch.slot_mapping[3])
            kv_cache[slot // 16, ..., slot % 16, :] = torch.nan
        return logits

    monkeypatch.setattr(LoadedModel, "forward", lambda self, batch, kv_cache: broken(batch, kv_cache))
    engine, said = make_engine(by_torch, num_speculative_tokens=3), list[SampledToken]()
    engine.add_request(Request("r", prompt, sampling))
    engine.add_request(Request("longer", [*prompt, 5, 9], sampling))  # beside which it decodes behind a mask
    while engine.has_work:
        mine = [update for update in engine.step().updates if update.request.request_id == "r"]
        said += [token for update in mine for token in update.new_tokens]
        if num_broken and [len(update.new_tokens) for update in mine] == [1]:
            engine._scheduler._speculation = None  # so that no guess is computed in its place
    assert num_broken
    assert said == expected.tokens


def test_with_a_draft_model_the_text_is_that_of_transformers(tmp_path: Path) -> None:
    """In float32, by torch: greedy tokens that survive another order of sums."""
    directory = damp_upper_layers(write_model(tmp_path / "llama3", "llama3", seed=3), 1, 0.1)
    by_torch = [
        load_model(str(each), num_threads=1, cpu_kernels="torch")
        for each in (directory, write_draft(tmp_path / "draft", directory, 1))
    ]
    engine = drafting_engine(Models(*by_torch), num_blocks=100)
    prompts = random_prompts([3, 40, 100], seed=2)
    streams = {f"r{i}": Stream() for i in range(len(prompts))}
    for name, prompt in zip(streams, prompts, strict=True):
        engine.add_request(Request(name, prompt, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)))
    while engine.has_work:
        for update in engine.step().updates:
            streams[update.request.request_id].hears(update)
    said = [[token.token_id for token in stream.tokens] for stream in streams.values()]
    assert said == reference_greedy(directory, prompts, 40, ignore_eos=True)
    assert 20 < engine.stats.num_accepted_tokens < engine.stats.num_draft_tokens
