"""Keeps the launcher's private Redis running."""

from __future__ import annotations

import asyncio
import os

from kvstore.errors import RedisServerError
from services.cli.embedded_redis import EmbeddedRedis
from services.cli.up.console import Display


async def keep_redis(server: EmbeddedRedis, display: Display) -> None:
    """Starts the server again, on its port, when it dies; closes it when cancelled. Takes the server over.

    What was in it need not be saved: the registry is soft state, which the workers announce anew. Meanwhile the routers
    go on with the membership that they know.
    """
    try:
        while True:
            await _ended(server.pid)
            display.line("redis", "the private Redis died; starting it again")
            server.close()
            server = server.start_again()
    except Exception as error:  # whatever it is: nobody else would say that Redis is kept no more
        why = str(error) if isinstance(error, RedisServerError) else repr(error)
        display.line("redis", f"{why}; serving goes on, but no worker can join")
    finally:
        server.close()


async def _ended(pid: int) -> None:
    """Returns when our child process has ended (Linux; elsewhere never)."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    if not hasattr(os, "pidfd_open"):
        await ended.wait()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
