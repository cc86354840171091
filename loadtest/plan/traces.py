"""Reads request traces: when, how long, and which parts of prompts are equal; no text.

Three formats are read, told apart by their first line:

- Mooncake's JSONL (github.com/kvcache-ai/Mooncake, FAST25-release/traces): `timestamp` in ms, `input_length` and
  `output_length` in tokens, and `hash_ids`, one per 512 prompt tokens, equal where everything up to there is equal.
- Azure's CSV (github.com/Azure/AzurePublicDataset, data/AzureLLMInferenceTrace_*.csv): `TIMESTAMP`, `ContextTokens`,
  `GeneratedTokens`. It says nothing of what prompts share: here they share nothing.
- Sessions of agents, as JSONL with a session a line: `requests` are rows of its start in seconds since the session's,
  the prompt's and the answer's tokens, the tokens that it shares with an earlier one, and that one's number (-1: none).
  What follows in a row is passed over. Sessions share nothing, and begin evenly over the mean length of one.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """The first requests of a trace file of any of them. Raises ValueError naming the line that is none."""
    try:
        with path.open(encoding="utf-8") as lines:
            first = lines.readline()
    except OSError as error:
        raise ValueError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no trace: {error}") from error
    if first.startswith("{"):
        return read_sessions(path, num_requests) if '"requests"' in first else read_mooncake(path, num_requests)
    if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(first.strip().split(",")):
        return read_azure(path, num_requests)
    raise ValueError(
        f"{path} is neither Mooncake's JSONL nor Azure's CSV nor agent sessions; its first line is {first[:80]!r}"
    )


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


def read_sessions(path: Path, num_requests: int) -> list[TraceRequest]:
    """The first requests of sessions of agents, by their times. Raises ValueError naming the line that is none."""
    fresh = itertools.count()
    sessions = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                sessions.append(_read_session(json.loads(line)["requests"], fresh))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: no session of an agent: {error!r}") from error
    mean_s = sum(session[-1].at_s for session in sessions if session) / max(len(sessions), 1)
    starts_s = (index * mean_s / len(sessions) for index in range(len(sessions)))
    requests = [
        replace(each, at_s=start_s + each.at_s)
        for start_s, session in zip(starts_s, sessions, strict=True)
        for each in session
    ]
    return sorted(requests, key=lambda each: each.at_s)[:num_requests]


def _read_session(rows: list[list[float]], fresh: Iterator[int]) -> list[TraceRequest]:
    requests: list[TraceRequest] = []
    for turn, row in enumerate(rows):
        at_s, input_length, output_length, num_shared, before = float(row[0]), *map(int, row[1:5])
        blocks = fresh_blocks(input_length, fresh)
        if 0 <= before < turn:
            kept = requests[before].block_ids[: min(num_shared, input_length) // BLOCK_TOKENS]
            blocks = (*kept, *blocks[len(kept) :])
        requests.append(TraceRequest(at_s, input_length, output_length, blocks, turn))
    return requests


def fresh_blocks(num_tokens: int, fresh: Iterator[int]) -> tuple[int, ...]:
    """Identities for a prompt that shares nothing with any other."""
    return tuple(itertools.islice(fresh, max(1, -(-num_tokens // BLOCK_TOKENS))))
