"""A real token in a folder of its own: SoftHSM2, and another process that makes and removes keys in it.

    with SoftHsm(tmp_path) as hsm:
        hsm.make_key("p256", "release")

Inside `with`, SOFTHSM2_CONF points to it. The module reads that when it is initialised, which the broker's side does
anew when its last Token of the module is closed: so tests close their tokens, and each has its own folder.

Keys are made in a child process, as an operator makes them. So this file is a program too.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pkcs11
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

CURVES = {"p256": "secp256r1", "p384": "secp384r1", "p521": "secp521r1"}


class SoftHsm:
    """`label` and `pin_file` are what a Token is made with, and so is `module`."""

    def __init__(self, folder: Path, label: str = "acme") -> None:
        from tools.get_softhsm import softhsm  # noqa: PLC0415 - the program below has no tests/ on its path

        self._files = softhsm()
        self.module = self._files.module
        self.label = label
        self.pin = "1029384756"
        self.tokens = folder / "tokens"
        self.tokens.mkdir(parents=True)
        self.conf = folder / "softhsm2.conf"
        self.conf.write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.pin_file = folder / "pin"
        self.write_pin(self.pin)
        self._before: str | None = None
        self._folders: dict[str, Path] = {}
        self.add_token(label)

    def __enter__(self) -> Self:
        self._before = os.environ.get("SOFTHSM2_CONF")
        os.environ["SOFTHSM2_CONF"] = str(self.conf)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._before is None:
            del os.environ["SOFTHSM2_CONF"]
        else:
            os.environ["SOFTHSM2_CONF"] = self._before

    def write_pin(self, pin: str) -> None:
        """As an operator does, with a newline at its end."""
        self.pin_file.touch(mode=0o600)
        self.pin_file.write_text(f"{pin}\n")

    def add_token(self, label: str) -> None:
        """Another one in the same module, with the same PIN."""
        before = set(self.tokens.iterdir())
        init = ["--module", str(self.module), "--init-token", "--free", "--label", label, "--pin", self.pin]
        command = [str(self._files.program), *init, "--so-pin", "98765432"]
        ran = subprocess.run(command, env=self._environment(), capture_output=True, check=False, timeout=60)
        assert ran.returncode == 0, ran.stderr.decode()
        (self._folders[label],) = set(self.tokens.iterdir()) - before

    def make_key(self, kind: str, label: str, *, token: str = "", **attributes: Any) -> None:
        """kind: p256, p384, p521, ed25519, rsa2048, … attributes: of the private key (`EXTRACTABLE=True`)."""
        self._in_child("make", token=token or self.label, kind=kind, label=label, attributes=attributes)

    def delete(self, label: str, *kinds: str) -> None:
        """Removes the objects of that label; kinds: PRIVATE_KEY, PUBLIC_KEY, none for both."""
        kinds = kinds or ("PRIVATE_KEY", "PUBLIC_KEY")
        self._in_child("delete", token=self.label, label=label, kinds=kinds)

    def put_certificate(self, label: str, der: bytes) -> None:
        """Under the key's CKA_ID, as a smart card has them."""
        self._in_child("certificate", token=self.label, label=label, der=der.hex())

    def take_away(self, label: str = "") -> None:
        """Pulls a token out."""
        folder = self._folders[label or self.label]
        folder.rename(self.tokens.with_name(folder.name))

    def put_back(self, label: str = "") -> None:
        """And in again."""
        folder = self._folders[label or self.label]
        self.tokens.with_name(folder.name).rename(folder)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Another process holds the locks on the token's files, for which the module waits without end."""
        child = self._start("hang", folder=str(self.tokens))
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"held\n"
            yield
        finally:
            child.communicate(timeout=10)  # closes its input, which is when it ends

    def _in_child(self, task: str, **arguments: Any) -> None:
        child = self._start(task, module=str(self.module), pin=self.pin, **arguments)
        _, told = child.communicate(timeout=60)
        assert child.returncode == 0, told.decode()

    def _start(self, task: str, **arguments: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, __file__, task, json.dumps(arguments)],
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SOFTHSM2_CONF": str(self.conf)}


def _session(module: str, token: str, pin: str) -> pkcs11.Session:
    return pkcs11.lib(module).get_token(token_label=token).open(rw=True, user_pin=pin)


def make(*, kind: str, label: str, attributes: dict[str, Any], **where: str) -> None:
    session = _session(**where)
    private = {Attribute.EXTRACTABLE: False} | {Attribute[name]: value for name, value in attributes.items()}
    as_made = {"id": label.encode(), "label": label, "store": True, "private_template": private}
    if kind in CURVES:
        curve = {Attribute.EC_PARAMS: encode_named_curve_parameters(CURVES[kind])}
        session.create_domain_parameters(KeyType.EC, curve, local=True).generate_keypair(**as_made)
    elif kind == "ed25519":
        curve = {Attribute.EC_PARAMS: bytes.fromhex("130c") + b"edwards25519"}
        parameters = session.create_domain_parameters(KeyType.EC_EDWARDS, curve, local=True)
        parameters.generate_keypair(mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN, **as_made)
    else:
        session.generate_keypair(KeyType.RSA, int(kind.removeprefix("rsa")), **as_made)


def delete(*, label: str, kinds: list[str], **where: str) -> None:
    session = _session(**where)
    for kind in kinds:
        for found in list(session.get_objects({Attribute.CLASS: ObjectClass[kind], Attribute.LABEL: label})):
            found.destroy()


def certificate(*, label: str, der: str, **where: str) -> None:
    _session(**where).create_object(
        {
            Attribute.CLASS: ObjectClass.CERTIFICATE,
            Attribute.CERTIFICATE_TYPE: pkcs11.CertificateType.X_509,
            Attribute.TOKEN: True,
            Attribute.ID: label.encode(),
            Attribute.SUBJECT: b"\x30\x00",
            Attribute.VALUE: bytes.fromhex(der),
        }
    )


def hang(*, folder: str) -> None:
    """Until the input ends. SoftHSM locks a file before it looks whether another process changed it."""
    files = [path.open("r+b") for path in Path(folder).rglob("*") if path.is_file()]
    for file in files:
        fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    tasks = {"make": make, "delete": delete, "certificate": certificate, "hang": hang}
    tasks[sys.argv[1]](**json.loads(sys.argv[2]))
