"""What workers rely on, asked of every engine through its port; each has a factory in ENGINES."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from math import isclose
from typing import Any

import pytest

from kvstore.block import BlockHash, hash_blocks, namespace, subject_of
from kvstore.pool import CacheEvent
from kvstore.protocol import Reservation
from services.engine.api import (
    Engine,
    FinishReason,
    InvalidRequest,
    NotLent,
    NotReserved,
    QueueFull,
    Request,
    RequestUpdate,
    SampledToken,
    SamplingParams,
)
from tests.hf_models import VOCAB_SIZE, random_prompts

NUM_OUTPUTS = 8
TRANSFER = b"a transfer's id."


def ask(name: str, prompt: Sequence[int], hold_blocks: bool = False, **sampling: object) -> Request:
    chosen: dict[str, object] = {"temperature": 0.0, "max_tokens": NUM_OUTPUTS, "ignore_eos": True, **sampling}
    sampling_params = SamplingParams(**chosen)  # type: ignore[arg-type]
    return Request(name, prompt, sampling_params, hold_blocks=hold_blocks, transfer_id=TRANSFER if hold_blocks else b"")


def prompt_of(engine: Engine, num_tokens: int, seed: int = 0) -> list[int]:
    """Random tokens, so many where blocks have 16 tokens, and as many times more as they have."""
    return random_prompts([num_tokens * engine.layout.block_size // 16], seed=seed)[0]


def hashes_of(engine: Engine, prompt: Sequence[int]) -> list[BlockHash]:
    return hash_blocks(namespace(engine.layout.model_fingerprint, ""), prompt, engine.layout.block_size)


def run(engine: Engine, *requests: Request) -> list[RequestUpdate]:
    for request in requests:
        engine.add_request(request)
    updates: list[RequestUpdate] = []
    while engine.has_work:
        updates += engine.step().updates
        engine.check_integrity()
    return updates


def tokens(updates: Sequence[RequestUpdate], name: str) -> list[int]:
    return [token.token_id for update in updates if update.request.request_id == name for token in update.new_tokens]


def reserve(engine: Engine, request: Request) -> Reservation:
    granted: list[Reservation] = []
    engine.reserve(request, granted.append)
    return granted[0]


def copy(source: Engine, source_ids: Sequence[int], target: Engine, target_ids: Sequence[int]) -> None:
    block = source.memory.staging(1)
    for ours, theirs in zip(target_ids, source_ids, strict=True):
        source.memory.gather(theirs, block)
        target.memory.scatter(ours, block)


def taken(engine: Engine, token: SampledToken) -> SampledToken | None:
    """What the engine wants of a handoff's first token."""
    return None if engine.capabilities.samples_first_token else token


def prefill(engine: Engine, name: str, prompt: Sequence[int]) -> tuple[list[int], list[RequestUpdate]]:
    """The blocks that the updates lent, in order, and the updates."""
    updates = run(engine, ask(name, prompt, hold_blocks=True))
    return [block.block_id for update in updates for block in update.blocks], updates


# ---- requests ---------------------------------------------------------------------------


def test_it_is_what_it_says(engine: Engine) -> None:
    able, load = engine.capabilities, engine.load()
    assert (able.max_model_len, able.num_blocks, able.caches_prefixes) == (25 * engine.layout.block_size, 40, True)
    assert engine.memory.block_bytes == engine.layout.block_bytes
    assert engine.memory.num_blocks >= able.num_blocks
    assert (load.num_blocks, load.num_free_blocks) == (40, 40)
    assert {"device", "kernels", "quantization"} <= set(able.compute)
    assert able.numerics
    assert bool(engine.host_figures()) == (able.num_host_blocks > 0)
    assert (engine.has_work, engine.step().num_tokens) == (False, 0)


