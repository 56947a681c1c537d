"""Security event tokens: what a configured transmitter says has become of a session, or of a workload's sessions.

Source: RFC 8417 ("SET" below), OpenID Shared Signals Framework 1.0 ("SSF") and Continuous Access Evaluation Profile 1.0
("CAEP"), https://openid.net/specs/openid-sharedsignals-framework-1_0-final.html and
https://openid.net/specs/openid-caep-1_0-final.html. Delivery is HTTP's (edges/http_events.py), and whether a token was
taken before is the ledger's to know.
"""

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol

from attestors.session import HIGH, LEVELS, Level
from broker.errors import Invalid, Reason, Refused
from broker.identity.event_age import EVENT_AGE, EVENT_AHEAD
from broker.identity.event_refused import Err, EventRefused
from broker.identity.event_subject import EventSubject, parse_subject
from broker.identity.oidc_issuer import IssuerKey
from broker.identity.others_jws import audiences, fitting, signed_by_one_of, take_apart, text_claim, time_claim
from broker.identity.person import check_issuer
from broker.identity.spiffe_id import SpiffeId

TYPES: Final = frozenset({"secevent+jwt", "application/secevent+jwt"})  # SET 2.3, RFC 7515 section 4.1.9
MAX_JTI: Final = 255
_WHAT: Final = "security event token"
_CAEP: Final = "https://schemas.openid.net/secevent/caep/event-type/"
_SSF: Final = "https://schemas.openid.net/secevent/ssf/event-type/"


class EventType(StrEnum):
    """What can have happened: CAEP section 3, and what SSF says of the stream itself."""

    SESSION_REVOKED = f"{_CAEP}session-revoked"
    TOKEN_CLAIMS_CHANGE = f"{_CAEP}token-claims-change"
    CREDENTIAL_CHANGE = f"{_CAEP}credential-change"
    ASSURANCE_LEVEL_CHANGE = f"{_CAEP}assurance-level-change"
    DEVICE_COMPLIANCE_CHANGE = f"{_CAEP}device-compliance-change"
    SESSION_ESTABLISHED = f"{_CAEP}session-established"
    SESSION_PRESENTED = f"{_CAEP}session-presented"
    RISK_LEVEL_CHANGE = f"{_CAEP}risk-level-change"
    VERIFICATION = f"{_SSF}verification"
    STREAM_UPDATED = f"{_SSF}stream-updated"


@dataclass(frozen=True, slots=True, kw_only=True)
class TransmitterSettings:
    """One transmitter, as an operator configures it.

    audience: what its events call us. principals: SPIFFE IDs, or with a slash at its end all below a path, whose
    sessions it may score; empty for everybody's. lowers: whether it may also lower a score.

    Raises: Invalid when a part cannot be.
    """

    issuer: str
    audience: str
    principals: tuple[str, ...] = ()
    lowers: bool = True

    def __post_init__(self) -> None:
        check_issuer(self.issuer)
        if not self.audience:
            raise Invalid(f"{self.issuer}: audience (what its events call us) must not be empty")
        for one in self.principals:
            SpiffeId.parse(one.removesuffix("/"))

    def may_score(self, principal: str) -> bool:
        """Whether sessions of this principal are its to score."""
        return not self.principals or any(
            principal.startswith(one) if one.endswith("/") else principal == one for one in self.principals
        )


