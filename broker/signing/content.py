"""What is to stand in a signing certificate: checked values, and the texts that its extensions get from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import rsa

from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import SpiffeId
from broker.signing.signer import PublicKey, UnusableKey, algorithm_of, spki_of

MAX_LIFETIME: Final = timedelta(minutes=5)
DEFAULT_LIFETIME: Final = timedelta(minutes=2)
BACKDATED: Final = timedelta(seconds=10)  # for timestamp authorities whose clock is a little behind ours
MAX_TEXT: Final = 2048  # bytes of UTF-8; what is longer is no URI that anybody follows (as SPIFFE ID section 2.3)
LARGEST_RSA: Final = 4096  # bits; Fulcio's certificate specification
RSA_EXPONENT: Final = 65537  # likewise

# Fulcio's extension ← the fact of the provenance attestor. What it does not know about stays out.
_FROM_PROVENANCE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "build_signer_uri": "builder",
        "runner_environment": "runner",
        "source_repository_uri": "source",
        "source_repository_digest": "source_digest",
        "source_repository_ref": "source_ref",
        "build_config_uri": "config_uri",
        "build_config_digest": "config_digest",
        "run_invocation_uri": "invocation",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateContent:
    """Everything that one certificate will say.

    public_key: of who signs, possession proven. not_before, not_after: aware; whole seconds count, the part is cut off.
    action_digest: 32 bytes. artifacts: as in the signing request, algorithm → hex. provenance: the *verified* facts of
    the provenance attestor; None without. node, pod_uid: as attested; "" where unknown.

    What comes of it: spki: DER of the key. fulcio: the text of each of Fulcio's extensions by name, in the order of
    their numbers. ours: the values of each of our attributes by name. None of them is empty.

    Raises: Refused(PROVENANCE_REJECTED) when a fact cannot stand in a certificate. Refused(EXPIRED) when no time is
    left. Invalid for a key of a kind that is not certified. ValueError for what only our own mistake can bring here.
    Not checked: that any of it is true.
    """

    spiffe_id: SpiffeId
    issuer: str
    public_key: PublicKey = field(repr=False)
    not_before: datetime
    not_after: datetime
    grant_id: str
    action_digest: bytes
    artifacts: tuple[Mapping[str, str], ...]
    policy_revision: str
    provenance: Mapping[str, Any] | None = None
    node: str = ""
    pod_uid: str = ""
    spki: bytes = field(init=False, repr=False, compare=False)
    fulcio: Mapping[str, str] = field(init=False, repr=False, compare=False)
    ours: Mapping[str, tuple[str, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_certifiable(self.public_key)
        if not self.spiffe_id.path:
            raise ValueError("a trust domain signs nothing: the SPIFFE ID needs a path")
        if len(self.action_digest) != 32 or not self.artifacts:
            raise ValueError("a certificate is about one action and at least one artifact")
        if self.not_before.tzinfo is None or self.not_after.tzinfo is None:
            raise ValueError("the times of a certificate are aware")
        object.__setattr__(self, "not_before", self.not_before.replace(microsecond=0))
        object.__setattr__(self, "not_after", self.not_after.replace(microsecond=0))
        if self.not_after <= self.not_before:
            raise Refused(Reason.EXPIRED, "nothing is left of the time that the certificate would have")
        if self.not_after - self.not_before > MAX_LIFETIME:
            raise ValueError(f"a signing certificate lives {MAX_LIFETIME} at most")
        for text in (self.issuer, self.grant_id, self.policy_revision):
            require_text(text)
        for text in (self.node, self.pod_uid):
            if text:
                require_text(text)
        object.__setattr__(self, "spki", spki_of(self.public_key))
        build = certifiable(self.provenance)
        fulcio = {"issuer": self.issuer, **build, "token_subject": str(self.spiffe_id)}
        object.__setattr__(self, "fulcio", MappingProxyType(fulcio))
        object.__setattr__(self, "ours", MappingProxyType(self._ours()))

    def _ours(self) -> dict[str, tuple[str, ...]]:
        named = {f"{algorithm}:{digest}" for artifact in self.artifacts for algorithm, digest in artifact.items()}
        values = {
            "grant_id": self.grant_id,
            "action_digest": f"sha256:{self.action_digest.hex()}",
            "policy_revision": self.policy_revision,
            "node": self.node,
            "pod_uid": self.pod_uid,
        }
        return {"artifact": tuple(sorted(named))} | {name: (value,) for name, value in values.items() if value}


def certifiable(provenance: Mapping[str, Any] | None) -> dict[str, str]:
    """What a certificate says of the build: Fulcio's extensions from the facts of the provenance attestor.

    Raises: Refused(PROVENANCE_REJECTED) when a fact cannot stand in a certificate.
    """
    build = {}
    for name, fact in _FROM_PROVENANCE.items():
        value = (provenance or {}).get(fact, "")
        if value == "":
            continue
        try:
            build[name] = require_text(value)
        except ValueError as error:
            raise Refused(Reason.PROVENANCE_REJECTED, f"provenance's {fact} cannot be certified: {error}") from None
    return build


def validity(now: datetime, *, until: datetime, lifetime: timedelta = DEFAULT_LIFETIME) -> tuple[datetime, datetime]:
    """not_before and not_after of a certificate that is made now: for `lifetime`, but ended by `until`.

    It begins `BACKDATED` before now, and is cut so that the whole is never over `MAX_LIFETIME`.

    Raises: Refused(EXPIRED) when that ends within this second: what it certifies would have to be older.
    """
    begin = now - BACKDATED
    end = min(now + lifetime, begin + MAX_LIFETIME, until)
    if end.replace(microsecond=0) <= now:
        raise Refused(Reason.EXPIRED, "nothing is left of the time that the certificate would have")
    return begin, end


def require_certifiable(key: object) -> PublicKey:
    """A key that we certify: ECDSA P-256 or P-384, Ed25519, RSA of 2048 to 4096 bits with e=65537.

    As Fulcio's certificate specification, without P-521, which signs nothing here. Raises: Invalid.
    """
    try:
        algorithm_of(key)
    except UnusableKey as error:
        raise Invalid(f"this key is not certified: {error}") from error
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        if key.key_size > LARGEST_RSA or key.key_size % 8 or numbers.e != RSA_EXPONENT or numbers.n % 2 == 0:
            raise Invalid(f"an RSA key is certified up to {LARGEST_RSA} bits, in whole bytes, with e={RSA_EXPONENT}")
    return key  # type: ignore[return-value] # algorithm_of took it, so it is one


def require_text(value: object) -> str:
    """A text that a certificate can hold and a terminal can show. Raises: ValueError, which does not repeat it."""
    if not isinstance(value, str) or not value:
        raise ValueError("it is no text, or an empty one")
    if not value.isprintable():
        raise ValueError("it has characters that cannot be shown, such as NUL, line ends or direction marks")
    if len(value) > MAX_TEXT or len(value.encode()) > MAX_TEXT:
        raise ValueError(f"it is longer than {MAX_TEXT} bytes")
    return value
