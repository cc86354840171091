"""Defines a process's record in the registry: its identity, addresses, models and capacity."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Literal

import msgspec

from kvstore.errors import InvalidRecord

MAX_RECORD_BYTES = 64 * 1024

_MAX_NAME_CHARS = 256


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process or store node, as announced. Construction raises ValueError for impossible values.

    Addresses are `host:port`. `worker_id` stays the same over restarts; `incarnation` (from `new_incarnation`) is new
    for every process and sorts by its start. A store node (role "store") generates nothing: it has no gRPC address
    and no limits of requests, and takes its layout from the workers' records. A worker in a `phase` of its start does
    not serve yet: what it will know only of its model, and addresses at which nobody listens yet, may be empty.
    """

    worker_id: str
    role: Literal["prefill", "decode", "elastic", "store"]
    incarnation: str
    served_model_names: tuple[str, ...]
    model_path: str
    tokenizer_path: str
    model_fingerprint: str
    grpc_address: str  # empty for a store node
    kv_address: str  # of the block protocol; empty where the worker exchanges no blocks
    http_address: str  # of /metrics, /health and /debug/state; empty where there is none
    block_size: int  # tokens
    num_blocks: int
    max_model_len: int  # tokens
    max_num_seqs: int
    dtype: str
    transports: tuple[str, ...]
    draining: bool = False
    colocated: bool = False
    local_prefill_max_tokens: int = 0  # a decode worker prefills by itself what lacks no more than so many
    version: str = ""
    started_unix_s: float = 0.0
    revision: str = ""  # of model_path on the hub; empty: its default
    layout: dict[str, int | str] | None = None  # `BlockLayout.to_wire()`
    numerics: str = ""  # of a worker: names its arithmetic; empty: unknown
    is_exact: bool = False  # of a worker: all of one model and one `numerics` compute equal logits, in any company
    phase: str = ""  # of its start, for a person to read; empty once it serves
    is_simulation: bool = False  # its tokens mean nothing
    adapters: tuple[str, ...] = ()  # keys of its LoRA adapters: the name that clients ask for, a colon, a fingerprint

    @property
    def prefills(self) -> bool:
        """Whether it takes prefill orders. An elastic worker does both."""
        return self.role in ("prefill", "elastic")

    @property
    def decodes(self) -> bool:
        """Whether it has sessions with routers."""
        return self.role in ("decode", "elastic")

    @property
    def key(self) -> tuple[str, str]:
        """The names of one process's life: worker id and incarnation."""
        return self.worker_id, self.incarnation

    @property
    def adapter_keys(self) -> dict[str, str]:
        """Its adapters' keys by the names that clients ask for."""
        return {key.rpartition(":")[0]: key for key in self.adapters}

    @property
    def model_names(self) -> tuple[str, ...]:
        """All that clients may ask it for: the model's names, then its adapters'."""
        return (*self.served_model_names, *self.adapter_keys)

    def __post_init__(self) -> None:
        is_store = self.role == "store"
        known_later = () if self.phase else ("model_fingerprint", "kv_address" if is_store else "grpc_address")
        for field in ("worker_id", "incarnation", *known_later):
            # Ids and incarnations travel as words of a message; nothing printed in a log may carry control characters.
            value: str = getattr(self, field)
            if not 0 < len(value) <= _MAX_NAME_CHARS or not value.isascii() or not value.isprintable() or " " in value:
                raise ValueError(
                    f"{field} must be 1 .. {_MAX_NAME_CHARS} printable ASCII characters, not {value!r:.80}"
                )
        if self.role not in ("prefill", "decode", "elastic", "store"):
            raise ValueError(f"role must be prefill, decode, elastic or store, not {self.role!r:.80}")
        if not self.served_model_names or not all(self.served_model_names):
            raise ValueError(f"served_model_names must name at least one model, not {self.served_model_names!r:.80}")
        limits = () if is_store else ("max_model_len", "max_num_seqs")
        for field in () if self.phase else ("block_size", "num_blocks", *limits):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")


def new_incarnation(now_unix_ns: Callable[[], int] = time.time_ns, after: str = "") -> str:
    """Return a name for one process's life: 24 hex digits, unique; later ones sort after earlier ones, and `after`."""
    number = now_unix_ns()
    if re.fullmatch("[0-9a-f]{24}", after):
        number = max(number, int(after[:16], 16) + 1)
    return f"{number:016x}{secrets.token_hex(4)}"


def encode_record(record: WorkerRecord) -> bytes:
    """Return the record as JSON; equal records give equal bytes."""
    return msgspec.json.encode(record)


def decode_record(data: bytes) -> WorkerRecord:
    """Read what `encode_record` gave. Raises `InvalidRecord`, saying what is wrong with it.

    Fields that we do not know are skipped, so that workers and routers of neighbouring versions understand each other.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidRecord(f"worker record of {len(data)} bytes, at most {MAX_RECORD_BYTES} are allowed")
    try:
        return msgspec.json.decode(data, type=WorkerRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRecord(f"worker record: {error}") from error
