"""A decode worker that is lost in mid-stream: another one goes on, and the client gets what it would have got."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from kvstore.block import hash_blocks, namespace
from kvstore.index.entries import Holding
from services.orders import MOVES, RESUMES
from services.router.config import RouterConfig
from tests.router.direct import Answer
from tests.router.harness import FakeIndex
from tests.router.scripted_fleet import ScriptedFleet, ScriptedWorker, scripted_fleet
from tests.waiting import until
from tests.worker_records import worker_record

LENGTH = 64
PROMPT = list(range(20, 60))
ALIKE: dict[str, object] = {"prompt": PROMPT, "max_tokens": LENGTH, "seed": 7, "return_token_ids": True}
STREAM: dict[str, object] = {**ALIKE, "stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def make(model_directory):
    """Makes workers; those with less in front of them are asked first."""

    def make_one(num_outstanding: int = 0, **options: object) -> ScriptedWorker:
        return ScriptedWorker(str(model_directory), num_outstanding, **options)  # type: ignore[arg-type]

    return make_one


def sample(fleet: ScriptedFleet, series: str) -> float:
    lines = fleet.parts.metrics.exposition().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(series))


def is_at_rest(fleet: ScriptedFleet) -> bool:
    gauges = [sample(fleet, f"vllm:num_requests_{name}{{") for name in ("running", "waiting")]
    waiting = [worker.num_waiting_tokens for worker in fleet.parts.workers.decode_candidates()]
    return gauges == [0, 0] and not any(waiting) and fleet.parts.admission.num_running == 0


async def undisturbed(fleet: ScriptedFleet, make, **body: object) -> Answer:
    await fleet.serve_with(make())
    answer = await fleet.ask(**body)
    assert answer.error is None
    return answer


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("temperature", [0, 1], ids=["greedy", "sampled"])
async def test_the_stream_is_the_same_at_whatever_token_its_worker_dies(make, temperature, n):
    await kill_at_each(make, temperature, n, stream=True, every=1)


@pytest.mark.parametrize("n", [1, 3])
async def test_the_whole_answer_is_the_same_at_whatever_token_its_worker_dies(make, n):
    await kill_at_each(make, 1, n, stream=False, every=8)  # what differs is only how it is written


async def kill_at_each(make, temperature: int, n: int, stream: bool, every: int) -> None:
    async with scripted_fleet() as fleet:
        body = {**(STREAM if stream else ALIKE), "temperature": temperature, "n": n}
        text = (await undisturbed(fleet, make, **body)).choices()[0]["text"]
        assert isinstance(text, str)
        survivor = make(9, is_brief=True)
        for number, (logprobs, stop) in enumerate(itertools.product((None, 2), (None, text[-20:-16]))):
            asked = body | {"logprobs": logprobs, "stop": stop}
            expected = await undisturbed(fleet, make, **asked)
            num_tokens = len(expected.choices()[0]["token_ids"])  # type: ignore[arg-type]
            assert (num_tokens < LENGTH) == (stop is not None)
            for killed_at in range(1 + number % every, num_tokens + 1, every):
                victim = make(dies_after=killed_at, is_brief=True)
                survivor.orders.clear()
                await fleet.serve_with(victim, survivor)
                answer = await fleet.ask(**asked)
                assert answer.choices() == expected.choices(), (logprobs, stop, killed_at)
                assert answer.usage == expected.usage
                resumed = [len(order.resumed_token_ids) for order in survivor.orders]
                assert killed_at in resumed or killed_at == num_tokens
        assert is_at_rest(fleet)


@pytest.mark.parametrize(("end", "expected"), [("dies_after", "inexact"), ("drains_after", "exact")])
async def test_what_another_kind_of_worker_had_computed_is_exact_only_where_it_is_not_computed_again(
    make, end, expected
):
    """The prompt's KV came from a prefill worker of other numerics, and counts in every token that follows."""
    async with scripted_fleet() as fleet:
        both = {"features": (RESUMES, MOVES)}
        first, second = make(**both, **{end: 10}), make(1, **both)
        prefill = worker_record(worker_id="prefill-0", role="prefill", grpc_address="prefill-0", numerics="other")
        first.prefilled_by = prefill.worker_id
        await fleet.serve_with(first, second)
        fleet.announce(first, second, holds=(prefill,))
        await until(lambda: fleet.parts.workers.numerics("prefill-0") == "other")
        (receipt,) = (await fleet.ask(**STREAM, receipt=True)).receipts
        assert receipt["resumed_elsewhere"] == expected


