"""What every measuring tool is asked to send, and the figures that it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LEAST_REPORTED = 0.95


@dataclass(frozen=True)
class Load:
    """An open loop: requests of equal lengths at equal gaps. Every seed makes other prompts."""

    num_requests: int
    rate: float
    prompt_tokens: int
    output_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """A server under test, and the directory with the tokenizer of its model."""

    url: str
    model: str
    tokenizer: Path


@dataclass(frozen=True)
class Figures:
    """One run as a tool reports it. Latencies are medians over the requests.

    `tpot_ms` is the time from the first token to the last, divided by the tokens after the first, whatever the tool
    calls it.
    """

    num_ok: int
    num_failed: int
    num_output_tokens: int
    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float

    def check(self, load: Load) -> None:
        """Raises AssertionError where a request failed, or an answer was short.

        Of many requests a tool may leave one out of its report: on a machine without time to spare guidellm has, with
        no failure anywhere.
        """
        told = f"{self.num_ok} of {load.num_requests} requests completed, {self.num_failed} failed"
        assert self.num_failed == 0, told
        assert self.num_ok >= _LEAST_REPORTED * load.num_requests, told
        expected = self.num_ok * load.output_tokens
        assert self.num_output_tokens == expected, f"{self.num_output_tokens} output tokens, {expected} asked for"
        assert min(self.ttft_ms, self.tpot_ms, self.output_tokens_per_s) > 0, self

    def __str__(self) -> str:
        return (
            f"{self.num_ok} requests, TTFT {self.ttft_ms:.1f} ms, TPOT {self.tpot_ms:.2f} ms,"
            f" {self.output_tokens_per_s:.1f} tokens/s"
        )


Measure = Callable[[Target, Load], Figures]
