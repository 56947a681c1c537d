"""What a signing grant is spent on: a signature, or a certificate for the agent's own key.

Each act is fixed before the grant is spent, and done after: what can be refused is refused while it costs nothing.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from attestors.dsse import STATEMENT_TYPE, pae
from attestors.in_threads import Busy, InThreads
from attestors.statement import StatementError, parse_statement_to_sign, require_exactly
from broker.artifacts import AGENT_KEY, KEYLESS, SigningRequest
from broker.credentials import mint
from broker.decision.decide import Grant
from broker.errors import Invalid, Reason, Refused, Unavailable
from broker.signing import bundle
from broker.signing.authority import Authority
from broker.signing.content import DEFAULT_LIFETIME, CertificateContent, certifiable, validity
from broker.signing.csr import verified_key
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey, require_digest, require_one_kind
from broker.signing.profile import ToBeSigned, to_be_signed
from broker.signing.signer import Algorithm, PublicKey, Signer, spki_of
from broker.signing.timestamp import TimestampAuthority
from broker.spending import Decided, Prepared

MAX_STATEMENT: Final = 128 * 1024  # bytes: a thousand subjects fit
_READ_AT_ONCE: Final = 2
_WAIT_TO_BE_READ: Final = 64  # statements; the worst of them takes 0.1 s


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a signature for who asks again. certificate_chain: DER, leaf first; empty for a named key.

    public_key: DER SubjectPublicKeyInfo. timestamp: DER TimeStampResp, empty without an authority. hash_name: of the
    artifact's digest that was signed; "" for a statement, which is not kept: who asks again shows it again.
    """

    signature: bytes
    certificate_chain: tuple[bytes, ...]
    public_key: bytes
    timestamp: bytes
    hash_name: str


