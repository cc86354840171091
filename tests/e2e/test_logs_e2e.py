"""The logs of a whole stack at its most talkative: every request can be followed, and no word of it can be read."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.stack import Service, Stack

DEMO_MODEL = Path(__file__).parents[2] / "services" / "cli" / "demo_model" / "tandem-demo"
MARKER = "xylophone-marmalade-7741"
TOKEN_IDS = [211, 97, 305, 118, 402, 266, 173, 350]
KEY, WRONG_KEY = "sk-tandem-quartz-secret", "sk-wrong-but-somebodys-secret"
PROMPT = f"The code of {MARKER} is 4711. What is the code of {MARKER}? " * 6
QUOTING = ("bad-model", "bad-type", "bad-stop", "bad-format", "bad-bias")  # the marker is in a parameter, not a prompt
# gRPC's own, of a worker that stood still for longer than its keepalive allows, as it does on a busy machine.
GRPC_LINE = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ \w+\.cc:\d+\] ")
Lines = dict[str, list[dict[str, object]]]


@pytest.fixture(scope="module")
def stack(new_stack: Callable[..., Stack]) -> Iterator[Stack]:
    logs = "--log-format json --log-level debug"
    with new_stack(
        DEMO_MODEL,
        f"{logs} --peer-timeout-s 4 --num-gpu-blocks-override 512",
        prefill=["--max-num-batched-tokens 64"],
        decode=["--local-prefill-max-tokens 0"] * 2,
        store=[logs],
        router=f"{logs} --api-key acme:{KEY} --public-routes metrics debug",
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def answers(stack: Stack) -> dict[str, str]:
    """What the model generated, by request id, after requests of every kind: served, refused, cut, and orphaned."""
    answers = {}
    with httpx.Client(base_url=stack.url, timeout=120, headers={"Authorization": f"Bearer {KEY}"}) as client:

        def complete(header_id: str, status: int = 200, **fields: object) -> str:
            body = {"model": "m", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
            response = client.post("/v1/completions", json=body, headers={"X-Request-Id": header_id})
            assert response.status_code == status, response.text
            assert status == 200 or header_id in QUOTING or MARKER not in response.text, "an error quotes the prompt"
            return response.text

        def begin_stream(request_id: str) -> None:
            """Read the head of an answer and hang up."""
            body = {"model": "m", "prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": request_id}) as stream:
                next(stream.iter_lines())

        answers["whole"] = json.loads(complete("whole"))["choices"][0]["text"]
        answers["tokens"] = json.loads(complete("tokens", prompt=TOKEN_IDS * 20))["choices"][0]["text"]
        both = json.loads(complete("overruled", request_id="named-in-the-body", n=2))["choices"]
        answers["named-in-the-body"] = both[0]["text"]
        messages = [{"role": "user", "content": PROMPT}]
        chat = {"model": "m", "messages": messages, "max_tokens": 24, "ignore_eos": True, "logprobs": True}
        client.post("/v1/chat/completions", json=chat | {"request_id": "chat"})

        complete("bad-json", 400, prompt={"text": MARKER})
        complete("bad-type", 400, temperature=MARKER)
        complete("bad-model", 404, model=MARKER)
        complete("bad-stop", 400, stop=[MARKER] * 100)
        complete("bad-format", 400, response_format={"type": MARKER})
        complete("too-long", 400, prompt=PROMPT * 100)
        complete("bad-token", 400, prompt=[*TOKEN_IDS, 99_999_999])
        complete("bad-bias", 400, logit_bias={MARKER: 1})
        for content in (f'{{"prompt": "{MARKER}"', json.dumps({"messages": MARKER})):
            refusal = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            assert MARKER not in refusal.text
        client.get(f"/v1/models/{MARKER}")
        client.get(f"/{MARKER}?prompt={MARKER}")
        client.post("/tokenize", json={"model": "m", "prompt": PROMPT})
        client.post("/v1/completions", json={"prompt": PROMPT}, headers={"Authorization": f"Bearer {WRONG_KEY}"})

        begin_stream("cut")
        prefill, decode = stack.services["prefill-0"].process, stack.services["decode-0"].process
        os.kill(prefill.pid or 0, signal.SIGSTOP)
        complete("without-prefill-0", max_tokens=8, prompt=f"prefill {PROMPT}")
        os.kill(prefill.pid or 0, signal.SIGCONT)
        decode.kill()
        decode.join()
        complete("without-decode-0", max_tokens=8, prompt=f"decode {PROMPT}")
    return answers


@pytest.fixture(scope="module")
def lines(stack: Stack, answers: dict[str, str]) -> Lines:
    """Every line of every process, by its name."""
    for request_id in ("cut", "without-decode-0"):
        stack.wait_for(
            lambda request_id=request_id: any(
                line.get("request_id") == request_id and "status" in line for line in lines_of(stack.services["router"])
            ),
            f"the line of {request_id}",
        )
    return {name: lines_of(service) for name, service in stack.services.items()}


def lines_of(service: Service) -> list[dict[str, object]]:
    """What it has said so far; its last line may be half written."""
    whole = service.log.rpartition("\n")[0].splitlines()
    return [json.loads(line) for line in whole if line.strip() and not GRPC_LINE.match(line)]


def about(lines: Lines, role: str, request_id: str) -> list[dict[str, object]]:
    return [
        line
        for name, of_process in lines.items()
        if name.startswith(role)
        for line in of_process
        if line.get("request_id") == request_id
    ]


@pytest.mark.parametrize("request_id", ["whole", "tokens", "chat"])
def test_a_request_is_found_by_its_id_in_the_logs_of_router_decode_and_prefill(lines: Lines, request_id: str) -> None:
    (access,) = [line for line in about(lines, "router", request_id) if "status" in line]
    assert (access["status"], access["level"], access["role"]) == (200, "info", "router")
    (ended,) = [line for line in about(lines, "decode", request_id) if line["message"] == "request ended"]
    assert (ended["role"], ended["worker_id"], ended["finish_reason"]) == ("decode", access["decoded_by"], "length")
    (prefill,) = [line for line in about(lines, "prefill", request_id) if line["message"] == "prefill finished"]
    assert prefill["worker_id"] == access["prefilled_by"] == ended["prefilled_by"] == "prefill-0"
    assert prefill["reader"] == access["decoded_by"]
    assert access["prompt_tokens"] == ended["prompt_tokens"] == prefill["prompt_tokens"]
    assert access["generated_tokens"] == ended["generated_tokens"] == 24
    assert 0 < access["ttft_seconds"] <= access["seconds"]


def test_each_request_has_one_line_at_the_router_however_it_ended(lines: Lines) -> None:
    accesses = [line for line in lines["router"] if line["logger"] == "services.router.edge.access" and "error" in line]
    found = {line["request_id"]: (line["status"], line["error"]) for line in accesses}
    assert found["cut"] == (499, "client_gone")
    assert found["bad-model"] == (404, "model_not_found")
    assert found["too-long"] == (400, "context_length_exceeded")
    assert all(found[f"bad-{what}"][0] == 400 for what in ("json", "type", "stop", "format", "token", "bias"))
    assert 401 in [status for status, _ in found.values()]
    assert not about(lines, "router", "overruled"), "the id in the body counts"
    (several,) = [line for line in about(lines, "router", "named-in-the-body") if "status" in line]
    assert several["generated_tokens"] == 48
    assert {line["request_id"] for line in lines["prefill-0"] if "request_id" in line} > {"named-in-the-body-0"}


def test_what_serves_all_requests_is_not_in_the_name_of_one(lines: Lines) -> None:
    connections = [line for of in lines.values() for line in of if line["logger"] == "kvstore.exchange.peer_sessions"]
    assert len(connections) >= 4
    assert not [line for line in connections if "request_id" in line]


def test_a_lost_worker_is_in_the_lines_of_the_requests_that_it_cost(lines: Lines) -> None:
    failures = [line for line in about(lines, "decode", "without-prefill-0") if line["level"] == "warning"]
    assert any("prefill by prefill-0 failed" in str(line["message"]) for line in failures)
    (access,) = [line for line in about(lines, "router", "without-decode-0") if "status" in line]
    assert access["decoded_by"] == "decode-1"


def test_no_line_quotes_a_prompt_an_answer_or_a_key(stack: Stack, lines: Lines, answers: dict[str, str]) -> None:
    for service in stack.services.values():
        text = service.log
        assert len(text) > 500, f"{service.name} is not silent"
        for secret in (MARKER, KEY, WRONG_KEY, "99999999"):
            assert secret not in text, f"{service.name}: {secret}"
        for separator in (", ", ",", " ", "\\n"):
            assert separator.join(map(str, TOKEN_IDS[:3])) not in text, f"{service.name}: token ids"
        for request_id, answer in answers.items():
            assert len(answer.strip()) >= 8
            assert answer.strip() not in text, f"{service.name}: the answer to {request_id}"
    assert all({"time", "level", "logger", "message", "role"} <= line.keys() for of in lines.values() for line in of)
