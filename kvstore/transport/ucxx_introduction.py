"""Exchanges the first messages of a ucxx endpoint, in which its two ends tell each other their tags.

ucxx's own version gives up by cancelling the wait for a message that stays posted: the buffer is freed, the endpoint is
never closed. Under load, where dials come too late, that was a socket at both ends each time, and now and then the end
of the process (SIGSEGV). This one says the same, and gives up by closing the endpoint; buffers stay until that is done.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from ucxx._lib.libucxx import UCXEndpoint

_FORMAT: Final = "QQ"
_CLOSE_PERIOD_NS: Final = 1_000_000_000
_POSTED: Final[set[asyncio.Future[None]]] = set()


def mend(ucxx: ModuleType) -> None:
    """Have ucxx introduce its endpoints in this way, those that dial and those that come."""
    from ucxx._lib.arr import Array
    from ucxx._lib_async import application_context, listener
    from ucxx._lib_async.utils import hash64bits

    async def introduce(
        endpoint: UCXEndpoint, msg_tag: int, listener: bool, connect_timeout: float = 5.0
    ) -> dict[str, int]:
        return await _introduce(endpoint, msg_tag, listener, connect_timeout, Array, hash64bits)

    for module in (application_context, listener):
        assert hasattr(module, "exchange_peer_info"), f"{module.__name__} of ucxx {ucxx.__version__} is another one"
        module.exchange_peer_info = introduce


async def _introduce(
    endpoint: UCXEndpoint,
    msg_tag: int,
    is_listener: bool,
    timeout_s: float,
    array: Callable[[object], Any],
    checksum: Callable[[int], int],
) -> dict[str, int]:
    """Raises TimeoutError, RuntimeError for garbage, and what the messages raise."""
    ours = array(struct.pack(_FORMAT, msg_tag, checksum(msg_tag)))
    buffer = bytearray(struct.calcsize(_FORMAT))
    theirs = array(buffer)
    steps = [lambda: endpoint.stream_send(ours), lambda: endpoint.stream_recv(theirs)]
    ends_s = asyncio.get_running_loop().time() + timeout_s
    for step in steps if is_listener else reversed(steps):
        posted = asyncio.ensure_future(_wait(step(), (ours, theirs)))
        try:
            await asyncio.wait([posted], timeout=ends_s - asyncio.get_running_loop().time())
        finally:
            if not posted.done():
                hold(posted)
                endpoint.close_blocking(period=_CLOSE_PERIOD_NS, max_attempts=1)
                endpoint.remove_close_callback()
        if not posted.done():
            raise TimeoutError(f"the other end has not introduced itself within {timeout_s:g} s")
        posted.result()
    tag, of_tag = struct.unpack(_FORMAT, buffer)
    if of_tag != checksum(tag):
        raise RuntimeError(f"the other end introduces itself by {tag:#x}, which has another checksum than {of_tag:#x}")
    return {"msg_tag": tag, "checksum": of_tag}


async def _wait(request: Any, buffers: object) -> None:
    """Wait for one message, and hold its buffers until it has ended."""
    await request.wait()


def hold(posted: asyncio.Future[None]) -> None:
    """Keep what is posted on an endpoint, with its buffers, until it has ended, whoever waits for it still."""
    _POSTED.add(posted)
    posted.add_done_callback(_ended)


def _ended(posted: asyncio.Future[None]) -> None:
    _POSTED.discard(posted)
    if not posted.cancelled():
        posted.exception()  # whoever waits hears of it; nobody may be left to
