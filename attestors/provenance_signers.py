"""Who signed the provenance, of those whom somebody trusts. What nobody trusted signed contributes nothing.

A signature counts in one of three ways, and keyids count in none:

1. it verifies by a key that is configured for a builder;
2. it verifies by the leaf of a chain beside it, and that chain is an X.509-SVID: at the RFC 3161 time over the
   signature where a trusted authority gave one, else now;
3. the whole is a Sigstore bundle of a configured identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from attestors.dsse import Signature
from attestors.provenance_evidence import Evidence
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust, SigstoreCheck, SigstoreIdentity, X509SvidCheck
from attestors.rfc3161 import TimestampError, verify_timestamp
from attestors.signature_keys import Message, SigningKey

# What reading a stranger's certificate may raise: parsing is lazy, so any look at one can.
_UNREADABLE = (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """A certificate that signed. not_before: when it began. spki: its key, as in `SigningKey`."""

    not_before: datetime
    spki: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signers:
    """Who was found to have signed one envelope.

    keys: by SubjectPublicKeyInfo. spiffe_ids, sigstore: each with its certificate. doubts: why others did not count.
    """

    keys: frozenset[bytes] = frozenset()
    spiffe_ids: Mapping[str, Certified] = field(default_factory=dict)
    sigstore: Mapping[SigstoreIdentity, Certified] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.spiffe_ids or self.sigstore)

    def names(self, builder: BuilderTrust) -> list[str]:
        """Those of them who sign for the builder: "key:<name>", SPIFFE IDs, "sigstore:<issuer>#<who>".

        Each key counts once, under whatever names it comes.
        """
        found = [(key.spki, f"key:{name}") for name, key in sorted(builder.keys.items()) if key.spki in self.keys]
        found += [(self.spiffe_ids[one].spki, one) for one in sorted(builder.spiffe_ids & self.spiffe_ids.keys())]
        found += [(self.sigstore[one].spki, str(one)) for one in sorted(builder.sigstore & self.sigstore.keys())]
        first = dict(reversed(found))
        return [name for spki, name in found if first[spki] == name]

    def not_before(self, builder: BuilderTrust) -> datetime | None:
        """The earliest time at which one of those may have signed; None where no certificate says.

        No signature under a certificate is older than it. A timestamp says only that one is no younger, and anybody
        can have an old signature stamped anew: it bounds no age.
        """
        found = [one for spiffe_id, one in self.spiffe_ids.items() if spiffe_id in builder.spiffe_ids]
        found += [one for identity, one in self.sigstore.items() if identity in builder.sigstore]
        return min((one.not_before for one in found), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignerChecks:
    """How those are verified who have no configured key. None: nobody is."""

    x509_svid: X509SvidCheck | None = None
    sigstore: SigstoreCheck | None = None


def find_signers(evidence: Evidence, trust: ProvenanceTrust, checks: SignerChecks, now: datetime) -> Signers:
    """All who count. Raises: AttestationUnavailable where it cannot be said now whose an SVID is."""
    signed, keys = Message(evidence.envelope.signed), trust.all_keys()
    svids, svid_doubt = _find_svid(evidence, signed, trust, checks.x509_svid, now)
    identities, identity_doubt = _find_identity(evidence, trust, checks.sigstore)
    return Signers(
        keys=frozenset(key.spki for key in keys for one in evidence.envelope.signatures if key.signed(one.sig, signed)),
        spiffe_ids=svids,
        sigstore=identities,
        doubts=tuple(doubt for doubt in (svid_doubt, identity_doubt) if doubt),
    )


def _stamped_at(evidence: Evidence, signature: Signature, trust: ProvenanceTrust) -> datetime | None:
    """The earliest time at which the signature is proven to have existed.

    A timestamp of nobody trusted, or over something else, is as none.
    """
    found = []
    for response in evidence.timestamps if trust.timestamp_roots else ():
        try:
            found.append(verify_timestamp(response, signature.sig, trust.timestamp_roots))
        except TimestampError:
            continue
    return min(found, default=None)


def _find_svid(
    evidence: Evidence, signed: Message, trust: ProvenanceTrust, check: X509SvidCheck | None, now: datetime
) -> tuple[dict[str, Certified], str]:
    """Whose X.509-SVID signed, with its certificate; else why none did, "" where none is presented."""
    if not evidence.chain or check is None or not any(one.spiffe_ids for one in trust.builders.values()):
        return {}, ""
    try:
        leaf = x509.load_der_x509_certificate(evidence.chain[0])
        key = SigningKey(leaf.public_key())  # type: ignore[arg-type]  # it looks itself
    except _UNREADABLE as error:
        return {}, f"the certificate beside the envelope is none that signs: {error}"
    signature = next((one for one in evidence.envelope.signatures if key.signed(one.sig, signed)), None)
    if signature is None:
        return {}, "the certificate beside the envelope is not the signer's"
    try:
        spiffe_id = check(evidence.chain, _stamped_at(evidence, signature, trust) or now)
    except ValueError as error:
        return {}, f"the certificate beside the envelope is no X.509-SVID of a trusted domain: {error}"
    return {spiffe_id: Certified(not_before=leaf.not_valid_before_utc, spki=key.spki)}, ""


def _find_identity(
    evidence: Evidence, trust: ProvenanceTrust, check: SigstoreCheck | None
) -> tuple[dict[SigstoreIdentity, Certified], str]:
    """Which Sigstore identity signed, with its certificate; else why none did."""
    identities = trust.all_identities()
    if evidence.bundle is None or check is None or not identities:
        return {}, ""
    try:
        found = check(evidence.bundle, identities)
    except ValueError as error:
        return {}, f"the bundle is not of a trusted Sigstore identity: {error}"
    if (found.payload_type, found.payload) != (evidence.envelope.payload_type, evidence.envelope.payload):
        return {}, "the bundle was verified for another payload"  # two readers of one text disagree
    return {found.identity: Certified(not_before=found.not_before, spki=found.spki)}, ""
