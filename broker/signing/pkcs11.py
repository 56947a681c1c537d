"""Signing keys that never leave a PKCS#11 token: sessions in threads, bounded waits, a token that goes and comes back.

What happens when:
- the token is taken away, also in the middle of a call: Unavailable, no signature. When it is back the next call
  works: a failed call makes one new attempt, with the module taken up again (pkcs11_module.py).
- the module hangs: Unavailable after `timeout_s`; the thread is replaced, within a bound (module_threads.py).
- the token has another key under the same label: its signatures do not verify, so Unavailable, until the broker is
  started again with it.
- the PIN is refused: Unavailable, and that PIN is not tried again, since tokens lock themselves after a few tries.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import pkcs11
import structlog
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import SignMixin

from broker.errors import Reason, Unavailable
from broker.signing.module_threads import RETRY_AFTER_MS, ModuleThreads
from broker.signing.pkcs11_key import NoSuchKey, TokenKey, describe, find_private, sign
from broker.signing.pkcs11_module import Module
from broker.signing.signer import (
    Algorithm,
    PublicKey,
    UnusableKey,
    check_digest,
    digest_of,
    require_valid,
)

SESSIONS: Final = 8  # calls that are under way at once; more wait for their turn
MOST_SESSIONS: Final = 64
TIMEOUT_S: Final = 5.0  # half of what a request may take

_Result = TypeVar("_Result")
_log = structlog.get_logger(__name__)


class _Seat(threading.local):
    """What one thread holds in the module: a session, and its keys by label. Void in another generation."""

    generation = -1
    session: pkcs11.Session | None = None
    keys: dict[str, SignMixin]


class Token:
    """A token, found by its label among the module's slots; logged in with the PIN in a file.

    Resources: `sessions` threads, until `close`, which `with` calls.
    """

    def __init__(
        self, module: Path, label: str, pin_file: Path, sessions: int = SESSIONS, *, timeout_s: float = TIMEOUT_S
    ) -> None:
        """The token itself is first looked for in `signer`.

        Raises: UnusableKey, Unavailable when the module cannot be used.
        """
        if not 1 <= sessions <= MOST_SESSIONS:
            raise UnusableKey(f"a token is used in 1 to {MOST_SESSIONS} sessions, not {sessions}")
        self._label = label
        self._pin_file = pin_file
        self._wait_s = timeout_s / 4  # for turns inside a call, so that a call ends before it is given up
        self._seat = _Seat()
        self._module = Module.of(module)
        self._threads = ModuleThreads(f"token {label!r}", sessions, timeout_s, self._leave)
        self._closed = False

    def __repr__(self) -> str:
        return f"Token(label={self._label!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and, with the module's last token, logs out. Twice is once."""
        if not self._closed:
            self._closed = True
            self._threads.close()
            self._module.release()

    def signer(self, key_label: str, name: str) -> "Pkcs11Signer":
        """The key of this label, its public half read from the token. Blocks, so it is for start-up.

        Raises: UnusableKey where there is no such key, two of them, or one that signs nothing here; Unavailable.
        """
        since = time.monotonic()

        def work() -> TokenKey:
            return self._with_key(key_label, lambda private: describe(private, key_label), since)

        key = self._threads.run_blocking(work)
        for warning in key.warnings:
            _log.warning("signing_key_not_confined", key=name, token=self._label, warning=warning)
        return Pkcs11Signer(self, key_label, name, key)

    async def sign(self, key_label: str, key: TokenKey, signed: bytes) -> bytes:
        """One signature, verified. Raises: Unavailable."""
        since = time.monotonic()

        def work() -> bytes:
            made = self._with_key(key_label, lambda private: sign(private, key.algorithm, signed), since)
            require_valid(key.algorithm, key.public_key, made, signed)
            return made

        try:
            return await self._threads.run(work)
        except UnusableKey as error:  # the PIN's file, the key's label: somebody changed them while we run
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, str(error)) from error

    def _with_key(self, key_label: str, use: Callable[[SignMixin], _Result], since: float) -> _Result:
        """In a thread: with the session it has; when that fails, once more with the module taken up again.

        since: when it was asked for.
        """
        seen = -1
        try:
            with self._module.use(self._wait_s) as seen:
                return use(self._key(key_label, seen))
        except (PKCS11Error, Unavailable, NoSuchKey) as error:
            if not self._module.renew(seen, since, self._wait_s):
                if isinstance(error, PKCS11Error):
                    raise self._failed(error) from error
                raise
        try:
            with self._module.use(self._wait_s) as generation:
                return use(self._key(key_label, generation))
        except PKCS11Error as error:
            raise self._failed(error) from error

    def _failed(self, error: PKCS11Error) -> Unavailable:
        detail = f"token {self._label!r} failed: {type(error).__name__}"
        return Unavailable(Reason.SIGNER_UNAVAILABLE, detail, retry_after_ms=RETRY_AFTER_MS)

    def _key(self, key_label: str, generation: int) -> SignMixin:
        seat = self._seat
        if seat.session is None or seat.generation != generation:
            seat.session, seat.keys, seat.generation = None, {}, generation
            seat.session = self._module.open_session(self._label, self._pin_file, self._wait_s)
        if key_label not in seat.keys:
            seat.keys[key_label] = find_private(seat.session, key_label)
        return seat.keys[key_label]

    def _leave(self) -> None:
        """A thread ends: its session goes back, where it still counts."""
        session = self._seat.session
        if session is None:
            return
        try:
            with self._module.use(0) as generation:
                if generation == self._seat.generation:
                    session.close()
        except (PKCS11Error, Unavailable) as error:
            _log.info("session_not_closed", token=self._label, error=type(error).__name__)


class Pkcs11Signer:
    """A named key in a token. Several may share one."""

    __slots__ = ("_key", "_key_label", "_token", "name")

    def __init__(self, token: Token, key_label: str, name: str, key: TokenKey) -> None:
        self._token = token
        self._key_label = key_label
        self._key = key
        self.name = name

    def __repr__(self) -> str:
        return f"Pkcs11Signer(name={self.name!r}, algorithm={self.algorithm.value!r})"

    @property
    def algorithm(self) -> Algorithm:
        """See Signer."""
        return self._key.algorithm

    @property
    def public_key(self) -> PublicKey:
        """See Signer."""
        return self._key.public_key

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the token would let others do with the key; empty for one that was made in it to stay."""
        return self._key.warnings

    async def sign_digest(self, digest: bytes) -> bytes:
        """See Signer."""
        check_digest(self.algorithm, digest)
        return await self._token.sign(self._key_label, self._key, digest)

    async def sign_message(self, message: bytes) -> bytes:
        """See Signer."""
        digest = digest_of(self.algorithm, message)
        return await self._token.sign(self._key_label, self._key, message if digest is None else digest)
