"""X.509-SVIDs: which chain of certificates speaks for which SPIFFE ID, now.

Source: https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md ("X" below) and RFC 5280. In this order:

1. the leaf is an SVID for authentication, whoever signed it      X sections 2, 3.1, 4, 5.2
2. its trust domain has a bundle                                  the own one: nobody else's authorities are looked at
3. a path leads from it to an authority in that bundle            X section 5.1: RFC 5280, by cryptography's verifier
4. each signing certificate on the path that is an SVID is one    X sections 3.2, 4.3

Not checked: revocation lists (an SVID is short-lived instead), and that the peer holds the key, which TLS proves.
URI name constraints are not supported by the verifier, so a path with one is refused, as X section 4.2 foresees.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SCHEME, SpiffeId
from broker.identity.trust import TrustBundle, TrustSnapshot

Peer = Literal["client", "server"]

MAX_INTERMEDIATES = 4  # nested SPIRE needs one or two; path building is work that a stranger could order
MAX_CHAIN_BYTES = 64 * 1024  # five certificates of a kind that nobody makes on purpose
MIN_RSA_BITS = 2048  # as RFC 7518 section 3.3 for JWT; the verifier holds authorities to it, we the leaf
REMEMBERED = 4096  # verified chains; about 2 KiB each

_PURPOSES = {"client": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
# What reading a hostile certificate may raise: parsing is lazy, so any look at one can.
_UNREADABLE = (
    ValueError,
    TypeError,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    UnsupportedAlgorithm,
)
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedX509Svid:
    """A workload that an authority of its own trust domain vouched for.

    leaf_sha256: of the leaf's DER (`x5t#S256` before base64url, RFC 8705 section 3.1).
    not_after: the earliest end on the path; from then on the same chain is refused.
    authority_sha256: of the DER of the authority that the path ends at, as it stands in the bundle.
    """

    spiffe_id: SpiffeId
    leaf_sha256: bytes
    not_after: datetime
    public_key: CertificatePublicKeyTypes = field(compare=False)
    authority_sha256: bytes


@dataclass(frozen=True, slots=True)
class _Remembered:
    fingerprint: bytes
    not_before: datetime
    svid: VerifiedX509Svid


class _Memory:
    """Chains that verified. Failures are not kept: strangers could push out what is true.

    An entry counts for the same chain and kind of peer, against a bundle with the same content, within the time in
    which every certificate on the path is valid. The least recently used goes first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[Peer, bytes], _Remembered] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: tuple[Peer, bytes], snapshot: TrustSnapshot, now: datetime) -> VerifiedX509Svid | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            bundle = snapshot.bundles.get(entry.svid.spiffe_id.trust_domain)
            if bundle is None or bundle.fingerprint != entry.fingerprint:
                return None
            if not entry.not_before <= now <= entry.svid.not_after:
                return None
            self._entries.move_to_end(key)
            return entry.svid

    def put(self, key: tuple[Peer, bytes], entry: _Remembered) -> None:
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            if len(self._entries) > self._size:
                self._entries.popitem(last=False)


_memory = _Memory(REMEMBERED)  # pure: the same inputs verify the same way, and the key and the entry hold all of them


def verify_x509_svid(chain: Sequence[bytes], snapshot: TrustSnapshot, now: datetime, *, peer: Peer) -> VerifiedX509Svid:
    """Who the chain speaks for.

    chain: DER, leaf first, then intermediates in any order. now: aware. peer: what the other side is, to us.

    Raises: Invalid when the chain or its SPIFFE ID cannot be read or is too large; Refused(expired) when a certificate
    in it is past its end; Refused(unauthenticated) otherwise.
    """
    now = now.replace(microsecond=0)  # certificates count seconds, and their last one is included (RFC 5280 4.1.2.5)
    if not 1 <= len(chain) <= 1 + MAX_INTERMEDIATES or sum(map(len, chain)) > MAX_CHAIN_BYTES:
        raise Invalid(f"X.509-SVID is not a chain of 1 to {1 + MAX_INTERMEDIATES} certificates of reasonable size")
    digest = hashlib.sha256(b"".join(len(item).to_bytes(4) + item for item in chain)).digest()
    known = _memory.get((peer, digest), snapshot, now)
    if known is not None:
        return known
    try:
        certificates = [x509.load_der_x509_certificate(item) for item in chain]
        spiffe_id = _check_leaf(certificates[0])
        public_key = certificates[0].public_key()
    except _UNREADABLE as error:
        raise Invalid("X.509-SVID holds a certificate that cannot be read") from error
    if isinstance(public_key, rsa.RSAPublicKey) and public_key.key_size < MIN_RSA_BITS:
        raise Refused(Reason.UNAUTHENTICATED, f"leaf has an RSA key under {MIN_RSA_BITS} bits")
    bundle = snapshot.bundle_for(spiffe_id.trust_domain)
    path = _find_path(certificates, bundle, now, peer)
    svid = VerifiedX509Svid(
        spiffe_id=spiffe_id,
        leaf_sha256=hashlib.sha256(chain[0]).digest(),
        not_after=min(item.not_valid_after_utc for item in path),
        public_key=public_key,
        authority_sha256=authority_digest(path[-1]),
    )
    not_before = max(item.not_valid_before_utc for item in path)
    _memory.put((peer, digest), _Remembered(bundle.fingerprint, not_before, svid))
    return svid


def authority_digest(authority: x509.Certificate) -> bytes:
    """SHA-256 of an authority's DER."""
    return authority.fingerprint(hashes.SHA256())


