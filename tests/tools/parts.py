"""Parts that some machines have: a test with their marker runs where they are, and with --real everywhere.

SPIRE is not among them: its tests take minutes, so they run with --real alone, like those marked `slow`.
"""

import shutil
import sys
from pathlib import Path

if __name__ != "tools.parts":  # imported by a program beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import get_softhsm

COSIGN = ("cosign", "timestamp-server")


def here() -> frozenset[str]:
    """The markers of the parts that this machine has. Nothing is fetched or built."""
    found = {"softhsm": get_softhsm.is_here(), "cosign": _cosign_is_here()}
    return frozenset(marker for marker, is_here in found.items() if is_here)


def _cosign_is_here() -> bool:
    built = get_softhsm.cache().glob("sigstore-*/bin")
    return all(map(shutil.which, COSIGN)) or any(all((folder / name).is_file() for name in COSIGN) for folder in built)
