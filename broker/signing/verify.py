"""Verifying a bundle: who signed this artifact, what they were granted it for, and when.

A bundle with a certificate, in this order:

1. it is a Sigstore bundle v0.3 with one signature                                          Fault.BUNDLE
2. its time is the one that a trusted timestamp over this very signature proves, else now   Fault.TIMESTAMP
3. a CA of the trusted root vouched for the certificate at that time                        Fault.CERTIFICATE
4. the certificate names one workload, the expected one, and the expected issuer            Fault.IDENTITY
5. the bundle is about this artifact; a statement has it among its subjects                 Fault.ARTIFACT
6. the certificate was given for this artifact, and for all that a statement is about       Fault.ARTIFACT
7. the signature verifies with the certificate's key                                        Fault.SIGNATURE

A bundle by a named key: 1; 2 where it has timestamps; 5; 7 with the key that the verifier brings, which the bundle must
name (Fault.KEY). A certificate there would be ignored, so it is refused.

Not checked: transparency logs, of which our bundles have none; revocation, which certificates of minutes do without;
whether the workload was right to sign.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, utils

from attestors.dsse import STATEMENT_TYPE
from attestors.rfc3161 import TimestampError, verify_timestamp
from attestors.statement import Statement, StatementError, parse_statement, require_subjects
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId
from broker.signing import extensions
from broker.signing.bundle import Bundle, key_hint, read_bundle
from broker.signing.extensions import Certified
from broker.signing.read_trusted_root import TrustedRoot
from broker.signing.signer import PublicKey, UnusableKey, algorithm_of, digest_of, hash_of, pss, spki_of
from broker.signing.verify_certificate import UNREADABLE, NotVouchedFor, require_vouched_for

BLOB: Final = "blob"
STATEMENT: Final = "statement"


class Fault(StrEnum):
    """What is wrong with a bundle, by the obligation that it does not meet."""

    BUNDLE = "bundle"
    TIMESTAMP = "timestamp"
    CERTIFICATE = "certificate"
    IDENTITY = "identity"
    ARTIFACT = "artifact"
    SIGNATURE = "signature"
    KEY = "key"


class NotVerified(Exception):
    """The signature counts for nothing here. The message says why, and holds nothing that the bundle says unescaped."""

    def __init__(self, fault: Fault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedSignature:
    """A signature that met every obligation.

    artifact: as given, algorithm → hex. kind: BLOB or STATEMENT. predicate_type: of the statement, else "".
    time: when it was made, if `time_proven`; else the time at which it was verified. certified: what the certificate
    says; None for a named key. certificate_ends: likewise; without a proven time the bundle stops verifying then.
    key_sha256: of the SubjectPublicKeyInfo that signed, hex.
    """

    artifact: Mapping[str, str]
    kind: str
    predicate_type: str
    time: datetime
    time_proven: bool
    key_sha256: str
    certified: Certified | None = None
    certificate_ends: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """For scripts. Of the certificate only what it says: an absent member is one that it does not say."""
        told: dict[str, Any] = {
            "artifact": dict(self.artifact),
            "kind": self.kind,
            "time": self.time.isoformat(),
            "time_proven": self.time_proven,
            "key_sha256": self.key_sha256,
        }
        if self.predicate_type:
            told["predicate_type"] = self.predicate_type
        if self.certified is not None and self.certificate_ends is not None:
            certified = self.certified
            told["certificate_ends"] = self.certificate_ends.isoformat()
            told["identity"], told["issuer"] = certified.uri, certified.issuer
            told["build"] = dict(certified.build)
            decision = {
                "grant_id": certified.grant_id,
                "action_digest": certified.action_digest,
                "policy_revision": certified.policy_revision,
            }
            place = {"node": certified.node, "pod_uid": certified.pod_uid}
            told["decision"] = {name: value for name, value in decision.items() if value}
            told["place"] = {name: value for name, value in place.items() if value}
        return told


def verify_bundle(
    bundle: str | bytes,
    artifact: Mapping[str, str],
    trusted_root: TrustedRoot,
    now: datetime,
    *,
    identity: str | None = None,
    issuer: str | None = None,
) -> VerifiedSignature:
    """A bundle with a certificate, against our CA.

    artifact: its digests, sha256 and the others of `HEX_DIGITS`, by the caller's own reading of it. identity: the
    SPIFFE ID that must have signed; None for any that the CA certifies. issuer: the broker that must have decided,
    likewise.

    Raises: NotVerified.
    """
    read = _read(bundle)  # 1
    if not read.certificate:
        raise NotVerified(Fault.CERTIFICATE, "a named key made this signature: verify it with that key (--key)")
    times = _proven(read, trusted_root)  # 2
    try:
        leaf = x509.load_der_x509_certificate(read.certificate)
        require_vouched_for(leaf, trusted_root.certificate_authorities, times or (now,))  # 3
        certified = extensions.read(leaf)
        key = leaf.public_key()
    except NotVouchedFor as error:
        hint = "" if times else "; no trusted timestamp proves an earlier time"
        raise NotVerified(Fault.CERTIFICATE, f"{error}{hint}") from error
    except UNREADABLE as error:
        raise NotVerified(Fault.CERTIFICATE, "the certificate cannot be read, or is not in our profile") from error
    _require_identity(certified, identity, issuer)  # 4
    statement = _require_artifact(read, artifact)  # 5
    _require_certified(certified, artifact, statement)  # 6
    _require_signature(read, artifact, key)  # 7
    return VerifiedSignature(
        artifact=MappingProxyType(dict(artifact)),
        kind=STATEMENT if statement else BLOB,
        predicate_type=statement.predicate_type if statement else "",
        time=min(times, default=now),
        time_proven=bool(times),
        key_sha256=hashlib.sha256(spki_of(key)).hexdigest(),
        certified=certified,
        certificate_ends=leaf.not_valid_after_utc,
    )


def verify_with_key(
    bundle: str | bytes,
    artifact: Mapping[str, str],
    key: PublicKey,
    now: datetime,
    *,
    trusted_root: TrustedRoot | None = None,
) -> VerifiedSignature:
    """A bundle by a named key. trusted_root: for its timestamp authorities alone; without it no time is proven.

    Raises: NotVerified.
    """
    read = _read(bundle)  # 1
    if read.certificate:
        raise NotVerified(Fault.KEY, "a certified key made this signature: verify it without --key")
    times = _proven(read, trusted_root) if trusted_root else ()  # 2
    if read.hint and read.hint != key_hint(spki_of(key)):
        raise NotVerified(Fault.KEY, "the bundle names another key than the one given")
    statement = _require_artifact(read, artifact)  # 5
    _require_signature(read, artifact, key)  # 7
    return VerifiedSignature(
        artifact=MappingProxyType(dict(artifact)),
        kind=STATEMENT if statement else BLOB,
        predicate_type=statement.predicate_type if statement else "",
        time=min(times, default=now),
        time_proven=bool(times),
        key_sha256=hashlib.sha256(spki_of(key)).hexdigest(),
    )


def _read(bundle: str | bytes) -> Bundle:
    try:
        return read_bundle(bundle.encode() if isinstance(bundle, str) else bundle)
    except (Invalid, UnicodeEncodeError) as error:
        why = error.detail if isinstance(error, Invalid) else "the bundle is not UTF-8"
        raise NotVerified(Fault.BUNDLE, why) from error


def _proven(bundle: Bundle, trusted_root: TrustedRoot) -> tuple[datetime, ...]:
    """The times that trusted authorities prove; none where the bundle has no timestamps, or no authority is trusted.

    Raises: NotVerified where there are both and none proves anything: then somebody tampered, or a root is missing.
    """
    if not bundle.timestamps or not trusted_root.timestamp_authorities:
        return ()
    found, why = [], ""
    for timestamp in bundle.timestamps:
        try:
            found.append(verify_timestamp(timestamp, bundle.signature, trusted_root.timestamp_authorities))
        except TimestampError as error:
            why = str(error)
    if not found:
        raise NotVerified(Fault.TIMESTAMP, why)
    return tuple(found)


def _require_identity(certified: Certified, identity: str | None, issuer: str | None) -> None:
    try:
        who = str(SpiffeId.parse(certified.uri))
    except Invalid as error:
        raise NotVerified(Fault.IDENTITY, "the certificate does not name a workload by its SPIFFE ID") from error
    if identity is not None and who != identity:
        raise NotVerified(Fault.IDENTITY, f"signed by {who}, not by the expected {identity}")
    if not certified.issuer or not certified.issuer.isprintable():
        raise NotVerified(Fault.IDENTITY, "the certificate does not say who decided")
    if issuer is not None and certified.issuer != issuer:
        raise NotVerified(Fault.IDENTITY, f"decided by {certified.issuer}, not by the expected {issuer}")


def _require_artifact(bundle: Bundle, artifact: Mapping[str, str]) -> Statement | None:
    """The statement, where it is one. Raises: NotVerified unless the bundle is about the artifact."""
    if bundle.envelope is None:
        if artifact.get(bundle.hash_name) != bundle.digest.hex():
            raise NotVerified(Fault.ARTIFACT, f"the bundle is about another artifact, by its {bundle.hash_name}")
        return None
    if bundle.envelope.payload_type != STATEMENT_TYPE:
        raise NotVerified(Fault.ARTIFACT, f"what was signed is not of type {STATEMENT_TYPE}")
    try:
        statement = parse_statement(bundle.envelope.payload)
        require_subjects(statement, [artifact])
    except StatementError as error:
        raise NotVerified(Fault.ARTIFACT, str(error)) from error
    return statement


def _require_certified(certified: Certified, artifact: Mapping[str, str], statement: Statement | None) -> None:
    """Raises: NotVerified where the certificate was given for anything else than what it was used for."""
    count = sum(one.startswith("sha256:") for one in certified.artifacts)  # each artifact has one
    for algorithm, digest in artifact.items():
        given = [one for one in certified.artifacts if one.startswith(f"{algorithm}:")]
        if len(given) == count and f"{algorithm}:{digest}" not in given:
            raise NotVerified(Fault.ARTIFACT, f"the certificate was given for another artifact, by its {algorithm}")
    for subject in statement.subjects if statement else ():
        if not {f"{algorithm}:{digest}" for algorithm, digest in subject.items()} <= set(certified.artifacts):
            raise NotVerified(Fault.ARTIFACT, "the statement is also about something that was not granted")


def _require_signature(bundle: Bundle, artifact: Mapping[str, str], key: object) -> None:
    """Raises: NotVerified. The digest that is verified is the artifact's, not the one that the bundle states."""
    try:
        algorithm = algorithm_of(key)
    except UnusableKey as error:
        raise NotVerified(Fault.SIGNATURE, str(error)) from error
    if bundle.envelope is not None:
        signed = digest_of(algorithm, bundle.envelope.signed) or bundle.envelope.signed
    elif algorithm.hash_name is None:
        raise NotVerified(Fault.SIGNATURE, "an Ed25519 key signs statements, not blobs")
    elif algorithm.hash_name != bundle.hash_name:
        raise NotVerified(
            Fault.SIGNATURE, f"the key signs with {algorithm.hash_name}, the bundle has a {bundle.hash_name}"
        )
    else:
        signed = bytes.fromhex(artifact[bundle.hash_name])
    usable: PublicKey = key  # type: ignore[assignment] # algorithm_of took it, so it is one
    try:
        match usable:
            case ec.EllipticCurvePublicKey():
                usable.verify(bundle.signature, signed, ec.ECDSA(utils.Prehashed(hash_of(algorithm))))
            case rsa.RSAPublicKey():
                usable.verify(bundle.signature, signed, pss(algorithm), utils.Prehashed(hash_of(algorithm)))
            case ed25519.Ed25519PublicKey():
                usable.verify(bundle.signature, signed)
    except InvalidSignature as error:
        raise NotVerified(Fault.SIGNATURE, "the signature does not verify with this key") from error
