"""What comes to ports that is none of ours."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path


class Touch:
    """A pickle that makes a file where somebody loads it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._path),))


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "noise": lambda _: os.urandom(4096),
    "zeros": lambda _: bytes(4096),
    "http": lambda _: b"POST /debug/state HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nxxxx",
    "http2": lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    "pickle": lambda path: pickle.dumps(Touch(path)),
    "pickle in a frame": lambda path: framed(pickle.dumps(Touch(path))),
    "frame without end": lambda _: b"\x00\x00\xff\xff" + b"x" * 100,
}