class Signed(Made, frozen=True, kw_only=True):
    """A signature, and all it takes to verify it. bundle: JSON."""

    bundle: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What this broker signs with.

    authority: gives what certifies now; None without a CA. keys: those that never leave their place, by name.
    timestamps: None where bundles end with their certificate. node: this machine's name, for certificates.
    reading: where the statements are read that are to be signed.

    Raises: ValueError where one key is to sign both artifacts and statements.
    """

    issuer: str
    authority: Callable[[], Authority] | None = None
    keys: Mapping[str, NamedKey] = field(default_factory=dict)
    timestamps: TimestampAuthority | None = None
    certificate_ttl: timedelta = DEFAULT_LIFETIME
    node: str = ""
    reading: InThreads = field(default_factory=lambda: InThreads(at_once=_READ_AT_ONCE, waiting=_WAIT_TO_BE_READ))

    def __post_init__(self) -> None:
        require_one_kind(self.keys.values())

    def key(self, name: str) -> NamedKey:
        """Raises: Unavailable where there is none of this name."""
        try:
            return self.keys[name]
        except KeyError:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, f"no key {name} is configured: see [signing.keys]") from None

    def ca(self) -> Authority:
        """Raises: Unavailable where there is none."""
        if self.authority is None:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, "no CA is configured: run `action-broker ca init`")
        return self.authority()

    def require(self, signing: SigningRequest, until: datetime) -> None:
        """Raises: Unavailable or Invalid where we could not keep what a grant for this would promise.

        until: when that grant would end.
        """
        if signing.key_name is not None:
            self.key(signing.key_name).require(signing)
        elif self.ca().issuing.certificate.not_valid_after_utc < until:
            raise _no_certificate("the CA would end before the grant: run `action-broker ca rotate`")

    def require_certifiable(self, signing: SigningRequest, grant: Grant) -> None:
        """Raises: Refused(PROVENANCE_REJECTED) where a certificate would have to say what none can hold."""
        if signing.key_name is None:
            certifiable(_values(grant, "provenance"))


class Signature:
    """The act of signing: the digest of the one artifact, or a statement about all of them as DSSE."""

    def __init__(self, means: Means, statement: bytes) -> None:
        self._means, self._statement = means, statement

    @property
    def content(self) -> bytes:
        """The statement, b"" for none."""
        return self._statement

    async def check(self, signing: SigningRequest) -> None:
        """Raises: Refused or Invalid where it is not what was granted; Unavailable where that cannot be looked at."""
        if signing.signer == AGENT_KEY:
            raise Refused(Reason.OUT_OF_SCOPE, "the grant is for a certificate: use IssueSigningCertificate")
        key = None if signing.key_name is None else self._means.key(signing.key_name)
        if key is not None:
            key.require_kind(statement=bool(self._statement))
        if self._statement:
            await self._require_statement(signing)
        else:
            algorithm = Algorithm.ECDSA_P256 if key is None else key.signer.algorithm
            require_digest(signing, algorithm.hash_name)

    async def _require_statement(self, signing: SigningRequest) -> None:
        """In a thread: so many names or subjects would hold all other requests up."""
        statement = self._statement
        if len(statement) > MAX_STATEMENT:
            raise Invalid(f"the statement is larger than {MAX_STATEMENT} bytes")

        def require() -> None:
            require_exactly(parse_statement_to_sign(statement), signing.artifacts)

        try:
            await self._means.reading.run(require)
        except StatementError as error:
            raise Invalid(str(error)) from error
        except Busy as error:
            raise Unavailable(Reason.SIGNER_UNAVAILABLE, f"the statement was not looked at: {error}") from error

    def prepare(self, decided: Decided) -> Prepared:
        """By the key that the grant names, or by one that is born now and certified."""
        if decided.signing.signer != KEYLESS:
            key = self._means.key(str(decided.signing.key_name)).signer
            spki = spki_of(key.public_key)
            return _prepared(decided, "signature", spki, f"key:{key.name}", self._by_named_key(key, spki, decided))
        authority = self._means.ca()
        one_time = FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), "one-time")
        content, linted = _linted(self._means, decided, one_time.public_key, authority)
        perform = self._by_one_time_key(one_time, authority, linted, decided, content)
        return _prepared(decided, "signature", content.spki, f"ca:{authority.name}", perform)

    def answer(self, made: bytes, signing: SigningRequest) -> Signed:
        """The signature with its bundle. made: what `perform` gave for this statement and request."""
        found = msgspec.msgpack.decode(made, type=Made)
        leaf = found.certificate_chain[0] if found.certificate_chain else b""
        public_key = b"" if leaf else found.public_key
        material = bundle.Material(certificate=leaf, public_key=public_key, timestamp=found.timestamp)
        if self._statement:
            text = bundle.statement_bundle(material, statement=self._statement, signature=found.signature)
        else:
            name = found.hash_name
            digest = bytes.fromhex(signing.artifacts[0][name])
            text = bundle.blob_bundle(material, hash_name=name, digest=digest, signature=found.signature)
        return Signed(bundle=text, **msgspec.structs.asdict(found))

    def _by_named_key(self, key: Signer, spki: bytes, decided: Decided) -> Callable[[], Awaitable[tuple[bytes, str]]]:
        async def perform() -> tuple[bytes, str]:
            signature = await self._sign(key, decided.signing)
            return self._made(signature, (), spki, await self._stamp(signature, None), key.algorithm)

        return perform

    def _by_one_time_key(
        self, key: FileSigner, authority: Authority, linted: ToBeSigned, decided: Decided, content: CertificateContent
    ) -> Callable[[], Awaitable[tuple[bytes, str]]]:
        async def perform() -> tuple[bytes, str]:
            signature = await self._sign(key, decided.signing)
            leaf = await authority.issue(linted)
            stamp = await self._stamp(signature, (content.not_before, content.not_after))
            return self._made(signature, (leaf, *authority.chain), content.spki, stamp, key.algorithm)

        return perform

    async def _sign(self, key: Signer, signing: SigningRequest) -> bytes:
        if self._statement:
            return await key.sign_message(pae(STATEMENT_TYPE, self._statement))
        return await key.sign_digest(bytes.fromhex(signing.artifacts[0][str(key.algorithm.hash_name)]))

    async def _stamp(self, signature: bytes, within: tuple[datetime, datetime] | None) -> bytes:
        return b"" if self._means.timestamps is None else await self._means.timestamps.stamp(signature, within=within)

    def _made(
        self, signature: bytes, chain: tuple[bytes, ...], spki: bytes, stamp: bytes, algorithm: Algorithm
    ) -> tuple[bytes, str]:
        made = Made(
            signature=signature,
            certificate_chain=chain,
            public_key=spki,
            timestamp=stamp,
            hash_name="" if self._statement else str(algorithm.hash_name),
        )
        return msgspec.msgpack.encode(made), hashlib.sha256(signature).hexdigest()


class Certificate:
    """The act of certifying the agent's own key, which may sign other things too until the certificate ends."""

    def __init__(self, means: Means, csr: bytes, nonce: str) -> None:
        self._means, self._csr, self._nonce = means, csr, nonce
        self._key: PublicKey | None = None

    @property
    def content(self) -> bytes:
        """The request."""
        return self._csr

    async def check(self, signing: SigningRequest) -> None:
        """Raises: Refused or Invalid where it is not what was granted, or where the key is not the asker's."""
        if signing.signer != AGENT_KEY:
            raise Refused(Reason.OUT_OF_SCOPE, "the grant is for a signature: use Sign")
        self._key = verified_key(self._csr, self._nonce)

    def prepare(self, decided: Decided) -> Prepared:
        """A linted certificate for the key in the request. `check` came first, and found whose it is."""
        if self._key is None:
            raise RuntimeError("check() before prepare()")
        authority = self._means.ca()
        content, linted = _linted(self._means, decided, self._key, authority)

        async def perform() -> tuple[bytes, str]:
            leaf = await authority.issue(linted)
            return msgspec.msgpack.encode((leaf, *authority.chain)), hashlib.sha256(leaf).hexdigest()

        return _prepared(decided, "signing_certificate", content.spki, f"ca:{authority.name}", perform)

    def answer(self, made: bytes, signing: SigningRequest) -> tuple[bytes, ...]:  # noqa: ARG002 -- it says all of it
        """The certificate and those above it: DER, leaf first."""
        return msgspec.msgpack.decode(made, type=tuple[bytes, ...])


