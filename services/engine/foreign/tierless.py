"""What engines answer that keep no tier of blocks beside their memory, and run their first steps as requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from kvstore.block import BlockHash
from kvstore.pool import CacheChange
from services.engine.api import Restore, StepOutput
from services.engine.request import Request, SamplingParams

_WARM_UP_TOKENS: Final = 64


class Tierless:
    """A part of the port (`services.engine.api.Engine`)."""

    def may_restore(self, block_hash: BlockHash) -> bool:
        return False

    def begin_restore(self, hashes: Sequence[BlockHash]) -> Restore | None:
        return None

    def host_hashes(self) -> list[BlockHash]:
        return []

    def take_host_changes(self) -> list[CacheChange]:
        return []

    def host_figures(self) -> Mapping[str, float]:
        return {}


class _Steps(Protocol):
    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def step(self) -> StepOutput: ...


def first_steps(engine: _Steps, max_num_tokens: int, temperature: float) -> list[StepOutput]:
    """Compute a made-up prompt of at most so many tokens, and a token after the first one.

    With log probabilities where tokens are drawn: both have kernels that are made ready at their first use.
    """
    made_up = SamplingParams(
        temperature=temperature, logprobs=1 if temperature else None, max_tokens=2, ignore_eos=True
    )
    engine.add_request(Request("warm-up", (0,) * min(_WARM_UP_TOKENS, max_num_tokens), made_up))
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs.append(engine.step())
    return outputs
