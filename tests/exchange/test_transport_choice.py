"""Which transport carries a pair of peers, and how blocks are joined to runs."""

import ctypes
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstore.block import HostMemory, Run, coalesce
from kvstore.errors import IncompatiblePeer, TransportError
from kvstore.protocol import ExchangeTimeouts
from kvstore.transport import choose, make_transports, nixl, select, ucxx
from kvstore.transport.buffers import is_one_buffer, region
from kvstore.transport.host import can_read_memory, host_facts, on_same_host
from services.engine.tensor_memory import DeviceMemory
from tests.memory_transport import MemoryTransport, Switchboard

REPOSITORY = Path(__file__).parents[2]


class FakeTransport(MemoryTransport):
    """A transport of another name, whose descriptor is the lane."""

    def __init__(self, name: str, two_sided: bool) -> None:
        super().__init__(HostMemory.allocate(1, 8), Switchboard())
        self.name = name
        self.two_sided = two_sided

    def lane_to(self, descriptor: bytes) -> str | None:
        return descriptor.decode() or None


NIXL, UCXX = FakeTransport("nixl", two_sided=False), FakeTransport("ucxx", two_sided=True)


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        ({"nixl": b"rdma", "ucxx": b"tcp"}, ("nixl", "rdma")),
        ({"nixl": b"cuda_ipc", "ucxx": b"tcp"}, ("nixl", "cuda_ipc")),
        ({"ucxx": b"tcp", "nixl": b"cma"}, ("nixl", "cma")),
        ({"nixl": b"tcp", "ucxx": b"tcp"}, ("ucxx", "tcp")),
        ({"nixl": b"tcp"}, ("nixl", "tcp")),
        ({"nixl": b"", "ucxx": b"tcp", "other": b"x"}, ("ucxx", "tcp")),
    ],
)
def test_a_fast_lane_wins_then_two_sided_messages_then_whatever_there_is(offers, expected):
    transport, lane = choose([NIXL, UCXX], offers, "prefill-0")
    assert (transport.name, lane) == expected


def test_peers_with_nothing_in_common_are_told_what_each_has():
    with pytest.raises(IncompatiblePeer, match=r"prefill-0: ours nixl, theirs ucxx, other"):
        choose([NIXL], {"ucxx": b"tcp", "other": b""}, "prefill-0")


def test_an_unknown_transport_is_refused_by_name():
    with pytest.raises(ValueError, match="'rocket'; choose from auto, ucxx, nixl"):
        make_transports("rocket", HostMemory.allocate(1, 8), "prefill-0", "127.0.0.1")


def test_neighbours_on_both_sides_become_one_run():
    assert coalesce([7, 8, 9, 3, 4], [0, 1, 2, 3, 9], 64) == [Run(7, 0, 3), Run(3, 3, 1), Run(4, 9, 1)]
    assert coalesce([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], 2) == [Run(0, 5, 2), Run(2, 7, 2), Run(4, 9, 1)]
    assert coalesce([], [], 1) == []


def test_runs_are_the_pairs_that_they_were_made_of():
    rng = random.Random(3)
    for _ in range(200):
        num_blocks, max_blocks = rng.randrange(1, 40), rng.randrange(1, 8)
        remote, local = ([rng.randrange(12) for _ in range(num_blocks)] for _ in range(2))
        runs = coalesce(remote, local, max_blocks)
        pairs = [(run.remote_first + i, run.local_first + i) for run in runs for i in range(run.num_blocks)]
        assert pairs == list(zip(remote, local, strict=True))
        assert max(run.num_blocks for run in runs) <= max_blocks


def test_a_region_is_the_pools_own_memory_and_never_outside_it():
    memory = HostMemory.allocate(4, 16)
    region(memory, 1, 2)[:] = 7
    assert memory.array.sum(axis=1).tolist() == [0, 112, 112, 0]
    for first_block, num_blocks in ((-1, 1), (4, 1), (3, 2), (0, 0)):
        with pytest.raises(TransportError, match="not in this pool of 4"):
            region(memory, first_block, num_blocks)


def test_this_process_can_read_itself_and_nothing_where_the_proof_is_not():
    probe = ctypes.create_string_buffer(b"0123456789abcdef", 16)
    facts = host_facts(probe)
    assert on_same_host(facts, facts)
    assert can_read_memory(facts)
    probe.raw = b"fedcba9876543210"
    assert not can_read_memory(facts)


def test_loading_ucxx_leaves_no_setting_behind_that_would_slow_nixl_down():
    program = (
        "import os; os.environ.pop('UCX_RNDV_THRESH', None)\n"
        "from kvstore.transport.ucxx import import_ucxx\n"
        "options = import_ucxx()[1]\n"
        "print(sorted(options), [name for name in os.environ if name.startswith('UCX_RNDV')])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert ran.stdout.splitlines()[-1] == "['RNDV_FRAG_MEM_TYPE', 'RNDV_THRESH'] []"


@pytest.mark.parametrize("wrong", [{"read_s": 0}, {"offer_s": -1.0}, {"peer_timeout_s": 0.5}, {"lease_ttl_s": 0.5}])
def test_impossible_timeouts_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ExchangeTimeouts(**wrong)


@pytest.mark.parametrize("num_regions", [1, 2], ids=["one that ranks share", "one for each rank"])
def test_a_gpus_memory_that_ranks_gave_us_is_not_given_to_peers_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, num_regions: int
) -> None:
    monkeypatch.setattr(select, "confine_ucx", lambda host: None)
    for module, name in ((nixl, "NixlTransport"), (ucxx, "UcxxTransport")):
        monkeypatch.setattr(module, name, lambda memory, whose, name=name: FakeTransport(name, two_sided=True))

    def offered(choice: str, *, is_mapped: bool) -> list[str]:
        caches = [torch.zeros(1, 4, 64, dtype=torch.uint8) for _ in range(num_regions)]
        memory = DeviceMemory(*caches, is_mapped=is_mapped)
        assert is_one_buffer(memory) == (num_regions == 1 and not is_mapped)
        return [transport.name for transport in make_transports(choice, memory, "prefill-0", "127.0.0.1")]

    assert offered("auto", is_mapped=False) == ["NixlTransport", "UcxxTransport"]
    assert offered("auto", is_mapped=True) == ["UcxxTransport"]
    assert offered("nixl", is_mapped=True) == ["NixlTransport"]
