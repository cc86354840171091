"""Decides what becomes of an order at the prefill worker. Pure: `PrefillService` tells what happens, and does the rest.

    state       what it waits for                     its caller hangs up, it expires, the worker stands still
    PREPARING   hashes, a prefix from elsewhere       the preparation is cancelled; nothing is held
    QUEUED      its first chunk                       the engine drops it; nothing is held
    COMPUTING   chunks; the lease is open             computing ends, the lease is revoked: CLOSING
    LENT        the lease's end; all is announced     nothing; hung up before its last event: CLOSING
    CLOSING     the lease's end                       nothing: that comes
    SETTLED     nothing                               nothing

The call gets exactly one last event, `finished` or `failed`, unless it ends before. Blocks are pinned from the first
announcement on, by references that the order took on the engine thread. SETTLE gives them back, exactly once, and only
after the lease has closed: no transport of ours touches the blocks then.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from services.worker.states import Rows


class OrderState(Enum):
    """The states of an order that was not refused at once."""

    PREPARING = "preparing"
    QUEUED = "queued"
    COMPUTING = "computing"
    LENT = "lent"
    CLOSING = "closing"
    SETTLED = "settled"


class OrderEvent(Enum):
    """What may happen to an order, wherever it is."""

    PREPARED = "hashes and prefix are here, as far as they are to be had"
    REFUSED = "we, or the engine, cannot take it"
    BEGUN = "the first chunk is about to be computed"
    CHUNK = "blocks became full"
    LAST_CHUNK = "all blocks are computed, the first token is sampled"
    NO_TOKEN = "the engine could not get a token out of the prompt"
    LEASE_CLOSED = "confirmed, released, expired, revoked, or its reader is lost; or it could not be opened"
    HUNG_UP = "the call has ended before its last event was sent"
    CALL_ENDED = "the call has ended behind its last event"
    EXPIRED = "its time-out has passed"
    STOPPED = "the worker stands still, or its time to drain is over"
    BROKEN = "one of the actions failed: a bug of ours"


class OrderAction(Enum):
    """What is to be done."""

    CANCEL = "end the preparation"
    SUBMIT = "give it to the engine"
    LEND = "open the lease, tell the caller; `LEASE_CLOSED` follows, always"
    ANNOUNCE = "tell the reader of the blocks"
    FINISH = "tell the caller the first token: its last event"
    FAIL = "tell the caller why not: its last event"
    REVOKE = "end computing, and the lease"
    SETTLE = "take it out of the engine, and give its blocks back"


_S, _E, _A = OrderState, OrderEvent, OrderAction
_Rows = Rows[OrderEvent, OrderState, OrderAction]

# What the engine had sent before it heard that the order is over.
_LATE: Final[tuple[OrderEvent, ...]] = (_E.CHUNK, _E.LAST_CHUNK, _E.NO_TOKEN)


def _ends(state: OrderState, *undo: OrderAction) -> _Rows:
    """Return the rows of a state in which the order can still fail."""
    failed = (state, (_A.FAIL, *undo))
    return {_E.EXPIRED: failed, _E.STOPPED: failed, _E.HUNG_UP: (state, undo)}


def _stays(state: OrderState, *events: OrderEvent) -> _Rows:
    return dict.fromkeys(events, (state, ()))


TRANSITIONS: Final[Mapping[OrderState, _Rows]] = {
    _S.PREPARING: {
        **_ends(_S.SETTLED, _A.CANCEL),
        _E.PREPARED: (_S.QUEUED, (_A.SUBMIT,)),
        _E.REFUSED: (_S.SETTLED, (_A.FAIL,)),
    },
    _S.QUEUED: {
        **_ends(_S.SETTLED, _A.SETTLE),
        _E.REFUSED: (_S.SETTLED, (_A.FAIL,)),
        _E.BEGUN: (_S.COMPUTING, (_A.LEND,)),
    },
    _S.COMPUTING: {
        **_ends(_S.CLOSING, _A.REVOKE),
        _E.BROKEN: (_S.CLOSING, (_A.FAIL, _A.REVOKE)),
        _E.CHUNK: (_S.COMPUTING, (_A.ANNOUNCE,)),
        _E.LAST_CHUNK: (_S.LENT, (_A.ANNOUNCE, _A.FINISH)),
        _E.NO_TOKEN: (_S.CLOSING, (_A.FAIL, _A.REVOKE)),
        _E.LEASE_CLOSED: (_S.SETTLED, (_A.FAIL, _A.SETTLE)),
    },
    _S.LENT: {
        **_stays(_S.LENT, _E.CALL_ENDED, _E.STOPPED),
        _E.HUNG_UP: (_S.CLOSING, (_A.REVOKE,)),
        _E.BROKEN: (_S.CLOSING, (_A.FAIL, _A.REVOKE)),
        _E.LEASE_CLOSED: (_S.SETTLED, (_A.SETTLE,)),
    },
    _S.CLOSING: {
        **_stays(_S.CLOSING, *_LATE, _E.HUNG_UP, _E.CALL_ENDED, _E.STOPPED),
        _E.LEASE_CLOSED: (_S.SETTLED, (_A.SETTLE,)),
    },
    _S.SETTLED: _stays(_S.SETTLED, *_LATE, _E.PREPARED, _E.REFUSED, _E.BEGUN, _E.HUNG_UP, _E.CALL_ENDED, _E.STOPPED),
}
"""What has no row is a bug of ours, which raises with the history. A lease closes once; the time-out ends with the last
event; nothing breaks where nothing is done."""
