"""A stream whose decode worker dies or drains, between workers of equal and of other kernels: what a receipt promises.

Router, decode services and engines are the product's, in one process; orders and blocks go through memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Literal

import msgspec
import pytest
import torch
from tandem.v1 import worker_pb2 as pb

from kvstore.registry import WorkerRecord
from services.engine.native.kernels.choice import KernelChoice
from services.engine.native.model import model
from tests.hf_models import random_prompts, write_model
from tests.kernels.conftest import RUNNABLE, Libraries
from tests.memory_transport import Switchboard
from tests.router.scripted_fleet import Killed, scripted_fleet
from tests.worker.decode_worker import DecodeWorker, running
from tests.worker_records import worker_record

OTHER = RUNNABLE[-1]
END_AT = 20
ASKED: dict[str, object] = {
    "prompt": random_prompts([37], seed=5)[0],
    "max_tokens": 80,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "stream": True,
    "receipt": True,
}


class Worker:
    """A decode worker as the scripted fleet takes it."""

    def __init__(self, real: DecodeWorker, model: Path) -> None:
        able = real.parts.engine.capabilities
        self.real = real
        self.ends: Literal["", "dies", "drains"] = ""
        """What it does once it has said so many tokens."""
        self.on_end: Callable[[], None] = lambda: None
        self.num_said = 0
        self.record: WorkerRecord = worker_record(
            worker_id=real.parts.worker_id,
            incarnation="1",
            role="decode",
            served_model_names=("tiny",),
            model_path=str(model),
            tokenizer_path=str(model),
            model_fingerprint=real.parts.engine.layout.model_fingerprint,
            block_size=real.parts.engine.layout.block_size,
            grpc_address=real.parts.worker_id,
            kv_address=real.parts.exchange.address,
            max_model_len=able.max_model_len,
            colocated=True,
            numerics=able.numerics,
            is_exact=able.is_exact,
        )

    async def serve(
        self, requests: AsyncIterator[pb.SessionRequest], send: Callable[[pb.SessionFrame], Awaitable[None]]
    ) -> None:
        async def watched(frame: pb.SessionFrame) -> None:
            self.num_said += len(frame.token_ids) + sum(len(output.token_ids) for output in frame.outputs)
            await send(frame)
            if self.ends and self.num_said >= END_AT:
                self.on_end()
                if self.ends == "dies":
                    raise Killed
                self.real.service.begin_drain()

        if self.ends == "dies" and self.num_said >= END_AT:
            raise Killed
        await self.real.service.serve_session(requests, watched)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama3", "llama3", seed=3, dtype="bfloat16")


def decode_worker(
    libraries: Libraries, kernels: str, number: int, path: Path, switchboard: Switchboard
) -> DecodeWorker:
    with pytest.MonkeyPatch.context() as patch:
        if kernels != "torch":
            library = libraries(kernels)
            patch.setattr(model, "choose_kernels", lambda wanted: KernelChoice(library, "as the test says"))
        return DecodeWorker(
            f"decode-{number}",
            path,
            switchboard,
            cpu_kernels="torch" if kernels == "torch" else "auto",
            num_threads=1,
            colocated=True,
        )


@pytest.mark.parametrize("ends", ["dies", "drains"])
@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (("portable", "portable"), "exact"),
        (("portable", OTHER), "inexact"),
        (("portable", "torch"), "inexact"),
        (("torch", "torch"), "inexact"),  # whose bits depend on how many rows it computes at once
    ],
)
async def test_exact_is_said_of_equal_kernels_that_are_known_for_it_and_then_it_is(
    libraries: Libraries, model_path: Path, kernels: tuple[str, str], ends: Literal["dies", "drains"], expected: str
) -> None:
    switchboard = Switchboard()
    reals = [decode_worker(libraries, name, number, model_path, switchboard) for number, name in enumerate(kernels)]
    async with running(*reals), scripted_fleet() as fleet:
        first, second = (Worker(real, model_path) for real in reals)
        able = second.record
        second.record = msgspec.structs.replace(able, draining=True)  # so that it goes to the first one
        await fleet.serve_with(first, second)  # type: ignore[arg-type]
        undisturbed = await fleet.ask(**ASKED)

        def end() -> None:
            second.record = able
            fleet.announce(first, second)  # type: ignore[arg-type]

        first.ends, first.num_said, first.on_end = ends, 0, end
        answer = await fleet.ask(**ASKED)
        (receipt,) = answer.receipts
        (resume,) = receipt["resumes"]  # type: ignore[misc]
        assert resume["reason"] == {"dies": "lost", "drains": "moved"}[ends]
        assert (receipt["resumed_elsewhere"], receipt["numerics"]) == (expected, second.record.numerics)
        assert (first.record.numerics == second.record.numerics) == (kernels[0] == kernels[1])
        if expected == "exact":
            assert answer.choices() == undisturbed.choices()
        assert len(answer.choices()[0]["token_ids"]) == ASKED["max_tokens"]  # type: ignore[arg-type]
