"""Describes blocks: their shape, their element type, the model whose keys and values they hold, and what proves them.

Two workers exchange a layout when they first meet. Blocks are raw bytes, so any difference in layout means that one
side would read the other's bytes as something they are not: the peers refuse each other, by field and value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from kvstore.errors import IncompatibleLayout, InvalidLayout

NATIVE_LAYOUT_VERSION: Final = 1
"""Of the native engine's blocks; those of others are of version 2."""

_NATIVE_DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
# uint8 is for formats that `scales` names: quantised vectors with their scales among them.
DTYPE_BYTES: Final[Mapping[str, int]] = {**_NATIVE_DTYPE_BYTES, "float8_e4m3fn": 1, "float8_e5m2": 1, "uint8": 1}

_MAX_DIMENSION = 1 << 20
_MAX_BLOCK_BYTES = 1 << 32
_MAX_NAME_CHARS = 256

_DIMENSIONS: Final = ("num_layers", "num_kv_heads", "block_size", "head_dim", "num_vectors")
_MIN_NAME_CHARS: Final = {"model_fingerprint": 1, "engine": 1} | dict.fromkeys(
    ("proof_key", "kernel_layout", "isa", "scales", "attention_backend"), 0
)


@dataclass(frozen=True)
class BlockLayout:
    """One block: `num_layers * num_vectors * num_kv_heads * block_size (tokens) * head_dim` elements of `dtype`.

    The native engine's are `[num_layers, 2 (key, value), num_kv_heads, block_size, head_dim]`. Of any other engine
    `kernel_layout` says the order, as the block travels; how many pieces it lies in is each peer's own affair
    (`geometry.py`). Whatever decides what the bytes mean is declared, by whoever writes them, and compared: nothing is
    inferred from shapes. `model_fingerprint` (hex digits in practice) covers the model's configuration, its dtype and
    all its weight bytes. `proof_key` is the id of the key that these blocks are proven under. Construction raises
    `InvalidLayout` for impossible values.
    """

    num_layers: int
    num_kv_heads: int
    """Of the model, however many ranks of a worker have them among them: heads come in their order, before tokens."""
    block_size: int
    head_dim: int
    dtype: str
    model_fingerprint: str
    proof_key: str = ""
    # From here on: version 2, unless all are as the native engine's.
    engine: str = "native"
    kernel_layout: str = ""
    """Order of a block's axes, and what packs them: `LHNC`, with C for key and value fused."""
    isa: str = ""
    """The instruction set that the bytes are packed for; empty where they are not."""
    scales: str = ""
    """By what quantised keys and values are to be multiplied: a name, or a digest of the numbers."""
    attention_backend: str = ""
    num_vectors: int = 2
    """Per token, layer and head: key and value, or the one latent vector of MLA."""

    def __post_init__(self) -> None:
        for name in _DIMENSIONS:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MAX_DIMENSION:
                raise InvalidLayout(
                    f"block layout: {name} must be an integer in 1 .. {_MAX_DIMENSION}, not {value!r:.80}"
                )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPE_BYTES:
            raise InvalidLayout(f"block layout: dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r:.80}")
        for name, min_chars in _MIN_NAME_CHARS.items():
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
    def version(self) -> int:
        """1 where it can be said so that peers understand it which know no engine but the native one; else 2."""
        is_native = all(getattr(self, name) == value for name, value in _NATIVE.items())
        return NATIVE_LAYOUT_VERSION if is_native and self.dtype in _NATIVE_DTYPE_BYTES else 2

    @property
    def block_bytes(self) -> int:
        """Size of one block in bytes."""
        num_vectors = self.num_layers * self.num_vectors * self.num_kv_heads * self.block_size
        return num_vectors * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def fingerprint(self) -> str:
        """32 hex digits, equal exactly where all fields are equal."""
        text = ";".join(f"{name}={value}" for name, value in self.to_wire().items())
        return hashlib.blake2b(text.encode(), digest_size=16, person=b"tandem.layout").hexdigest()

    def to_wire(self) -> dict[str, int | str]:
        """Return the fields as a dict of plain integers and strings: those of its version, in a fixed order."""
        return {name: getattr(self, name) for name in _WIRE_FIELDS[self.version]}

    @classmethod
    def from_wire(cls, wire: object) -> BlockLayout:
        """Read what a peer's `to_wire` gave. Raises `InvalidLayout` for anything else, naming what is wrong.

        Fields that a version does not have are refused: a newer peer says a newer version.
        """
        if not isinstance(wire, Mapping):
            raise InvalidLayout(f"block layout: expected a map, got {type(wire).__name__}")
        version = wire.get("version", NATIVE_LAYOUT_VERSION)
        if type(version) is not int or version not in _WIRE_FIELDS:
            raise InvalidLayout(
                f"block layout: version must be one of {', '.join(map(str, _WIRE_FIELDS))}, not {version!r:.80}"
            )
        names = _WIRE_FIELDS[version]
        missing = [name for name in names if name not in wire]
        unknown = [repr(key)[:40] for key in wire if key not in names]
        if missing or unknown:
            problems = [f"missing {', '.join(missing)}"] if missing else []
            problems += [f"unknown {', '.join(unknown[:8])}"] if unknown else []
            raise InvalidLayout(f"block layout: {'; '.join(problems)}")
        layout = cls(**{name: wire[name] for name in names if name != "version"})
        if layout.version > version:
            raise InvalidLayout(
                f"block layout: dtype must be one of {', '.join(_NATIVE_DTYPE_BYTES)} in version {version}, "
                f"not {layout.dtype}"
            )
        return layout

    def check_compatible(self, peer: BlockLayout, peer_name: str) -> None:
        """Raise `IncompatibleLayout`, listing every difference, unless the peer's blocks mean the same as ours."""
        differences = [
            f"{field.name}: ours {_shown(getattr(self, field.name))}, theirs {_shown(getattr(peer, field.name))}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(peer, field.name)
        ]
        if differences:
            raise IncompatibleLayout(f"blocks of {peer_name} are incompatible with ours: {'; '.join(differences)}")


def _shown(value: int | str) -> int | str:
    return value if value != "" else "(none)"


_FIELDS: Final = [field.name for field in fields(BlockLayout)]
_NUM_NATIVE_FIELDS: Final = _FIELDS.index("engine")
_NATIVE: Final = {field.name: field.default for field in fields(BlockLayout)[_NUM_NATIVE_FIELDS:]}
# `version` stands where it stood when it was a field: fingerprints are made of them in this order.
_NATIVE_WIRE_FIELDS: Final = [*_FIELDS[: _NUM_NATIVE_FIELDS - 1], "version", _FIELDS[_NUM_NATIVE_FIELDS - 1]]
_WIRE_FIELDS: Final = {
    NATIVE_LAYOUT_VERSION: _NATIVE_WIRE_FIELDS,
    2: [*_NATIVE_WIRE_FIELDS, *_FIELDS[_NUM_NATIVE_FIELDS:]],
}
