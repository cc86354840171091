"""Tasks that give back what transfers held: they are waited for, and their errors are seen."""

from __future__ import annotations

import pytest

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
