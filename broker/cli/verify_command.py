"""`verify`: who signed this file, from which source, on which node, under which decision. It needs no network."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from rich.markup import escape

from broker.artifacts import HEX_DIGITS
from broker.cli.output import REFUSED, USAGE, Output, pass_output, printable
from broker.client.signing import digests_of
from broker.errors import Invalid
from broker.signing.read_trusted_root import TrustedRoot, read_trusted_root
from broker.signing.signer import PublicKey, UnusableKey, algorithm_of
from broker.signing.verify import NotVerified, VerifiedSignature, verify_bundle, verify_with_key

MAX_INPUT: Final = 1 << 20
"""Bytes of a bundle, trusted root or key: each has its own bound below this."""

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("file", type=_FILE)
@click.option("--bundle", required=True, type=_FILE, help="The Sigstore bundle.")
@click.option("--trusted-root", "root_file", type=_FILE, help="Whom to believe: from `action-broker ca trusted-root`.")
@click.option("--key", "key_file", type=_FILE, help="For a named key: its public key, PEM. Instead of a CA's word.")
@click.option("--identity", help="The SPIFFE ID that must have signed.")
@click.option("--issuer", help="The broker that must have decided: its issuer URL.")
@pass_output
def verify(
    output: Output,
    file: Path,
    bundle: Path,
    root_file: Path | None,
    key_file: Path | None,
    identity: str | None,
    issuer: str | None,
) -> None:
    """Verify a file's signature, and tell who made it and why it was allowed.

    With --trusted-root for bundles with a certificate; with --key for a named key, where a trusted root only adds whose
    timestamps are believed. Exit code 3 when the signature counts for nothing.
    """
    if key_file is None and root_file is None:
        output.fail("whom to believe? name --trusted-root, or --key for a named key", USAGE)
    if key_file is not None and (identity or issuer):
        output.fail("a bundle by a named key says no identity or issuer: leave --identity and --issuer out", USAGE)
    root = _trusted_root(output, root_file)
    now = datetime.now(UTC)
    try:
        found, content = digests_of(file, HEX_DIGITS), _read(output, bundle)
        if key_file is not None:
            verified = verify_with_key(content, found, _public_key(output, key_file), now, trusted_root=root)
        else:
            verified = verify_bundle(content, found, root, now, identity=identity, issuer=issuer)
    except OSError as error:
        output.fail(f"{file}: {error.strerror}", USAGE)
    except NotVerified as error:
        output.fail(
            f"not verified ({error.fault}): {printable(str(error))}", REFUSED, verified=False, fault=error.fault
        )
    output.value({"verified": True, **verified.to_json()})
    output.say(f"[green]verified[/]: {escape(printable(str(file)))}")
    for label, text in _told(verified):
        output.say(f"  {label:<11} {escape(printable(text))}")
    for warning in _warnings(verified, identity):
        output.say(f"[yellow]{escape(warning)}[/]")


def _trusted_root(output: Output, file: Path | None) -> TrustedRoot:
    if file is None:
        return TrustedRoot(certificate_authorities=(), timestamp_authorities=())
    try:
        return read_trusted_root(_read(output, file))
    except Invalid as error:
        output.fail(f"{file}: {error.detail}", USAGE)


def _public_key(output: Output, file: Path) -> PublicKey:
    try:
        key = load_pem_public_key(_read(output, file))
        algorithm_of(key)
    except (ValueError, UnsupportedAlgorithm, UnusableKey) as error:
        output.fail(f"{file} is no public key in PEM that signs here: {error}", USAGE)
    return key  # type: ignore[return-value] # algorithm_of took it, so it is one


def _read(output: Output, file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_INPUT + 1)
    except OSError as error:
        output.fail(f"{file}: {error.strerror}", USAGE)
    if len(content) > MAX_INPUT:
        output.fail(f"{file} is larger than {MAX_INPUT} bytes: it is something else", USAGE)
    return content


def _told(verified: VerifiedSignature) -> Iterator[tuple[str, str]]:
    """For people: label and text, only of what is known."""
    certified = verified.certified
    if certified is None:
        yield "key", f"sha256:{verified.key_sha256}"
    else:
        yield "who", certified.uri
        yield "decided by", certified.issuer
    yield "what", f"sha256:{verified.artifact['sha256']}"
    if verified.predicate_type:
        yield "statement", verified.predicate_type
    at = f"{verified.time:%Y-%m-%d %H:%M:%S} UTC"
    yield "signed", f"{at}, proven by a timestamp" if verified.time_proven else f"before {at}, which is now"
    if certified is None:
        return
    build = certified.build
    source = [build.get(f"source_repository_{part}", "") for part in ("uri", "ref", "digest")]
    rows = {
        "source": " ".join(filter(None, source)),
        "builder": build.get("build_signer_uri", ""),
        "run": build.get("run_invocation_uri", ""),
        "ran on": build.get("runner_environment", ""),
        "node": certified.node,
        "pod": certified.pod_uid,
        "grant": certified.grant_id,
        "action": certified.action_digest,
        "policy": certified.policy_revision,
    }
    yield from ((label, text) for label, text in rows.items() if text)


def _warnings(verified: VerifiedSignature, identity: str | None) -> Iterator[str]:
    if verified.certified is not None and identity is None:
        yield "any workload of this broker was accepted: name the one that must have signed with --identity"
    if verified.certificate_ends is not None and not verified.time_proven:
        ends = f"{verified.certificate_ends:%Y-%m-%d %H:%M:%S} UTC"
        yield f"no trusted timestamp proves the time: this bundle stops verifying when its certificate ends, {ends}"
