"""Where the embedded trust domain and its broker live: one folder, its name the same for all commands of one user."""

import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.errors import Invalid

TRUST_DOMAIN: Final = "dev.test"
ISSUER: Final = "https://broker.dev.test"
_MAX_PATH: Final = 70  # bytes, so that the longest socket name in it stays below the 108 of sun_path (unix(7))


@dataclass(frozen=True, slots=True, kw_only=True)
class DevFolder:
    """The places in it. They follow from `path` alone, so that `dev exec` needs no message from `dev`."""

    path: Path

    @property
    def trust(self) -> Path:
        """The trust domain's sockets: workload.sock, broker.sock (SPIFFE Broker API), entries.sock."""
        return self.path / "trust"

    @property
    def entries(self) -> Path:
        """DevEntries, for our own user."""
        return self.trust / "entries.sock"

    @property
    def broker_socket(self) -> Path:
        """The broker's, for every user."""
        return self.path / "broker.sock"

    @property
    def policy(self) -> Path:
        """The policy folder, unless another is named."""
        return self.path / "policy"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to find the broker and its own identity."""
        return {
            "ACTION_BROKER_ISSUER": ISSUER,
            "ACTION_BROKER_UNIX__SOCKET": f"unix://{self.broker_socket}",
            "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.trust / 'workload.sock'}",
        }

    def take(self) -> None:
        """Makes the folder, 0755, where it is missing. Raises: Invalid as `check`; OSError."""
        self._check_name()
        _make(self.path)
        self.check()  # before anything is put in
        _make(self.trust)

    def check(self) -> None:
        """Raises: Invalid where the folder could be somebody else's work, or its name is too long for sockets."""
        self._check_name()
        try:
            found = self.path.lstat()
        except FileNotFoundError:
            raise Invalid(f"{self.path} is not there: start `action-broker dev` first, or name its --folder") from None
        if not stat.S_ISDIR(found.st_mode):
            raise Invalid(f"{self.path} is not a folder (a link is none): remove it, or choose another --folder")
        if found.st_uid != os.geteuid():
            raise Invalid(f"{self.path} belongs to uid {found.st_uid}, not to us: choose another --folder")
        if found.st_mode & 0o022:
            raise Invalid(f"{self.path} can be written by others: chmod go-w it, or choose another --folder")

    def _check_name(self) -> None:
        if len(os.fsencode(self.path)) > _MAX_PATH:
            raise Invalid(f"{self.path} is longer than {_MAX_PATH} bytes: choose a shorter --folder")


def _make(folder: Path) -> None:
    if not os.path.lexists(folder):
        folder.mkdir(parents=True)
        folder.chmod(0o755)  # whatever the umask: other users' processes are workloads, too


def default_folder() -> Path:
    """`action-broker-dev-<uid>` in XDG_RUNTIME_DIR where that is ours, else in the temporary folder."""
    uid = os.geteuid()
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    try:
        ours = runtime.stat().st_uid == uid
    except OSError:
        ours = False
    return (runtime if ours else Path(tempfile.gettempdir())) / f"action-broker-dev-{uid}"
