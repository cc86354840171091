"""Decides what becomes of a live request at the decode worker. Pure: `DecodeService` tells what happens, does the rest.

    stage       where it is                             the router aborts it, or is lost; its time is up; we close
    ADMITTING   its admission brings its blocks, or     the admission is cancelled, and disposes of what it has
                a place in the engine (admission.py)    (see there); the engine drops it
    QUEUED      the engine has it: no token yet         the engine drops it between two steps, and frees its blocks
    REDIRECTED  the engine is asked to give it up       the same
                before its first token, so that its
                prompt goes on elsewhere
                (redirecting.py)
    DECODING    tokens come                             the same; the admission is cancelled, if it has not ended
    LEAVING     any of these, asked to go elsewhere:    as in any of these; what the engine lets go afterwards is freed
                it goes as soon as the engine can
                let it (moving.py)
    ENDED       its last output is on the way           nothing

Every request gets exactly one output with a finish reason, by END.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final

from services.worker.states import Rows


class LiveState(Enum):
    """The stages of a request; the values are for messages."""

    ADMITTING = "handoff"
    QUEUED = "prefill queue"
    REDIRECTED = "redirection"
    DECODING = "decode"
    LEAVING = "move"
    ENDED = "end"


class LiveEvent(Enum):
    """What may happen to a request, wherever it is."""

    ADMITTED = "its admission has brought it into the engine, or seen it end"
    NOT_ADMITTED = "its admission failed"
    TOKENS = "tokens, and not the last ones"
    LAST = "the last tokens, or an error of the engine"
    REDIRECT_ASKED = "the router would have its prompt computed elsewhere, or here"
    GIVEN_UP = "the engine has given it up before its first token, as it was asked to"
    MOVE_ASKED = "the router has room for it elsewhere"
    LET_GO = "the engine has taken it out, with its blocks"
    ABORTED = "the router wants no more of it, or is lost"
    EXPIRED = "its time is up"
    CLOSED = "the worker ends, or its time to drain is over"
    BROKEN = "an output could not be sent: a bug of ours"


class LiveAction(Enum):
    """What is to be done."""

    CANCEL = "cancel the admission, if it goes on"
    DROP = "have the engine drop it, if it has it"
    SUSPEND = "have the engine let it go, if it has it and can; then `LET_GO` follows"
    AIM = "tell its admission, if it goes on, where its prompt is to be computed from here on"
    RETRACT = "have the engine give it up, if it has said no token; then `GIVEN_UP` follows"
    ADMIT = "begin a new admission"
    SAY = "send tokens"
    KEEP = "keep the blocks that it leaves, for whoever goes on with it"
    FREE = "free them"
    END = "send the last output"


_S, _E, _A = LiveState, LiveEvent, LiveAction
_Rows = Rows[LiveEvent, LiveState, LiveAction]

_WITHDRAWN: Final = (_S.ENDED, (_A.CANCEL, _A.DROP, _A.END))
_OVER: Final = (_S.ENDED, (_A.END,))
_LIVE: Final[_Rows] = {
    _E.TOKENS: (_S.DECODING, (_A.SAY,)),
    _E.LAST: _OVER,
    _E.MOVE_ASKED: (_S.LEAVING, (_A.SUSPEND,)),
    _E.ABORTED: _WITHDRAWN,
    _E.EXPIRED: _WITHDRAWN,
    _E.CLOSED: _WITHDRAWN,
}

# The engine's first tokens may overtake the admission's end: they come from another thread.
TRANSITIONS: Final[Mapping[LiveState, _Rows]] = {
    _S.ADMITTING: {
        **_LIVE,
        _E.ADMITTED: (_S.QUEUED, ()),
        _E.NOT_ADMITTED: (_S.ENDED, (_A.DROP, _A.END)),
        _E.REDIRECT_ASKED: (_S.ADMITTING, (_A.AIM,)),
    },
    _S.QUEUED: {**_LIVE, _E.REDIRECT_ASKED: (_S.REDIRECTED, (_A.AIM, _A.RETRACT))},
    _S.REDIRECTED: {
        **_LIVE,
        _E.REDIRECT_ASKED: (_S.REDIRECTED, (_A.AIM,)),
        _E.GIVEN_UP: (_S.ADMITTING, (_A.ADMIT,)),
    },
    _S.DECODING: {
        **_LIVE,
        _E.REDIRECT_ASKED: (_S.DECODING, ()),
        _E.ADMITTED: (_S.DECODING, ()),
        _E.NOT_ADMITTED: (_S.ENDED, (_A.DROP, _A.END)),
        _E.BROKEN: _WITHDRAWN,
    },
    _S.LEAVING: {
        **_LIVE,
        _E.ADMITTED: (_S.LEAVING, (_A.SUSPEND,)),
        _E.NOT_ADMITTED: (_S.ENDED, (_A.DROP, _A.END)),
        _E.TOKENS: (_S.LEAVING, (_A.SAY, _A.SUSPEND)),
        _E.MOVE_ASKED: (_S.LEAVING, ()),
        _E.REDIRECT_ASKED: (_S.LEAVING, ()),
        _E.GIVEN_UP: (_S.LEAVING, (_A.ADMIT,)),
        _E.LET_GO: (_S.ENDED, (_A.KEEP, _A.END)),
        _E.BROKEN: _WITHDRAWN,
    },
    _S.ENDED: {
        **dict.fromkeys(
            (_E.ADMITTED, _E.NOT_ADMITTED, _E.REDIRECT_ASKED, _E.GIVEN_UP, _E.TOKENS, _E.LAST, _E.BROKEN),
            (_S.ENDED, ()),
        ),
        _E.LET_GO: (_S.ENDED, (_A.FREE,)),
    },
}
"""What has no row is a bug of ours, which raises with the history: the engine lets nobody go that was not asked to, and
nobody aborts, ends or asks for what the router's session does not have any more."""
