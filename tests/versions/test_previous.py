"""Today's processes work together with those of the version before, in both directions.

`previous` names its commit, which is checked out below build/. It moves with a line in CHANGELOG.md alone.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from tandem.v1 import worker_pb2 as pb

from services.cli.embedded_redis import stop
from tests.orders import Orders
from tests.peers import PEER_SECRET, session_with
from tests.stack import Stack

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "services" / "cli" / "demo_model" / "tandem-demo"
COMMIT = (Path(__file__).parent / "previous").read_text().strip()
# Not in bfloat16: the kernels for that are built, and the checkout of the version before has none.
WORKER = "--dtype float32 --prefix-fetch always --prefix-fetch-timeout-s 30 --peer-timeout-s 20"
PROMPTS = [list(range(start, start + 100)) for start in (3, 203, 403)]
NUM_NEW_TOKENS = 6
STOP_TIMEOUT_S = 30.0


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def previous() -> Path:
    """A checkout of the version before."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    if git("cat-file", "-e", f"{COMMIT}^{{commit}}").returncode != 0:
        pytest.fail(f"this checkout's history lacks {COMMIT}, the version before: git fetch --unshallow")
    directory = ROOT / "build" / "versions" / COMMIT[:12]
    if git("-C", str(directory), "rev-parse", "HEAD").stdout.strip() != COMMIT:
        git("worktree", "prune")
        made = git("worktree", "add", "--force", "--detach", str(directory), COMMIT)
        assert made.returncode == 0, made.stderr
    assert git("-C", str(directory), "status", "--porcelain", "--untracked-files=no").stdout == ""
    return directory


