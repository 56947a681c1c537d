"""Finds SoftHSM2, or brings it from the machine's own Debian archive without installing it, once for each machine.

    python tests/tools/get_softhsm.py          prints the module and the program

Taken from the machine when both are there. Else `apt-get download` and `dpkg-deb -x` put the three packages into
$XDG_CACHE_HOME/action-broker (default ~/.cache/action-broker): no root is needed, except to fetch package lists where
the machine has none. What they link to (libssl3, libstdc++6) is on each Debian that has Python.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("softhsm2", "libsofthsm2", "softhsm2-common")
MODULE = "libsofthsm2.so"
PROGRAM = "softhsm2-util"
# Where distributions put the module: Debian, Debian multiarch, Fedora, Arch, and what is built by hand.
FOLDERS = (
    "usr/lib/softhsm",
    "usr/lib/x86_64-linux-gnu/softhsm",
    "usr/lib/aarch64-linux-gnu/softhsm",
    "usr/lib64/softhsm",
    "usr/lib64/pkcs11",
    "usr/lib/pkcs11",
    "usr/local/lib/softhsm",
)
INSTALL = "install it (Debian: apt-get install softhsm2; Fedora: dnf install softhsm)"


class CannotGet(Exception):
    """SoftHSM2 is neither here nor to be had; the message says what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftHsmFiles:
    """module: the PKCS#11 library. program: softhsm2-util, which makes tokens."""

    module: Path
    program: Path


def softhsm() -> SoftHsmFiles:
    """Finds it, or brings it. Raises: CannotGet."""
    found = on_this_machine() or in_cache()
    if found:
        return found
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / "softhsm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return in_cache() or _bring()


def is_here() -> bool:
    """Whether `softhsm` would answer without bringing anything."""
    return (on_this_machine() or in_cache()) is not None


def on_this_machine(root: Path = Path("/")) -> SoftHsmFiles | None:
    """What is installed."""
    program = shutil.which(PROGRAM)
    return _module_below(root, Path(program)) if program else None


def in_cache() -> SoftHsmFiles | None:
    """What an earlier run brought."""
    unpacked = cache() / "softhsm"
    return _module_below(unpacked, unpacked / "usr/bin" / PROGRAM)


def cache() -> Path:
    """As for SPIRE."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "action-broker"


def _module_below(root: Path, program: Path) -> SoftHsmFiles | None:
    if not program.is_file():
        return None
    modules = (root / folder / MODULE for folder in FOLDERS)
    return next((SoftHsmFiles(module=module, program=program) for module in modules if module.is_file()), None)


def _bring() -> SoftHsmFiles:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise CannotGet(f"SoftHSM2 is not on this machine: {INSTALL}")
    if not _listed():
        if os.geteuid() != 0:
            raise CannotGet(f"SoftHSM2 is not on this machine, nor in its package lists: {INSTALL}, or apt-get update")
        print("softhsm: fetching the package lists", file=sys.stderr, flush=True)
        _run(["apt-get", "-q", "update"], Path("/"))
    print("softhsm: downloading it from the machine's Debian archive (0.4 MB)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix="softhsm-unpacking-") as working:
        folder = Path(working)
        # As root apt would download as its own user, who cannot write here, and warn.
        _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *PACKAGES], folder)
        for package in sorted(folder.glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(folder / "softhsm")], folder)
        (folder / "softhsm").rename(cache() / "softhsm")  # on one file system, so whole or not at all
    found = in_cache()
    if not found:
        raise CannotGet(f"the Debian packages of SoftHSM2 have other paths than expected: {INSTALL}")
    return found


def _listed() -> bool:
    shown = subprocess.run(["apt-cache", "show", *PACKAGES], capture_output=True, check=False)
    return shown.returncode == 0


def _run(command: list[str], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, stdout=sys.stderr, check=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotGet(f"{' '.join(command[:3])} … failed ({error}); {INSTALL}") from error


if __name__ == "__main__":
    try:
        files = softhsm()
    except CannotGet as error:
        sys.exit(f"softhsm: {error}")
    print(files.module, files.program)
