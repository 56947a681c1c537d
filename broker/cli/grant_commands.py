"""`grant`: the steps of signing one by one, for those who drive them themselves.

A grant is bound to who asked. Over mutual TLS that is an X.509-SVID, so another process of the same workload can go on
with it; over the Unix socket it is the very process, so there is nothing that a second command could do with it.
"""

import json
import secrets
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import AttributeOID
from rich.markup import escape

from broker.action import Action, parse_parameters
from broker.cli.ask import Reach, ask, reach_from, reach_options
from broker.cli.files import INPUT, TARGET, read_bounded, require_writable, write_or_fail
from broker.cli.output import USAGE, Output, pass_output
from broker.cli.signing_options import (
    MAX_EVIDENCE,
    Asking,
    asking_options,
    provenance_option,
    read_evidence,
    signer_of,
)
from broker.client.signing import SigningGrant
from broker.errors import BrokerError

_MAX_KEY = 64 * 1024
_grant_option = click.option("--grant", "file", required=True, type=INPUT, help="What `grant request` wrote.")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptGrant:
    """A grant in a file. idempotency_id: with it the answer that a step lost can be fetched by the same step again."""

    grant: SigningGrant
    idempotency_id: str


@click.group()
def grant() -> None:
    """The steps of signing one by one, over mutual TLS: a grant of the Unix socket ends with its process."""


