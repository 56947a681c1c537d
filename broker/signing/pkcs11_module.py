"""One PKCS#11 module in this process: its initialisation, its logins, and how it is taken up again after a removal.

A module is a library with state of its own, one for the process. It is initialised for use by several threads
(CKF_OS_LOCKING_OK; PKCS#11 v2.40 base specification, section 5.4): python-pkcs11 does not ask for that, yet lets go of
the GIL in its calls, and SoftHSM then dies of a segmentation fault. So C_Initialize and C_Finalize are called here.

Whatever fails for a token that was taken away and put back (its sessions, its objects, the slot list) is mended by
one thing that all modules support: C_Finalize and C_Initialize, with no call under way.
"""

import ctypes
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Self, TypeVar

import pkcs11
import structlog
from pkcs11.exceptions import PKCS11Error

from broker.errors import Reason, Unavailable
from broker.signing.module_threads import RETRY_AFTER_MS
from broker.signing.secret_file import read_secret
from broker.signing.signer import UnusableKey

MAX_PIN: Final = 1024  # bytes in its file
RENEW_EVERY_S: Final = 0.25  # a token that stays away may not keep the others of its module from work
_PATIENCE_S: Final = 1.0  # for calls under way to end before the module is taken up again

_OS_LOCKING_OK: Final = 0x2  # CKF_OS_LOCKING_OK
_OK: Final = 0x0  # CKR_OK
_NOT_INITIALIZED: Final = 0x190  # CKR_CRYPTOKI_NOT_INITIALIZED

_Result = TypeVar("_Result")
_log = structlog.get_logger(__name__)


class _Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_ubyte), ("minor", ctypes.c_ubyte))


_Call = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)


class _Functions(ctypes.Structure):
    """How CK_FUNCTION_LIST begins."""

    _fields_ = (("version", _Version), ("initialize", _Call), ("finalize", _Call))


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_void_p),
    )