@pytest.mark.parametrize(
    ("holder", "num_cached", "expected"),
    [
        ({"role": "prefill", "numerics": "other"}, 3, "inexact"),
        ({"role": "prefill", "numerics": "other"}, 0, "exact"),
        ({"role": "prefill", "numerics": "alike"}, 3, "exact"),
        ({"role": "store"}, 3, "inexact"),
        ({"role": "store"}, 0, "exact"),
    ],
)
async def test_what_was_found_in_a_cache_may_be_of_anybody_s_making(make, holder, num_cached, expected):
    """It may have been fetched there, or been handed over for another choice; a store node holds everybody's."""
    async with scripted_fleet() as fleet:
        first, second = make(dies_after=10), make(1, num_cached=num_cached)
        first.num_cached = 0
        await fleet.serve_with(first, second)
        fleet.announce(first, second, holds=(worker_record(worker_id="holder", **holder),))
        await until(lambda: len(fleet.parts.workers.records) == 3)
        fleet.announce(first, second)  # it is gone, and what it has made is not
        await until(lambda: len(fleet.parts.workers.records) == 2)
        (receipt,) = (await fleet.ask(**STREAM, receipt=True)).receipts
        assert receipt["resumed_elsewhere"] == expected


@pytest.mark.parametrize("end", ["dies_after", "drains_after"])
async def test_equal_names_are_exact_only_where_a_token_s_bits_do_not_depend_on_its_company(make, end):
    async with scripted_fleet() as fleet:
        both = {"features": (RESUMES, MOVES), "is_exact": False}
        await fleet.serve_with(make(**both, **{end: 10}), make(1, **both))
        (receipt,) = (await fleet.ask(**STREAM, receipt=True)).receipts
        assert receipt["resumed_elsewhere"] == "inexact"


async def test_who_said_nothing_did_not_begin_it(make):
    async with scripted_fleet() as fleet:
        refuses, begins = make(0, is_full=True, numerics="a"), make(1, numerics="b", num_cached=0, dies_after=10)
        like_who_refused, alike = make(5, numerics="a", num_cached=0), make(9, numerics="b", num_cached=0)
        for others, expected in (([like_who_refused], "inexact"), ([like_who_refused, alike], "exact")):
            refuses.orders, begins.orders, begins.is_dead = [], [], False
            await fleet.serve_with(refuses, begins, *others)
            (receipt,) = (await fleet.ask(**STREAM, receipt=True)).receipts
            assert refuses.orders
            assert receipt["resumed_elsewhere"] == expected
            assert receipt["decode_worker_id"] == others[-1].record.worker_id


@pytest.mark.parametrize("death", ["dies_after", "gives_up_after"])
async def test_the_receipt_and_the_metrics_tell_of_the_pause(make, death):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM, receipt=True)
        first, second = make(**{death: 10}), make(9)
        await fleet.serve_with(first, second)
        answer = await fleet.ask(**STREAM, receipt=True)
        assert answer.choices() == expected.choices()
        ((receipt,), (undisturbed_receipt,)) = answer.receipts, expected.receipts
        (resume,) = receipt["resumes"]
        assert undisturbed_receipt["resumes"] == []
        assert resume.pop("pause_seconds") >= 0
        assert resume == {
            "worker_id": first.record.worker_id,
            "reason": "lost" if death == "dies_after" else "given_up",
            "carried_tokens": 10,
            "recomputed_tokens": len(PROMPT) + 10 - 3,  # the scripted worker says that it had three in its cache
            "reused_tokens": 3,
            "fetched_tokens": 0,
            "moved_tokens": 0,
            "moved": None,
            "exact": True,
        }
        alike = ("prompt_tokens", "completion_tokens", "computed_tokens", "reused_tokens", "recomputes")
        assert [receipt[name] for name in alike] == [undisturbed_receipt[name] for name in alike]
        assert (receipt["decode_worker_id"], receipt["attempts"]) == (second.record.worker_id, 2)
        assert receipt["prefill_worker_id"] == first.record.worker_id
        assert sample(fleet, "tandem:router_resumes_total{") == 1
        assert sample(fleet, f'tandem:router_resumes_total{{outcome="resumed",reason="{resume["reason"]}"}}') == 1
        assert sample(fleet, "tandem:router_resume_pause_seconds_count") == 1
        assert sample(fleet, 'tandem:router_resumed_tokens_total{source="recomputed"}') == len(PROMPT) + 7
        assert sample(fleet, "vllm:generation_tokens_total{") == 2 * LENGTH


