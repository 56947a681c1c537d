"""Two verifiers of one bundle, by the same files: stock cosign, and `action-broker verify`. Each is a real command."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.broker import ISSUER
from support.cli import cli
from support.signing import AGENT
from support.sigstore_tools import cosign

Json = dict[str, Any]
BLOB, STATEMENT = "blob", "statement"
_COMMAND = {BLOB: "verify-blob", STATEMENT: "verify-blob-attestation"}
_OFFLINE = ("--insecure-ignore-tlog", "--insecure-ignore-sct")


@dataclass(frozen=True)
class Verdict:
    """Whether each of them accepts. why: what they said."""

    cosign: bool
    ours: bool
    why: str

    @property
    def both(self) -> bool:
        """Raises: AssertionError where they do not agree."""
        assert self.cosign is self.ours, self.why
        return self.ours


@dataclass(frozen=True)
class Verifiers:
    """They work in a folder, where `root.json` is what they trust."""

    folder: Path

    def write(self, name: str, content: str | bytes | Json) -> Path:
        """A file there."""
        file = self.folder / name
        text = json.dumps(content) if isinstance(content, dict) else content
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        return file

    def export(self, ca_folder: Path, tsa_chain: bytes, name: str = "root.json") -> None:
        """The trusted root, as an operator exports it."""
        chain = self.write(f"{name}.tsa.pem", tsa_chain)
        ran = cli("ca", "trusted-root", ca_folder, "--tsa-chain", chain)
        assert ran.code == 0, ran.err
        self.write(name, ran.out)

    def certified(self, bundle: Json | str, content: bytes, *, root: str = "root.json", **said: str) -> Verdict:
        """Of a bundle with a certificate. said: identity, issuer: those expected; predicate: cosign's --type."""
        file, blob = self.write("bundle.json", bundle), self.write("artifact", content)
        common = ("--bundle", file, "--trusted-root", self.folder / root)
        who, issuer = said.get("identity", AGENT), said.get("issuer", ISSUER)
        theirs = cosign(
            self.folder,
            _COMMAND[kind_of(bundle)],
            *common,
            *_OFFLINE,
            "--use-signed-timestamps",
            "--certificate-identity",
            who,
            "--certificate-oidc-issuer",
            issuer,
            *_predicate(bundle, said),
            blob,
        )
        return self._verdict(theirs, blob, *common, "--identity", who, "--issuer", issuer)

    def keyed(self, bundle: Json | str, content: bytes, key: Any, *, root: str | None = None) -> Verdict:
        """Of a bundle by a named key. root: whose timestamps are believed; None for nobody's."""
        file, blob = self.write("bundle.json", bundle), self.write("artifact", content)
        public = self.write("key.pem", key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        common: tuple[object, ...] = ("--bundle", file, "--key", public)
        stamped: tuple[object, ...] = ()
        if root is not None:
            common, stamped = (*common, "--trusted-root", self.folder / root), ("--use-signed-timestamps",)
        command = _COMMAND[kind_of(bundle)]
        theirs = cosign(
            self.folder, command, *common, "--insecure-ignore-tlog", *stamped, *_predicate(bundle, {}), blob
        )
        return self._verdict(theirs, blob, *common)

    def _verdict(self, theirs: Any, blob: Path, *arguments: object) -> Verdict:
        ours = cli("verify", blob, *arguments)
        assert ours.code in {0, 3}, ours.err
        return Verdict(theirs.code == 0, ours.code == 0, f"cosign: {theirs.err}\nours: {ours.out}{ours.err}")


def kind_of(bundle: Json | str) -> str:
    """By what is in it."""
    found: Json = json.loads(bundle) if isinstance(bundle, str) else bundle
    return STATEMENT if "dsseEnvelope" in found else BLOB


def _predicate(bundle: Json | str, said: dict[str, str]) -> tuple[str, ...]:
    return ("--type", said.get("predicate", "slsaprovenance1")) if kind_of(bundle) == STATEMENT else ()


def changed(bundle: Json, change: Callable[[Json], None]) -> Json:
    """A copy, with this done to it."""
    found = copy.deepcopy(bundle)
    change(found)
    assert found != bundle, "the change changes something"
    return found


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()
