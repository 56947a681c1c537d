"""`process`: what the kernel says of a caller on this node, read afresh at each request.

Values: `uid` and `gid` (effective), `exe` (path as the process sees it), `exe_sha256` (of the file that it runs),
`cgroup`. No PID and no start time among them: policies cannot use those, and a credential's environment digest should
be the same when the same program runs again. They are in the facts' key instead.

Not seen: libraries, scripts and arguments. For an interpreter, `exe` says only which interpreter it is.
"""

import asyncio
import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import datetime
from io import BufferedReader
from typing import Protocol

from attestors.contract import (
    AttestationFailed,
    AttestationRequest,
    AttestationUnavailable,
    FactKey,
    Facts,
    JsonValue,
    Process,
)
from attestors.proc import cgroup, exe_path, exited, held, may_not_look, open_exe

MAX_EXE = 256 * 1024**2  # bytes; hashing so much takes 0.15 s to 1 s, by processor
_HASHES = 512  # executables whose hash is remembered
_HASHING = 2  # executables hashed at the same time: callers choose what they run, and shall not have all processors
_SETTLED_NS = 2 * 10**9  # a file changed within the last 2 s may change again within the same tick of its ctime
_POLL_S = 1.0  # exec is invisible to a pidfd, so the executable is compared this often
# Seconds. No credential lives longer than 300 s, with 5 s of leeway and of clock skew each; facts not asked for again
# within that time support none.
_WATCH_S = 310.0


class ReadProcess(Protocol):
    """Reads /proc. Raises: ProcessLookupError when the process is gone; PermissionError when it may not look."""

    def __call__(self, pid: int) -> Process:
        """What it is now, all of it at one moment."""


