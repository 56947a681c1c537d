"""Finds spire-server and spire-agent 1.15.x, or builds them from go.mod beside this file, once for each machine.

    python tests/tools/build_spire.py          prints the folder that holds both

Taken from PATH when both are there, else built and kept as go_tools.py says. The build needs a C compiler (SPIRE's
SQLite).
"""

import re
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # then only this file's own folder can be imported from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.go_tools import HERE, CannotBuild, GoTools, on_path

PROGRAMS = ("spire-server", "spire-agent")
WANTED = re.compile(r"1\.15\.\d+.*", re.DOTALL)
SPIRE = GoTools(
    name="spire",
    folder=HERE,
    packages=tuple(f"github.com/spiffe/spire/cmd/{program}" for program in PROGRAMS),
    usual="about 5 minutes on two cores the first time, 10 with a slow network; seconds when Go's own cache is warm",
    cgo="SPIRE's SQLite needs a C compiler",
)


def spire_binaries() -> Path:
    """The folder with spire-server and spire-agent 1.15.x; builds them if need be. Raises: CannotBuild."""
    return _on_path() or SPIRE.built()


def _on_path() -> Path | None:
    return on_path(PROGRAMS, _is_wanted)


def _is_wanted(program: str) -> bool:
    # SPIRE prints its version to the error stream.
    ran = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=30)
    wanted = WANTED.fullmatch((ran.stdout + ran.stderr).strip()) is not None
    if not wanted:
        SPIRE.say(f"{program} is not 1.15.x: left aside")
    return wanted


if __name__ == "__main__":
    try:
        print(spire_binaries())
    except CannotBuild as error:
        sys.exit(f"spire: {error}")