async def test_the_index_is_asked_again_for_prompt_and_output(make):
    holder = make().record
    index = FakeIndex()
    async with scripted_fleet(index=index) as fleet:
        first, second = make(dies_after=30), make(9)
        await fleet.serve_with(first, second)
        index.answer = lambda hashes: [
            Holding(holder.worker_id, holder.incarnation, len(hashes), (0, 0, len(hashes), 0))
        ]
        fleet.announce(first, second, holds=(holder,))
        await fleet.ask(**STREAM, cache_salt="s")
    (before,), (after,) = first.orders, second.orders
    context = [*PROMPT, *after.resumed_token_ids]
    root = namespace(holder.model_fingerprint, "s")
    assert [len(hashes) for hashes in index.asked] == [1, 2]
    assert index.asked[1] == hash_blocks(root, context, 32)
    assert after.prompt_hashes.hashes == b"".join(hash_blocks(root, context, 32))
    assert [(source.holder_id, source.num_blocks) for source in after.prefix_sources] == [(holder.worker_id, 2)]
    assert (before.sampling, before.prompt_token_ids, before.priority) == (
        after.sampling,
        after.prompt_token_ids,
        after.priority,
    )
    assert 0 < after.timeout_s < before.timeout_s


async def test_a_second_death_ends_the_request_and_says_so(make):
    async with scripted_fleet() as fleet:
        await fleet.serve_with(make(dies_after=10), make(3, dies_after=10), make(9))
        for body in (STREAM, ALIKE):
            answer = await fleet.ask(**body)
            assert answer.error is not None
            assert (answer.error["code"], answer.error["type"]) == ("internal_error", "server_error")
            assert "2 decode workers were lost with this request aboard" in str(answer.error["message"])
            await fleet.serve_with(make(dies_after=10), make(3, dies_after=10), make(9))
        assert sample(fleet, 'tandem:router_resumes_total{outcome="worker_deaths",reason="lost"}') == 2
        assert is_at_rest(fleet)


async def test_a_moved_request_has_the_same_two_lives(make):
    async with scripted_fleet() as fleet:
        both = {"features": (RESUMES, MOVES)}
        drains, *doomed = make(drains_after=10, **both), make(3, dies_after=10, **both), make(9, dies_after=10)
        await fleet.serve_with(drains, *doomed, make(20))
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert answer.error["code"] == "internal_error"
        assert "2 decode workers were lost with this request aboard" in str(answer.error["message"])
        assert [worker.orders[0].HasField("move") for worker in doomed] == [True, False]
        assert sample(fleet, 'tandem:router_resumes_total{outcome="resumed",reason="moved"}') == 1
        assert is_at_rest(fleet)


async def test_a_choice_with_which_two_workers_die_ends_the_request_for_all(make):
    async with scripted_fleet() as fleet:
        doomed, survivor = make(4, dies_after=10), make(3)
        await fleet.serve_with(make(dies_after=10), doomed, survivor)
        answer = await fleet.ask(**STREAM, n=3)
        assert doomed.orders
        assert survivor.orders, "some went on"
        assert answer.error is not None
        assert answer.error["code"] == "internal_error"
        assert "2 decode workers were lost with this request aboard" in str(answer.error["message"])
        assert is_at_rest(fleet)


async def test_a_request_in_which_two_step_loops_hang_is_given_up(make):
    # It went from worker to worker, each of which ended itself: a whole fleet for one request.
    async with scripted_fleet() as fleet:
        workers = [make(number, hangs_after=3) for number in range(6)]
        await fleet.serve_with(*workers)
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert "2 decode workers were lost with this request aboard" in str(answer.error["message"])
        assert sum(worker.is_dead for worker in workers) == 2
        assert is_at_rest(fleet)