class Module:
    """A module that is in use. `generation` grows whenever it is taken up again: sessions of an older one are void."""

    _all: Final[dict[str, "Module"]] = {}
    _all_lock: Final = threading.Lock()

    def __init__(self, path: Path) -> None:
        """Not for use: see `of`."""
        self._path = path
        try:
            self._library = pkcs11.lib(str(path))
        except PKCS11Error as error:
            raise UnusableKey(f"{path} cannot be loaded as a PKCS#11 module: {error}") from error
        self._functions = self._function_list()
        self._gate = threading.Condition()
        self._inside = 0
        self._renewing = False
        self._renewed_at = float("-inf")
        self._users = 0
        self._login = threading.Lock()
        self._anchors: dict[str, pkcs11.Session] = {}  # a session each: a login lasts as long as any session
        self._refused_pins: dict[str, bytes] = {}
        self._salt = secrets.token_bytes(16)
        self.generation = 0
        self._restart()

    @classmethod
    def of(cls, path: Path) -> Self:
        """The one module of this path, counted: each call is followed by one of `release`.

        Raises: UnusableKey; Unavailable where it does not initialise.
        """
        name = str(path.resolve())
        with cls._all_lock:
            found = cls._all.get(name) or cls._all.setdefault(name, _apart(lambda: cls(Path(name))))
            found._users += 1  # noqa: SLF001 - its own
            return found  # type: ignore[return-value]

    def release(self) -> None:
        """With the last user the module is finalised, which logs out; unless a call hangs in it (then: undefined)."""
        with self._all_lock:
            self._users -= 1
            if self._users:
                return
            with self._gate:
                idle = self._gate.wait_for(lambda: not self._inside, _PATIENCE_S)
            if idle:
                del self._all[str(self._path)]
                self._anchors.clear()
                _apart(lambda: self._functions.finalize(None))

    @contextmanager
    def use(self, wait_s: float) -> Iterator[int]:
        """Around calls into the module; gives the generation. Raises: Unavailable when it is being taken up again."""
        with self._gate:
            if self._renewing and not self._gate.wait_for(lambda: not self._renewing, wait_s):
                raise _away(f"{self._path} does not come back from its initialisation")
            self._inside += 1
            generation = self.generation
        try:
            yield generation
        finally:
            with self._gate:
                self._inside -= 1
                if not self._inside:
                    self._gate.notify_all()

    def renew(self, seen: int, since: float, wait_s: float) -> bool:
        """Takes the module up again, once for all who saw generation `seen` fail. Not inside `use`.

        since: when (monotonic) the call that failed was asked for. False where the module was taken up after that: it
        did not help, and to do it again for each call of a queue would help nobody either.
        Raises: Unavailable where it cannot be: a call hangs in it, or it does not initialise.
        """
        with self._gate:
            while True:
                if not self._gate.wait_for(lambda: not self._renewing, wait_s):
                    raise _away(f"{self._path} does not come back from its initialisation")
                if self.generation != seen:
                    return True
                if self._renewed_at >= since:
                    return False
                too_early = self._renewed_at + RENEW_EVERY_S - time.monotonic()
                if too_early <= 0:
                    break
                self._gate.wait(too_early)  # meanwhile the other tokens of the module are at work
            self._renewing = True
        try:
            self._renew()
        finally:
            with self._gate:
                self._renewing = False
                self._gate.notify_all()
        return True

    def _renew(self) -> None:
        with self._gate:
            if not self._gate.wait_for(lambda: not self._inside, _PATIENCE_S):
                raise _away(f"{self._inside} calls hang in {self._path}, so it cannot be taken up again")
        self._renewed_at = time.monotonic()
        self._restart()
        _log.info("pkcs11_module_taken_up_again", module=str(self._path), generation=self.generation)

    def _restart(self) -> None:
        self._anchors.clear()
        self.generation += 1  # even where it fails: no old session counts
        finalized = self._functions.finalize(None)
        if finalized not in {_OK, _NOT_INITIALIZED}:
            raise _away(f"C_Finalize of {self._path} failed with {finalized:#x}")
        initialized = self._functions.initialize(ctypes.byref(_InitializeArgs(flags=_OS_LOCKING_OK)))
        if initialized != _OK:
            raise _away(f"C_Initialize of {self._path} with CKF_OS_LOCKING_OK failed with {initialized:#x}")

    def _function_list(self) -> _Functions:
        listed = ctypes.POINTER(_Functions)()
        if ctypes.CDLL(str(self._path)).C_GetFunctionList(ctypes.byref(listed)) != _OK:
            raise UnusableKey(f"{self._path} gives no function list")
        return listed.contents

    def open_session(self, label: str, pin_file: Path, wait_s: float) -> pkcs11.Session:
        """A session of its own for the calling thread, logged in. Inside `use`.

        Raises: Unavailable, PKCS11Error; UnusableKey for the PIN and its file.
        """
        if not self._login.acquire(timeout=wait_s):
            raise _away(f"a login to {label!r} does not end")
        try:
            token = self._token(label)
            if label not in self._anchors:
                self._anchors[label] = self._log_in(token, label, pin_file)
            return token.open()
        finally:
            self._login.release()

    def _token(self, label: str) -> pkcs11.Token:
        found = []
        for slot in self._library.get_slots(token_present=True):
            try:
                token = slot.get_token()
            except PKCS11Error:  # of another token, perhaps: only ours may be missing
                continue
            if token.label == label:
                found.append(token)
        if len(found) != 1:
            raise _away(f"{len(found) or 'no'} token{'s' * (len(found) > 1)} of {self._path} has the label {label!r}")
        return found[0]

    def _log_in(self, token: pkcs11.Token, label: str, pin_file: Path) -> pkcs11.Session:
        pin = read_secret(pin_file, MAX_PIN).strip(b"\r\n")
        known = hashlib.blake2b(pin, key=self._salt).digest()
        if self._refused_pins.get(label) == known:
            raise UnusableKey(f"the PIN in {pin_file} was refused before: put the right one there, then it is tried")
        try:
            return token.open(user_pin=pin.decode())
        except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, UnicodeDecodeError):
            # Each further try brings the token nearer to locking itself.
            self._refused_pins[label] = known
            raise UnusableKey(f"token {label!r} refused the PIN in {pin_file}: put the right one there") from None
        except PKCS11Error as error:
            # `from None`: frames of the login have the PIN.
            raise _away(f"the login to token {label!r} failed: {type(error).__name__}") from None


def _apart(call: Callable[[], _Result]) -> _Result:
    """In a thread that ends with it. Raises: what it raises.

    A module may use the OpenSSL of this process, and SoftHSM leaves errors in its queue, one for each thread: the next
    use of TLS in the thread would take them for its own.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="pkcs11-apart") as one:
        return one.submit(call).result()


def _away(detail: str) -> Unavailable:
    return Unavailable(Reason.SIGNER_UNAVAILABLE, detail, retry_after_ms=RETRY_AFTER_MS)
