"""Where the transports listen. UCX's TCP ports take whatever comes: who reaches one writes the process's memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvstore.block import HostMemory
from kvstore.errors import TransportError
from kvstore.transport import devices, make_transports
from tests.exchange.listening_peer import BLOCK_BYTES
from tests.garbage import PAYLOADS
from tests.reach import ELSEWHERE, listening, reached_from_elsewhere

REPOSITORY = Path(__file__).parents[2]
BOUND_S = 60.0
# Of UCX's TCP transport: what each connection begins with, and the message that writes.
MAGIC, PUT = 0xCAFEBABE12345678, 33


@dataclass
class Peer:
    process: asyncio.subprocess.Process
    pool: int

    async def state(self) -> dict[str, Any]:
        """The first bytes of its blocks, and the turns of its transports' threads. Raises where the process is dead."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        found: dict[str, Any] = json.loads(await line_of(self.process))
        return found

    async def first_bytes(self) -> list[bytes]:
        return [bytes.fromhex(each) for each in (await self.state())["first_bytes"]]

    async def put(self, port: int, block: int, data: bytes) -> None:
        """What a stranger sends: write these bytes there. Returns when the other side has taken it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = struct.pack("<QQI", self.pool + block * BLOCK_BYTES, len(data), 1)
        writer.write(struct.pack("<QBI", MAGIC, PUT, len(body)) + body + data)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), BOUND_S)
        writer.close()


async def line_of(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), BOUND_S)
    assert line, f"the process is gone: {process.returncode}"
    return line


@asynccontextmanager
async def peer_on(host: str) -> AsyncIterator[Peer]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.exchange.listening_peer", host),
        cwd=REPOSITORY,
        env=environ,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        said = json.loads(await line_of(process))
        yield Peer(process, said["pool"])
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), BOUND_S)


async def test_on_loopback_nobody_elsewhere_reaches_a_transport_and_whoever_is_there_writes_memory() -> None:
    """One packet, without a secret: so the device is chosen with care. At ucxx's own port nothing of it lands."""
    async with peer_on("127.0.0.1") as peer:
        ports = sorted(listening(peer.process.pid))
        assert [host for host, _ in ports] == [
            "0.0.0.0",
            "127.0.0.1",
            "127.0.0.1",
        ]  # ucxx's endpoints begin at the first
        assert reached_from_elsewhere(peer.process.pid) == []
        before = await peer.first_bytes()
        for block, (host, port) in enumerate(ports):
            await peer.put(port, block, b"from a stranger!")
            now = before
            while host != "0.0.0.0" and now[block] == before[block]:
                now = await peer.first_bytes()
        assert now == [before[0], *[b"from a stranger!"] * 2, *before[3:]]


async def test_garbage_and_pickles_at_the_transports_ports_are_not_run_and_disturb_nobody(tmp_path: Path) -> None:
    """What begins as UCX's own messages do is another matter: whoever reaches these ports owns the process."""
    async with peer_on("127.0.0.1") as peer:
        before = await peer.state()
        for host, port in listening(peer.process.pid):
            for payload in PAYLOADS.values():
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(payload(tmp_path / "loaded"))
                if host != "0.0.0.0":  # ucxx's own waits for more
                    with contextlib.suppress(ConnectionResetError):  # an end, too: of what was left unread
                        await asyncio.wait_for(reader.read(), BOUND_S)
                writer.close()
        now = await peer.state()
        while any(now["turns"][name] <= turns + 1 for name, turns in before["turns"].items()):
            now = await peer.state()
        assert now["first_bytes"] == before["first_bytes"]
        assert len(listening(peer.process.pid)) == 3
        assert not (tmp_path / "loaded").exists()


def test_a_port_on_all_addresses_is_narrowed_to_one() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        assert (ELSEWHERE, port) in reached_from_elsewhere(os.getpid())
        devices.narrow(port, "0.0.0.0")
        assert (ELSEWHERE, port) in reached_from_elsewhere(os.getpid())
        devices.narrow(port, "localhost")
        assert port not in {of for _, of in reached_from_elsewhere(os.getpid())}
        devices.narrow(port, "::1")
        with socket.socket() as connecting:
            connecting.setblocking(False)
            connecting.connect_ex(("127.0.0.1", port))
            with pytest.raises(OSError, match="not connected"):
                connecting.getpeername()


