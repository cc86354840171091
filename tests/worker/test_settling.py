"""Tasks that give back what transfers held: they are waited for, and their errors are seen."""

from __future__ import annotations

import asyncio

import pytest

from services.worker import settling
from services.worker.settling import Settlements


async def test_a_settlement_that_breaks_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def breaks() -> None:
        raise RuntimeError("the books do not balance")

    settlements = Settlements("loans")
    settlements.start(breaks(), "loan-1")
    assert len(settlements) == 1
    await settlements.ended()
    assert len(settlements) == 0
    assert "loan-1 broke" in caplog.text
    assert "the books do not balance" in caplog.text


async def test_what_does_not_settle_is_named_and_holds_up_no_shutdown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs() -> None:
        await may_end.wait()

    monkeypatch.setattr(settling, "_SETTLE_TIMEOUT_S", 0.05)
    may_end, settlements = asyncio.Event(), Settlements("loans")
    settlements.start(hangs(), "loan-1")
    async with asyncio.timeout(20):
        await settlements.settled()
    assert "1 loans hold blocks still" in caplog.text
    may_end.set()
    await settlements.ended()