@pytest.fixture(scope="module")
def fleet(previous: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Prefill worker, decode worker and router of either version, under one registry: `old-…` are of the one before."""
    directory = tmp_path_factory.mktemp("versions")
    decode = "--local-prefill-max-tokens 0"
    with (
        Stack(directory, prefill=[""], decode=[decode], worker=WORKER, model=DEMO_MODEL) as stack,
        ExitStack() as cleanup,
    ):
        model = ["--num-threads", "1", "--model", str(DEMO_MODEL), "--served-model-name", "m", *WORKER.split()]
        model += ["--proof-key-file", str(directory / "proof-key")]
        for role, argv in (("prefill", model), ("decode", [*model, *decode.split()]), ("router", ["--port", "0"])):
            flags = [*stack.common, *argv, *([] if role == "router" else ["--worker-id", f"old-{role}"])]
            environ = {
                **os.environ,
                "PYTHONPATH": f"{previous}:{previous / 'proto'}",
                "TANDEM_PEER_SECRET": PEER_SECRET,
            }
            with (directory / f"old-{role}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", f"services.{role}", *flags],
                    cwd=previous,
                    env=environ,
                    stdout=log,
                    stderr=log,
                )
            cleanup.callback(stop, process, STOP_TIMEOUT_S)
        stack.wait_for(lambda: len(stack.records()) == 4, "workers of both versions to announce themselves")
        for url in (stack.url, old_router(stack)):
            stack.wait_for(lambda url=url: connected(url) == {"decode-0", "old-decode"}, "sessions with both versions")
        yield stack


def old_router(stack: Stack) -> str:
    log = stack.directory / "old-router.log"
    stack.wait_for(lambda: "listening on" in log.read_text(), "the router of the version before to listen")
    return re.findall(r'listening on ([^\s"]+)', log.read_text())[-1]


def connected(router: str) -> set[str]:
    """The decode workers that a router has a session with."""
    workers = httpx.get(f"{router}/debug/workers", timeout=30).raise_for_status().json()["workers"]
    return {each["worker_id"] for each in workers if each["role"] == "decode" and each["connected"]}


async def test_prompts_are_handed_over_and_prefixes_fetched_between_versions(fleet: Stack) -> None:
    orders = Orders(fleet, NUM_NEW_TOKENS)
    for prompt, decode, prefill in ((PROMPTS[0], "decode-0", "old-prefill"), (PROMPTS[1], "old-decode", "prefill-0")):
        tokens, usage = await orders.generate(prompt, decode, prefill, [])
        assert (usage.prefill_worker_id, usage.prefilled_locally) == (prefill, False)
        assert usage.num_transferred_blocks > 0
        other = {"decode-0": "old-decode", "old-decode": "decode-0"}[decode]
        again, usage = await orders.generate(prompt, other, None, [orders.source(decode, 3)])
        assert [part.holder_id for part in usage.fetched] == [decode]
        assert again == tokens


async def test_routers_of_both_versions_have_requests_served_by_workers_of_both(fleet: Stack) -> None:
    body = {"model": "m", "prompt": PROMPTS[2], "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "receipt": True}
    texts = set()
    async with httpx.AsyncClient(timeout=60) as client:
        for router in (fleet.url, old_router(fleet)):
            decoded_by: set[str] = set()
            while decoded_by != {"decode-0", "old-decode"}:  # the second has work where the first has some still
                answers = await asyncio.gather(*(client.post(f"{router}/v1/completions", json=body) for _ in range(6)))
                for answer in answers:
                    assert answer.status_code == 200, answer.text
                    texts.add(answer.json()["choices"][0]["text"])
                    decoded_by |= set(re.findall(r'"(old-decode|decode-0)"', answer.text))
    assert len(texts) == 1


async def test_choices_with_lists_of_tokens_are_alike_through_either_version(fleet: Stack) -> None:
    """Today's router and decode worker have the lists apart from the orders; with the version before, in each."""
    allowed = list(range(300, 400))
    body = {"model": "m", "prompt": PROMPTS[1], "max_tokens": NUM_NEW_TOKENS, "temperature": 0, "n": 3, "receipt": True}
    body |= {"allowed_token_ids": allowed, "return_token_ids": True, "ignore_eos": True}
    said = set()
    async with httpx.AsyncClient(timeout=60) as client:
        for router in (fleet.url, old_router(fleet)):
            decoded_by: set[str] = set()
            while decoded_by != {"decode-0", "old-decode"}:
                answers = await asyncio.gather(*(client.post(f"{router}/v1/completions", json=body) for _ in range(4)))
                for answer in answers:
                    assert answer.status_code == 200, answer.text
                    said |= {tuple(choice["token_ids"]) for choice in answer.json()["choices"]}
                    decoded_by |= set(re.findall(r'"(old-decode|decode-0)"', answer.text))
    (token_ids,) = said
    assert len(token_ids) == NUM_NEW_TOKENS
    assert set(token_ids) <= set(allowed)


async def test_a_router_that_knows_more_than_we_do_is_served(fleet: Stack) -> None:
    """Its hello has a field and a feature that nobody has heard of, and so has its order."""
    unknown = b"\xa2\x7d\x05shiny"  # field 2004, as bytes
    hello = pb.SessionHello(router_id="newer", protocol_version="2", features=["shiny"])
    sampling = pb.SamplingParams(temperature=0, top_p=1, repetition_penalty=1, max_tokens=2, ignore_eos=True)
    order = pb.GenerateRequest(handle=1, request_id="newer", prompt_token_ids=PROMPTS[0][:20], sampling=sampling)
    for message in (hello, order):
        message.MergeFromString(unknown)
        assert unknown in message.SerializeToString()
    for worker in ("decode-0", "old-decode"):
        async with session_with(Orders(fleet, 1).record(worker).grpc_address) as session, asyncio.timeout(60):
            await session.write(pb.SessionRequest(hello=hello))
            await session.write(pb.SessionRequest(generate=order))
            outputs = [output async for frame in session_until_done(session) for output in frame.outputs]
            assert outputs[-1].finish_reason == pb.FINISH_REASON_LENGTH, outputs[-1].error


async def session_until_done(session):
    async for frame in session:
        yield frame
        if any(output.finish_reason for output in frame.outputs):
            return