@dataclass(frozen=True, slots=True)
class _FileState:
    """Changes whenever the file's content does: nobody can set a ctime back without owning the disk."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "_FileState":
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class _Hashing:
    """The hash of one executable on its way. waiting: requests that still want it."""

    def __init__(self, pool: ThreadPoolExecutor, exe: BufferedReader, state: _FileState) -> None:
        self.waiting = 0
        self._exe = os.fdopen(os.dup(exe.fileno()), "rb")
        self._work: Future[str] = pool.submit(_hash, self._exe, state)
        self.done = asyncio.wrap_future(self._work)

    def drop(self) -> bool:
        """Ends it where it has not begun; whether it did."""
        dropped = self._work.cancel()
        if dropped:
            self._exe.close()
        return dropped


class ProcessAttestor:
    """Facts about the caller's process.

    read: reads /proc. max_watched: how many processes `watch` follows; over it the oldest is reported as possibly
    changed and followed no longer. Each costs a descriptor.
    """

    name = "process"

    def __init__(self, read: ReadProcess, *, max_watched: int = 1024) -> None:
        self._read = read
        self._hashes: OrderedDict[_FileState, str] = OrderedDict()
        self._hashing: dict[_FileState, _Hashing] = {}
        self._pool = ThreadPoolExecutor(_HASHING, thread_name_prefix="hash-executable")
        self._watch = _Watch(read, max_watched)

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """What the process is now; None where the caller is no process on this node.

        It must still be the process that identification saw: same start time, user, group and executable.

        Raises: AttestationFailed when it is not, has exited, or has an executable that cannot be told; no credential
        should rest on it. AttestationUnavailable when we may not look.
        """
        process = request.process
        if process is None:
            return None
        with held(process.pid) as pidfd:
            self._check_same(process)
            with open_exe(process) as exe:
                values: dict[str, JsonValue] = {
                    "uid": process.uid,
                    "gid": process.gid,
                    "exe": exe_path(process.pid),
                    "exe_sha256": await self._sha256(exe, now),
                    "cgroup": cgroup(process.pid),
                }
            self._check_same(process)  # it may have run exec meanwhile
            if exited(pidfd):
                raise AttestationFailed(f"process {process.pid} has exited")
            key = FactKey(f"process:{process.pid}:{process.start_time}")
            self._watch.follow(key, process, pidfd, _Where(str(values["exe"]), str(values["cgroup"])))
        return Facts(attestor=self.name, key=key, values=values, attested_at=now)

    async def close(self) -> None:
        """Hashes no more; waits for what was begun. Call it when no request is left."""
        await asyncio.to_thread(self._pool.shutdown)

    def watch(self) -> AsyncIterator[FactKey]:
        """Keys of processes attested since it was first iterated that exited (at once) or run another program (≤ 1 s).

        For one consumer at a time. Follows a process for 310 s after it was last attested.
        """
        return self._watch.changes()

    def blind(self) -> Mapping[str, float]:
        """See attestors.contract.Attestor: what of `/proc` cannot be read counts as changed."""
        return {}

    def follow(self, process: Process) -> None:
        """Follows a process that a credential rests on, whether or not policies name its facts.

        Raises: AttestationFailed where it is not that process any more; AttestationUnavailable, also while nobody
        listens: then nobody would hear of its end.
        """
        key = FactKey(f"process:{process.pid}:{process.start_time}")
        if not self._watch.is_listened_to:
            raise AttestationUnavailable("processes are not watched now: nobody would hear of its end")
        if self._watch.follows(key, process):
            return
        with held(process.pid) as pidfd:
            self._check_same(process)
            if exited(pidfd):
                raise AttestationFailed(f"process {process.pid} has exited")
            self._watch.follow(key, process, pidfd)

    def _check_same(self, expected: Process) -> None:
        try:
            found = self._read(expected.pid)
        except ProcessLookupError as error:
            raise AttestationFailed(f"process {expected.pid} is gone") from error
        except PermissionError as error:
            raise may_not_look(expected.pid) from error
        changed = [one.name for one in fields(Process) if getattr(found, one.name) != getattr(expected, one.name)]
        if changed:
            raise AttestationFailed(f"process {expected.pid} changed since it was identified: {', '.join(changed)}")

    async def _sha256(self, exe: BufferedReader, now: datetime) -> str:
        """Hex. Hashed once for each state of the file, off the event loop.

        Of what nobody waits for any more, only what was begun goes on: it is bounded, and the next one to ask finds it
        done, also where it takes longer than a request may.
        """
        state = _FileState.of(os.fstat(exe.fileno()))
        if state in self._hashes:
            self._hashes.move_to_end(state)
            return self._hashes[state]
        if state.size > MAX_EXE:
            size = f"{state.size} bytes is larger than the {MAX_EXE} that are hashed"
            raise AttestationFailed(f"an executable of {size}: use a smaller one, or a policy without process facts")
        hashing = self._hashing.get(state)
        if hashing is None:
            hashing = self._hashing[state] = _Hashing(self._pool, exe, state)
            hashing.done.add_done_callback(functools.partial(self._hashed, state, hashing))
        hashing.waiting += 1
        try:
            digest = await asyncio.shield(hashing.done)  # one that gives up does not end it for the others
        finally:
            hashing.waiting -= 1
            if not hashing.waiting and hashing.drop():
                del self._hashing[state]  # now, so that nobody comes to wait for what will not be
        if int(now.timestamp() * 10**9) - state.ctime_ns > _SETTLED_NS:
            self._hashes[state] = digest
            if len(self._hashes) > _HASHES:
                self._hashes.popitem(last=False)
        return digest

    def _hashed(self, state: _FileState, hashing: _Hashing, done: asyncio.Future[str]) -> None:
        if self._hashing.get(state) is hashing:
            del self._hashing[state]
        if not done.cancelled():
            done.exception()  # whoever waited has it; if nobody waits any more, nobody misses it


@dataclass(frozen=True, slots=True)
class _Where:
    """What else was told of a process, and may become otherwise while it stays the same."""

    exe: str
    cgroup: str


@dataclass(slots=True)
class _Followed:
    """pidfd: its own. until: of the event loop's clock. where: as attested last; None where nobody asked for it."""

    process: Process
    pidfd: int
    until: float
    where: _Where | None = None


_Seen = tuple[Process, _Where | None]