def _check_leaf(leaf: x509.Certificate) -> SpiffeId:
    """What a leaf must be, whoever signed it. Raises: Refused, Invalid, and what is `_UNREADABLE`."""
    _check_leaf_usage(leaf.extensions)
    if _find(leaf.extensions, x509.NameConstraints):
        raise Refused(Reason.UNAUTHENTICATED, "leaf has name constraints, which are for signing certificates (X 4.2)")
    names = _find(leaf.extensions, x509.SubjectAlternativeName)
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    if names is None or len(uris) != 1:
        raise Refused(Reason.UNAUTHENTICATED, f"leaf has {len(uris)} URI names, and an SVID has exactly one (X 2)")
    if not names.critical and not leaf.subject.rdns:
        raise Refused(Reason.UNAUTHENTICATED, "leaf has no subject, and its names are not critical (X 3.1)")
    spiffe_id = SpiffeId.parse(uris[0])
    if not spiffe_id.path:
        raise Refused(Reason.UNAUTHENTICATED, "leaf names a trust domain, not a workload in it (X 3.1)")
    return spiffe_id


def _check_leaf_usage(extensions: x509.Extensions) -> None:
    constraints = _find(extensions, x509.BasicConstraints)
    if constraints and constraints.value.ca:
        raise Refused(Reason.UNAUTHENTICATED, "leaf is a CA, which must not authenticate anyone (X 3.2, 5.2)")
    usage = _find(extensions, x509.KeyUsage)
    if usage is None or not usage.critical:
        raise Refused(Reason.UNAUTHENTICATED, "leaf has no critical key usage (X 4.3)")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise Refused(Reason.UNAUTHENTICATED, "leaf may sign certificates or revocation lists (X 4.3, 5.2)")
    if not usage.value.digital_signature:
        raise Refused(Reason.UNAUTHENTICATED, "leaf may not make digital signatures (X 4.3)")
    purposes = _find(extensions, x509.ExtendedKeyUsage)
    if purposes and not set(_PURPOSES.values()) <= set(purposes.value):
        raise Refused(Reason.UNAUTHENTICATED, "leaf limits its purposes, but not to both server and client (X 4.4)")


def _find(extensions: x509.Extensions, kind: type[_Extension]) -> x509.Extension[_Extension] | None:
    try:
        return extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


def _find_path(
    certificates: list[x509.Certificate], bundle: TrustBundle, now: datetime, peer: Peer
) -> list[x509.Certificate]:
    """The path from the leaf to an authority of the bundle, both included. Raises: Refused."""
    if not bundle.x509_authorities:
        raise Refused(Reason.UNAUTHENTICATED, f"the bundle of {bundle.trust_domain} has no X.509 authorities")
    verifier = (
        PolicyBuilder()
        .store(Store(list(bundle.x509_authorities)))
        .time(now)
        .max_chain_depth(MAX_INTERMEDIATES)
        .extension_policies(ca_policy=_SIGNING[peer], ee_policy=ExtensionPolicy.permit_all())
        .build_client_verifier()  # for both kinds of peer: a server's names are not DNS names here
    )
    try:
        path = verifier.verify(certificates[0], certificates[1:]).chain
    except VerificationError as error:
        if any(item.not_valid_after_utc < now for item in certificates):
            raise Refused(Reason.EXPIRED, "a certificate in the chain has expired: renew the SVID") from error
        why = str(error).partition(" (encountered")[0]  # what follows repeats the stranger's certificate
        raise Refused(Reason.UNAUTHENTICATED, f"no path to an authority of {bundle.trust_domain}: {why}") from error
    except _UNREADABLE as error:
        raise Invalid("X.509-SVID holds an intermediate that cannot be read") from error
    if len(path) == 1:
        raise Refused(Reason.UNAUTHENTICATED, "the bundle holds the leaf itself, which is no authority (X 3.2)")
    return path


def _check_signing_svid(_: Policy, certificate: x509.Certificate, names: x509.SubjectAlternativeName | None) -> None:
    """A signing certificate need not be an SVID (X 3.2 SHOULD), but one that is must be a valid one.

    Raises: ValueError, which the verifier takes as no to this path.
    """
    uris = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    mine = [uri for uri in uris if uri.startswith(SCHEME)]
    # `spiffe://acme.test/` stands in the standard's own example of an authority (TDB appendix A): an empty path.
    if any(uri.removeprefix(SCHEME).partition("/")[2] for uri in mine):
        raise ValueError("a signing certificate's SPIFFE ID has a path (X 3.2)")
    usage = _find(certificate.extensions, x509.KeyUsage)
    if mine and not (usage and usage.critical):
        raise ValueError("a signing certificate's key usage is not critical (X 4.3)")


def _purpose(peer: Peer) -> Callable[[Policy, x509.Certificate, x509.ExtendedKeyUsage | None], None]:
    """X section 4.4 leaves the meaning of a CA's extended key usage open. Ours: it limits all that stands below."""
    allowed = {_PURPOSES[peer], ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}

    def check(_: Policy, __: x509.Certificate, purposes: x509.ExtendedKeyUsage | None) -> None:
        if purposes is not None and allowed.isdisjoint(purposes):
            raise ValueError(f"a signing certificate is not for authenticating a {peer} (X 4.4)")

    return check


# The defaults for CAs are RFC 5280's: critical basic constraints with cA, keyCertSign, no unknown critical extension.
_SIGNING = {
    peer: ExtensionPolicy.webpki_defaults_ca()
    .may_be_present(x509.SubjectAlternativeName, Criticality.AGNOSTIC, _check_signing_svid)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, _purpose(peer))
    for peer in ("client", "server")
}
