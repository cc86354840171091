"""Runs the thread that owns a NIXL agent: everything that touches the agent happens in it.

NIXL's own progress thread burns a third of a core, so this one makes the agent progress: often while reads are under
way, each millisecond while UCX has work beside them (connections being set up, lanes emulated in software), and else
hardly ever: then it waits for a command. A call may block for as long as copying takes; the event loop never waits
for it.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kvstore.block import BlockMemory
from kvstore.errors import ReadFailed, TransportError
from kvstore.threads import show_name
from kvstore.transport.nixl_backend import make_agent
from kvstore.transport.nixl_pool import (
    Indexes,
    PoolAddress,
    Prepared,
    Remote,
    cut,
    fitting_unit,
    memory_kind,
    pool_address,
    prepare,
)
from kvstore.transport.nixl_tokens import TOKEN_BYTES, Tokens

if TYPE_CHECKING:
    from nixl_cu13._api import nixl_agent, nixl_xfer_handle
    from nixl_cu13._bindings import nixlRegDList

logger = logging.getLogger(__name__)

_BUSY_POLL_S: Final = 50e-6
_SLOW_POLL_S: Final = 1e-3
_IDLE_POLL_S: Final = 0.1  # nothing waits for it: UCX looks after its connections, and notes those that were closed
_BUSY_S: Final = 0.1  # a read older than this is not worth a core: poll it slowly
_SETTLE_S: Final = 10.0  # as long as a handshake may take: both agents set a connection up meanwhile
_FIRST_RETRY_S: Final = 0.5  # until an agent that could not be made is tried again; doubled each time
_MAX_RETRY_S: Final = 30.0
_MAX_FORMER: Final = 64  # owners that are remembered although nothing is to be read from them now
_LAST_REFERENCE: Final = 2  # what sys.getrefcount gives for an object with one name: the name and its own argument

_Answer = TypeVar("_Answer")
_Handle = TypeVar("_Handle")


@dataclass
class _Owner:
    """What our agent knows of another one.

    It is remembered when its last link has ended: UCX closes a connection at one end alone, and were it made anew with
    the next link, both would have a socket more each time.
    """

    metadata: bytes
    blocks: Prepared | None = None
    """Its pool's; None without users."""
    num_users: int = 0


@dataclass
class _Read:
    handle: nixl_xfer_handle
    done: Future[None]
    remote: Remote
    landed: Callable[[], None] | None = None
    rest: deque[tuple[Indexes, Indexes]] = field(default_factory=deque)  # to be posted once what is has ended
    give_up_at: float | None = None


