"""Names a start of a process, so that it sorts after the one before under the same id.

Who registers last is the newer one; clocks alone may say otherwise, as after one was set back, or on another host.
"""

from __future__ import annotations

import logging
from typing import cast

from kvstore.errors import InvalidRecord
from kvstore.registry.redis_session import REDIS_FAILURES, describe, open_home
from kvstore.registry.registry import DEFAULT_PREFIX, DEFAULT_TIMEOUT_S, Keyspace
from kvstore.registry.worker_record import decode_record, new_incarnation

logger = logging.getLogger(__name__)

_RECORD = "return redis.call('HGET', KEYS[1], ARGV[1])"


async def next_incarnation(
    redis_url: str, worker_id: str, *, prefix: str = DEFAULT_PREFIX, timeout_s: float = DEFAULT_TIMEOUT_S
) -> str:
    """Return an incarnation that sorts after what is registered under this id; with Redis away, after older clocks."""
    workers, *_ = Keyspace.under(prefix).keys
    try:
        async with open_home(redis_url, timeout_s) as home:
            data = cast("bytes | None", await home.eval(_RECORD, 1, workers, worker_id))
        return new_incarnation(after=decode_record(data).incarnation if data else "")
    except REDIS_FAILURES as error:
        logger.warning("who had the id %s before is not known: %s", worker_id, describe(error))
    except InvalidRecord:
        pass  # routers say so
    return new_incarnation()