class KeySource(Protocol):
    """Where a transmitter's public keys are (event_keys.py)."""

    async def keys(self, kid: str | None, now: datetime) -> tuple[IssuerKey, ...]:
        """Those of that id; without one the only key. Raises: Unavailable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transmitter:
    """A transmitter and its keys. secrets: those of which it shows one in `Authorization`; none where it need not."""

    settings: TransmitterSettings
    keys: KeySource
    secrets: Callable[[], Sequence[bytes]] = field(default=tuple, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedEvent:
    """An event that its transmitter signed. by: its settings.

    id: hex SHA-256 over "<iss> <jti>". level: what it says of its subject's risk; None where it says nothing of that.
    said_at: as of when, by the transmitter's clock and not after `now`. reason: in its own words. token_sha256: hex, of
    what was signed.
    """

    by: TransmitterSettings
    id: str
    type: EventType
    subject: EventSubject
    level: Level | None
    reason: str
    issued_at: datetime
    said_at: datetime
    token_sha256: str


class SecurityEvents:
    """Verifies the tokens of these transmitters and of no other. issuer: ours."""

    def __init__(self, transmitters: Iterable[Transmitter], issuer: str) -> None:
        self._transmitters = {one.settings.issuer: one for one in transmitters}
        self._issuer = issuer

    async def verify(self, token: str, authorization: str | None, now: datetime) -> VerifiedEvent:
        """What the token says, if its transmitter does.

        authorization: the value of that header, None without one.

        Obligations, in this order, so that what costs something comes last: (1) a small JWS with an algorithm that we
        take, explicitly typed; (2) of a configured issuer; (3) that shows its secret, where it has one; (4) for us;
        (5) no other kind of token: no `exp`, no `sub`; with a `jti`, and issued within the last hour; (6) exactly one
        event, of a type that is known, and what we read of it as its definition says; (7) about somebody; (8) signed by
        a key of that issuer which is for that algorithm.

        Raises: EventRefused; Unavailable(IDENTITY_UNAVAILABLE) when the issuer's keys cannot be had.
        Not checked: whether it was taken before; `txn`; whether the transmitter may speak of its subject.
        """
        try:
            return await self._verify(token, authorization, now)
        except Invalid as error:
            raise EventRefused(Err.INVALID_REQUEST, error.detail) from error

    async def _verify(self, token: str, authorization: str | None, now: datetime) -> VerifiedEvent:
        try:
            read = take_apart(token, _WHAT)
        except Invalid:
            raise
        except Refused as error:  # another algorithm
            raise EventRefused(Err.INVALID_KEY, error.detail) from error
        kind = read.header.get("typ")
        if not isinstance(kind, str) or kind.lower() not in TYPES:
            raise Invalid(f"typ is not secevent+jwt (SSF 4.1.1), so it is no {_WHAT}")
        transmitter = self._transmitters.get(text_claim(read.claims, "iss", _WHAT))
        if transmitter is None:
            raise EventRefused(Err.INVALID_ISSUER, "no transmitter of this issuer is configured")
        _require_one(transmitter.secrets(), authorization)
        settings = transmitter.settings
        if settings.audience not in audiences(read.claims, _WHAT):
            raise EventRefused(Err.INVALID_AUDIENCE, f"{settings.issuer} sent an event for somebody else")
        event = _event(read.claims, settings, self._issuer, now, read.sha256.hex())
        keys = fitting(read.alg, await transmitter.keys.keys(read.kid, now))
        if not keys:
            raise EventRefused(Err.INVALID_KEY, f"{settings.issuer} has no key that kid and alg allow")
        if not signed_by_one_of(token, read.alg, keys):
            raise EventRefused(Err.AUTHENTICATION_FAILED, f"no key of {settings.issuer} signed this")
        return event


def _require_one(secrets: Sequence[bytes], authorization: str | None) -> None:
    """RFC 6750 section 2.1. Raises: EventRefused."""
    if not secrets:
        return
    scheme, _, token = (authorization or "").partition(" ")
    shown = _sha256(token.encode(errors="surrogateescape"))  # so that no length shows in how long it takes
    same = [hmac.compare_digest(shown, _sha256(one)) for one in secrets]
    if scheme.lower() != "bearer" or not any(same):
        raise EventRefused(Err.AUTHENTICATION_FAILED, "the transmitter did not show its secret")


def _sha256(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _event(
    claims: Mapping[str, Any], settings: TransmitterSettings, issuer: str, now: datetime, sha256: str
) -> VerifiedEvent:
    """What the claims say. Raises: Invalid, EventRefused."""
    for name in ("exp", "sub"):  # SSF 4.1.2, 4.1.7: so that it is taken for no other token, and no other for it
        if name in claims:
            raise Invalid(f"{_WHAT} has {name}: it must not")
    jti = text_claim(claims, "jti", _WHAT)
    if not 0 < len(jti) <= MAX_JTI or not jti.isprintable():
        raise Invalid(f"{_WHAT} jti is not 1 to {MAX_JTI} printable characters")
    issued_at = time_claim(claims, "iat", _WHAT)
    if now - issued_at > EVENT_AGE:
        raise EventRefused(Err.INVALID_REQUEST, f"issued more than {EVENT_AGE} ago", Reason.EXPIRED)
    if issued_at - now > EVENT_AHEAD:
        raise EventRefused(Err.INVALID_REQUEST, "issued in the future: compare the clocks")
    kind, body = _one_event(claims)
    times = [time_claim(claims, "toe", _WHAT)] if "toe" in claims else []
    times += [time_claim(body, "event_timestamp", "event")] if "event_timestamp" in body else []
    return VerifiedEvent(
        by=settings,
        id=hashlib.sha256(f"{settings.issuer} {jti}".encode()).hexdigest(),
        type=kind,
        subject=parse_subject(claims.get("sub_id"), issuer),
        level=_level(kind, body),
        reason=_reason(body),
        issued_at=issued_at,
        said_at=min(now, issued_at, *times),
        token_sha256=sha256,
    )


def _one_event(claims: Mapping[str, Any]) -> tuple[EventType, Mapping[str, Any]]:
    """SSF 4.2.1: one event; two would have to be two names of one. Raises: Invalid, EventRefused."""
    events = claims.get("events")
    if not isinstance(events, dict) or len(events) != 1:
        raise Invalid(f"{_WHAT} has no events, or more than one")
    ((name, body),) = events.items()
    if not isinstance(body, dict):
        raise Invalid("the event is not a JSON object")
    try:
        kind = EventType(name)
    except ValueError:
        raise Invalid("the event is of a type that nobody asked for: CAEP 1.0 and SSF 1.0 alone are read") from None
    if kind is EventType.VERIFICATION and "state" in body:  # SSF 8.1.4.1: nobody here has asked with one
        raise EventRefused(Err.INVALID_STATE, "a verification with a state that we did not choose")
    return kind, body


def _level(kind: EventType, body: Mapping[str, Any]) -> Level | None:
    """CAEP 3.8.1; a session that was revoked (3.1) is as risky as can be. Raises: Invalid."""
    if kind is EventType.SESSION_REVOKED:
        return HIGH
    if kind is not EventType.RISK_LEVEL_CHANGE:
        return None
    if not text_claim(body, "principal", "event"):
        raise Invalid("event principal is empty")
    if "previous_level" in body:
        _one_level(body, "previous_level")
    return _one_level(body, "current_level")


def _one_level(body: Mapping[str, Any], name: str) -> Level:
    for level in LEVELS:
        if body.get(name) == level:
            return level
    raise Invalid(f"event {name} is none of {', '.join(LEVELS)}")


def _reason(body: Mapping[str, Any]) -> str:
    """Why, as its transmitter says (CAEP 2 and 3.8.1): for the ledger, and for people alone."""
    found = body.get("risk_reason")
    if found is None:
        spoken = body.get("reason_admin")
        found = next(iter(spoken.values()), "") if isinstance(spoken, dict) else ""
    return found if isinstance(found, str) else ""