def test_a_port_that_nobody_listens_on_is_not_narrowed() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="nothing of this process listens on TCP port"):
            devices.narrow(bound.getsockname()[1], "127.0.0.1")


def has(address: str, family: socket.AddressFamily = socket.AF_INET) -> SimpleNamespace:
    return SimpleNamespace(family=family, address=address)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with two networks, a bridge and an RDMA device."""
    for name in ("UCX_NET_DEVICES", "UCX_TCP_BRIDGE_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    found = {
        "lo": [has("127.0.0.1"), has("::1", socket.AF_INET6)],
        "eth0": [has("02:00:00:00:00:01", socket.AF_PACKET), has("10.0.0.7"), has("fd00::7", socket.AF_INET6)],
        "eth0:1": [has("10.0.0.8")],
        "eth1": [has("192.168.3.7"), has("fe80::7%eth1", socket.AF_INET6)],
        "br0": [has("172.17.0.1")],
    }
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    monkeypatch.setattr(devices, "_INFINIBAND", tmp_path / "infiniband")
    monkeypatch.setattr(devices, "_NETWORK", tmp_path / "net")
    (tmp_path / "pci" / "ports" / "1").mkdir(parents=True)
    (tmp_path / "infiniband").mkdir()
    (tmp_path / "infiniband" / "mlx5_0").symlink_to(tmp_path / "pci")
    (tmp_path / "net" / "br0" / "bridge").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("host", "chosen", "has_rdma"),
    [
        ("127.0.0.1", "lo", False),
        ("127.0.0.53", "lo", False),
        ("localhost", "lo", False),
        ("[::1]", "lo", False),
        ("10.0.0.7", "eth0,mlx5_0:1", True),
        ("10.0.0.8", "eth0,mlx5_0:1", True),
        ("fd00::7", "eth0,mlx5_0:1", True),
        ("192.168.3.7", "eth1,mlx5_0:1", True),
        ("172.17.0.1", "br0,mlx5_0:1", True),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("", None, True),
    ],
)
def test_ucx_listens_on_the_device_of_the_host_and_keeps_rdma(
    machine: Path, host: str, chosen: str | None, has_rdma: bool
) -> None:
    reached = devices.confine_ucx(host)
    assert os.environ.get("UCX_NET_DEVICES") == chosen
    assert reached == (None if chosen == "lo" else chosen or "all")
    assert devices.has_rdma() == has_rdma
    assert os.environ.get("UCX_TCP_BRIDGE_ENABLE") == ("y" if host == "172.17.0.1" else None)


@pytest.mark.parametrize(
    ("own", "reached", "has_rdma"),
    [
        ("lo", None, False),
        ("eth1", "eth1", False),
        ("all", "all", True),
        ("eth1,mlx5_0:1", "eth1,mlx5_0:1", True),
        ("mlx5_0", "mlx5_0", True),
        ("^eth0", "^eth0", True),
        ("^mlx5_0:1", "^mlx5_0:1", False),
    ],
)
def test_the_users_own_devices_win(
    machine: Path, monkeypatch: pytest.MonkeyPatch, own: str, reached: str | None, has_rdma: bool
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", own)
    assert devices.confine_ucx("127.0.0.1") == reached
    assert os.environ["UCX_NET_DEVICES"] == own
    assert devices.has_rdma() == has_rdma


def test_an_address_of_no_device_is_refused(machine: Path) -> None:
    with pytest.raises(TransportError, match=r"no network device has the address 10\.9\.9\.9"):
        devices.confine_ucx("10.9.9.9")


def test_where_others_reach_ucx_the_log_says_so(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvstore.transport.ucxx.UcxxTransport", lambda *_: object())
    make_transports("ucxx", HostMemory.allocate(1, 8), "decode-0", "10.0.0.7")
    assert "UCX listens on network devices eth0,mlx5_0:1" in caplog.text
    caplog.clear()
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    make_transports("ucxx", HostMemory.allocate(1, 8), "decode-0", "127.0.0.1")
    assert caplog.text == ""