@grant.command("request")
@click.argument("files", nargs=-1, required=True, type=INPUT)
@asking_options
@click.option("--key", help="For a signature by the broker's key of this name.")
@click.option("--agent-key", is_flag=True, help="For a certificate of a key of your own; policy has to say @agent_key.")
@click.option("--out", required=True, type=TARGET, help="Where the grant goes, mode 0600.")
@reach_options
@pass_output
def request_(output: Output, /, files: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Ask for a grant over FILES and keep it in a file. It lives a minute or two."""
    signer = signer_of(options.pop("key"), agent_key=options.pop("agent_key"))
    asking, reach = Asking.taken(options), _reach(output, options)
    require_writable(output, out)
    provenance = asking.evidence(output)
    action = asking.about(output, files, issuer=reach.issuer, signer=signer)
    found = ask(
        output,
        reach,
        lambda broker: broker.signing.grant(action, provenance, request_id=asking.request_id),
        request_id=asking.request_id,
    )
    kept = KeptGrant(grant=found, idempotency_id=secrets.token_urlsafe(24))
    write_or_fail(output, out, json.dumps(_to_json(kept)).encode(), 0o600)
    output.value({"grant_id": found.grant_id, "expires_at": found.expires_at.isoformat(), "file": str(out)})
    output.say(f"[green]granted[/] until {found.expires_at:%H:%M:%S} UTC → {escape(str(out))}")


@grant.command("sign")
@_grant_option
@provenance_option
@click.option("--statement", type=INPUT, help="An in-toto Statement to sign as DSSE.")
@click.option("--bundle", required=True, type=TARGET, help="Where the Sigstore bundle goes.")
@reach_options
@pass_output
def sign_(output: Output, /, file: Path, statement: Path | None, bundle: Path, **options: Any) -> None:
    """Spend a grant on its one signature. The same again gives the same signature, while the grant lives."""
    kept = _from_file(output, file, read_evidence(output, options.pop("provenance")))
    body = read_bounded(output, statement, MAX_EVIDENCE) if statement else b""
    reach = _reach(output, options)
    require_writable(output, bundle)
    signature = ask(
        output,
        reach,
        lambda broker: broker.signing.sign(kept.grant, statement=body, idempotency_id=kept.idempotency_id),
    )
    write_or_fail(output, bundle, signature.bundle.encode() + b"\n")
    output.value({"bundle": str(bundle), "correlation_id": signature.correlation_id})
    output.say(f"[green]signed[/] → {escape(str(bundle))}")


@grant.command("csr")
@_grant_option
@click.option("--key", required=True, type=INPUT, help="Your private key, PEM without a password.")
@click.option("--out", required=True, type=TARGET, help="Where the request goes, DER.")
@pass_output
def csr_(output: Output, /, file: Path, key: Path, out: Path) -> None:
    """Make the certificate request that the grant wants: your key, and the grant's nonce."""
    kept = _from_file(output, file, ())
    try:
        private = serialization.load_pem_private_key(read_bounded(output, key, _MAX_KEY), password=None)
    except (ValueError, TypeError):
        output.fail(f"{key} is no private key in PEM without a password", USAGE)
    if not isinstance(private, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        output.fail(f"{key} is of a kind that is not certified: make one with `openssl genpkey -algorithm EC`", USAGE)
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, kept.grant.csr_nonce.encode())
    algorithm = None if isinstance(private, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    made = builder.sign(private, algorithm).public_bytes(serialization.Encoding.DER)
    require_writable(output, out)
    write_or_fail(output, out, made)
    output.value({"csr": str(out)})
    output.say(f"[green]made[/] → {escape(str(out))}")


@grant.command("certify")
@_grant_option
@provenance_option
@click.option("--csr", required=True, type=INPUT, help="What `grant csr` made.")
@click.option("--out", required=True, type=TARGET, help="Where the chain goes, PEM, leaf first.")
@reach_options
@pass_output
def certify_(output: Output, /, file: Path, csr: Path, out: Path, **options: Any) -> None:
    """Spend a grant on a certificate for your own key. The same again gives the same one, while the grant lives."""
    kept = _from_file(output, file, read_evidence(output, options.pop("provenance")))
    request, reach = read_bounded(output, csr, _MAX_KEY), _reach(output, options)
    require_writable(output, out)
    chain = ask(
        output,
        reach,
        lambda broker: broker.signing.certify(kept.grant, request, idempotency_id=kept.idempotency_id),
    )
    certificates = [x509.load_der_x509_certificate(one) for one in chain]
    write_or_fail(output, out, b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates))
    ends = certificates[0].not_valid_after_utc
    output.value({"certificate": str(out), "certificate_ends": ends.isoformat()})
    output.say(f"[green]certified[/] until {ends:%H:%M:%S} UTC → {escape(str(out))}")


def _reach(output: Output, options: dict[str, Any]) -> Reach:
    reach = reach_from(output, options)
    if reach.address is None:
        output.fail("--address is needed: a grant of the Unix socket is bound to its one process; use `sign`", USAGE)
    return reach


def _to_json(kept: KeptGrant) -> dict[str, Any]:
    found = kept.grant
    return {
        "grant": found.grant,
        "grant_id": found.grant_id,
        "csr_nonce": found.csr_nonce,
        "expires_at": found.expires_at.isoformat(),
        "correlation_id": found.correlation_id,
        "idempotency_id": kept.idempotency_id,
        "action": {
            "name": found.action.name,
            "resource": found.action.resource,
            "audience": found.action.audience,
            "parameters": dict(found.action.parameters),
        },
    }


def _from_file(output: Output, file: Path, provenance: tuple[bytes, ...]) -> KeptGrant:
    try:
        read = json.loads(read_bounded(output, file, MAX_EVIDENCE))
        wire = read["action"]
        action = Action(
            wire["name"], wire["resource"], wire["audience"], parse_parameters(json.dumps(wire["parameters"]))
        )
        found = SigningGrant(
            grant=read["grant"],
            grant_id=read["grant_id"],
            csr_nonce=read["csr_nonce"],
            expires_at=datetime.fromisoformat(read["expires_at"]),
            correlation_id=read["correlation_id"],
            action=action,
            provenance=provenance,
        )
        return KeptGrant(grant=found, idempotency_id=read["idempotency_id"])
    except (ValueError, KeyError, TypeError, BrokerError):
        output.fail(f"{file} is not what `action-broker grant request` writes", USAGE)