class _Watch:
    """Follows processes while somebody listens."""

    def __init__(self, read: ReadProcess, limit: int) -> None:
        self._read = read
        self._limit = limit
        self._followed: OrderedDict[FactKey, _Followed] = OrderedDict()
        self._changed: dict[FactKey, None] = {}  # in order, each once
        self._let_go: dict[FactKey, None] = {}  # likewise
        self._told: asyncio.Event | None = None  # set while somebody listens

    def follow(self, key: FactKey, process: Process, pidfd: int, where: _Where | None = None) -> None:
        """Follows a process that was just attested; does not keep `pidfd`. Does nothing when nobody listens."""
        if self._told is None:
            return
        loop = asyncio.get_running_loop()
        known = self._followed.get(key)
        if known is None:
            own = os.dup(pidfd)
            loop.add_reader(own, self._tell, key)
            known = self._followed[key] = _Followed(process, own, 0)
        elif known.process != process:  # exec within the last second: earlier facts do not hold, these do
            self._changed[key] = None
            self._told.set()
            known.process = process
        if where is not None and known.where not in (None, where):
            self._changed[key] = None
            self._told.set()
        known.where = where or known.where
        known.until = loop.time() + _WATCH_S
        self._followed.move_to_end(key)
        if len(self._followed) > self._limit:  # told with the next poll: who then follows it again lets another one go
            oldest = next(iter(self._followed))
            self._drop(oldest)
            self._let_go[oldest] = None

    @property
    def is_listened_to(self) -> bool:
        """Whether somebody takes what changes."""
        return self._told is not None

    def follows(self, key: FactKey, process: Process) -> bool:
        """Whether it is followed as just this, and then for as long as if it had been attested now."""
        known = self._followed.get(key)
        if known is None or known.process != process:
            return False
        known.until = asyncio.get_running_loop().time() + _WATCH_S
        self._followed.move_to_end(key)
        return True

    async def changes(self) -> AsyncIterator[FactKey]:
        """Each key that changed or may have."""
        if self._told is not None:
            raise RuntimeError("processes are watched already: one consumer at a time")
        self._told = asyncio.Event()
        loop = asyncio.get_running_loop()
        look_at = loop.time() + _POLL_S
        try:
            while True:
                while self._changed:
                    key = next(iter(self._changed))
                    del self._changed[key]
                    yield key
                self._told.clear()
                try:
                    async with asyncio.timeout_at(look_at):
                        await self._told.wait()
                except TimeoutError:
                    await self._look()
                    look_at = loop.time() + _POLL_S
        finally:
            for key in list(self._followed):
                self._drop(key)
            self._changed.clear()
            self._let_go.clear()
            self._told = None

    async def _look(self) -> None:
        self._changed |= self._let_go
        self._let_go.clear()
        now = asyncio.get_running_loop().time()
        for key in [key for key, followed in self._followed.items() if followed.until < now]:
            self._drop(key)
        followed = [(key, (one.process, one.where)) for key, one in self._followed.items()]
        for key, seen in await asyncio.to_thread(self._changes_among, followed):
            # It may have been attested again, as what it is now, while we looked.
            one = self._followed.get(key)
            if one is not None and (one.process, one.where) == seen:
                self._tell(key)

    def _changes_among(self, followed: list[tuple[FactKey, _Seen]]) -> list[tuple[FactKey, _Seen]]:
        return [(key, seen) for key, seen in followed if not self._same(*seen)]

    def _same(self, process: Process, where: _Where | None) -> bool:
        try:
            if self._read(process.pid) != process:
                return False
            return where is None or _Where(exe_path(process.pid), cgroup(process.pid)) == where
        except (OSError, AttestationFailed):  # gone, or hidden from us
            return False

    def _tell(self, key: FactKey) -> None:
        self._drop(key)
        self._changed[key] = None
        if self._told is not None:
            self._told.set()

    def _drop(self, key: FactKey) -> None:
        pidfd = self._followed.pop(key).pidfd
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)


def _hash(exe: BufferedReader, state: _FileState) -> str:
    with exe:
        digest = hashlib.file_digest(exe, "sha256").hexdigest()
        if _FileState.of(os.fstat(exe.fileno())) != state:
            raise AttestationUnavailable("an executable changed while it was read")
    return digest
