"""The policy folder as texts: one consistent reading of it, and whether it has changed since.

A folder holds `*.cedar` and `*.cedarschema` files (not in subfolders). Symbolic links are followed, because a mounted
Kubernetes ConfigMap is one: its files lead through `..data`, which is swapped when the map changes.
"""

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.decision.findings import Defect, Finding, PolicyError

MAX_FILE = 8 * 1024 * 1024
MAX_FILES = 1000
_ENDINGS = (".cedar", ".cedarschema")
# The name is a part of policy ids ("refunds.cedar#under-limit"), so it may not hold "#" or spaces.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_ATTEMPTS = 5  # at reading a folder that is being written; the watch comes back a second later anyway

Fingerprint = tuple[tuple[str, int, int, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """The texts of one reading, by file name. fingerprint: of the files they were read from."""

    policies: Mapping[str, str]
    schemas: Mapping[str, str]
    fingerprint: Fingerprint = ()

    @property
    def revision(self) -> str:
        """Names exactly these texts: "sha256:" and 32 hex digits."""
        digest = hashlib.sha256()
        for name, text in sorted({**self.policies, **self.schemas}.items()):
            for part in (name.encode(), text.encode(errors="surrogatepass")):
                digest.update(len(part).to_bytes(8, "big") + part)
        return f"sha256:{digest.hexdigest()[:32]}"


def fingerprint(folder: Path) -> Fingerprint:
    """What changes when a file of the folder is edited, replaced, added, removed or re-linked.

    Raises: PolicyError when there is no such folder.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix in _ENDINGS and not p.name.startswith("."))
        found = [(name, (folder / name).stat()) for name in names[: MAX_FILES + 1]]
    except OSError as error:
        fix = "Create it with `action-broker policy init`, or correct the path."
        raise PolicyError([_folder_finding(f"cannot be read: {error.strerror}", fix)]) from error
    return tuple((n, s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in found)


def read(folder: Path) -> Documents:
    """Reads all documents, as they were together at one moment.

    Raises: PolicyError with all mistakes: no folder, names, sizes, not UTF-8, or a folder that does not come to rest.
    """
    for _ in range(_ATTEMPTS):
        before = fingerprint(folder)
        if len(before) > MAX_FILES:
            raise PolicyError([_folder_finding(f"holds more than {MAX_FILES} documents", "Join some of them.")])
        texts: dict[str, str] = {}
        findings: list[Finding] = []
        for name, *_ in before:
            text = _read_file(folder, name)
            if isinstance(text, Finding):
                findings.append(text)
            else:
                texts[name] = text
        if fingerprint(folder) != before:
            continue
        if findings:
            raise PolicyError(findings)
        return Documents(
            policies={name: text for name, text in texts.items() if name.endswith(".cedar")},
            schemas={name: text for name, text in texts.items() if name.endswith(".cedarschema")},
            fingerprint=before,
        )
    raise PolicyError([_folder_finding("changes while it is being read", "Replace its files by renaming new ones.")])


def _read_file(folder: Path, name: str) -> str | Finding:
    if not _NAME.fullmatch(name):
        return Finding(
            defect=Defect.FOLDER,
            file=name,
            problem="the file name is part of policy ids and holds more than letters, digits, dot, _ and -",
            fix="Rename it.",
        )
    try:
        # Non-blocking, so that a FIFO of that name cannot hold the reader.
        handle = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                return Finding(defect=Defect.FOLDER, file=name, problem="not a regular file", fix="Remove it.")
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        fix = "Let the broker's user read it."
        return Finding(defect=Defect.FOLDER, file=name, problem=f"cannot be read: {error.strerror}", fix=fix)
    if len(data) > MAX_FILE:
        return Finding(defect=Defect.TOO_LARGE, file=name, problem=f"larger than {MAX_FILE} bytes", fix="Split it.")
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte {error.start}"
        return Finding(defect=Defect.NOT_TEXT, file=name, problem=problem, fix="Save it as UTF-8.")


def _folder_finding(problem: str, fix: str) -> Finding:
    return Finding(defect=Defect.FOLDER, file="", problem=problem, fix=fix)
