"""The tables choose as a plain scan of all candidates does, whatever happened to their rows before."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import replace

import httpx
import numpy as np
import pytest

from services.budgets import UNLIMITED, Objectives
from services.rates import Rates
from services.router.config import RouterConfig
from services.router.routing import (
    MAX_CANDIDATES,
    Bending,
    CostModel,
    Decision,
    DecodeCandidate,
    DecodeTable,
    Held,
    KnownPrefix,
    Policy,
    PolicyState,
    PrefillCandidate,
    PrefillTable,
    RoutedRequest,
    choose,
)
from services.router.routing.tables import first
from tests.router import plain_choice
from tests.router.fake_worker import Script
from tests.router.harness import Running, running_router, until
from tests.worker_records import worker_record

MODELS, FINGERPRINTS, ADAPTERS = ("m", "n"), ("f", "g"), ("a:1", "b:2")
NUM_FLEETS, NUM_REQUESTS = 120, 12


def served(rng: random.Random) -> dict[str, object]:
    # Mostly one model of one version, as fleets are; the others must not get in.
    others = rng.random() < 0.2
    return {
        "model_names": tuple(rng.sample(MODELS, rng.randint(1, 2))) if others else ("m",),
        "model_fingerprint": rng.choice(FINGERPRINTS) if others else "f",
        "adapters": tuple(rng.sample(ADAPTERS, rng.randint(0, 2))),
        "numerics": rng.choice(("", "x", "y")),
    }


def decode_news(rng: random.Random) -> dict[str, object]:
    num_blocks = rng.choice((0, 100, 100))
    return {
        "connected": rng.random() < 0.9,
        "draining": rng.random() < 0.1,
        "is_suspect": rng.random() < 0.1,
        "num_outstanding": rng.choice((0, 0, 1, 5, 40)),
        "num_waiting_tokens": rng.choice((0, 0, 700)),
        "num_blocks": num_blocks,
        "num_free_blocks": rng.randint(0, num_blocks),
    }


def make_bending(rng: random.Random) -> Bending:
    return Bending(
        rng.choice(("prefill", "decode")),
        rng.choice((math.inf, 0.04, 0.08)),
        rng.choice((UNLIMITED, 128, 0)),
        rng.choice((0, 1, 12)),
        rng.choice((0, 700, 20_000)),
    )


def make_elastic(rng: random.Random, number: int) -> tuple[DecodeCandidate, PrefillCandidate]:
    """The two rows of a worker that does both."""
    facts, bending, max_model_len = served(rng), make_bending(rng), rng.choice((0, 2000, 600))
    decode = replace(make_decode(rng, number), worker_id=f"e{number}", colocated=False, local_prefill_max_tokens=0)
    decode = replace(decode, **facts, bending=bending, max_model_len=max_model_len)
    prefill = replace(make_prefill(rng, number), worker_id=f"e{number}", **facts, bending=bending)
    num_waiting = rng.choice((0, 0, 512, 4000))
    return (
        replace(decode, num_waiting_tokens=num_waiting),
        replace(prefill, max_model_len=max_model_len, num_outstanding_tokens=num_waiting),
    )


def make_decode(rng: random.Random, number: int) -> DecodeCandidate:
    return DecodeCandidate(
        worker_id=f"d{number}",
        incarnation="1",
        max_num_seqs=rng.choice((0, 8, 8)),
        colocated=rng.random() < 0.2,
        local_prefill_max_tokens=rng.choice((0, 64, 1000)),
        max_model_len=rng.choice((0, 2000, 600)),
        **served(rng) | decode_news(rng),  # type: ignore[arg-type]
    )


def prefill_news(rng: random.Random) -> dict[str, object]:
    return {"draining": rng.random() < 0.1, "num_outstanding_tokens": rng.choice((0, 0, 0, 512, rng.randint(0, 9000)))}


def make_prefill(rng: random.Random, number: int) -> PrefillCandidate:
    facts = served(rng) | prefill_news(rng) | {"max_model_len": rng.choice((0, 2000, 600))}
    return PrefillCandidate(f"p{number}", "1", "host:1", "host:2", **facts)  # type: ignore[arg-type]


def make_prefix(rng: random.Random, names: list[str], num_tokens: int) -> KnownPrefix:
    most = num_tokens // 32

    def held() -> Held:
        counts = [rng.randint(0, most // 4) for _ in range(4)]
        return Held(sum(counts), (counts[0], counts[1], counts[2], counts[3]))

    kinds = [held() for _ in range(3)]  # a beginning that many have in common
    holders = rng.sample(names, min(rng.choice((0, 0, 3, 30)), len(names)))
    soon = rng.sample(names, min(rng.choice((0, 2)), len(names)))
    return KnownPrefix(
        32,
        most,
        {name: rng.choice(kinds) if rng.random() < 0.7 else held() for name in holders},
        {name: rng.randint(1, most + 1) for name in soon},
    )


def make_request(rng: random.Random, names: list[str]) -> RoutedRequest:
    num_tokens = rng.choice((10, 500, 1500))
    return RoutedRequest(
        model=rng.choice(("m", "m", "m", "n", "unknown")),
        num_prompt_tokens=num_tokens,
        key=rng.randbytes(4),
        prefixes={each: make_prefix(rng, names, num_tokens) for each in FINGERPRINTS},
        numerics=rng.choice(("", "", "x")),
        has_begun=rng.random() < 0.3,
        num_final_tokens=rng.choice((0, num_tokens + 100)),
        adapter=rng.choice(("", "", "", "a:1")),
        fingerprints=rng.choice((None, {"f"}, {"f", "g"})),
        objectives=rng.choice((Objectives(), Objectives(0.05), Objectives(0.5, 0.05), Objectives(tpot_s=0.03))),
        num_output_tokens=rng.choice((1.0, 8.0, 200.5)),
    )


def assert_equal(fast: object, plain: object) -> None:
    if not isinstance(fast, Decision) or not isinstance(plain, Decision):
        assert fast is plain
        return
    assert fast == replace(
        plain,
        reason=fast.reason,
        weighed=fast.weighed,
        sources=plain.sources[:MAX_CANDIDATES],
        decode_terms=plain.decode_terms[:MAX_CANDIDATES],
        prefill_terms=plain.prefill_terms[:MAX_CANDIDATES],
    )


@pytest.mark.parametrize("policy", list(Policy))
def test_tables_choose_what_a_scan_of_all_candidates_chooses(policy):
    rng, num_decisions, causes = random.Random(f"tables {policy}"), 0, Counter[str]()
    for _ in range(NUM_FLEETS):
        decodes = [make_decode(rng, number) for number in range(rng.choice((0, 1, 3, 40)))]
        prefills = [make_prefill(rng, number) for number in range(rng.choice((0, 1, 3, 60)))]
        for pair in [make_elastic(rng, number) for number in range(rng.choice((0, 0, 2, 30)))]:
            decodes.append(pair[0])
            prefills.append(pair[1])
        decode, prefill = DecodeTable(decodes), PrefillTable(prefills)
        names = [worker.worker_id for worker in (*decodes, *prefills)] + ["store"]
        for _ in range(NUM_REQUESTS):
            for row in rng.sample(range(len(decodes)), len(decodes) // 3):
                decodes[row] = replace(decodes[row], **decode_news(rng))
                if decodes[row].bending.is_elastic:
                    decodes[row] = replace(decodes[row], bending=make_bending(rng))
                decode.put(row, decodes[row])
            for row in rng.sample(range(len(prefills)), len(prefills) // 3):
                prefills[row] = replace(prefills[row], **prefill_news(rng))
                prefill.put(row, prefills[row])
            request, exclude = make_request(rng, names), set(rng.sample(names, rng.choice((0, 0, 1))))
            among = set(rng.sample(names, len(names) // 2)) if rng.random() < 0.2 else ()
            state = PolicyState({name: rng.randint(0, 9) for name in rng.sample(names, len(names) // 2)})
            cost = CostModel(Rates(prompt_token_s=rng.choice((1e-5, 2e-4)), num_steps=rng.choice((0, 99)), spread=0.2))
            options = {"among": among, "policy": policy, "state": state, "cost": cost}
            fast = choose(request, decode, prefill, exclude, **options)
            assert_equal(fast, plain_choice.choose(request, decodes, prefills, exclude, **options))
            num_decisions += isinstance(fast, Decision)
            causes[fast.deflected if isinstance(fast, Decision) else "refused"] += 1
    if policy is Policy.KV:
        assert min(causes[deflected] for deflected in ("", "prompt", "answer")) > 5
    assert num_decisions > NUM_FLEETS * NUM_REQUESTS // 4


@pytest.mark.parametrize("num_values", [1, 3, 1000])
def test_the_first_few_of_many_pairs_are_those_of_the_sorted_pairs(num_values):
    rng = np.random.default_rng(num_values)
    for size in (0, 1, 5, 6, 50, 400):
        primary, tie = rng.integers(0, num_values, size), rng.permutation(size)
        assert list(first(primary, tie, 5)) == sorted(range(size), key=lambda i: (primary[i], tie[i]))[:5]


async def test_the_routers_tables_follow_its_sessions_and_what_it_sends(make_worker, sentence):
    """After each piece of news the tables say what all workers, asked anew, say."""
    permits, looks = asyncio.Semaphore(0), []
    workers = [
        make_worker(lambda request: Script([[each] for each in sentence[:3]], permits=permits)) for _ in range(3)
    ]
    prefills = [worker_record(worker_id=f"p{i}", served_model_names=("tiny",)) for i in range(3)]

    def look(running: Running) -> None:
        fleet = running.parts.workers
        looks.append(sum(worker.num_outstanding for worker in fleet.decode_table().workers))
        assert fleet.decode_table().workers == fleet.decode_candidates()
        assert fleet.prefill_table().workers == fleet.prefill_candidates()
        for table in (fleet.decode_table(), fleet.prefill_table()):
            fresh = type(table)(table.workers)
            assert all((column == fresh.columns[name]).all() for name, column in table.columns.items())

    async with (
        running_router(RouterConfig(), *workers, extra_records=tuple(prefills)) as running,
        httpx.AsyncClient(base_url=running.base_url, timeout=60) as client,
    ):
        look(running)
        bodies = [{"prompt": "x" * 50, "max_tokens": number} for number in (3, 3, 3, 3)]
        asking = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
        await until(lambda: sum(len(worker.requests) for worker in workers) == len(bodies))
        look(running)
        for _ in range(12):
            permits.release()
            await asyncio.sleep(0)
            look(running)
        for answer in await asyncio.gather(*asking):
            assert answer.status_code == 200
        look(running)
        await workers[0].stop()
        await until(lambda: running.parts.workers.num_sessions_up == 2)
        look(running)
        running.membership.set(*(worker.record() for worker in workers[1:]), *prefills[1:])
        look(running)
        assert len(running.parts.workers.decode_table().workers) == 2
    assert max(looks) == len(bodies)