async def test_a_worker_that_answers_again_had_not_died_of_the_request(make):
    # A router that was stopped for a moment, twice, took its workers for dead, and the request for what they died of.
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        worker = make(breaks_after=10)
        await fleet.serve_with(worker)
        answer = await fleet.ask(**STREAM)
        assert len(worker.orders) > 2
        assert answer.choices() == expected.choices()
        assert is_at_rest(fleet)


async def test_a_larger_budget_goes_on_through_many_deaths(make):
    async with scripted_fleet(RouterConfig(max_worker_deaths=9)) as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        await fleet.serve_with(*(make(number, dies_after=8) for number in range(8)))
        answer = await fleet.ask(**STREAM, receipt=True)
        assert answer.choices() == expected.choices()
        (receipt,) = answer.receipts
        assert [resume["carried_tokens"] for resume in receipt["resumes"]] == list(range(8, 64, 8))


async def test_where_no_worker_is_left_the_stream_waits_for_one(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        victim, late = make(dies_after=20), make()
        await fleet.serve_with(victim)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: fleet.parts.workers.num_sessions_up == 0)
        assert not asking.done()
        fleet.announce(late)
        answer = await asking
        assert answer.choices() == expected.choices()
        assert is_at_rest(fleet)


async def test_choices_that_had_not_begun_when_the_last_worker_was_lost_wait_for_one_like_the_others(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM, n=40)
        victim, late = make(dies_after=1), make()
        await fleet.serve_with(victim)
        asking = asyncio.create_task(fleet.ask(**STREAM, n=40))
        await until(lambda: fleet.parts.workers.num_sessions_up == 0)
        assert len(victim.orders) < 40
        assert not asking.done()
        fleet.announce(late)
        assert (await asking).choices() == expected.choices()
        assert is_at_rest(fleet)


async def test_a_worker_that_refuses_since_it_drains_is_waited_for_like_a_lost_one(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        draining, late = make(refuses=True), make()
        await fleet.serve_with(draining)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: draining.orders and fleet.parts.workers.decode_candidates()[0].draining)
        assert not asking.done()
        fleet.announce(draining, late)
        assert (await asking).choices() == expected.choices()
        assert is_at_rest(fleet)


async def test_who_refused_it_before_is_asked_again_when_its_worker_gives_it_up(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        full, gives_up = make(is_full=True), make(3, gives_up_after=10)
        await fleet.serve_with(full, gives_up)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: gives_up.orders)
        full.is_full = False
        assert (await asking).choices() == expected.choices()
        assert len(full.orders) == 2


async def test_a_stream_that_has_begun_waits_for_room(make):
    async with scripted_fleet(RouterConfig(max_attempts=2)) as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        full = make(9, is_full=True)
        await fleet.serve_with(make(dies_after=20), full)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: len(full.orders) > 2)
        full.is_full = False
        assert (await asking).choices() == expected.choices()
        assert is_at_rest(fleet)


async def test_a_worker_that_always_refuses_is_asked_no_longer_than_one_is_waited_for(make):
    async with scripted_fleet(RouterConfig(resume_wait_s=0.9)) as fleet:
        refuses = make(9, is_full=True)
        await fleet.serve_with(make(dies_after=20), refuses)
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert len(answer.choices()[0]["token_ids"]) == 20  # type: ignore[arg-type]
        assert len(refuses.orders) <= 3
        assert is_at_rest(fleet)


async def test_where_none_comes_the_client_hears_what_was_lost(make):
    async with scripted_fleet(RouterConfig(resume_wait_s=0)) as fleet:
        await fleet.serve_with(make(dies_after=20))
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert answer.error["code"] == "service_unavailable"
        assert "was lost" in str(answer.error["message"])
        assert sample(fleet, 'tandem:router_resumes_total{outcome="no_worker",reason="lost"}') == 1
        assert is_at_rest(fleet)


async def test_a_worker_of_an_older_version_begins_afresh_and_nothing_is_said_twice(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM, logprobs=1)
        old = make(9, features=())
        await fleet.serve_with(make(dies_after=20), old)
        answer = await fleet.ask(**STREAM, logprobs=1, receipt=True)
        assert answer.choices() == expected.choices()
        assert answer.usage == expected.usage
        (order,) = old.orders
        assert not order.resumed_token_ids
        ((resume,),) = (receipt["resumes"] for receipt in answer.receipts)
        assert resume["recomputed_tokens"] == len(PROMPT) - 3 + 20


