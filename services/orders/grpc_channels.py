"""Keeps the channels to prefill workers, and leaves a worker that falls silent while an order waits for it.

    nobody waits        an order waits                          no answer for `silence_s`
    nobody is asked     the worker is asked for its health      the channel is closed, and its orders end;
                        again and again                         those on which nobody waits are closed, too

gRPC's own keep-alive takes ten seconds to find a connection that leads nowhere, and does not see a worker that hangs.
Health is what a worker of any version says, to anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from kvstore.peer_keys import PeerKeys
from services.orders.grpc_peers import ProvenChannel
from services.orders.streams import WorkerSilent

_HEALTH: Final = "/grpc.health.v1.Health/Check"
_ANYTHING: Final = b""
"""A request for the health of the whole process."""
# More prefill workers than one decode worker orders from at a time; old addresses of restarted ones count, too.
_MAX_CHANNELS: Final = 64
_ChannelOptions = tuple[tuple[str, int | str], ...]


class Channels:
    """A channel per prefill worker, of which the latest used ones are kept."""

    def __init__(self, options: _ChannelOptions, keys: PeerKeys, silence_s: float) -> None:
        """`silence_s`: how long a worker may leave us without an answer."""
        self._options = options
        self._keys = keys
        self._silence_s = silence_s
        self._channels: OrderedDict[str, _Channel] = OrderedDict()

    @contextlib.asynccontextmanager
    async def of(self, address: str) -> AsyncIterator[ProvenChannel]:
        """The channel to a worker, on which somebody waits. What breaks by the worker's silence raises WorkerSilent."""
        channel = self._channel(address)
        if len(self._channels) > _MAX_CHANNELS:
            await self.forget(next(iter(self._channels)))
        if not channel.num_waiting:
            channel.watch = asyncio.create_task(self._watch(address, channel), name=f"is {address} there")
        channel.num_waiting += 1
        try:
            yield channel.proven
        except Exception as error:
            if channel.is_silent:
                raise WorkerSilent(f"no answer for {self._silence_s:g} s") from error
            raise
        finally:
            channel.num_waiting -= 1
            if not channel.num_waiting:
                await channel.unwatch()
                if self._channels.get(address) is not channel:
                    await channel.close()

    async def forget(self, address: str) -> None:
        """Begin afresh with a worker. What waits on its channel goes on."""
        channel = self._channels.pop(address, None)
        if channel is not None and not channel.num_waiting:
            await channel.close()

    async def close(self) -> None:
        """End all, with what waits on them."""
        while self._channels:  # one may begin meanwhile
            _, channel = self._channels.popitem()
            await channel.close()

    def _channel(self, address: str) -> _Channel:
        if address not in self._channels:
            channel = grpc.aio.insecure_channel(address, options=self._options)
            self._channels[address] = _Channel(ProvenChannel(channel, address, self._keys))
        self._channels.move_to_end(address)
        return self._channels[address]

    async def _watch(self, address: str, channel: _Channel) -> None:
        """Return once the worker has been silent for too long, with the channel closed."""
        while True:
            await asyncio.sleep(self._silence_s / 8)  # many an order has its answer sooner
            if not await self._answers(channel):
                break
        channel.is_silent = True
        if self._channels.get(address) is channel:
            del self._channels[address]
        await channel.close()
        # What made this one lead nowhere may have had the others, too: to dial them anew costs less than to find out.
        for other in [other for other, each in self._channels.items() if not each.num_waiting]:
            await self.forget(other)

    async def _answers(self, channel: _Channel) -> bool:
        """Whether the worker, or its machine, says anything: that it refuses us is news to whoever waits, not to us."""
        answer = asyncio.ensure_future(channel.ask())
        silent_s, look_s, clock = 0.0, self._silence_s / 8, asyncio.get_running_loop().time
        try:
            while silent_s < self._silence_s:
                looked_s = clock()
                if (await asyncio.wait([answer], timeout=look_s))[0]:
                    return True
                silent_s += min(clock() - looked_s, 2 * look_s)  # else it was our own loop that stood still
            return False
        finally:
            answer.cancel()
            await asyncio.wait([answer])


class _Channel:
    def __init__(self, proven: ProvenChannel) -> None:
        self.proven = proven
        self.num_waiting = 0
        self.is_silent = False
        self.watch: asyncio.Task[None] | None = None

    async def ask(self) -> None:
        """Return with the worker's answer, whatever it is."""
        call: Any = self.proven.channel.unary_unary(_HEALTH)
        with contextlib.suppress(grpc.aio.AioRpcError, grpc.aio.UsageError):
            await call(_ANYTHING)

    async def unwatch(self) -> None:
        """Ask no more. Raises what is wrong with the watch."""
        assert self.watch is not None
        watch, self.watch = self.watch, None
        watch.cancel()
        await asyncio.wait([watch])
        if not watch.cancelled():
            watch.result()

    async def close(self) -> None:
        await self.proven.channel.close()
