"""Workers whose blocks are in pieces hand over to each other, and to those whose are not: the same bytes and proofs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvstore.block import BlockLayout
from kvstore.errors import IncompatiblePeer
from kvstore.exchange import Fetch, Lease
from kvstore.protocol import FetchCause, LeaseOutcome
from tests.exchange.exchange_worker import LAYOUT, TRANSFER, Worker, room, running, some_hashes
from tests.memory_transport import Faults, Switchboard
from tests.pieces import flip, read_all

FOREIGN = BlockLayout(
    *(24, 1, 8, 8, "float32", "ab12"), engine="vllm", kernel_layout="LHNC", isa="amx", attention_backend="CPU_ATTN"
)
SOURCE, TARGET = [3, 4, 5, 6, 20, 9], [40, 41, 42, 11, 12, 50]
HASHES = some_hashes(len(SOURCE))


def make_pair(owner_pieces: int, reader_pieces: int, faults: Faults | None = None) -> tuple[Worker, Worker]:
    switchboard = Switchboard()
    owner = Worker("prefill-0", switchboard, FOREIGN, num_pieces=owner_pieces)
    return owner, Worker("decode-0", switchboard, FOREIGN, faults, num_pieces=reader_pieces)


def hand_over(owner: Worker, reader: Worker) -> tuple[Fetch, Lease]:
    fetch = reader.exchange.fetch(TRANSFER, "prefill-0", HASHES, room(TARGET))
    lease = owner.exchange.open_lease(TRANSFER, "decode-0", len(SOURCE))
    lease.announce(0, owner.announced(SOURCE, HASHES), last=True)
    return fetch, lease


@pytest.mark.parametrize(("owner_pieces", "reader_pieces"), list(itertools.product([1, 3, 24], repeat=2)))
async def test_blocks_arrive_whatever_pieces_they_lie_in_at_either_end(owner_pieces: int, reader_pieces: int) -> None:
    owner, reader = make_pair(owner_pieces, reader_pieces, Faults(max_delay_s=0.001))
    expected, held = read_all(reader.memory), read_all(owner.memory)
    expected[TARGET] = held[SOURCE]
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = hand_over(owner, reader)
        result = await fetch.result
        assert result.ok, result.failure
        assert result.num_bytes == len(SOURCE) * FOREIGN.block_bytes
        assert await lease.closed is LeaseOutcome.CONFIRMED
    assert (read_all(reader.memory) == expected).all(), "each where it belongs, and nothing else was touched"
    assert (read_all(owner.memory) == held).all()


@pytest.mark.parametrize("reader_pieces", [1, 24])
@pytest.mark.parametrize("piece", [0, 11, 23])
async def test_a_bit_that_flips_in_one_piece_after_it_was_proven_is_seen(reader_pieces: int, piece: int) -> None:
    owner, reader = make_pair(24, reader_pieces)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch = reader.exchange.fetch(TRANSFER, "prefill-0", HASHES, room(TARGET))
        lease = owner.exchange.open_lease(TRANSFER, "decode-0", len(SOURCE))
        announced = owner.announced(SOURCE, HASHES)
        flip(owner.memory, SOURCE[2], (piece + 1) * (FOREIGN.block_bytes // 24) - 1)
        lease.announce(0, announced, last=True)
        failure = (await fetch.result).failure
        assert failure is not None
        assert failure.cause is FetchCause.DIGEST_MISMATCH
        assert "blocks [2]" in failure.detail
        assert sorted(await fetch.quiesced) == sorted(TARGET)
        assert await lease.closed is LeaseOutcome.RELEASED


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (Faults(corrupt=1.0), FetchCause.DIGEST_MISMATCH),
        (Faults(cut=1.0), FetchCause.READ_FAILED),
        (Faults(fail=1.0), FetchCause.READ_FAILED),
    ],
    ids=["flipped on the way", "cut", "failed"],
)
@pytest.mark.parametrize("pieces", [(24, 1), (3, 24)], ids=["24 to 1", "3 to 24"])
async def test_a_read_that_goes_wrong_in_its_midst_gives_all_blocks_back(
    faults: Faults, cause: FetchCause, pieces: tuple[int, int]
) -> None:
    owner, reader = make_pair(*pieces, faults)
    async with running(owner, reader):
        await reader.exchange.connect(owner.exchange.address)
        fetch, lease = hand_over(owner, reader)
        failure = (await fetch.result).failure
        assert failure is not None
        assert failure.cause is cause
        assert sorted(await fetch.quiesced) == sorted(TARGET)
        assert await lease.closed in (LeaseOutcome.RELEASED, LeaseOutcome.PEER_LOST)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (replace(FOREIGN, isa="vec"), "isa: ours vec, theirs amx"),
        (replace(FOREIGN, dtype="float8_e5m2", scales="1f0a"), "scales: ours 1f0a, theirs (none)"),
        (LAYOUT, "engine: ours native, theirs vllm; kernel_layout: ours (none), theirs LHNC"),
    ],
    ids=["isa", "scales", "engine"],
)
async def test_another_engines_blocks_are_refused_on_both_sides_naming_both_values(
    theirs: BlockLayout, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    switchboard = Switchboard()
    owner, reader = Worker("prefill-0", switchboard, FOREIGN), Worker("decode-0", switchboard, theirs)
    async with running(owner, reader):
        with pytest.raises(IncompatiblePeer) as refused:
            await reader.exchange.connect(owner.exchange.address)
        assert said in str(refused.value)
    ours, others = said.split(": ours ")[-1].split(", theirs ")
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any(f"ours {ours}, theirs {others}" in error for error in errors), errors
    assert any(f"ours {others}, theirs {ours}" in error for error in errors), errors
