"""Describes blocks: their shape, their element type, the model whose keys and values they hold, and what proves them.

Two workers exchange a layout when they first meet. Blocks are raw bytes, so any difference in layout means that one
side would read the other's bytes as something they are not: the peers refuse each other, by field and value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final

from kvstore.errors import IncompatibleLayout, InvalidLayout

LAYOUT_VERSION: Final = 1

DTYPE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2, "float16": 2}

_MAX_DIMENSION = 1 << 20
_MAX_BLOCK_BYTES = 1 << 32
_MAX_NAME_CHARS = 256


@dataclass(frozen=True)
class BlockLayout:
    """One block: `[num_layers, 2 (key, value), num_kv_heads, block_size (tokens), head_dim]`, contiguous, of `dtype`.

    `model_fingerprint` (hex digits in practice) covers the model's configuration, its dtype and all its weight bytes.
    `proof_key` is the id of the key that these blocks are proven under. Construction raises `InvalidLayout` for
    impossible values.
    """

    num_layers: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    model_fingerprint: str
    version: int = LAYOUT_VERSION
    proof_key: str = ""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "block_size", "head_dim", "version"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_DIMENSION:
                raise InvalidLayout(
                    f"block layout: {name} must be an integer in 1 .. {_MAX_DIMENSION}, not {value!r:.80}"
                )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise InvalidLayout(f"block layout: dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r:.80}")
        for name, min_chars in (("model_fingerprint", 1), ("proof_key", 0)):
            text = getattr(self, name)
            is_printable = isinstance(text, str) and text.isascii() and text.isprintable()
            if not is_printable or not min_chars <= len(text) <= _MAX_NAME_CHARS:
                raise InvalidLayout(
                    f"block layout: {name} must be {min_chars} .. {_MAX_NAME_CHARS} printable ASCII characters, "
                    f"not {text!r:.80}"
                )
        if self.block_bytes > _MAX_BLOCK_BYTES:
            raise InvalidLayout(f"block layout: a block of {self.block_bytes} bytes exceeds {_MAX_BLOCK_BYTES}")
        if self.block_bytes % 8:
            # Proofs and checksums read blocks as 64-bit words.
            raise InvalidLayout(f"block layout: a block of {self.block_bytes} bytes is no whole number of 8-byte words")

    @property
    def block_bytes(self) -> int:
        """Size of one block in bytes."""
        return self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """32 hex digits, equal exactly where all fields are equal."""
        text = ";".join(f"{name}={value}" for name, value in asdict(self).items())
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"tandem.layout").hexdigest()

    def to_wire(self) -> dict[str, int | str]:
        """Return the fields as a dict of plain integers and strings."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: object) -> BlockLayout:
        """Read what a peer's `to_wire` gave. Raises `InvalidLayout` for anything else, naming what is wrong.

        Fields that we do not know are refused: a newer peer bumps `version`, and then says so by it.
        """
        if not isinstance(wire, Mapping):
            raise InvalidLayout(f"block layout: expected a map, got {type(wire).__name__}")
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in wire]
        unknown = [repr(key)[:40] for key in wire if key not in names]
        if missing or unknown:
            problems = [f"missing {', '.join(missing)}"] if missing else []
            problems += [f"unknown {', '.join(unknown[:8])}"] if unknown else []
            raise InvalidLayout(f"block layout: {'; '.join(problems)}")
        return cls(**{name: wire[name] for name in names})

    def check_compatible(self, peer: BlockLayout, peer_name: str) -> None:
        """Raise `IncompatibleLayout`, listing every difference, unless the peer's blocks mean the same as ours."""
        differences = [
            f"{field.name}: ours {getattr(self, field.name)}, theirs {getattr(peer, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(peer, field.name)
        ]
        if differences:
            raise IncompatibleLayout(f"blocks of {peer_name} are incompatible with ours: {'; '.join(differences)}")
