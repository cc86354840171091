"""A simulated fleet: each request ends once, nothing leaks, times are those that a hand computes, and runs repeat."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from services.budgets import Objectives
from services.engine.api import Engine, Request, SamplingParams
from services.engine.config import EngineConfig
from services.engine.paced import open_paced, read_profile
from services.planner import Delays, Limits, Outcomes, PlannedRequest, Setup, Shape, Simulation, Workload, simulate
from services.planner.step_worker import StepWorker
from services.planner.virtual_time import VirtualTime
from services.rates import Rates, StepShape, tokens_of
from tests.hf_models import write_model

RATES = Rates(base_s=0.01, prompt_token_s=1e-4, prompt_pair_s=1e-9, running_s=1e-4, context_token_s=1e-8)
SETUP = Setup(RATES, Objectives(0.5, 0.03), Limits(max_num_seqs=32, num_blocks=512, block_size=16))
STEP_FIELDS = ("base_s", "prompt_token_s", "prompt_pair_s", "running_s", "context_token_s")
SHAPES = [
    Shape(0, 1),
    Shape(0, 3),
    Shape(1, 1),
    Shape(2, 2),
    Shape(1, 1, is_elastic=True),
    Shape(1, 3, is_elastic=True),
]


def workload(num_requests: int = 120, rate: float = 20.0, seed: int = 1, num_families: int = 20) -> Workload:
    """Prompts of a few families: those of one begin equally."""
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for number in range(num_requests):
        at_s += rng.expovariate(rate)
        blocks = (rng.randrange(num_families), *range(1000 + 10 * number, 1010 + 10 * number))
        requests.append(PlannedRequest(at_s, rng.randint(1, 600), rng.randint(1, 60), blocks))
    return Workload(requests, tokens_per_block=64)


def run(shape: Shape, of: Workload, setup: Setup = SETUP, *, takes_steps: bool = True) -> Outcomes:
    return simulate(of, shape, setup, takes_steps=takes_steps)


@pytest.mark.parametrize("takes_steps", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_run_gives_the_same_to_the_last_bit(shape: Shape, takes_steps: bool) -> None:
    first, second = (run(shape, workload(40), takes_steps=takes_steps) for _ in range(2))
    assert first.outcomes == second.outcomes
    assert (first.num_steps, first.itl) == (second.num_steps, second.itl)


@pytest.mark.parametrize("takes_steps", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_request_ends_once_with_all_its_tokens_in_order(shape: Shape, takes_steps: bool) -> None:
    requests = workload(60)
    outcomes = run(shape, requests, takes_steps=takes_steps).outcomes
    wanted = Counter((each.at_s, each.num_prompt_tokens, each.num_output_tokens) for each in requests.requests)
    assert Counter((each.at_s, each.num_prompt_tokens, each.num_output_tokens) for each in outcomes) == wanted
    assert all(each.at_s < each.first_s <= each.end_s for each in outcomes)
    assert all(each.first_s < each.end_s for each in outcomes if each.num_output_tokens > 1)


@pytest.mark.parametrize("shape", SHAPES[1:6:2], ids=str)
def test_no_block_leaks_where_memory_is_short(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """So short that running requests are preempted; checked after each step."""
    setup = replace(SETUP, limits=replace(SETUP.limits, num_blocks=64))
    simulation = Simulation(workload(rate=60), shape, setup, takes_steps=True)
    workers = [each for each in simulation.workers if isinstance(each, StepWorker)]
    stepped = simulation.stepped

    def checked(row: int) -> None:
        workers[row].check_integrity()
        stepped(row)

    monkeypatch.setattr(simulation, "stepped", checked)
    outcomes = simulation.run()
    assert len(outcomes.outcomes) == 120
    assert sum(worker.scheduler.stats.num_preemptions for worker in workers) > 0
    for worker in workers:
        worker.check_integrity()
        assert worker.load().num_running == worker.load().num_waiting == 0
        assert worker.pool.num_free == worker.pool.num_blocks


@pytest.mark.parametrize("takes_steps", [True, False])
def test_a_lone_request_takes_what_its_steps_take(takes_steps: bool) -> None:
    setup = replace(SETUP, delays=Delays(order_s=0.002, frame_s=0.001, handoff_s=0.005))
    alone = Workload([PlannedRequest(1.0, 700, 3, tuple(range(20)))], 64)
    # Two chunks, of 512 and of 188 tokens; then a token a step, which attends to 701 tokens and to 702.
    chunks_s = 2 * 0.01 + 700e-4 + (700 * 701 // 2) * 1e-9
    steps_s = 2 * (0.01 + 1e-4) + (701 + 702) * 1e-8
    colocated = run(Shape(0, 1), alone, setup, takes_steps=takes_steps)
    (outcome,) = colocated.outcomes
    assert outcome.ttft_s == pytest.approx(0.002 + chunks_s + 0.001)
    assert outcome.end_s - outcome.first_s == pytest.approx(steps_s)
    assert colocated.num_steps == 4
    disaggregated = run(Shape(1, 1), alone, setup, takes_steps=takes_steps)
    (outcome,) = disaggregated.outcomes
    read_s = RATES.fetch_s(tokens_of("device", 188))
    assert outcome.ttft_s == pytest.approx(0.002 + 0.002 + chunks_s + read_s + 0.005 + 0.001)
    assert outcome.end_s - outcome.first_s == pytest.approx(steps_s)
    assert disaggregated.prefill_busy_s == pytest.approx(chunks_s)
    assert disaggregated.decode_busy_s == pytest.approx(steps_s)


def test_three_requests_share_steps_as_the_scheduler_has_them_do() -> None:
    """By hand: the second and third come during the first one's chunk, and share the next step with its next token."""
    requests = [
        PlannedRequest(0.0, 100, 3, (0, 1)),
        PlannedRequest(0.001, 200, 2, (10, 11, 12, 13)),
        PlannedRequest(0.002, 400, 1, (20, 21, 22, 23, 24, 25, 26)),
    ]
    setup = replace(SETUP, delays=Delays(0.0, 0.0, 0.0))
    simulation = Simulation(Workload(requests, 64), Shape(0, 1), setup, takes_steps=True)
    (worker,) = simulation.workers
    assert isinstance(worker, StepWorker)
    shapes: list[StepShape] = []
    worker.on_shape = shapes.append
    simulation.run()
    pairs = 200 * 201 // 2 + 311 * 312 // 2
    assert shapes == [
        StepShape(100, 100 * 101 // 2, 0, 0),
        StepShape(200 + 311, pairs, 1, 101),  # of 512 tokens, one is the stream's
        StepShape(89, 311 * 89 + 89 * 90 // 2, 2, 102 + 201),
    ]


def test_a_prefix_that_is_there_is_not_computed_again() -> None:
    prompt = (1, 2, 3, 4)
    requests = Workload([PlannedRequest(0.0, 256, 2, prompt), PlannedRequest(5.0, 256, 2, prompt)], 64)
    for shape in (Shape(0, 2), Shape(2, 1)):
        first, second = run(shape, requests).outcomes
        assert first.num_cached_tokens == 0
        assert second.ttft_s < 0.6 * first.ttft_s
    assert run(Shape(0, 2), requests).outcomes[1].num_cached_tokens == 255


def test_what_finds_the_queue_full_is_refused_and_is_not_good() -> None:
    setup = replace(SETUP, max_queue=2, max_concurrent_requests=1, objectives=Objectives())
    outcomes = run(Shape(0, 1), workload(40, rate=1000), setup)
    assert outcomes.num_refused > 0
    assert outcomes.num_good == 40 - outcomes.num_refused


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leaps_end_where_steps_do(shape: Shape) -> None:
    """Without equal prompts, and with memory enough, the one leaves nothing out that the other has."""
    requests = workload(200, rate=12, num_families=10**6)
    steps, leaps = (run(shape, requests, takes_steps=each) for each in (True, False))
    assert leaps.ttft.p50 == pytest.approx(steps.ttft.p50, rel=0.02)
    assert leaps.tpot.p90 == pytest.approx(steps.tpot.p90, rel=0.05)
    assert leaps.num_good == pytest.approx(steps.num_good, abs=4)


@pytest.mark.slow
@pytest.mark.parametrize("takes_steps", [True, False])
def test_more_workers_are_never_worse_by_more_than_noise(takes_steps: bool) -> None:
    requests = workload(150, rate=60)
    for shapes in ([Shape(0, n) for n in (1, 2, 4, 8)], [Shape(n, n) for n in (1, 2, 4)]):
        good = [run(shape, requests, takes_steps=takes_steps).good for shape in shapes]
        assert all(after >= before - 0.02 for before, after in itertools.pairwise(good)), good
        assert good[-1] > good[0]


def test_an_elastic_fleet_bends_where_a_fixed_one_misses() -> None:
    """First long prompts and short answers, then short prompts and long answers: each half is wrong for one split."""
    rng = random.Random(7)
    requests = []
    for number in range(320):
        is_late = number >= 160
        prompt, answer = (rng.randint(20, 60), rng.randint(150, 250)) if is_late else (rng.randint(900, 1300), 4)
        requests.append(PlannedRequest(0.11 * number, prompt, answer, tuple(range(40 * number, 40 * number + 21))))
    shifting = Workload(requests, 64)
    setup = replace(SETUP, objectives=Objectives(0.5, 0.0115), limits=replace(SETUP.limits, num_blocks=2048))
    fixed = [run(Shape(num, 3 - num), shifting, setup, takes_steps=False).good for num in (1, 2)]
    elastic = run(Shape(2, 1, is_elastic=True), shifting, setup, takes_steps=False)
    assert elastic.good > max(fixed)


@pytest.mark.parametrize("takes_steps", [True, False])
def test_redirected_prompts_end_once_and_leave_no_block(takes_steps: bool) -> None:
    """Long and short prompts come in bursts: those that would be late where they wait go on elsewhere."""
    rng = random.Random(11)
    requests = [
        PlannedRequest(
            0.6 * (n // 10), rng.choice((100, 300, 3000)), rng.choice((1, 5, 60)), tuple(range(80 * n, 80 * n + 48))
        )
        for n in range(60)
    ]
    setup = replace(SETUP, objectives=Objectives(0.8, 0.03), limits=replace(SETUP.limits, num_blocks=2048))
    simulation = Simulation(Workload(requests, 64), Shape(1, 2, is_elastic=True), setup, takes_steps=takes_steps)
    outcomes = simulation.run()
    assert outcomes.num_redirects > 3
    wanted = Counter((each.at_s, each.num_prompt_tokens, each.num_output_tokens) for each in requests)
    assert Counter((each.at_s, each.num_prompt_tokens, each.num_output_tokens) for each in outcomes.outcomes) == wanted
    assert all(each.at_s < each.first_s <= each.end_s for each in outcomes.outcomes)
    # No two prompts share a block, and what was computed for a prompt itself is no cached one.
    assert not any(each.num_cached_tokens for each in outcomes.outcomes)
    for worker in simulation.workers:
        load = worker.load()
        assert (load.num_running, load.num_waiting, load.num_free_blocks) == (0, 0, load.num_blocks)
        if isinstance(worker, StepWorker):
            worker.check_integrity()


@pytest.mark.slow
def test_the_policy_changes_roles_where_one_side_is_short() -> None:
    """Prompts with short answers: too many for a fleet that begins with one prefill worker of four."""
    rng = random.Random(3)
    prompts = [
        PlannedRequest(0.045 * n, rng.randint(1000, 1200), 8, tuple(range(40 * n, 40 * n + 20))) for n in range(1450)
    ]
    setup = replace(SETUP, objectives=Objectives(1.0, 0.02), limits=replace(SETUP.limits, num_blocks=2048))
    outcomes = run(Shape(1, 3, is_elastic=True), Workload(prompts, 64), setup, takes_steps=False)
    assert outcomes.num_flips > 0
    assert outcomes.num_requests == len(prompts)


def test_calls_run_in_order_of_time_and_then_of_asking() -> None:
    time, heard = VirtualTime(), list[tuple[str, float]]()

    def hear(name: str) -> None:
        heard.append((name, time.now_s))

    time.at(2.0, hear, "late")
    time.at(1.0, hear, "first")
    time.at(1.0, lambda: time.at(0.5, hear, "of the past"))
    time.after(1.0, hear, "second")
    time.run()
    assert heard == [("first", 1.0), ("second", 1.0), ("of the past", 1.0), ("late", 2.0)]


@pytest.mark.slow
def test_the_paced_engine_takes_the_same_steps(tmp_path: Path) -> None:
    """The same requests, through the engine of `--engine paced` with a clock that its own sleeping moves."""
    path = tmp_path / "slow.json"
    # Steps of many seconds: what this machine itself takes for one is never more.
    path.write_text(json.dumps({field: 1000 * getattr(RATES, field) for field in STEP_FIELDS}))
    profile = read_profile(str(path))
    model = write_model(tmp_path / "model", "llama3", seed=3)
    (model / "model.safetensors").unlink()
    limits = Limits(max_num_seqs=4, max_num_batched_tokens=96, num_blocks=40, block_size=16, max_model_len=256)
    rng = random.Random(5)
    requests = [
        PlannedRequest(
            0.15 * number, rng.randint(20, 180), rng.randint(1, 12), (number % 3, 100 + number, 200 + number)
        )
        for number in range(30)
    ]
    of = Workload(requests, 64)
    setup = Setup(profile.rates, Objectives(), limits, Delays(0.0, 0.0, 0.0), worker_backlog_s=0.0)
    simulation = Simulation(of, Shape(0, 1), setup, takes_steps=True)
    (worker,) = simulation.workers
    assert isinstance(worker, StepWorker)
    simulated: list[StepShape] = []
    worker.on_shape = simulated.append
    simulation.run()

    taken: list[StepShape] = []
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        taken.append(engine.step_shape)
        now_s += profile.step_s(engine.step_shape)

    config = EngineConfig(
        str(model), engine="paced", paced_profile=str(path), block_size=16, max_model_len=256,
        num_gpu_blocks_override=40, max_num_seqs=4, max_num_batched_tokens=96,
    )  # fmt: skip
    engine: Engine = open_paced(config, clock=lambda: now_s, sleep=sleep)
    to_come = list(requests)
    while to_come or engine.has_work:
        if not engine.has_work:
            now_s = max(now_s, to_come[0].at_s)
        while to_come and to_come[0].at_s <= now_s:
            each = to_come.pop(0)
            sampling = SamplingParams(temperature=0.0, max_tokens=each.num_output_tokens, ignore_eos=True)
            prompt = [token_id % 256 for token_id in of.prompt(each)]
            engine.add_request(Request(str(len(to_come)), prompt, sampling, arrival_s=each.at_s))
        engine.step()
    assert taken == simulated