def _linted(
    means: Means, decided: Decided, key: PublicKey, authority: Authority
) -> tuple[CertificateContent, ToBeSigned]:
    """What a certificate is to say, and the certificate but for its signature.

    Raises: Refused; Unavailable where the CA has ended, or where what we would certify is not in the profile.
    """
    until = authority.issuing.certificate.not_valid_after_utc
    if until <= decided.now:
        raise _no_certificate("the CA has ended: run `action-broker ca rotate`")
    try:
        content = _content(means, decided, key, min(until, decided.expires_at))
        return content, to_be_signed(content, authority.issuing)
    except ValueError as error:  # ours to mend, and a no until then
        raise _no_certificate(str(error)) from error


def _no_certificate(why: str) -> Unavailable:
    return Unavailable(Reason.SIGNER_UNAVAILABLE, f"no certificate can be given: {why}")


def _content(means: Means, decided: Decided, key: PublicKey, until: datetime) -> CertificateContent:
    """What a certificate says: the decision's own facts, and nothing of the caller's."""
    grant, identity = decided.grant, decided.caller.identity
    begin, end = validity(decided.now, until=until, lifetime=means.certificate_ttl)
    pod = _values(grant, "kubernetes") or {}
    return CertificateContent(
        spiffe_id=identity.spiffe_id,
        issuer=means.issuer,
        public_key=key,
        not_before=begin,
        not_after=end,
        grant_id=decided.claims.jti,
        action_digest=grant.action.digest,
        artifacts=decided.signing.artifacts,
        policy_revision=grant.policy_revision,
        provenance=_values(grant, "provenance"),
        node=pod.get("node") or ("" if identity.process is None else means.node),
        pod_uid=pod.get("pod_uid") or "",
    )


def _values(grant: Grant, attestor: str) -> Mapping[str, Any] | None:
    facts = grant.facts.get(attestor)
    return None if facts is None else facts.values


def _prepared(
    decided: Decided,
    credential: str,
    spki: bytes,
    key_id: str,
    perform: Callable[[], Awaitable[tuple[bytes, str]]],
) -> Prepared:
    return Prepared(
        jti=mint.new_id(decided.now),
        credential=credential,
        cnf={"spki_sha256": hashlib.sha256(spki).hexdigest()},
        key_id=key_id,
        perform=perform,
    )
