"""Reads request traces: when, how long, and which parts of prompts are equal; no text.

Two published formats are read, told apart by their first line:

- Mooncake's JSONL (github.com/kvcache-ai/Mooncake, FAST25-release/traces): `timestamp` in ms, `input_length` and
  `output_length` in tokens, and `hash_ids`, one per 512 prompt tokens, equal where everything up to there is equal.
- Azure's CSV (github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_*.csv): `TIMESTAMP`, `ContextTokens`,
  `GeneratedTokens`. It says nothing of what prompts share: here they share nothing.
"""

from __future__ import annotations

import csv
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

BLOCK_TOKENS = 512
"""Tokens of a trace block, as Mooncake publishes them."""


@dataclass(frozen=True)
class TraceRequest:
    """One request as a trace has it, lengths in the trace's own tokens.

    `block_ids` are the identities of the prompt's blocks, in order; the last block may be partly filled. `turn` counts
    from 0 within a conversation, where that is known.
    """

    at_s: float
    input_length: int
    output_length: int
    block_ids: tuple[int, ...]
    turn: int = 0


def read_trace(path: Path, num_requests: int) -> list[TraceRequest]:
    """The first requests of a trace file of either format. Raises ValueError naming the line that is none."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = lines.readline()
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no trace: {error}") from error
    if first.startswith("{"):
        return read_mooncake(path, num_requests)
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(first.strip().split(",")):
        return read_azure(path, num_requests)
    raise ValueError(f"{path} is neither Mooncake's JSONL nor Azure's CSV; its first line is {first[:80]!r}")


def read_mooncake(path: Path, num_requests: int) -> list[TraceRequest]:
    """The first requests of a Mooncake trace. Raises ValueError naming the line that is none."""
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(itertools.islice(lines, num_requests), 1):
            try:
                row = json.loads(line)
                block_ids = tuple(map(int, row["hash_ids"]))
                lengths = int(row["input_length"]), int(row["output_length"])
                requests.append(TraceRequest(row["timestamp"] / 1000, *lengths, block_ids))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no request of a Mooncake trace: {error!r}") from error
    return requests


def read_azure(path: Path, num_requests: int) -> list[TraceRequest]:
    """The first requests of an Azure trace. Raises ValueError naming the line that is none."""
    fresh = itertools.count()
    requests = []
    with path.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(itertools.islice(csv.DictReader(lines), num_requests), 2):
            try:
                # Seven digits of a second's fraction: datetime takes six.
                at_s = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                lengths = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no request of an Azure trace: {error!r}") from error
            requests.append(TraceRequest(at_s, *lengths, fresh_blocks(lengths[0], fresh)))
    return requests


def fresh_blocks(num_tokens: int, fresh: Iterator[int]) -> tuple[int, ...]:
    """Identities for a prompt that shares nothing with any other."""
    return tuple(itertools.islice(fresh, max(1, -(-num_tokens // BLOCK_TOKENS))))


def make_conversations(num_requests: int, seed: int) -> list[TraceRequest]:
    """Conversations over a few system prompts, close together: each turn repeats what came before, and adds to it.

    Denser than any published trace (70 % of the requests continue a conversation), so that a few hundred requests show
    what routing does.
    """
    rng = random.Random(seed)
    fresh: Iterator[int] = itertools.count(1)
    systems = [tuple(next(fresh) for _ in range(rng.randint(2, 8))) for _ in range(4)]
    open_chats: list[tuple[int, tuple[int, ...]]] = []
    requests: list[TraceRequest] = []
    at_s = 0.0
    while len(requests) < num_requests:
        at_s += rng.expovariate(1.0)
        if open_chats and rng.random() < 0.7:
            turn, history = open_chats.pop(rng.randrange(len(open_chats)))
        else:
            turn, history = 0, rng.choice(systems)
        blocks = (*history, *(next(fresh) for _ in range(rng.randint(1, 6))))
        requests.append(TraceRequest(at_s, len(blocks) * BLOCK_TOKENS, BLOCK_TOKENS, blocks, turn))
        if len(blocks) < 80:
            open_chats.append((turn + 1, blocks))
    return requests


def infinite_cache_hits(prompts: Sequence[Sequence[int]], block_size: int) -> int:
    """Prompt tokens that one shared cache without bounds would have, prompt after prompt.

    As the server counts: whole blocks, and the last token of a prompt is always computed.
    """
    known: set[tuple[int, ...]] = set()
    num_hits = 0
    for prompt in prompts:
        num_cached = 0
        is_hit = True
        for end in range(block_size, len(prompt) + 1, block_size):
            prefix = tuple(prompt[:end])
            is_hit = is_hit and prefix in known
            num_cached = end if is_hit else num_cached
            known.add(prefix)
        num_hits += min(num_cached, len(prompt) - 1)
    return num_hits
