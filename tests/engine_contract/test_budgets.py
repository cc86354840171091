"""Every engine keeps to its budgets: what the shapes of its steps say, while streams run and budgets change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from services.budgets import MAX_PASSED_OVER, MIN_CHUNK, UNBOUND, Budgets
from services.engine.api import Engine, Request, RequestUpdate
from services.rates import StepShape
from tests.engine_contract.test_engine_contract import ask, copy, prefill, prompt_of, reserve, run, taken, tokens

NUM_STREAMED = 60
CHUNK = 40


@pytest.fixture(scope="module")
def settings() -> dict[str, int]:
    return {
        "block_size": 16,
        "max_model_len": 400,
        "num_gpu_blocks_override": 60,
        "max_num_batched_tokens": 128,
        "max_num_waiting": 8,
    }


class Steps:
    """An engine's steps: their shapes, and what came of them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.updates: list[RequestUpdate] = []

    def take(self, num_steps: int) -> list[StepShape]:
        shapes: list[StepShape] = []
        while self.engine.has_work and len(shapes) < num_steps:
            output = self.engine.step()
            self.engine.check_integrity()
            self.updates += output.updates
            shapes.append(output.shape)
        return shapes

    def stream(self, tpot_s: float = math.inf) -> Request:
        """Begin one that goes on for NUM_STREAMED tokens."""
        request = ask("stream", prompt_of(self.engine, 5, seed=9), max_tokens=NUM_STREAMED)
        request.tpot_s = tpot_s
        self.engine.add_request(request)
        self.take(1)
        return request

    def tokens(self, name: str) -> list[int]:
        return tokens(self.updates, name)


@pytest.fixture
def steps(engine: Engine) -> Steps:
    return Steps(engine)


def beside(shapes: Sequence[StepShape]) -> list[int]:
    """Prompt tokens of the steps that had a stream."""
    return [shape.num_prompt_tokens for shape in shapes if shape.num_running]


def test_it_begins_without_budgets_and_says_what_it_keeps_to(engine: Engine) -> None:
    assert engine.budgets == UNBOUND
    engine.set_budgets(Budgets(0.5, 64))
    assert engine.budgets == Budgets(0.5, 64)


def test_steps_with_a_stream_carry_what_they_may_and_tokens_are_the_same(make: Callable[[], Engine]) -> None:
    engine, unbound = make(), make()
    prompts = {name: prompt_of(engine, length, seed) for seed, (name, length) in enumerate({"a": 150, "b": 90}.items())}
    steps = Steps(engine)
    steps.stream()
    engine.set_budgets(Budgets(prompt_tokens=CHUNK))
    for name, prompt in prompts.items():
        engine.add_request(ask(name, prompt))
    shapes = steps.take(1000)
    num_prompt_tokens = sum(map(len, prompts.values()))
    assert max(beside(shapes)) == CHUNK
    assert sum(beside(shapes)) == num_prompt_tokens, "the stream outlives them"
    assert shapes[0].num_running == 1
    expected = run(unbound, *(ask(name, prompt) for name, prompt in prompts.items()))
    assert {name: steps.tokens(name) for name in prompts} == {name: tokens(expected, name) for name in prompts}
    assert len(steps.tokens("stream")) == NUM_STREAMED


@pytest.mark.parametrize("budgets", [Budgets(tpot_s=0.0), Budgets(prompt_tokens=0), UNBOUND])
def test_where_there_is_no_room_a_prompt_gets_the_smallest_chunk_now_and_then(steps: Steps, budgets: Budgets) -> None:
    steps.engine.set_budgets(budgets)
    steps.stream(tpot_s=0.0 if budgets == UNBOUND else math.inf)  # what its own client is to get counts as much
    steps.engine.add_request(ask("a", prompt_of(steps.engine, 390)))
    shapes = steps.take(2 * (MAX_PASSED_OVER + 1))
    assert beside(shapes) == 2 * [*MAX_PASSED_OVER * [0], MIN_CHUNK]
    rest = steps.take(1000)
    first_alone = next(shape for shape in rest if not shape.num_running)
    assert first_alone.num_prompt_tokens > MIN_CHUNK, "nothing bounds it when the stream has ended"
    assert steps.tokens("a")


def test_budgets_change_while_streams_run_and_prompts_are_computed(steps: Steps) -> None:
    engine = steps.engine
    most = 128 * engine.layout.block_size // 16
    steps.stream()
    engine.add_request(ask("a", prompt_of(engine, 390)))
    assert beside(steps.take(1)) == [most - 1]
    engine.set_budgets(Budgets(prompt_tokens=CHUNK))
    assert beside(steps.take(2)) == [CHUNK, CHUNK]
    engine.set_budgets(Budgets(tpot_s=0.0))
    assert beside(steps.take(2)) == [0, 0]
    engine.set_budgets(UNBOUND)
    assert beside(steps.take(1)) == [most - 1]
    steps.take(1000)


def test_time_enough_is_no_bound(steps: Steps) -> None:
    most = 128 * steps.engine.layout.block_size // 16
    steps.stream()
    steps.take(20)
    steps.engine.set_budgets(Budgets(tpot_s=1e6))
    steps.engine.add_request(ask("a", prompt_of(steps.engine, 390)))
    assert beside(steps.take(1)) == [most - 1]
    steps.take(1000)


def test_who_joins_does_not_wait_for_prompts(make: Callable[[], Engine]) -> None:
    engine, other = make(), make()
    lent, updates = prefill(other, "r", prompt := prompt_of(engine, 50, seed=4))
    steps = Steps(engine)
    steps.stream()
    for name in "ab":
        engine.add_request(ask(name, prompt_of(engine, 300, seed=ord(name))))
    steps.take(1)
    engine.set_budgets(Budgets(prompt_tokens=CHUNK))
    request = ask("r", prompt)
    room = reserve(engine, request)
    copy(other, lent[room.num_present :], engine, room.block_ids[room.num_present :])
    proofs = [block.proof for update in updates for block in update.blocks]
    (first,) = updates[-1].new_tokens
    steps.updates.append(engine.add_prefilled(request, room.block_ids, proofs, taken(engine, first)))
    other.release_blocks(lent)
    assert max(beside(steps.take(3))) <= CHUNK
    assert len(steps.tokens("r")) == 3 + (not engine.capabilities.samples_first_token)
    steps.take(1000)
    assert steps.tokens("r") == tokens(run(other, ask("alone", prompt)), "alone")


def test_the_load_says_how_much_the_streams_have_of_context(steps: Steps) -> None:
    engine = steps.engine
    assert engine.load().num_context_tokens == 0
    stream = steps.stream()
    engine.set_budgets(Budgets(prompt_tokens=CHUNK))
    engine.add_request(ask("a", prompt_of(engine, 100)))
    steps.take(1)
    said = len(steps.tokens("stream"))
    assert engine.load().num_context_tokens == stream.num_prompt_tokens + said, "a prompt is none yet"
    steps.take(1000)
    assert engine.load().num_context_tokens == 0
    assert math.isinf(engine.budgets.tpot_s)
