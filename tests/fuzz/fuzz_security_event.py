"""Fuzz target: security event tokens, and the subjects in them.

Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_security_event -max_total_time=60`.
"""

import base64
import json
import sys
from collections.abc import Coroutine
from datetime import datetime
from typing import Any

from support.oidc import Signer
from support.pki import ISSUER, NOW, jwks, jws, seeded_ec_key
from support.security_events import SECRET, TRANSMITTER, Transmitting

from attestors.session import LEVELS, is_session_id
from broker.errors import Refused
from broker.identity.event_age import EVENT_AGE, EVENT_AHEAD
from broker.identity.event_refused import EventRefused
from broker.identity.event_subject import EventSubject, parse_subject
from broker.identity.oidc_issuer import IssuerKey, keys_of, parse_keys
from broker.identity.others_jws import ALGORITHMS
from broker.identity.security_event import (
    TYPES,
    EventType,
    SecurityEvents,
    Transmitter,
    TransmitterSettings,
    VerifiedEvent,
)
from broker.identity.spiffe_id import SpiffeId

BY = Transmitting(audience=ISSUER, signer=Signer("ES256", kid="k", key=seeded_ec_key("security-event")))
HEADER = json.dumps({"alg": "ES256", "kid": "k", "typ": "secevent+jwt"}).encode()
PAYLOAD = json.dumps(BY.claims(NOW, jti="j-1")).encode()
SUBJECT = json.dumps(BY.claims(NOW)["sub_id"]).encode()


class Keys:
    """The transmitter's, without asking anybody."""

    def __init__(self) -> None:
        self._by_kid = parse_keys(jwks(BY.signer.jwk()))

    async def keys(self, kid: str | None, now: datetime) -> tuple[IssuerKey, ...]:  # noqa: ARG002 -- of KeySource
        return keys_of(self._by_kid, kid)


SETTINGS = TransmitterSettings(issuer=TRANSMITTER, audience=ISSUER)
EVENTS = SecurityEvents([Transmitter(settings=SETTINGS, keys=Keys())], ISSUER)
SECRETIVE = SecurityEvents([Transmitter(settings=SETTINGS, keys=Keys(), secrets=lambda: (SECRET.encode(),))], ISSUER)


def one_input(data: bytes) -> None:
    """As a token, as a header or claims truly signed, so that what lies behind is reached, as a subject, a secret."""
    verified(data.decode(errors="surrogateescape"), signed=False)
    verified(jws(data, PAYLOAD, BY.signer.sign), signed=True)
    verified(jws(HEADER, data, BY.signer.sign), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, BY.signer.sign), signed=True)
    verified(jws(HEADER, spliced(PAYLOAD, data), BY.signer.sign), signed=True)
    verified(jws(spliced(HEADER, data), PAYLOAD, lambda _: data), signed=False)
    for text in (data, spliced(SUBJECT, data)):
        subject(text)
    shown = data.decode(errors="surrogateescape")
    if verified(jws(HEADER, PAYLOAD, BY.signer.sign), signed=True, events=SECRETIVE, shown=shown):
        assert shown.partition(" ")[2] == SECRET


def spliced(text: bytes, data: bytes) -> bytes:
    """`text` with a part of it replaced: two bytes of `data` say which part, the others by what."""
    first, last = sorted(at % (len(text) + 1) for at in (data + b"\0\0")[:2])
    return text[:first] + data[2:] + text[last:]


def verified(
    token: str, *, signed: bool, events: SecurityEvents = EVENTS, shown: str | None = None
) -> VerifiedEvent | None:
    try:
        found = at_once(events.verify(token, shown, NOW))
    except EventRefused:  # and nothing else: each defect has its code
        return None
    assert signed, "accepted without a signature of the transmitter"
    header, claims = json.loads(part_of(token, 0)), json.loads(part_of(token, 1))
    assert header["alg"] in ALGORITHMS
    assert header["typ"].lower() in TYPES
    assert claims["iss"] == TRANSMITTER
    assert ISSUER in (claims["aud"], *claims["aud"])
    assert not {"exp", "sub"} & claims.keys()
    assert -EVENT_AHEAD <= NOW - found.issued_at <= EVENT_AGE
    assert found.said_at <= NOW
    ((kind, event),) = claims["events"].items()
    assert found.type == EventType(kind)
    assert found.level in {"HIGH" if found.type is EventType.SESSION_REVOKED else event.get("current_level"), None}
    assert found.level in {*LEVELS, None}
    checked(found.subject)
    return found


def subject(text: bytes) -> None:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return
    try:
        checked(parse_subject(found, ISSUER))
    except Refused:
        return


def checked(found: EventSubject) -> None:
    assert not found.session or is_session_id(found.session)
    assert not found.principal or str(SpiffeId.parse(found.principal)) == found.principal


def part_of(token: str, number: int) -> bytes:
    """The decoded part of a token that was accepted."""
    part = token.split(".")[number]
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def at_once(call: Coroutine[Any, Any, VerifiedEvent]) -> VerifiedEvent:
    """What it returns, without an event loop: it has nothing to wait for."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