async def test_an_older_worker_that_says_something_else_ends_the_stream(make):
    async with scripted_fleet() as fleet:
        await fleet.serve_with(make(dies_after=20), make(9, features=(), differs=True))
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert "the answer cannot go on" in str(answer.error["message"])
        assert len(answer.choices()[0]["token_ids"]) == 20  # type: ignore[arg-type]
        assert is_at_rest(fleet)


async def test_a_client_that_leaves_while_its_worker_is_lost_leaves_nothing_behind(make):
    async with scripted_fleet() as fleet:
        await fleet.serve_with(make(dies_after=20))
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: fleet.parts.workers.num_sessions_up == 0)
        fleet.hang_up()
        assert (await asking).error is None
        assert sample(fleet, "tandem:router_client_disconnects_total") == 1
        assert is_at_rest(fleet)
        assert sample(fleet, 'tandem:router_resumes_total{outcome="left",reason="lost"}') == 1
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("resume-")]


async def test_the_request_s_own_deadline_ends_the_wait_for_a_worker(make):
    async with scripted_fleet(RouterConfig(request_timeout_s=0.2)) as fleet:
        await fleet.serve_with(make(dies_after=20))
        answer = await fleet.ask(**STREAM)
        assert answer.error is not None
        assert answer.error["code"] == "timeout"
        assert is_at_rest(fleet)


async def test_a_worker_that_falls_silent_is_lost(make):
    # Which is no death of it: the request has one life.
    async with scripted_fleet(RouterConfig(silence_timeout_s=2.0, max_worker_deaths=1)) as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        silent, other = make(silent_after=20), make(9)
        await fleet.serve_with(silent, other)
        answer = await fleet.ask(**STREAM, receipt=True)
        assert answer.choices() == expected.choices()
        assert [len(order.resumed_token_ids) for order in other.orders] == [20]
        ((resume,),) = (receipt["resumes"] for receipt in answer.receipts)
        assert (resume["worker_id"], resume["reason"]) == (silent.record.worker_id, "silent")


async def test_a_worker_of_shorter_context_cuts_no_stream_short(make):
    """It may come in a rolling change. What it does not hold goes on at another one."""
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        first, short, long = make(dies_after=10), make(max_model_len=len(PROMPT) + 30), make(9)
        await fleet.serve_with(first)
        asking = asyncio.create_task(fleet.ask(**STREAM, receipt=True))
        await until(lambda: first.orders)
        fleet.announce(first, short)
        await until(lambda: short.orders)
        fleet.announce(short, long)
        answer = await asking
        assert answer.choices() == expected.choices()
        assert answer.usage == expected.usage
        assert [len(order.resumed_token_ids) for order in long.orders] == [30]
        (receipt,) = answer.receipts
        assert [resume["reason"] for resume in receipt["resumes"]] == ["lost", "given_up"]  # type: ignore[attr-defined]
        assert is_at_rest(fleet)


async def test_without_a_worker_of_long_enough_context_the_client_hears_of_it(make):
    async with scripted_fleet(RouterConfig(resume_wait_s=0.3)) as fleet:
        first = make(dies_after=10, dies_once=asyncio.Event())
        await fleet.serve_with(first)
        asking = asyncio.create_task(fleet.ask(**STREAM))
        await until(lambda: first.orders)
        fleet.announce(first, make(max_model_len=len(PROMPT) + 30))
        await until(lambda: fleet.parts.workers.num_sessions_up == 2)
        first.dies_once.set()
        answer = await asking
        assert answer.error is not None
        assert answer.error["code"] == "service_unavailable"
        assert "context" in str(answer.error["message"])
        assert len(answer.choices()[0]["token_ids"]) == 30  # type: ignore[arg-type]
        assert is_at_rest(fleet)


async def test_who_finds_a_stream_invalid_that_has_begun_is_passed_over(make):
    async with scripted_fleet() as fleet:
        expected = await undisturbed(fleet, make, **STREAM)
        first, wrong, other = make(dies_after=20), make(1, context=len(PROMPT) + 5), make(9)
        await fleet.serve_with(first, wrong, other)
        answer = await fleet.ask(**STREAM)
        assert answer.choices() == expected.choices()
        assert len(wrong.orders) == 1
