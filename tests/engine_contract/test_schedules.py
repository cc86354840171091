"""Random lives of requests over two engines: whatever happens to them, and in whatever order, no token is wrong, no
block is lost and nothing stands still.

Blocks go from one engine to the other as a transfer takes them, between any two steps. Pools are small, so that
requests are preempted and reservations wait. What each prompt is followed by, transformers says; with keys and values
in 8 bits, an engine that has one request at a time.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvstore.block import BlockHash, Proof, hash_blocks, namespace, subject_of
from kvstore.protocol import AnnouncedBlock, Reservation
from services.budgets import UNBOUND, Budgets
from services.engine.api import Engine, FinishReason, QueueFull, Request, RequestUpdate, SampledToken, SamplingParams
from tests.engine_contract.conftest import ENGINES, VLLM
from tests.engine_contract.test_engine_contract import TRANSFER, copy, taken
from tests.hf_models import random_prompts, reference_greedy

NUM_TOKENS = 40
LENGTHS = (3, 32, 64, 90, 97, 115, 130)
FEW = range(1)
MANY = range(1, 200)
# Those whose tokens mean something.
EXACT = [*(name for name in ENGINES if name != "paced"), *VLLM]
Prompt = tuple[list[int], list[int]]
"""Its tokens, and those that follow."""


@dataclass(eq=False)
class Life:
    """One request: the prompt, what has been said, and where it is."""

    name: str
    prompt: list[int]
    expected: list[int]
    max_tokens: int
    said: list[int] = field(default_factory=list)
    num_attempts: int = 0
    # A handoff in progress.
    lent: list[AnnouncedBlock] = field(default_factory=list)  # by the first engine
    request: Request | None = None  # at the second
    reservation: Reservation | None = None
    first: SampledToken | None = None

    def order(self, **changes: object) -> Request:
        self.num_attempts += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=self.max_tokens, ignore_eos=True)
        name = f"{self.name}.{self.num_attempts}"
        return Request(name, self.prompt, sampling, resumed_token_ids=tuple(self.said), **changes)  # type: ignore[arg-type]


class World:
    """A prefill engine, a decode engine, and those who live between them."""

    def __init__(self, prefill: Engine, decode: Engine, prompts: Sequence[Prompt], seed: int) -> None:
        self.prefill, self.decode, self.prompts = prefill, decode, prompts
        self.random = random.Random(seed)
        self.lives: list[Life] = []
        self.at: dict[str, Life] = {}  # by id of a request that an engine has
        self.prefixes: list[tuple[Engine, list[int]]] = []  # lent
        self.num_done = self.num_born = self.num_preemptions = 0

    def run(self, num_turns: int) -> None:
        actions = 4 * [self.step] + 2 * [self.born, self.hand_over]
        actions += [self.give_up, self.move, self.prefix, self.release, self.share, self.bound]
        for _ in range(num_turns):
            self.random.choice(actions)()
            self.prefill.check_integrity()
            self.decode.check_integrity()
        num_idle = 0
        while self.lives:
            assert num_idle < 100, f"{[vars(life) for life in self.lives]} stand still"
            num_before = sum(len(life.said) + len(life.lent) for life in self.lives) + self.num_done
            self.release()
            self.step()
            self.hand_over()
            num_after = sum(len(life.said) + len(life.lent) for life in self.lives) + self.num_done
            num_idle = num_idle + 1 if num_after == num_before else 0
        while self.prefixes:
            self.release()

    # ---- what may happen -----------------------------------------------------------

    def born(self) -> None:
        if len(self.lives) == 12:
            return
        prompt, expected = self.random.choice(self.prompts)
        self.num_born += 1
        life = Life(f"r{self.num_born}", prompt, expected, self.random.randint(1, NUM_TOKENS))
        self.lives.append(life)
        self.begin(life, here=self.random.random() < 0.3)

    def begin(self, life: Life, *, here: bool) -> None:
        """Compute it at the second engine, or prefill it at the first."""
        order = life.order() if here else life.order(hold_blocks=True, transfer_id=TRANSFER)
        try:
            (self.decode if here else self.prefill).add_request(order)
        except QueueFull:
            self.lives.remove(life)
            return
        self.at[order.request_id] = life
        life.request = order

    def step(self) -> None:
        for engine in (self.prefill, self.decode):
            if engine.has_work:
                for update in engine.step().updates:
                    self.heard(engine, update)

    def heard(self, engine: Engine, update: RequestUpdate) -> None:
        life = self.at[update.request.request_id]
        life.lent += update.blocks
        self.num_preemptions += update.num_preemptions
        if engine is self.prefill and update.finish_reason is FinishReason.HANDED_OFF:
            del self.at[update.request.request_id]
            (life.first,) = update.new_tokens
            life.request = life.order()
            self.at[life.request.request_id] = life
            life.request.given_hashes = self.hashes(life)
            self.decode.reserve(life.request, lambda room: setattr(life, "reservation", room))
            return
        self.says(life, update)

    def says(self, life: Life, update: RequestUpdate) -> None:
        life.said += [token.token_id for token in update.new_tokens]
        assert life.said == life.expected[: len(life.said)], f"{life.name}: {life.said}, not {life.expected}"
        assert update.num_output_tokens == len(life.said)
        if update.finish_reason is not None:
            assert (update.finish_reason, len(life.said)) == (FinishReason.LENGTH, life.max_tokens)
            self.end(life)

    def hand_over(self) -> None:
        """End a transfer: the blocks arrive, or they do not."""
        ready = [life for life in self.lives if life.reservation is not None]
        if not ready:
            return
        life = self.random.choice(ready)
        assert life.request is not None
        assert life.reservation is not None
        block_ids, life_lent = life.reservation.block_ids, life.lent
        present, life.reservation = life.reservation.num_present, None
        if self.random.random() < 0.2:  # it fails
            self.decode.release_reservation(life.request, block_ids)
            del self.at[life.request.request_id]
            self.give_back(life)
            self.begin(life, here=True)
            return
        sources = [block.block_id for block in life_lent]
        copy(self.prefill, sources[present:], self.decode, block_ids[present:])
        proofs: list[Proof] = [block.proof for block in life_lent]
        assert life.first is not None
        # As after a handoff, or as after a move, of which every engine takes the newest token.
        first = taken(self.decode, life.first) if self.random.random() < 0.7 else life.first
        update = self.decode.add_prefilled(life.request, block_ids, proofs, first)
        self.give_back(life)
        self.says(life, update)

    def give_up(self) -> None:
        """The client leaves, wherever the request is."""
        if not self.lives or self.random.random() < 0.5:
            return
        life = self.random.choice(self.lives)
        assert life.request is not None
        engine = self.prefill if life.request.hold_blocks else self.decode
        assert engine.abort(life.request.request_id)
        if life.reservation is not None:
            engine.release_reservation(life.request, life.reservation.block_ids)
        self.end(life)

    def move(self) -> None:
        """One that decodes goes on from its blocks, computed again or handed over."""
        decoding = [life for life in self.lives if life.request is not None and not life.request.hold_blocks]
        if not decoding:
            return
        life = self.random.choice(decoding)
        assert life.request is not None
        left = self.decode.suspend(life.request.request_id, TRANSFER)
        if left is None:
            return
        assert left.num_output_tokens == len(life.said)
        self.check_proofs(self.decode, left.blocks)
        self.decode.release_blocks([block.block_id for block in left.blocks])
        del self.at[life.request.request_id]
        self.begin(life, here=self.random.random() < 0.5)

    def prefix(self) -> None:
        """A peer reads what is cached."""
        engine = self.random.choice([self.prefill, self.decode])
        prompt, _ = self.random.choice(self.prompts)
        self.prefixes.append((engine, engine.lend_prefix(hashes_of(engine, prompt))))

    def share(self) -> None:
        """The second engine fetches a prefix that the first one has."""
        prompt, _ = self.random.choice(self.prompts)
        hashes = hashes_of(self.prefill, prompt)
        lent = self.prefill.lend_prefix(hashes)
        taken = self.decode.take_prefix(hashes[: len(lent)])
        if taken is not None:
            new = slice(taken.num_present, None)
            copy(self.prefill, lent[new], self.decode, taken.block_ids[new])
            proofs = self.prefill.proofs(lent, [subject_of(each) for each in hashes[: len(lent)]])
            self.decode.publish_blocks(taken.block_ids, hashes[: len(lent)], proofs)
            self.decode.release_blocks(taken.block_ids)
        self.prefill.release_blocks(lent)

    def bound(self) -> None:
        """Somebody bends a role, whatever runs."""
        budgets = Budgets(self.random.choice([0.0, math.inf]), self.random.choice([0, 34, UNBOUND.prompt_tokens]))
        self.random.choice([self.prefill, self.decode]).set_budgets(budgets)

    def release(self) -> None:
        if self.prefixes:
            engine, block_ids = self.prefixes.pop(self.random.randrange(len(self.prefixes)))
            engine.release_blocks(block_ids)

    # ---- ends ------------------------------------------------------------------------

    def end(self, life: Life) -> None:
        assert life.request is not None
        self.at.pop(life.request.request_id, None)
        self.give_back(life)
        self.lives.remove(life)
        self.num_done += 1

    def give_back(self, life: Life) -> None:
        self.check_proofs(self.prefill, life.lent)
        self.prefill.release_blocks([block.block_id for block in life.lent])
        life.lent = []

    def check_proofs(self, engine: Engine, blocks: Sequence[AnnouncedBlock]) -> None:
        """What was announced is there still."""
        subjects = [subject_of(block.block_hash, TRANSFER, index) for index, block in enumerate(blocks)]
        ids, proofs = [block.block_id for block in blocks], [block.proof for block in blocks]
        assert engine.proof_key.find_wrong(engine.memory, ids, subjects, proofs) == []

    def hashes(self, life: Life) -> list[BlockHash]:
        return hashes_of(self.decode, [*life.prompt, *life.said])


def hashes_of(engine: Engine, token_ids: Sequence[int]) -> list[BlockHash]:
    return hash_blocks(namespace(engine.layout.model_fingerprint), token_ids, engine.layout.block_size)


@pytest.fixture(scope="module")
def settings() -> dict[str, int]:
    return {
        "block_size": 16,
        "max_model_len": 176,
        "num_gpu_blocks_override": 11,
        "max_num_batched_tokens": 48,
        "max_num_waiting": 3,
        "max_num_seqs": 8,
    }


@pytest.fixture(scope="module")
def prompts_of() -> Callable[[Path], list[Prompt]]:
    """What transformers says with a model."""

    @functools.cache
    def followed(model: Path) -> list[Prompt]:
        # Two of each length share a beginning.
        found = random_prompts(LENGTHS)
        found += [
            prompt[: len(prompt) // 2] + other[len(prompt) // 2 :]
            for prompt, other in zip(found, random_prompts(LENGTHS, 1), strict=True)
        ]
        return list(zip(found, reference_greedy(model, found, NUM_TOKENS, ignore_eos=True), strict=True))

    return followed


@pytest.fixture
def prompts(
    request: pytest.FixtureRequest, prompts_of: Callable[[Path], list[Prompt]], model: Path, wider_model: Path
) -> list[Prompt]:
    """Of the model that the engines of `make` have; in 8 bits, by such an engine that nothing disturbs."""
    name = request.node.callspec.params["make"]
    found = prompts_of(wider_model if name.startswith("vllm") else model)
    if name != "native in 8 bits":
        return found
    engine: Engine = request.getfixturevalue("make")()
    return [(prompt, said_alone(engine, prompt)) for prompt, _ in found]


def said_alone(engine: Engine, prompt: list[int]) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    engine.add_request(Request("alone", prompt, sampling))
    said: list[int] = []
    while engine.has_work:
        said += [token.token_id for update in engine.step().updates for token in update.new_tokens]
    return said


def live(make: Callable[[], Engine], prompts: Sequence[Prompt], seed: int) -> None:
    world = World(make(), make(), prompts, seed)
    world.run(150)
    for engine in (world.prefill, world.decode):
        assert engine.recheck(engine.cached_hashes()) == 0


@pytest.mark.parametrize("make", EXACT, indirect=True)
@pytest.mark.parametrize("seed", FEW)
def test_a_few_random_lives(make: Callable[[], Engine], prompts: list[Prompt], seed: int) -> None:
    live(make, prompts, seed)


@pytest.mark.slow
@pytest.mark.parametrize("make", EXACT, indirect=True)
@pytest.mark.parametrize("seed", MANY)
def test_many_random_lives(make: Callable[[], Engine], prompts: list[Prompt], seed: int) -> None:
    live(make, prompts, seed)
