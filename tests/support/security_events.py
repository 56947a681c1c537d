"""Security event tokens, with any defect on request, and the transmitter that signs them.

What is made without further arguments is sound at the time it is made for: it says that session `s-1` of the agent is
HIGH.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from support.oidc import Signer
from support.pki import ISSUER, WORKLOAD, jws

from broker.identity.event_keys import FileKeys
from broker.identity.security_event import KeySource, SecurityEvents, Transmitter, TransmitterSettings

TRANSMITTER = "https://caep.acme.test/tenant-1/"
CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
SSF = "https://schemas.openid.net/secevent/ssf/event-type/"
RISK, REVOKED = f"{CAEP}risk-level-change", f"{CAEP}session-revoked"
VERIFICATION = f"{SSF}verification"
SECRET = "s3cret-of-the-transmitter"


def opaque(session: str = "s-1") -> dict[str, str]:
    return {"format": "opaque", "id": session}


def uri(principal: str = WORKLOAD) -> dict[str, str]:
    return {"format": "uri", "uri": principal}


def complex_subject(session: str = "s-1", principal: str = WORKLOAD, **members: Any) -> dict[str, Any]:
    """A session and its workload; "" leaves one out."""
    found: dict[str, Any] = {"format": "complex"}
    if session:
        found["session"] = opaque(session)
    if principal:
        found["user"] = uri(principal)
    return found | members


@dataclass
class Transmitting:
    """Signs events. issuer: as which. audience: for whom."""

    issuer: str = TRANSMITTER
    audience: str = ISSUER
    signer: Signer = field(default_factory=lambda: Signer("RS256", kid="k-1"))

    def claims(
        self,
        now: datetime,
        level: str = "HIGH",
        *,
        kind: str = RISK,
        subject: Any = None,
        event: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
        **changes: Any,
    ) -> dict[str, Any]:
        """event: members of the event that are changed; None leaves one out. without: claims that are left out."""
        at = now.timestamp()
        usual: dict[str, Any] = {"event_timestamp": at}
        if kind == RISK:
            usual |= {"current_level": level, "principal": "SESSION", "risk_reason": "READ_AN_UNTRUSTED_PAGE"}
        body = {name: value for name, value in (usual | dict(event or {})).items() if value is not None}
        found = {
            "iss": self.issuer,
            "jti": secrets.token_hex(8),
            "iat": int(at),
            "aud": self.audience,
            "txn": "8675309",
            "sub_id": complex_subject() if subject is None else subject,
            "events": {kind: body},
        } | changes
        return {name: value for name, value in found.items() if name not in without}

    def token(self, now: datetime, level: str = "HIGH", *, header: Mapping[str, Any] | None = None, **how: Any) -> str:
        return self.sign(self.claims(now, level, **how), **(header or {}))

    def sign(self, claims: Mapping[str, Any] | bytes, **header: Any) -> str:
        head = {"alg": self.signer.alg, "kid": self.signer.kid, "typ": "secevent+jwt"} | header
        return jws({name: value for name, value in head.items() if value is not None}, claims, self.signer.sign)

    def write_keys(self, file: Path, *signers: Signer) -> Path:
        """Its public keys, as it publishes them."""
        file.write_text(json.dumps({"keys": [one.jwk() for one in signers or (self.signer,)]}))
        return file

    def configured(self, folder: Path, **settings: Any) -> Transmitter:
        """As it is configured at the broker, by a file of keys."""
        secret = settings.pop("secret", "")
        keys: KeySource = FileKeys(self.write_keys(folder / "transmitter.jwks"))
        made = TransmitterSettings(**({"issuer": self.issuer, "audience": self.audience} | settings))
        return Transmitter(settings=made, keys=keys, secrets=lambda: (secret.encode(),) if secret else ())

    def verifier(self, folder: Path, **settings: Any) -> SecurityEvents:
        return SecurityEvents([self.configured(folder, **settings)], ISSUER)