class AgentThread:
    """One agent with the whole pool registered.

    Methods may be called from any thread and return at once; their futures resolve in the agent's thread.
    """

    def __init__(self, agent_class: type[nixl_agent], role: str, memory: BlockMemory) -> None:
        self._agent_class = agent_class
        self._role = role
        self._memory = memory
        # No SimpleQueue: where its `get` is interrupted until its time-out has passed, it waits without end (CPython
        # 3.11 passes on what is left of the time as a negative number). At 50 us that happens.
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue()
        self._stopping = threading.Event()
        self._ended: Future[None] = Future()
        self._ended.set_running_or_notify_cancel()  # nobody cancels it
        self._thread = threading.Thread(target=self._run, name="kv-nixl", daemon=True)
        self._tokens = Tokens()
        self._address: PoolAddress | None = None
        self.problem: str | None = "not started"
        """Why nothing can be read at present; None: all is well."""
        self.num_turns = 0
        """Calls into the agent, and rounds without one."""
        # From here on: touched by the thread only.
        self._generation = 0
        self._agent: nixl_agent | None = None
        self._registered: list[nixlRegDList] = []
        self._local_blocks: dict[int, Prepared] = {}  # by the size of their units
        self._owners: dict[str, _Owner] = {}  # by their agents' names; of those without users the last one left last
        self._reads: list[_Read] = []
        self._busy_until = 0.0
        self._settling_until = 0.0
        self._num_driven = 0
        self._retry_s = _FIRST_RETRY_S
        self._retry_at: float | None = None  # when to make an agent in place of the one that is gone

    # ---- from any thread ----

    def start(self) -> Future[None]:
        """Start the thread and its agent."""
        self._thread.start()
        return self._submit(self._create_agent)

    @property
    def address(self) -> PoolAddress:
        """The address at which peers find our pool; changes when the agent is reset."""
        if self._address is None:
            raise TransportError("nixl: not started")
        return self._address

    def add_remote(self, address: PoolAddress) -> Future[Remote]:
        """Make an owner's pool readable. Raises `TransportError`."""
        return self._submit(lambda: self._add_remote(address))

    def remove_remote(self, remote: Remote, is_sound: bool = True) -> Future[None]:
        """Forget a pool; no read from it may be under way. `is_sound`: its connections may serve again."""
        return self._submit(lambda: self._remove_remote(remote, is_sound))

    def check(self, remote: Remote, address: PoolAddress) -> Future[None]:
        """Read the owner's token: sets the connection up, and proves that we reach what we believe to reach."""
        return self._begin(lambda done: self._start_check(remote, address, done))

    def read(
        self,
        remote: Remote,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
        landed: Callable[[], None] | None = None,
    ) -> Future[None]:
        """Read blocks. Resolves when the read has really ended; raises `ReadFailed`. `landed`: as `Link.read` says."""
        return self._begin(lambda done: self._start_read(remote, remote_ids, local_ids, landed, done))

    def give_up(self, remote: Remote, after_s: float) -> None:
        """End what is read from this pool: by itself, or, after so long, by destroying the agent."""
        self._commands.put(lambda: self._set_give_up(remote, time.monotonic() + after_s))

    def reader_came(self, is_driven: bool) -> None:
        """Note that a peer is about to connect to read from us. `is_driven`: each of its reads needs our turns."""
        self._commands.put(lambda: self._note_reader(int(is_driven)))

    def reader_left(self, was_driven: bool) -> None:
        """Note that it is gone."""
        self._commands.put(lambda: self._note_reader(-int(was_driven)))

    def stop(self) -> Future[None]:
        """Destroy the agent and end the thread; resolves when that is done. May be called again."""
        if self._thread.ident is None and not self._ended.done():
            self._ended.set_result(None)  # it was never started
        self._commands.put(self._stopping.set)
        return self._ended

    def _submit(self, work: Callable[[], _Answer]) -> Future[_Answer]:
        return self._begin(lambda answer: answer.set_result(work()), TransportError)

    def _begin(
        self, work: Callable[[Future[_Answer]], None], error_type: type[TransportError] = ReadFailed
    ) -> Future[_Answer]:
        """Have the thread start something that resolves the future when it has ended."""
        answer = _future_of_ours()

        def run() -> None:
            try:
                work(answer)
            except Exception as error:  # nothing has been started; NIXL's errors have no common base
                translated = error_type(f"nixl: {error if isinstance(error, TransportError) else repr(error)}")
                translated.__cause__ = error.with_traceback(None)  # its frames would keep the agent alive
                answer.set_exception(translated)

        self._commands.put(run)
        return answer

    # ---- in the thread ----

    def _run(self) -> None:
        show_name()
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception:
                # The thread must go on: reads wait for it, and only it can end them.
                logger.exception("nixl: a step of the agent's thread failed")
        try:
            self._destroy_agent("the transport was closed")
        finally:
            self._ended.set_result(None)

    def _step(self) -> None:
        try:
            self._commands.get(timeout=self._pause_s(time.monotonic()))()
            while not self._commands.empty():
                self.num_turns += 1
                self._commands.get()()
        except queue.Empty:
            pass
        self.num_turns += 1
        if self._agent is not None and not self._stopping.is_set():
            self._agent.get_new_notifs()  # makes progress; nobody sends us any
            if self._poll_reads():
                self._reset()
        elif self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._revive()

    def _pause_s(self, now: float) -> float:
        """How long the agent can do without us, unless a command comes."""
        if now < self._busy_until:
            return _BUSY_POLL_S
        return _SLOW_POLL_S if self._reads or self._num_driven or now < self._settling_until else _IDLE_POLL_S

    def _note_reader(self, change: int) -> None:
        self._num_driven += change
        self._settling_until = time.monotonic() + _SETTLE_S

    def _create_agent(self) -> None:
        geometry, tokens = self._memory.geometry, self._tokens
        name = f"{self._role}-{os.getpid()}-{time.time_ns()}"  # a name that was used before confuses peers
        agent = make_agent(self._agent_class, name)
        pool = [(each.address, geometry.span_bytes, each.device_id, "") for each in geometry.regions]
        registered = [
            agent.register_memory(pool, memory_kind(self._memory.device)),
            agent.register_memory([(tokens.address, tokens.size_bytes, 0, "")], "DRAM"),
        ]
        local_blocks = self._prepare_local(agent, geometry.piece_bytes)  # what fits peers with pieces as ours
        metadata, device = agent.get_agent_metadata(), self._memory.device
        address = pool_address(metadata, device, geometry, tokens.address, tokens.ours)
        self._local_blocks[geometry.piece_bytes] = local_blocks
        self._agent, self._registered, self._address = agent, registered, address
        self.problem = None

    def _add_remote(self, address: PoolAddress) -> Remote:
        agent = self._living_agent()
        self._settling_until = time.monotonic() + _SETTLE_S
        unit_bytes = fitting_unit(self._memory.geometry, address.geometry)
        if unit_bytes not in self._local_blocks:
            self._local_blocks[unit_bytes] = self._prepare_local(agent, unit_bytes)
        known = (name for name, owner in self._owners.items() if owner.metadata == address.metadata)
        name = next(known, None)
        is_former = name is not None and not self._owners[name].num_users
        if name is None:
            given = agent.add_remote_agent(address.metadata)
            name = given.decode() if isinstance(given, bytes) else given  # bytes, whatever its annotation says
            agent.make_connection(name)
        owner = self._owners.setdefault(name, _Owner(address.metadata))
        if owner.blocks is None:
            owner.blocks = prepare(agent, name, address.memory_kind, address.geometry, unit_bytes)
        owner.num_users += 1
        return Remote(name, self._generation, is_former)

    def _prepare_local(self, agent: nixl_agent, unit_bytes: int) -> Prepared:
        kind = memory_kind(self._memory.device)
        return prepare(agent, "NIXL_INIT_AGENT", kind, self._memory.geometry, unit_bytes)

    def _remove_remote(self, remote: Remote, is_sound: bool) -> None:
        if remote.generation != self._generation:
            return
        self._settling_until = time.monotonic() + _SETTLE_S
        owner = self._owners[remote.agent_name]
        owner.num_users -= 1
        if owner.num_users:
            return
        agent, blocks, owner.blocks = self._living_agent(), owner.blocks, None
        assert blocks is not None
        _release(agent.release_dlist_handle, blocks.handle)
        self._owners[remote.agent_name] = self._owners.pop(remote.agent_name)
        former = [name for name, each in self._owners.items() if not each.num_users]
        if not is_sound:
            self._forget(remote.agent_name)
        elif len(former) > _MAX_FORMER:
            self._forget(former[0])

    def _forget(self, agent_name: str) -> None:
        del self._owners[agent_name]
        _release(self._living_agent().remove_remote_agent, agent_name)

    def _start_check(self, remote: Remote, address: PoolAddress, done: Future[None]) -> None:
        agent = self._living_agent(remote)
        received = self._tokens.place_for(address.token)
        ours = agent.get_xfer_descs([(received.ctypes.data, TOKEN_BYTES, 0)], "DRAM")
        theirs = agent.get_xfer_descs([(address.token_address, TOKEN_BYTES, 0)], "DRAM")

        def compare(arrived: Future[None]) -> None:
            error = arrived.exception()
            if error is None and received.tobytes() != address.token:
                error = ReadFailed(f"nixl: {remote.agent_name} is reached, but not the memory that it described")
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        arrived = _future_of_ours()
        arrived.add_done_callback(compare)
        self._post(_Read(agent.initialize_xfer("READ", ours, theirs, remote.agent_name), arrived, remote))

    def _start_read(
        self,
        remote: Remote,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
        landed: Callable[[], None] | None,
        done: Future[None],
    ) -> None:
        self._living_agent(remote)
        theirs = self._blocks_of(remote)
        targets = self._local_blocks[theirs.unit_bytes].indexes(local_ids)
        sources = theirs.indexes(remote_ids)  # raises where ids of a peer that lies do not fit
        first, *rest = cut(targets, sources)
        self._post(_Read(self._make(remote, *first), done, remote, landed, deque(rest)))

    def _blocks_of(self, remote: Remote) -> Prepared:
        blocks = self._owners[remote.agent_name].blocks
        assert blocks is not None
        return blocks

    def _make(self, remote: Remote, targets: Indexes, sources: Indexes) -> nixl_xfer_handle:
        theirs = self._blocks_of(remote)
        ours = self._local_blocks[theirs.unit_bytes]
        return self._living_agent(remote).make_prepped_xfer("READ", ours.handle, targets, theirs.handle, sources)

    def _post(self, read: _Read) -> None:
        """Start a transfer. From here on only `_poll_reads` and `_destroy_agent` end it, even where posting fails."""
        self.num_turns += 1
        try:
            state = self._living_agent().transfer(read.handle)
        except Exception as error:
            logger.warning("nixl: posting a read from %s failed: %s", read.remote.agent_name, repr(error))
            state = "PROC"
        if state == "DONE":
            self._end(read, None)
        else:
            self._reads.append(read)
            self._busy_until = time.monotonic() + _BUSY_S

    def _poll_reads(self) -> bool:
        """End what has ended; return whether a read has outstayed its limit."""
        agent, overdue = self._living_agent(), False
        for read in list(self._reads):
            problem: str | None = None
            try:
                state = agent.check_xfer_state(read.handle)
            except Exception as error:  # how NIXL says that a transfer went wrong
                state = problem = f"{error!r}"
            if state == "PROC":
                overdue |= read.give_up_at is not None and time.monotonic() > read.give_up_at
            else:
                self._reads.remove(read)
                self._end(read, None if state == "DONE" else problem or state)
        if not self._reads:
            self._busy_until = 0.0
        return overdue

    def _end(self, read: _Read, problem: str | None) -> None:
        _release(self._living_agent().release_xfer_handle, read.handle)
        if problem is None and read.rest and (problem := self._go_on(read)) is None:
            return
        if problem is not None:
            read.done.set_exception(ReadFailed(f"nixl: read from {read.remote.agent_name} failed: {problem}"))
            return
        if read.landed is not None:
            read.landed()
            self.num_turns += 1
        read.done.set_result(None)

    def _go_on(self, read: _Read) -> str | None:
        """Post what is to come next of a read, or say why not."""
        if read.give_up_at is not None:
            return "it was given up before all of it was posted"
        try:
            read.handle = self._make(read.remote, *read.rest.popleft())
        except Exception as error:
            return f"{error!r}"
        self._post(read)
        return None

    def _set_give_up(self, remote: Remote, at: float) -> None:
        for read in self._reads:
            if read.remote is remote and read.give_up_at is None:
                read.give_up_at = at

    def _reset(self) -> None:
        """End reads that do not end by themselves: NIXL stops a transfer only together with its agent."""
        logger.error("nixl: %d reads do not end; the agent is reset, all peers must connect again", len(self._reads))
        self.problem = "the agent is being reset"
        self._destroy_agent("the agent was reset")
        self._revive()

    def _revive(self) -> None:
        """Make an agent in place of one that is gone; where that fails, try again after a while, without end."""
        try:
            self._create_agent()
        except Exception as error:
            self.problem = f"the agent is gone, and no other could be made: {error!r}"
            self._retry_at = time.monotonic() + self._retry_s
            logger.error("nixl: %s; trying again in %g s", self.problem, self._retry_s)
            self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
            return
        self._retry_at, self._retry_s = None, _FIRST_RETRY_S

    def _destroy_agent(self, reason: str) -> None:
        """Destroy the agent, and with it everything that it might still write; only then end the reads."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        self._generation += 1
        ended = [(read.done, read.remote.agent_name) for read in self._reads]
        self._release_all(agent)
        binding = agent.agent
        del agent
        if sys.getrefcount(binding) > _LAST_REFERENCE:
            gc.collect()
        if sys.getrefcount(binding) > _LAST_REFERENCE:
            # Never seen. The reads stay unresolved and their blocks in quarantine: the safe side.
            logger.critical("nixl: the agent is still referenced and cannot be destroyed; %d reads go on", len(ended))
            return
        del binding
        for done, agent_name in ended:
            done.set_exception(ReadFailed(f"nixl: read from {agent_name} was ended: {reason}"))

    def _release_all(self, agent: nixl_agent) -> None:
        """Drop everything that refers to the agent. Releasing a transfer does not end it; destroying the agent will."""
        for read in self._reads:
            _release(agent.release_xfer_handle, read.handle)
        self._reads.clear()
        for owner in self._owners.values():
            if owner.blocks is not None:
                _release(agent.release_dlist_handle, owner.blocks.handle)
        self._owners.clear()
        for blocks in self._local_blocks.values():
            _release(agent.release_dlist_handle, blocks.handle)
        self._local_blocks.clear()
        for registered in self._registered:
            _release(agent.deregister_memory, registered)
        self._registered.clear()

    def _living_agent(self, remote: Remote | None = None) -> nixl_agent:
        if self._agent is None:
            raise TransportError("the agent is gone")
        if remote is not None and remote.generation != self._generation:
            raise TransportError(f"the agent was reset since {remote.agent_name} was connected")
        return self._agent


def _future_of_ours() -> Future[Any]:
    """Return a future that nobody can cancel while the thread works on it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


def _release(release: Callable[[_Handle], object], handle: _Handle) -> None:
    """Give something back to NIXL. That it will not have it costs its memory, and nobody else's read."""
    try:
        release(handle)
    except Exception as error:
        logger.warning("nixl: %s failed: %s", release.__name__, repr(error))
