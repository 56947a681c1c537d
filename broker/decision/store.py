"""The policy in force: replaced as a whole when its folder changes, kept when the new one is wrong."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import structlog

from broker.decision.documents import Fingerprint, fingerprint, read
from broker.decision.findings import Defect, Finding, PolicyError
from broker.decision.policy import Policy, compile_documents

WATCH_INTERVAL_S = 1.0

_log = structlog.get_logger(__name__)


class PolicyStore:
    """Holds the policy of one folder.

    last_error: why the folder's present documents are not in force, or None. Making a store reads the folder, blocking.

    Raises: PolicyError when the folder's documents are wrong: a broker does not start without a policy.
    """

    def __init__(self, folder: Path) -> None:
        documents = read(folder)
        self._folder = folder
        self._current = compile_documents(documents)
        self._seen: Fingerprint | None = documents.fingerprint
        self._reloading = asyncio.Lock()
        self._listeners: list[Callable[[Policy], None]] = []
        self.last_error: PolicyError | None = None

    @property
    def current(self) -> Policy:
        """What decides now. Take it once for each decision."""
        return self._current

    def subscribe(self, listener: Callable[[Policy], None]) -> None:
        """Calls `listener`, on the event loop, with each policy that comes into force from now on."""
        self._listeners.append(listener)

    async def reload(self) -> Policy:
        """Puts the folder's documents in force, all or nothing. Returns what is in force then.

        Reading and compiling happen in a thread; requests are decided by the old policy meanwhile.
        Raises: PolicyError when they are wrong; the old policy stays.
        """
        async with self._reloading:
            try:
                policy, self._seen = await asyncio.to_thread(self._load)
            except PolicyError as error:
                self.last_error = error
                raise
            self.last_error = None
            if policy is not self._current:
                self._current = policy
                _log.info("policy_changed", revision=policy.revision, policies=len(policy.rules))
                for listener in self._listeners:
                    listener(policy)
            return policy

    async def watch(self, interval_s: float = WATCH_INTERVAL_S) -> NoReturn:
        """Reloads whenever the folder changes; run it as a task. A wrong document is logged and kept as `last_error`.

        A changed folder is read twice, an interval apart: two writes within one tick of the file system's clock can
        look like one.
        """
        settled = False
        said: tuple[Finding, ...] = ()
        while True:
            await asyncio.sleep(interval_s)
            found = await asyncio.to_thread(self._fingerprint)
            changed = found != self._seen
            if changed or not settled:
                settled = not changed
                try:
                    await self.reload()
                    said = ()
                except PolicyError as error:
                    self._seen = found  # tried again when the folder changes again
                    if error.findings != said:
                        said = error.findings
                        _log.error("policy_refused", findings=[str(finding) for finding in said])

    def _fingerprint(self) -> Fingerprint | None:
        try:
            return fingerprint(self._folder)
        except PolicyError:
            return None

    def _load(self) -> tuple[Policy, Fingerprint]:
        documents = read(self._folder)
        if documents.revision == self._current.revision:
            return self._current, documents.fingerprint
        try:
            return compile_documents(documents), documents.fingerprint
        except PolicyError:
            raise
        except Exception as error:  # the edge to documents: whatever they do to the compiler, the old policy stays
            finding = Finding(
                defect=Defect.FOLDER,
                file="",
                problem=f"the documents cannot be compiled: {type(error).__name__}",
                fix="Undo the last change, and report this with the documents.",
            )
            raise PolicyError([finding]) from error