def test_a_request_is_computed_to_its_last_token(engine: Engine) -> None:
    begun: list[str] = []
    request, updates = ask("r", prompt_of(engine, 50)), []
    engine.add_request(request)
    while engine.has_work:
        updates += engine.step(lambda each: begun.append(each.request_id)).updates
        assert begun == ["r"]
    size = engine.layout.block_size
    assert [update.num_computed_tokens for update in updates[:2]] == [2 * size, len(request.prompt_token_ids)]
    assert len(tokens(updates, "r")) == NUM_OUTPUTS
    assert [update.num_output_tokens for update in updates] == [0, *range(1, NUM_OUTPUTS + 1)]
    assert [update.finish_reason for update in updates] == [None] * NUM_OUTPUTS + [FinishReason.LENGTH]
    assert all(not update.blocks for update in updates)
    stats = engine.stats
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (len(request.prompt_token_ids), NUM_OUTPUTS)


def test_an_engine_on_a_processor_gives_the_same_tokens_in_any_company(make: Callable[[], Engine]) -> None:
    prompts = random_prompts([3, 40, 90])
    together, apart = make(), make()
    updates = run(together, *[ask(f"r{i}", prompt) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert tokens(updates, f"r{i}") == tokens(run(apart, ask(f"r{i}", prompt)), f"r{i}")


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ask("r", []), "prompt"),
        (ask("r", [1, VOCAB_SIZE]), "prompt"),
        (ask("r", [1] * 2000), "prompt"),
        (ask("r", [1], logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        (ask("r", [1], stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_nothing(engine: Engine, request_: Request, param: str) -> None:
    for enter in (engine.check, engine.add_request, lambda request: engine.reserve(request, lambda _: None)):
        with pytest.raises(InvalidRequest) as refusal:
            enter(request_)
        assert refusal.value.param == param
    assert not engine.has_work


def test_the_queue_is_bounded(engine: Engine) -> None:
    for number in range(3):
        engine.add_request(ask(f"r{number}", prompt_of(engine, 20)))
    with pytest.raises(QueueFull):
        engine.add_request(ask("late", prompt_of(engine, 20)))
    assert engine.load().num_waiting == 3
    run(engine)


def test_an_abort_frees_a_request_wherever_it_is(engine: Engine) -> None:
    assert not engine.abort("nobody")
    names = ["queued", "half", "runs"]
    queued, chunked, running = (ask(name, prompt_of(engine, 60, seed)) for seed, name in enumerate(names))
    engine.add_request(queued)
    assert engine.abort("queued")
    engine.add_request(chunked)
    engine.step()
    assert engine.abort("half")
    engine.add_request(running)
    for _ in range(4):
        engine.step()
    assert engine.abort("runs")
    assert not engine.abort("runs")
    assert not any(update.new_tokens for update in run(engine))


# ---- handoff ----------------------------------------------------------------------------


def test_a_prompt_to_hand_off_lends_each_block_once_with_its_proof(engine: Engine) -> None:
    prompt = prompt_of(engine, 70)
    block_ids, updates = prefill(engine, "r", prompt)
    assert [(update.first_block, len(update.blocks)) for update in updates] == [(0, 2), (2, 2), (4, 1)]
    blocks = [block for update in updates for block in update.blocks]
    assert [block.block_hash for block in blocks] == [*hashes_of(engine, prompt), None]
    subjects = [subject_of(block.block_hash, TRANSFER, index) for index, block in enumerate(blocks)]
    made = engine.proof_key.prove(engine.memory, block_ids, subjects)
    assert [block.proof for block in blocks] == made == engine.proofs(block_ids, subjects)
    assert (updates[-1].finish_reason, len(updates[-1].new_tokens)) == (FinishReason.HANDED_OFF, 1)
    assert engine.load().num_lent_blocks == 5
    engine.release_blocks(block_ids)
    with pytest.raises(NotLent):
        engine.release_blocks(block_ids[:1])


def test_a_prompt_whose_hashes_are_wrong_is_proven_to_be_nobodys(engine: Engine) -> None:
    # Who gives a worker orders must not get another prompt's name certified for what he had computed.
    mine, theirs = prompt_of(engine, 70), prompt_of(engine, 70, seed=1)
    order = ask("r", mine, hold_blocks=True)
    order.given_hashes = hashes_of(engine, theirs)
    blocks = [block for update in run(engine, order) for block in update.blocks]
    block_ids = [block.block_id for block in blocks]
    assert [block.block_hash for block in blocks] == [None] * 5
    claimed = [subject_of(each, TRANSFER, index) for index, each in enumerate([*hashes_of(engine, theirs), None])]
    proofs = [block.proof for block in blocks]
    assert engine.proof_key.find_wrong(engine.memory, block_ids, claimed, proofs) == [0, 1, 2, 3]
    assert engine.cached_hashes() == []
    engine.release_blocks(block_ids)


def test_blocks_lent_before_an_abort_stay_the_callers(engine: Engine) -> None:
    engine.add_request(ask("r", prompt_of(engine, 70), hold_blocks=True))
    (update,) = engine.step().updates
    assert engine.abort("r")
    engine.check_integrity()
    assert engine.load().num_lent_blocks == 2
    engine.release_blocks([block.block_id for block in update.blocks])


@pytest.mark.parametrize("num_tokens", [5, 32, 70])
def test_a_request_goes_on_where_another_engine_has_computed_its_prompt(
    make: Callable[[], Engine], num_tokens: int
) -> None:
    check_handoff(make(), make(), num_tokens)


def check_handoff(first: Engine, second: Engine, num_tokens: int) -> list[int]:
    """Returns the tokens."""
    prompt = prompt_of(first, num_tokens, seed=num_tokens)
    block_ids, updates = prefill(first, "r", prompt)
    request = ask("r", prompt)
    reservation = reserve(second, request)
    assert (reservation.num_present, len(reservation.block_ids)) == (0, len(block_ids))
    copy(first, block_ids, second, reservation.block_ids)
    (token,) = updates[-1].new_tokens
    proofs = [block.proof for update in updates for block in update.blocks]
    given = taken(second, token)
    joined = second.add_prefilled(request, reservation.block_ids, proofs, given)
    first.release_blocks(block_ids)
    told = () if given is None else (given,)
    assert (joined.new_tokens, joined.finish_reason, joined.num_output_tokens) == (told, None, len(told))
    alone = tokens(run(first, ask("alone", prompt)), "alone")
    rest = run(second)
    assert [each.token_id for each in told] + tokens(rest, "r") == alone
    assert alone[0] == token.token_id
    assert rest[0].num_computed_tokens == len(prompt) + len(told)  # one token, and no more
    assert second.peek_prefix(hashes_of(second, prompt)) == len(prompt) // second.layout.block_size
    return alone


def test_the_ends_of_a_reservation(engine: Engine) -> None:
    large = ask("large", prompt_of(engine, 380), max_tokens=1)
    second = ask("second", prompt_of(engine, 380, 1), max_tokens=1)
    granted: list[Reservation] = []
    reservation = reserve(engine, large)
    engine.reserve(second, granted.append)
    assert (granted, engine.cancel_reservation(second), engine.cancel_reservation(second)) == ([], True, False)
    engine.reserve(second, granted.append)
    assert not engine.cancel_reservation(large)
    engine.release_reservation(large, reservation.block_ids)
    assert len(granted) == 1
    with pytest.raises(NotLent):
        engine.release_reservation(large, reservation.block_ids[:1] * 2)
    assert engine.abort("second")
    with pytest.raises(NotReserved):
        engine.add_prefilled(second, granted[0].block_ids, [1] * 24, SampledToken(3))
    engine.release_reservation(second, granted[0].block_ids)


def test_what_a_transfer_writes_late_and_leaves_behind_changes_no_token(make: Callable[[], Engine]) -> None:
    # For a request that is gone and a prefix that nobody wants any more, while others need more blocks than there are.
    engine, alone = make(), make()
    gone = ask("gone", prompt_of(engine, 380), max_tokens=1)
    reservation = reserve(engine, gone)
    assert engine.abort("gone")
    prefix = engine.take_prefix([BlockHash(bytes([i]) * 16) for i in range(5)])
    assert prefix is not None
    others = [ask(f"r{i}", prompt_of(engine, 75, seed=i), max_tokens=24) for i in range(2)]
    others[1].arrival_s = 1.0
    for request in others:
        engine.add_request(request)
    no_numbers: Any = engine.memory.staging(1)
    no_numbers[:] = 255  # NaN, which no zero weighs down
    updates: list[RequestUpdate] = []
    while engine.has_work:
        for block_id in (*reservation.block_ids, *prefix.block_ids):
            engine.memory.scatter(block_id, no_numbers)
        updates += engine.step().updates
        engine.check_integrity()
        assert engine.load().num_lent_blocks == 29
    assert engine.stats.num_preemptions > 0, "there was room for all"
    for request in others:
        assert tokens(updates, request.request_id) == tokens(run(alone, request), request.request_id)
    engine.release_reservation(gone, reservation.block_ids)
    engine.release_blocks(prefix.block_ids)
    for seed in range(3):  # in all blocks, also such as they fill in part
        again = ask("again", prompt_of(engine, 280, seed=20 + seed))
        assert tokens(run(engine, again), "again") == tokens(run(alone, again), "again")


def test_an_abort_while_it_waits_for_blocks_calls_nobody(engine: Engine) -> None:
    first, granted = ask("first", prompt_of(engine, 380), max_tokens=1), []
    reservation = reserve(engine, first)
    engine.reserve(ask("second", prompt_of(engine, 380, 1), max_tokens=1), granted.append)
    assert engine.abort("second")
    engine.release_reservation(first, reservation.block_ids)
    assert granted == []


def test_reservations_and_the_queue_are_one_order(engine: Engine) -> None:
    # Of 40 blocks each but the last takes 24, and that would fit beside any of them.
    first, second, third = (ask(name, prompt_of(engine, 380, i), max_tokens=1) for i, name in enumerate("abc"))
    small, granted = ask("small", prompt_of(engine, 20, 3)), list[Reservation]()
    reservation = reserve(engine, first)
    engine.add_request(second)
    engine.step()
    assert not engine.has_work
    engine.reserve(third, granted.append)
    engine.add_request(small)
    engine.step()
    assert (granted, engine.load().num_running) == ([], 0), "a newer one came before"
    engine.release_reservation(first, reservation.block_ids)
    assert granted == [], "it took what an older one waits for"
    updates: list[RequestUpdate] = []
    while engine.has_work:
        updates += engine.step().updates
        assert granted or not tokens(updates, "small"), "a newer one came before"
    assert (len(tokens(updates, "b")), len(granted)) == (1, 1)
    engine.release_reservation(third, granted[0].block_ids)
    assert len(tokens([*updates, *run(engine)], "small")) == NUM_OUTPUTS


def test_requests_of_a_higher_priority_come_first(engine: Engine) -> None:
    late, soon = ask("late", prompt_of(engine, 60)), ask("soon", prompt_of(engine, 60, seed=1))
    soon.priority = -1
    order = [update.request.request_id for update in run(engine, late, soon) if update.num_output_tokens == 1]
    assert order == ["soon", "late"]


def test_a_preempted_request_says_the_same_and_is_counted(make: Callable[[], Engine]) -> None:
    engine, alone = make(), make()
    asked = [
        ask(f"r{i}", prompt_of(engine, 75, seed=i), max_tokens=24) for i in range(2)
    ]  # five blocks each, then seven, in 11
    asked[1].arrival_s = 1.0
    room = engine.take_prefix([BlockHash(bytes([i]) * 16) for i in range(29)])
    assert room is not None
    updates = run(engine, *asked)
    engine.release_blocks(room.block_ids)
    for request in asked:
        assert tokens(updates, request.request_id) == tokens(run(alone, request), request.request_id)
    counts = {update.request.request_id: update.num_preemptions for update in updates}
    assert counts["r0"] == 0  # the older one goes on
    assert engine.stats.num_preemptions == counts["r1"] > 0


def test_load_and_counts_tell_of_a_request_from_its_queue_to_its_end(engine: Engine) -> None:
    def told() -> tuple[int, int, int]:
        load = engine.load()
        return load.num_waiting, load.num_running, load.num_waiting_tokens

    request = ask("r", prompt_of(engine, 50))
    num_tokens, chunk = len(request.prompt_token_ids), 2 * engine.layout.block_size
    engine.add_request(request)
    assert told() == (1, 0, num_tokens)
    engine.step()
    assert told() == (0, 1, num_tokens - chunk)
    engine.step()
    assert told() == (0, 1, 0)
    assert engine.load().num_free_blocks == engine.load().num_blocks - 4
    run(engine)
    assert (told(), engine.stats.num_finished) == ((0, 0, 0), {FinishReason.LENGTH: 1})


def test_a_mask_and_an_adapter_that_it_lacks_are_refused_by_name(engine: Engine) -> None:
    masked, adapted = ask("r", [5]), ask("r", [5])
    masked.mask, adapted.adapter = lambda output: (5, 9), "sql:00ff"
    for request, named in ((masked, "response_format: .*mask"), (adapted, "model: .*sql:00ff")):
        with pytest.raises(InvalidRequest, match=named):
            engine.add_request(request)


def test_an_id_is_of_one_request_at_a_time(engine: Engine) -> None:
    engine.add_request(ask("r", prompt_of(engine, 20)))
    with pytest.raises(InvalidRequest):
        engine.add_request(ask("r", prompt_of(engine, 20, 1)))
    assert len(tokens(run(engine), "r")) == NUM_OUTPUTS


# ---- resumed requests -------------------------------------------------------------------

LENGTH = 64
SAMPLINGS: dict[str, dict[str, object]] = {
    "greedy": {},
    "drawn": {"temperature": 1.5, "seed": 7, "top_k": 40, "top_p": 0.9, "logit_bias": {5: 3.0, 9: -100.0}},
    "penalized": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": 0.4, "logprobs": 3},
    "with an early end": {"stop_token_ids": tuple(range(0, VOCAB_SIZE, 3)), "min_tokens": 40, "temperature": 1.0},
}


def resume(name: str, begun: Request, outputs: Sequence[SampledToken], **changes: object) -> Request:
    so_far = tuple(token.token_id for token in outputs)
    return Request(name, begun.prompt_token_ids, begun.sampling, resumed_token_ids=so_far, **changes)  # type: ignore[arg-type]


def same(found: SampledToken, expected: SampledToken) -> bool:
    """Equal tokens; log probabilities may differ in the last bits, as they do with another chunk of the same prompt."""
    if found.token_id != expected.token_id or (found.logprobs is None) != (expected.logprobs is None):
        return False
    told = [(token.logprobs.chosen, *token.logprobs.top) for token in (found, expected) if token.logprobs]
    return all(
        (a.token_id, a.rank) == (b.token_id, b.rank) and isclose(a.logprob, b.logprob, rel_tol=1e-4)
        for a, b in zip(*told, strict=True)
    )


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_a_resumed_request_goes_on_as_if_it_had_never_been_interrupted(
    make: Callable[[], Engine], sampling: str
) -> None:
    first, second = make(), make()
    whole = ask("whole", prompt_of(first, 37), **{"max_tokens": LENGTH, **SAMPLINGS[sampling]})
    updates = [update for update in run(first, whole) if update.new_tokens]
    outputs = [token for update in updates for token in update.new_tokens]
    assert len(outputs) > 39
    # Of all that are not greedy one in three: which meets every place in a block.
    for start in range(1, len(outputs), 1 if sampling == "greedy" else 3):
        second.add_request(resume("again", whole, outputs[:start]))
        told: list[RequestUpdate] = []
        # The next one, and from some on everything.
        while second.has_work and (start % 30 == 1 or not told):
            told += [update for update in second.step().updates if update.new_tokens]
        said = [token for update in told for token in update.new_tokens]
        assert all(map(same, said, outputs[start:])), start
        ends = itertools.accumulate((len(update.new_tokens) for update in told), initial=start)
        assert [start, *(update.num_output_tokens for update in told)] == list(ends)
        if second.abort("again"):
            continue
        assert start + len(said) == len(outputs)
        assert (told[-1].finish_reason, told[-1].stop_token_id) == (
            updates[-1].finish_reason,
            updates[-1].stop_token_id,
        )


def test_a_resumed_request_reports_no_prompt_logprobs_again(engine: Engine) -> None:
    whole = ask("whole", prompt_of(engine, 40), prompt_logprobs=2)
    told = run(engine, whole)
    assert [update.prompt_logprobs is not None for update in told if update.new_tokens].count(True) == 1
    outputs = [token for update in told for token in update.new_tokens]
    again = run(engine, resume("again", whole, outputs[:3]))
    assert all(update.prompt_logprobs is None for update in again)
    assert tokens(again, "again") == tokens(told, "whole")[3:]
    assert again[-1].num_cached_tokens >= 2 * engine.layout.block_size


@pytest.mark.parametrize("num_resumed", [1, 4, 30])
def test_a_resumed_request_is_handed_over_with_all_that_it_has_said(
    make: Callable[[], Engine], num_resumed: int
) -> None:
    first, second = make(), make()
    prompt = prompt_of(first, 50)
    whole = ask("whole", prompt, max_tokens=40, frequency_penalty=1.5, temperature=1.0, seed=3)
    outputs = [token for update in run(first, whole) for token in update.new_tokens]
    held = run(first, resume("held", whole, outputs[:num_resumed], hold_blocks=True, transfer_id=TRANSFER))
    block_ids = [block.block_id for update in held for block in update.blocks]
    context = [*prompt, *(token.token_id for token in outputs[:num_resumed])]
    partial = [None] * (len(context) % first.layout.block_size > 0)
    assert [block.block_hash for update in held for block in update.blocks] == [*hashes_of(first, context), *partial]
    request = resume("joined", whole, outputs[:num_resumed])
    reservation = reserve(second, request)
    copy(first, block_ids, second, reservation.block_ids)
    (token,) = held[-1].new_tokens
    proofs = [block.proof for update in held for block in update.blocks]
    given = taken(second, token)
    joined = second.add_prefilled(request, reservation.block_ids, proofs, given)
    first.release_blocks(block_ids)
    num_told = num_resumed + (given is not None)
    assert (token, joined.num_output_tokens) == (outputs[num_resumed], num_told)
    rest = [token for update in run(second) for token in update.new_tokens]
    assert rest == outputs[num_told:]


@pytest.mark.parametrize(
    ("resumed", "param"),
    [([1] * NUM_OUTPUTS, "resumed_token_ids"), ([VOCAB_SIZE], "resumed_token_ids"), ([1] * 1990, "prompt")],
)
def test_what_leaves_nothing_to_resume_is_refused(engine: Engine, resumed: list[int], param: str) -> None:
    request = Request("r", prompt_of(engine, 10), SamplingParams(max_tokens=NUM_OUTPUTS), resumed_token_ids=resumed)
    with pytest.raises(InvalidRequest) as refusal:
        engine.add_request(request)
    assert refusal.value.param == param


# ---- suspended requests -----------------------------------------------------------------


def run_until(engine: Engine, request: Request, num_outputs: int) -> list[SampledToken]:
    engine.add_request(request)
    outputs: list[SampledToken] = []
    while len(outputs) < num_outputs:
        outputs += [token for update in engine.step().updates for token in update.new_tokens]
    return outputs


@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_a_suspended_request_goes_on_elsewhere_from_its_blocks_and_nothing_is_computed_again(
    make: Callable[[], Engine], sampling: str
) -> None:
    first, second = make(), make()
    asked: dict[str, object] = {"max_tokens": 50, **SAMPLINGS[sampling]}
    size = first.layout.block_size
    prompt = random_prompts([2 * size + 5])[0]
    expected = [token for update in run(first, ask("whole", prompt, **asked)) for token in update.new_tokens]
    # The newest token's KV is computed nowhere: with `size - 4` a block has just become full, with one beside it not.
    for num_outputs in (1, size - 5, size - 4, size - 3, 30):
        begun = ask(f"begun-{num_outputs}", prompt, **asked)
        outputs = run_until(first, begun, num_outputs)
        assert all(map(same, outputs, expected))
        left = first.suspend(begun.request_id, TRANSFER)
        assert left is not None
        assert left.num_output_tokens == num_outputs
        assert not first.abort(begun.request_id)
        assert first.suspend(begun.request_id, TRANSFER) is None
        computed = [*prompt, *(token.token_id for token in outputs[:-1])]
        partial = [None] * (len(computed) % first.layout.block_size > 0)
        assert [block.block_hash for block in left.blocks] == [*hashes_of(first, computed), *partial]

        goes_on = resume(f"goes on-{num_outputs}", begun, outputs[:-1])
        reservation = reserve(second, goes_on)
        block_ids = [block.block_id for block in left.blocks]
        copy(first, block_ids, second, reservation.block_ids)
        first.release_blocks(block_ids)
        proofs = [block.proof for block in left.blocks]
        joined = second.add_prefilled(goes_on, reservation.block_ids, proofs, outputs[-1])
        assert (joined.num_output_tokens, joined.finish_reason) == (num_outputs, None)
        rest = [token for update in run(second) for token in update.new_tokens]
        assert all(map(same, rest, expected[num_outputs:]))
        assert len(rest) == len(expected) - num_outputs
    assert second.stats.num_prompt_tokens == 0


def test_one_that_has_not_begun_leaves_nothing_and_one_that_is_being_prefilled_stays(engine: Engine) -> None:
    engine.add_request(ask("prefilled", prompt_of(engine, 50)))
    engine.step()
    assert engine.suspend("prefilled", TRANSFER) is None
    waits, reserved = ask("waits", prompt_of(engine, 40, seed=1)), ask("reserved", prompt_of(engine, 20, seed=2))
    engine.add_request(waits)
    left = engine.suspend("waits", TRANSFER)
    assert left is not None
    assert (left.num_output_tokens, left.blocks) == (0, ())
    reservation = reserve(engine, reserved)
    assert engine.suspend("reserved", TRANSFER) is None
    engine.release_reservation(reserved, reservation.block_ids)
    assert engine.suspend("unknown", TRANSFER) is None
    assert len(tokens(run(engine), "prefilled")) == NUM_OUTPUTS
    assert engine.stats.num_finished[FinishReason.MOVED] == 1


def test_blocks_whose_hashes_are_wrong_are_left_to_nobody(engine: Engine) -> None:
    request = ask("r", prompt_of(engine, 40))
    request.given_hashes = hashes_of(engine, prompt_of(engine, 40, seed=9))
    run_until(engine, request, 3)
    left = engine.suspend("r", TRANSFER)
    assert left is not None
    assert (left.num_output_tokens, left.blocks) == (3, ())


# ---- the prefix cache -------------------------------------------------------------------


def test_a_running_requests_output_can_be_found_block_by_block_as_it_grows(engine: Engine) -> None:
    prompt = prompt_of(engine, 20)
    engine.add_request(ask("r", prompt, max_tokens=60))
    outputs: list[int] = []
    while engine.has_work:
        outputs += [token.token_id for update in engine.step().updates for token in update.new_tokens]
        # All but the newest token's KV is there.
        found = engine.peek_prefix(hashes_of(engine, [*prompt, *outputs]))
        assert found == (len(prompt) + max(len(outputs) - 1, 0)) // engine.layout.block_size
    published = [change for change in engine.take_cache_changes() if change.event is CacheEvent.PUBLISHED]
    assert [change.block_hash for change in published] == hashes_of(engine, [*prompt, *outputs[:-1]])


def test_a_prefix_of_another_engine_is_found_like_an_own_one(make: Callable[[], Engine]) -> None:
    holder, reader = make(), make()
    prompt = prompt_of(holder, 70)
    expected = tokens(run(holder, ask("r", prompt)), "r")
    hashes = hashes_of(holder, prompt)
    lent = holder.lend_prefix(hashes)
    taken = reader.take_prefix(hashes)
    assert taken is not None
    assert (len(lent), taken.num_present, len(taken.block_ids)) == (4, 0, 4)
    copy(holder, lent, reader, taken.block_ids)
    reader.take_cache_changes()
    reader.publish_blocks(taken.block_ids, hashes, holder.proofs(lent, list(map(subject_of, hashes))))
    assert [(change.event, change.block_hash) for change in reader.take_cache_changes()] == [
        (CacheEvent.PUBLISHED, block_hash) for block_hash in hashes
    ]
    holder.release_blocks(lent)
    reader.release_blocks(taken.block_ids)
    assert (reader.peek_prefix(hashes), set(reader.cached_hashes())) == (4, set(hashes))
    updates = run(reader, ask("r", prompt))
    assert (updates[-1].num_cached_tokens, tokens(updates, "r")) == (4 * reader.layout.block_size, expected)
    assert reader.stats.num_prefix_hits == 4 * reader.layout.block_size


def test_nothing_is_published_that_its_caller_does_not_hold(engine: Engine) -> None:
    with pytest.raises(NotLent):
        engine.publish_blocks([0], hashes_of(engine, prompt_of(engine, 16)), [1])
    assert engine.cached_hashes() == []


def test_a_prefix_that_has_no_room_is_refused_and_takes_nothing(engine: Engine) -> None:
    hashes = hashes_of(engine, [1] * engine.layout.block_size * 41)
    assert engine.take_prefix(hashes) is None


def test_a_prefix_of_no_blocks_is_taken_and_lent_as_that(engine: Engine) -> None:
    assert engine.take_prefix([]) == Reservation([])
    assert engine.lend_prefix([]) == []


def test_a_block_that_has_changed_is_dropped_and_counted(engine: Engine) -> None:
    prompt = prompt_of(engine, 64)
    run(engine, ask("r", prompt, max_tokens=1))
    hashes = hashes_of(engine, prompt)
    assert engine.recheck(hashes) == 0
    lent = engine.lend_prefix(hashes)
    block: Any = engine.memory.staging(1)
    engine.memory.gather(lent[2], block)
    block[0] ^= 1
    engine.memory.scatter(lent[2], block)
    engine.release_blocks(lent)
    assert (engine.recheck(hashes), engine.stats.num_corrupt_blocks, engine.peek_prefix(hashes)) == (1, 1, 2)


def test_what_was_evicted_comes_back_from_a_tier_of_its_own(engine: Engine) -> None:
    prompt = prompt_of(engine, 64)
    hashes = hashes_of(engine, prompt)
    run(engine, ask("r", prompt, max_tokens=1))
    run(engine, *[ask(f"other{i}", prompt_of(engine, 370, seed=i + 1), max_tokens=1) for i in range(2)])
    assert engine.peek_prefix(hashes) == 0
    assert set(hashes).isdisjoint(engine.cached_hashes())
    if not engine.capabilities.num_host_blocks:
        assert (engine.may_restore(hashes[0]), engine.begin_restore(hashes)) == (False, None)
        assert (engine.host_hashes(), engine.take_host_changes()) == ([], [])
        return
    assert set(hashes) <= set(engine.host_hashes())
    assert set(hashes) <= {change.block_hash for change in engine.take_host_changes()}
    assert engine.may_restore(hashes[0])
    restore = engine.begin_restore(hashes)
    assert restore is not None
    restore.copy_back()
    restore.end()
    assert engine.peek_prefix(hashes) == 4


def test_first_steps_of_made_up_tokens_are_told_as_steps_and_leave_nothing_behind(make: Callable[[], Engine]) -> None:
    engine, cold = make(), make()
    prompt, decode = engine.warm_up()
    assert prompt.shape.num_prompt_tokens == prompt.num_tokens > 1
    assert (decode.shape.num_running, decode.num_tokens) == (1, 1)
    assert min(prompt.duration_s, decode.duration_s) > 0
    assert (engine.stats, engine.load()) == (cold.stats, cold.load())
    assert (engine.cached_hashes(), engine.take_cache_changes(), engine.has_work) == ([], [], False)
    prompt_ids = prompt_of(engine, 50)
    warm, other = (run(each, ask("r", prompt_ids)) for each in (engine, cold))
    assert tokens(warm, "r") == tokens(other, "r")
