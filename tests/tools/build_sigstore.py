"""Finds cosign 3.1 and timestamp-server 2.1, or builds them from sigstore/go.mod, once for each machine.

    python tests/tools/build_sigstore.py       prints the folder that holds both

Taken from PATH when both are there, else built and kept as go_tools.py says.
"""

import re
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # then only this file's own folder can be imported from
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.go_tools import HERE, CannotBuild, GoTools, on_path

# Both print a banner, then lines such as "GitVersion:    v3.1.3".
WANTED = {
    "cosign": re.compile(r"^GitVersion:\s+v3\.1\.\d+$", re.MULTILINE),
    "timestamp-server": re.compile(r"^GitVersion:\s+v2\.1\.\d+$", re.MULTILINE),
}
SIGSTORE = GoTools(
    name="sigstore",
    folder=HERE / "sigstore",
    packages=(
        "github.com/sigstore/cosign/v3/cmd/cosign",
        "github.com/sigstore/timestamp-authority/v2/cmd/timestamp-server",
    ),
    usual="about 10 minutes on two cores the first time; two when Go's own cache is warm",
)


def sigstore_binaries() -> Path:
    """The folder with cosign 3.1.x and timestamp-server 2.1.x; builds them if need be. Raises: CannotBuild."""
    return on_path(tuple(WANTED), _is_wanted) or SIGSTORE.built()


def _is_wanted(program: str) -> bool:
    # timestamp-server prints its version to the error stream.
    ran = subprocess.run([program, "version"], capture_output=True, text=True, check=False, timeout=30)
    wanted = WANTED[Path(program).name].search(ran.stdout + ran.stderr) is not None
    if not wanted:
        SIGSTORE.say(f"{program} is of another version: left aside")
    return wanted


if __name__ == "__main__":
    try:
        print(sigstore_binaries())
    except CannotBuild as error:
        sys.exit(f"sigstore: {error}")
