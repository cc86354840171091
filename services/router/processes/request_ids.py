"""Names requests that bring no id of their own. In a router of several processes the id says which one has it. Pure."""

from __future__ import annotations

import os
import re

_NAMED = re.compile(r"p([1-9]\d{0,2})-[0-9a-f]{32}")


def new_request_id(number: int) -> str:
    """A new one. `number`: of the process; 0: there is one process."""
    random = os.urandom(16).hex()
    return f"p{number}-{random}" if number else random


def number_in(request_id: str) -> int:
    """The process that an id names, 0: none. A client may have made it up, or brought it back with another request."""
    named = _NAMED.fullmatch(request_id)
    return int(named[1]) if named is not None else 0
