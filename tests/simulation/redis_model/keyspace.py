"""What a Redis holds, and the commands on it that the product's scripts use. Pure: the clock is passed in.

A command takes and gives what Redis does: arguments are bytes; a reply is an int, bytes, None, a list of those, or a
`Status`. `CommandError` is an error reply.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

Reply: TypeAlias = "int | bytes | Status | list[Any] | None"

_WRONG_TYPE: Final = "WRONGTYPE Operation against a key holding the wrong kind of value"
_NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"
_SYNTAX: Final = "ERR syntax error"


class CommandError(Exception):
    """An error reply: its text, beginning with its kind."""


class Status(bytes):
    """A reply like +OK."""


OK: Final = Status(b"OK")


class _Hash(dict[bytes, bytes]):
    pass


class _Set(dict[bytes, None]):
    pass


class _SortedSet(dict[bytes, float]):
    pass


_Value: TypeAlias = "bytes | _Hash | _Set | _SortedSet"
_Container = TypeVar("_Container", _Hash, _Set, _SortedSet)
_TYPES: Final[dict[type, bytes]] = {bytes: b"string", _Hash: b"hash", _Set: b"set", _SortedSet: b"zset"}


@dataclass
class Keyspace:
    """`clock`: Unix time in seconds; it stands still while a script runs, as a server's does.

    `publish` gives a message to a channel, and returns how many heard it.
    """

    clock: Callable[[], float]
    random: random.Random
    publish: Callable[[bytes, bytes], int] = lambda channel, message: 0
    _values: dict[bytes, _Value] = field(default_factory=dict)
    _ends_ms: dict[bytes, int] = field(default_factory=dict)

    def run(self, name: bytes, arguments: list[bytes]) -> Reply:
        """Run a command. Raises CommandError."""
        command = _COMMANDS.get(name.upper())
        if command is None:
            raise CommandError(f"ERR unknown command `{name.decode(errors='replace')}`")
        run, least, most = command
        if not least <= len(arguments) <= most:
            raise CommandError(f"ERR wrong number of arguments for '{name.decode(errors='replace').lower()}' command")
        return run(self, *arguments)

    def copy(self) -> Keyspace:
        """What is here now, as a dump has it."""
        return Keyspace(self.clock, self.random, self.publish, copy.deepcopy(self._values), dict(self._ends_ms))

    # ---- values ----

    def _now_ms(self) -> int:
        return int(self.clock() * 1000)

    def _get(self, key: bytes) -> _Value | None:
        if key in self._ends_ms and self._ends_ms[key] <= self._now_ms():
            self._drop(key)
        return self._values.get(key)

    def _drop(self, key: bytes) -> bool:
        self._ends_ms.pop(key, None)
        return self._values.pop(key, None) is not None

    def _string(self, key: bytes) -> bytes | None:
        value = self._get(key)
        if value is not None and not isinstance(value, bytes):
            raise CommandError(_WRONG_TYPE)
        return value

    def _of(self, key: bytes, kind: type[_Container]) -> _Container:
        """The container, to be read: an empty one where there is none."""
        value = self._get(key)
        if value is None:
            return kind()
        if not isinstance(value, kind):
            raise CommandError(_WRONG_TYPE)
        return value

    def _made(self, key: bytes, kind: type[_Container]) -> _Container:
        """The container, to be added to."""
        value = self._of(key, kind)
        self._values[key] = value
        return value

    def _remove(self, key: bytes, kind: type[_Container], members: tuple[bytes, ...]) -> int:
        value = self._of(key, kind)
        gone = [value.pop(member) for member in dict.fromkeys(members) if member in value]
        if not value:
            self._drop(key)
        return len(gone)

    # ---- keys ----

    def _time(self) -> Reply:
        micros = round(self.clock() * 1e6)
        return [b"%d" % (micros // 1_000_000), b"%d" % (micros % 1_000_000)]

    def _flushall(self, *_: bytes) -> Reply:
        self._values.clear()
        self._ends_ms.clear()
        return OK

    def _type(self, key: bytes) -> Reply:
        value = self._get(key)
        return Status(b"none" if value is None else _TYPES[type(value)])

    def _exists(self, *keys: bytes) -> Reply:
        return sum(self._get(key) is not None for key in keys)

    def _del(self, *keys: bytes) -> Reply:
        return sum(self._get(key) is not None and self._drop(key) for key in keys)

    def _pexpire(self, key: bytes, duration_ms: bytes) -> Reply:
        end_ms = self._now_ms() + _int(duration_ms)
        if self._get(key) is None:
            return 0
        self._ends_ms[key] = end_ms
        self._get(key)
        return 1

    def _expire(self, key: bytes, duration_s: bytes) -> Reply:
        return self._pexpire(key, b"%d" % (_int(duration_s) * 1000))

    def _pttl(self, key: bytes) -> Reply:
        if self._get(key) is None:
            return -2
        return self._ends_ms[key] - self._now_ms() if key in self._ends_ms else -1

    # ---- strings ----

    def _get_string(self, key: bytes) -> Reply:
        return self._string(key)

    def _set(self, key: bytes, value: bytes, *options: bytes) -> Reply:
        if options and (len(options) != 2 or options[0].upper() != b"PX"):
            raise CommandError(_SYNTAX)
        self._drop(key)
        self._values[key] = value
        if options:
            self._ends_ms[key] = self._now_ms() + _int(options[1])
        return OK

    def _strlen(self, key: bytes) -> Reply:
        return len(self._string(key) or b"")

    def _setrange(self, key: bytes, offset: bytes, piece: bytes) -> Reply:
        value, start = self._string(key) or b"", _int(offset)
        if piece:
            value = value.ljust(start, b"\0")
            self._values[key] = value = value[:start] + piece + value[start + len(piece) :]
        return len(value)

    def _setbit(self, key: bytes, offset: bytes, bit: bytes) -> Reply:
        at, mask = _int(offset) // 8, 0x80 >> _int(offset) % 8
        value = bytearray((self._string(key) or b"").ljust(at + 1, b"\0"))
        before = int(bool(value[at] & mask))
        value[at] = value[at] | mask if _int(bit) else value[at] & ~mask
        self._values[key] = bytes(value)
        return before

    def _bitpos(self, key: bytes, bit: bytes) -> Reply:
        value = self._string(key)
        if _int(bit) != 1:
            raise CommandError(_SYNTAX)  # nobody asks for the first zero
        kept = (value or b"").lstrip(b"\0")
        return (len(value or b"") - len(kept)) * 8 + 8 - kept[0].bit_length() if kept else -1

    # ---- hashes ----

    def _hget(self, key: bytes, name: bytes) -> Reply:
        return self._of(key, _Hash).get(name)

    def _hmget(self, key: bytes, *names: bytes) -> Reply:
        return [self._of(key, _Hash).get(name) for name in names]

    def _hset(self, key: bytes, *pairs: bytes) -> Reply:
        if len(pairs) % 2:
            raise CommandError("ERR wrong number of arguments for 'hset' command")
        value = self._made(key, _Hash)
        num_before = len(value)
        value.update(zip(pairs[0::2], pairs[1::2], strict=True))
        return len(value) - num_before

    def _hdel(self, key: bytes, *names: bytes) -> Reply:
        return self._remove(key, _Hash, names)

    def _hlen(self, key: bytes) -> Reply:
        return len(self._of(key, _Hash))

    def _hkeys(self, key: bytes) -> Reply:
        return list(self._of(key, _Hash))

    def _hgetall(self, key: bytes) -> Reply:
        return [each for pair in self._of(key, _Hash).items() for each in pair]

    def _hexists(self, key: bytes, name: bytes) -> Reply:
        return int(name in self._of(key, _Hash))

    def _hincrby(self, key: bytes, name: bytes, by: bytes) -> Reply:
        try:
            total = int(self._of(key, _Hash).get(name, b"0")) + _int(by)
        except ValueError:
            raise CommandError("ERR hash value is not an integer") from None
        self._made(key, _Hash)[name] = b"%d" % total
        return total

    # ---- sets ----

    def _sadd(self, key: bytes, *members: bytes) -> Reply:
        value = self._made(key, _Set)
        num_before = len(value)
        value.update(dict.fromkeys(members))
        return len(value) - num_before

    def _srem(self, key: bytes, *members: bytes) -> Reply:
        return self._remove(key, _Set, members)

    def _smembers(self, key: bytes) -> Reply:
        return list(self._of(key, _Set))

    def _srandmember(self, key: bytes, count: bytes) -> Reply:
        members, num_wanted = list(self._of(key, _Set)), _int(count)
        if num_wanted < 0:
            raise CommandError(_SYNTAX)  # nobody asks for repetitions
        return members if num_wanted >= len(members) else self.random.sample(members, num_wanted)

    # ---- sorted sets ----

    def _zadd(self, key: bytes, *pairs: bytes) -> Reply:
        if len(pairs) % 2:
            raise CommandError(_SYNTAX)
        scores = [_float(score) for score in pairs[0::2]]
        value = self._made(key, _SortedSet)
        num_before = len(value)
        value.update(zip(pairs[1::2], scores, strict=True))
        return len(value) - num_before

    def _zrem(self, key: bytes, *members: bytes) -> Reply:
        return self._remove(key, _SortedSet, members)

    def _zcard(self, key: bytes) -> Reply:
        return len(self._of(key, _SortedSet))

    def _zscore(self, key: bytes, member: bytes) -> Reply:
        score = self._of(key, _SortedSet).get(member)
        return _score(score) if score is not None else None

    def _zrangebyscore(self, key: bytes, low: bytes, high: bytes, *options: bytes) -> Reply:
        words, with_scores, start, num_most = list(options), False, 0, -1
        while words:
            match words.pop(0).upper():
                case b"WITHSCORES":
                    with_scores = True
                case b"LIMIT" if len(words) >= 2:
                    start, num_most = _int(words.pop(0)), _int(words.pop(0))
                case _:
                    raise CommandError(_SYNTAX)
        found = self._within(key, low, high)[start:]
        found = found if num_most < 0 else found[:num_most]
        return [each for score, name in found for each in ((name, _score(score)) if with_scores else (name,))]

    def _zremrangebyscore(self, key: bytes, low: bytes, high: bytes) -> Reply:
        return self._remove(key, _SortedSet, tuple(name for _, name in self._within(key, low, high)))

    def _within(self, key: bytes, low: bytes, high: bytes) -> list[tuple[float, bytes]]:
        least, most = _bound(low), _bound(high)
        ordered = sorted((score, name) for name, score in self._of(key, _SortedSet).items())
        return [
            (score, name)
            for score, name in ordered
            if (score > least if low.startswith(b"(") else score >= least)
            and (score < most if high.startswith(b"(") else score <= most)
        ]

    def _publish(self, channel: bytes, message: bytes) -> Reply:
        return self.publish(channel, message)


_MANY: Final = 1_000_000
_COMMANDS: Final[dict[bytes, tuple[Callable[..., Reply], int, int]]] = {
    b"TIME": (Keyspace._time, 0, 0),
    b"FLUSHALL": (Keyspace._flushall, 0, 1),
    b"TYPE": (Keyspace._type, 1, 1),
    b"EXISTS": (Keyspace._exists, 1, _MANY),
    b"DEL": (Keyspace._del, 1, _MANY),
    b"PEXPIRE": (Keyspace._pexpire, 2, 2),
    b"EXPIRE": (Keyspace._expire, 2, 2),
    b"PTTL": (Keyspace._pttl, 1, 1),
    b"GET": (Keyspace._get_string, 1, 1),
    b"SET": (Keyspace._set, 2, 4),
    b"STRLEN": (Keyspace._strlen, 1, 1),
    b"SETRANGE": (Keyspace._setrange, 3, 3),
    b"SETBIT": (Keyspace._setbit, 3, 3),
    b"BITPOS": (Keyspace._bitpos, 2, 2),
    b"HGET": (Keyspace._hget, 2, 2),
    b"HMGET": (Keyspace._hmget, 2, _MANY),
    b"HSET": (Keyspace._hset, 3, _MANY),
    b"HDEL": (Keyspace._hdel, 2, _MANY),
    b"HLEN": (Keyspace._hlen, 1, 1),
    b"HKEYS": (Keyspace._hkeys, 1, 1),
    b"HGETALL": (Keyspace._hgetall, 1, 1),
    b"HEXISTS": (Keyspace._hexists, 2, 2),
    b"HINCRBY": (Keyspace._hincrby, 3, 3),
    b"SADD": (Keyspace._sadd, 2, _MANY),
    b"SREM": (Keyspace._srem, 2, _MANY),
    b"SMEMBERS": (Keyspace._smembers, 1, 1),
    b"SRANDMEMBER": (Keyspace._srandmember, 2, 2),
    b"ZADD": (Keyspace._zadd, 3, _MANY),
    b"ZREM": (Keyspace._zrem, 2, _MANY),
    b"ZCARD": (Keyspace._zcard, 1, 1),
    b"ZSCORE": (Keyspace._zscore, 2, 2),
    b"ZRANGEBYSCORE": (Keyspace._zrangebyscore, 3, 7),
    b"ZREMRANGEBYSCORE": (Keyspace._zremrangebyscore, 3, 3),
    b"PUBLISH": (Keyspace._publish, 2, 2),
}


def _int(text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise CommandError(_NOT_AN_INTEGER) from None


def _float(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        raise CommandError("ERR value is not a valid float") from None


def _bound(text: bytes) -> float:
    try:
        return float(text.removeprefix(b"("))
    except ValueError:
        raise CommandError("ERR min or max is not a float") from None


def _score(score: float) -> bytes:
    return b"%.17g" % score
