"""Runs the product's Lua scripts, as they are, on a `Keyspace`.

LuaJIT is Lua 5.1 with the very `bit` that Redis carries; `redis.call`, `redis.pcall` and `cjson.decode` are ours.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

from lupa import luajit21 as lua

from tests.simulation.redis_model.keyspace import CommandError, Keyspace, Reply, Status

_MAX_INT: Final = 2**63 - 1
_SEALED: Final = b"""
local function refuse(_, name) error('Script attempted to access nonexistent global variable ' .. tostring(name)) end
setmetatable(_G, {__index = refuse, __newindex = refuse})
"""


class Scripts:
    """The scripts that a server has seen, and the interpreter that runs them."""

    def __init__(self, keyspace: Keyspace) -> None:
        self.keyspace = keyspace
        self._runtime = lua.LuaRuntime(encoding=None, register_eval=False, register_builtins=False)
        self._known: dict[bytes, Any] = {}
        names = self._runtime.globals()
        names[b"redis"] = self._table({b"call": self._call, b"pcall": self._pcall})
        names[b"cjson"] = self._table({b"decode": self._decode})
        names[b"KEYS"] = names[b"ARGV"] = self._table([])
        for name in (b"io", b"require", b"print", b"ffi"):  # a server has none of these
            names[name] = None
        self._runtime.execute(_SEALED)

    def load(self, text: bytes) -> bytes:
        """Keep a script; return its digest. Raises CommandError."""
        digest = hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()
        if digest not in self._known:
            try:
                self._known[digest] = self._runtime.compile(text)
            except lua.LuaError as error:
                raise CommandError(f"ERR Error compiling script: {error}") from error
        return digest

    def run(self, digest: bytes, keys: list[bytes], arguments: list[bytes]) -> Reply:
        """Run a script that was loaded. Raises CommandError."""
        if digest.lower() not in self._known:
            raise CommandError("NOSCRIPT No matching script. Please use EVAL.")
        names = self._runtime.globals()
        names[b"KEYS"], names[b"ARGV"] = self._table(keys), self._table(arguments)
        now_s, clock = self.keyspace.clock(), self.keyspace.clock
        self.keyspace.clock = lambda: now_s
        try:
            returned = self._known[digest.lower()]()
            return _reply(returned[0] if isinstance(returned, tuple) else returned)
        except (lua.LuaError, CommandError) as error:
            raise CommandError(f"ERR Error running script: {error}") from error
        finally:
            self.keyspace.clock = clock

    def _table(self, content: Any) -> Any:
        return self._runtime.table_from(content)

    def _call(self, *words: bytes | float) -> Any:
        name, *arguments = [_argument(word) for word in words]
        return self._value(self.keyspace.run(name, arguments))

    def _pcall(self, *words: bytes | float) -> Any:
        try:
            return self._call(*words)
        except CommandError as error:
            return self._table({b"err": str(error).encode()})

    def _value(self, reply: Reply) -> Any:
        match reply:
            case Status():
                return self._table({b"ok": bytes(reply)})
            case list():
                return self._table([self._value(each) for each in reply])
            case None:
                return False
        return reply

    def _decode(self, text: bytes) -> Any:
        def convert(value: Any) -> Any:
            match value:
                case str():
                    return value.encode()
                case list():
                    return self._table([convert(each) for each in value])
                case dict():
                    return self._table({key.encode(): convert(each) for key, each in value.items()})
            return value

        return convert(json.loads(text))


def _argument(word: bytes | float) -> bytes:
    if isinstance(word, bytes):
        return word
    if isinstance(word, bool) or not isinstance(word, (int, float)):
        raise CommandError("ERR Lua redis() command arguments must be strings or integers")
    return b"%.17g" % word


def _reply(value: Any) -> Reply:
    """What a client is told of what a script returns."""
    match value:
        case None | False:
            return None
        case True:
            return 1
        case bytes():
            return value
        case int() | float():
            return max(-_MAX_INT, min(_MAX_INT, int(value)))
    if (error := value[b"err"]) is not None:
        raise CommandError(error.decode())
    if (status := value[b"ok"]) is not None:
        return Status(status)
    found: list[Any] = []
    while (each := value[len(found) + 1]) is not None:
        found.append(_reply(each))
    return found
