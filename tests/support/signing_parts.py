"""What a signing broker's configuration says of real parts: a token, a CA in it, a timestamp authority."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.broker import ISSUER
from support.cli import cli
from support.softhsm import SoftHsm

from broker.signing.pkcs11 import Token


def timestamps(folder: Path, url: str, chain_pem: bytes, **more: Any) -> dict[str, dict[str, Any]]:
    """`[signing.timestamp]`."""
    chain = folder / "tsa.pem"
    chain.write_bytes(chain_pem)
    return {"signing.timestamp": {"url": url, "chain_file": str(chain), **more}}


def token_keys(hsm: SoftHsm, **labels: str) -> dict[str, dict[str, Any]]:
    """`[signing.tokens]` and `[signing.keys]`. labels: of the keys in the token, by their names.

    Those whose names end in "-statements" sign statements.
    """
    token = {"module": str(hsm.module), "label": hsm.label, "pin_file": str(hsm.pin_file), "sessions": 2}
    keys = {f"signing.keys.{name}": {"token": "hsm", "label": label} for name, label in labels.items()}
    for name, table in keys.items():
        if name.endswith("-statements"):
            table["signs"] = "statements"
    return {"signing.tokens.hsm": token, **keys}


def ca_in(hsm: SoftHsm, folder: Path) -> Path:
    """A CA's folder; its keys are made in the token."""
    hsm.make_key("p384", "ca-root")
    hsm.make_key("p256", "ca-issuing")
    where = ("--module", hsm.module, "--token", hsm.label, "--pin-file", hsm.pin_file)
    labels = ("--label", "ca-issuing", "--root-label", "ca-root")
    made = cli("ca", "init", folder, "--issuer", ISSUER, *where, *labels)
    assert made.code == 0, made.err
    assert not list(folder.glob("*.key.pem")), "no key is in a file"
    return folder


def public_key(hsm: SoftHsm, label: str) -> Any:
    """As the token's operator hands it out."""
    with Token(hsm.module, hsm.label, hsm.pin_file, 1) as opened:
        return opened.signer(label, label).public_key


def merged(*tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tables of the configuration, each said in one or more parts."""
    found: dict[str, dict[str, Any]] = {}
    for one in tables:
        for name, table in one.items():
            found[name] = {**found.get(name, {}), **table}
    return found
