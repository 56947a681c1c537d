"""The store's file: how it is opened, who may open it, and its numbered, forward-only migrations.

One process writes (an advisory lock on `<path>.lock`, released by the kernel however the process ends); any number
read at the same time. SQLite in WAL mode with synchronous=FULL: a commit that returned is on the disk.
"""

import fcntl
import os
from pathlib import Path

import apsw

from broker.errors import Reason, Unavailable

BUSY_MS = 2_000  # a reader that recovers the WAL holds a lock for moments; nobody else writes
WAL_PAGES = 1_000  # checkpoint into the main file every ~4 MB: short enough that no commit waits long
WAL_KEEP = 64 * 1024 * 1024  # give the disk back after a burst
CACHE_KIB = 64 * 1024  # holds the index of live credentials, so that an append never reads

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE records (seq INTEGER PRIMARY KEY, hash BLOB NOT NULL, body BLOB NOT NULL) STRICT;
    CREATE TABLE ledger (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        id BLOB NOT NULL,            -- random; the chain's genesis comes from it
        seq INTEGER NOT NULL,        -- of the last record
        head BLOB NOT NULL,          -- of the chain after it
        epoch INTEGER NOT NULL,
        epoch_since INTEGER NOT NULL,  -- microseconds since 1970
        open_from INTEGER NOT NULL   -- no intent before it lacks its outcome
    ) STRICT;
    CREATE TABLE credentials (
        seq INTEGER PRIMARY KEY, jti TEXT NOT NULL UNIQUE, epoch INTEGER NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE redemptions (
        seq INTEGER PRIMARY KEY, jti TEXT NOT NULL UNIQUE, caller TEXT NOT NULL, idempotency BLOB NOT NULL,
        content BLOB NOT NULL, redeemed_at INTEGER NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE bindings (
        seq INTEGER PRIMARY KEY, assertion BLOB NOT NULL UNIQUE, jkt TEXT NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE keys (kid TEXT PRIMARY KEY, record BLOB NOT NULL, expires_at INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    """,
    # When the longest-lived assertion expired whose binding was deleted.
    "ALTER TABLE ledger ADD COLUMN bindings_forgotten INTEGER NOT NULL DEFAULT 0",
    # Digests of requests are hexadecimal. Each row's seq is that of the record it stands for; an answer's, its outcome.
    """
    CREATE TABLE approval_requests (
        seq INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, principal TEXT NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX approval_requests_of ON approval_requests (principal);
    CREATE TABLE approvals (
        seq INTEGER PRIMARY KEY, digest TEXT NOT NULL, approver TEXT NOT NULL, expires_at INTEGER NOT NULL,
        UNIQUE (digest, approver)
    ) STRICT;
    CREATE TABLE consumptions (
        seq INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, jti TEXT NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE answers (
        seq INTEGER PRIMARY KEY, jti TEXT NOT NULL UNIQUE, answer BLOB NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT;
    """,
    # refused: of live credentials. sessions: rows lead to the records that scored and then bound them (0: not since).
    # events: security events that were taken. evidence: facts that cannot be looked at again, of the intent with this
    # number, whose hash the intent has.
    """
    CREATE TABLE refused (
        jti TEXT PRIMARY KEY, seq INTEGER NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX refused_ends ON refused (expires_at);
    CREATE TABLE sessions (
        id TEXT PRIMARY KEY, principal TEXT NOT NULL, scored INTEGER NOT NULL, bound INTEGER NOT NULL,
        expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sessions_of ON sessions (principal);
    CREATE INDEX sessions_end ON sessions (expires_at);
    CREATE TABLE events (
        event TEXT PRIMARY KEY, seq INTEGER NOT NULL, expires_at INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX events_end ON events (expires_at);
    ALTER TABLE ledger ADD COLUMN events_forgotten INTEGER NOT NULL DEFAULT 0; -- when the last row ended that is gone
    ALTER TABLE ledger ADD COLUMN credentials_forgotten INTEGER NOT NULL DEFAULT 0; -- likewise
    CREATE TABLE evidence (
        seq INTEGER NOT NULL, attestor TEXT NOT NULL, facts BLOB NOT NULL, expires_at INTEGER NOT NULL,
        PRIMARY KEY (seq, attestor)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX evidence_ends ON evidence (expires_at);
    """,
)
"""Migration n brings a store from n-1 to n. Never edited, only added to. Times are seconds since 1970, rounded up,
except where microseconds are said."""


def unavailable(detail: str) -> Unavailable:
    """The ledger cannot be used, and why."""
    return Unavailable(Reason.LEDGER_UNAVAILABLE, detail)


def lock(path: Path) -> int:
    """Takes the lock to write, held until the descriptor is closed. Raises: Unavailable when another broker has it."""
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise unavailable(
            f"{path} is open in another broker: stop that one, or give this one a store of its own"
        ) from error
    return descriptor


def open_writable(path: Path) -> apsw.Connection:
    """The writer's connection, migrated. The file is made 0600. Raises: apsw.Error, OSError, Unavailable."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives -wal and -shm the same mode
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(BUSY_MS)
        connection.pragma("trusted_schema", False)
        connection.pragma("journal_mode", "wal")
        connection.pragma("synchronous", "full")
        connection.pragma("wal_autocheckpoint", WAL_PAGES)
        connection.pragma("journal_size_limit", WAL_KEEP)
        connection.pragma("cache_size", -CACHE_KIB)
        _migrate(connection, path)
    except BaseException:
        connection.close(True)
        raise
    return connection


def open_readonly(path: Path) -> apsw.Connection:
    """A connection that cannot write, also while a broker writes.

    SQLite wants to make its -shm file beside the store: to read one from a medium that cannot be written, copy it.

    Raises: FileNotFoundError; apsw.Error when the file is no database; Unavailable when it is not a ledger.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no ledger at {path}")
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        connection.set_busy_timeout(BUSY_MS)
        _check_version(path, _version(connection), at_least=1)
    except BaseException:
        connection.close(True)
        raise
    return connection


def _check_version(path: Path, version: int, *, at_least: int) -> None:
    if version < at_least:
        raise unavailable(f"{path} is not a ledger: check the path")
    if version > len(MIGRATIONS):
        raise unavailable(
            f"{path} was written by a newer release (schema {version}, known {len(MIGRATIONS)}): use that one"
        )


def _version(connection: apsw.Connection) -> int:
    if not connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'migrations'").get:
        return 0
    return int(connection.execute("SELECT coalesce(max(number), 0) FROM migrations").get)


def _migrate(connection: apsw.Connection, path: Path) -> None:
    with connection:
        version = _version(connection)
        is_new = not connection.execute("SELECT count(*) FROM sqlite_schema").get
        _check_version(path, version, at_least=0 if is_new else 1)
        if is_new:
            connection.execute("CREATE TABLE migrations (number INTEGER PRIMARY KEY) STRICT")
        for number in range(version + 1, len(MIGRATIONS) + 1):
            connection.execute(MIGRATIONS[number - 1])
            connection.execute("INSERT INTO migrations VALUES (?)", (number,))
