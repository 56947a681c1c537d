"""An issuer of action tokens with any defect on request, a receiving service's guard, and what a caller presents."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from support.pki import base64url, jws, seeded_ec_key

from broker.action import Action
from broker.credentials import action_token, dpop, jose
from broker.guard import Guard, KeyCache, Memory, Presented

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
ISSUER = "https://broker.acme.test"
AUDIENCE = "spiffe://acme.test/service/orders"
CALLER = "spiffe://acme.test/build/agent"
URL = "https://orders.acme.test/acme.Orders/Refund"
REFUND = Action("orders.refund", "https://orders.acme.test/v1/orders/17", AUDIENCE, {"amount": 30, "currency": "EUR"})
LEAF = b"the DER of the caller's leaf"
SEED = "action token tests"


def raw_signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """RFC 7518 section 3.4, the same for the same input."""
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)))
    return r.to_bytes(32) + s.to_bytes(32)


def x5t(der: bytes = LEAF) -> dict[str, str]:
    """A `cnf` that names a certificate."""
    return {"x5t#S256": base64url(hashlib.sha256(der).digest())}


class Issuer:
    """Signs whatever it is told to."""

    def __init__(self, seed: str = SEED) -> None:
        self.key = seeded_ec_key(f"{seed}/issuer")
        self.jwk = jose.to_jwk(self.key.public_key())
        self.kid = jose.thumbprint(self.jwk)

    def jwks(self, **changes: Any) -> bytes:
        """The key set. changes: members instead of or beside the usual ones."""
        members = {"kty": "EC", "crv": "P-256", "x": self.jwk.x, "y": self.jwk.y, "kid": self.kid}
        return json.dumps({"keys": [members | {"use": "sig", "alg": "ES256"} | changes]}).encode()

    def claims(self, action: Action = REFUND, *, now: datetime = NOW, **changes: Any) -> dict[str, Any]:
        """The usual claims, bound to LEAF. changes: instead of or beside them; None leaves one out."""
        issued = int(now.timestamp())
        found = {
            "iss": ISSUER,
            "sub": CALLER,
            "aud": action.audience,
            "exp": issued + 60,
            "iat": issued,
            "jti": "0123456789abcdef0123456789abcdef",
            "client_id": CALLER,
            "scope": action.name,
            "authorization_details": [
                {
                    "type": "action",
                    "actions": [action.name],
                    "identifier": action.resource,
                    "locations": [action.audience],
                    "parameters": dict(action.parameters),
                }
            ],
            "cnf": x5t(),
            "action_digest": action.digest.hex(),
            "use": "once",
            "attestation": {"environment": f"sha256:{'0' * 64}", "policy": "sha256:0123456789ab"},
        } | changes
        return {name: value for name, value in found.items() if value is not None}

    def header(self, **changes: Any) -> dict[str, Any]:
        found = {"alg": "ES256", "typ": "at+jwt", "kid": self.kid} | changes
        return {name: value for name, value in found.items() if value is not None}

    def sign(self, header: bytes | Mapping[str, Any], payload: bytes | Mapping[str, Any]) -> str:
        return jws(header, payload, lambda data: raw_signature(self.key, data))

    def token(self, action: Action = REFUND, **changes: Any) -> str:
        return self.sign(self.header(), self.claims(action, **changes))


class Prover:
    """A caller's key: DPoP proofs with any defect on request."""

    def __init__(self, seed: str = f"{SEED}/caller") -> None:
        self.key = seeded_ec_key(seed)
        self.jwk = jose.to_jwk(self.key.public_key())
        self.jkt = jose.thumbprint(self.jwk)
        self._count = 0

    @property
    def cnf(self) -> dict[str, str]:
        return {"jkt": self.jkt}

    def header(self, **changes: Any) -> dict[str, Any]:
        public = {"kty": "EC", "crv": "P-256", "x": self.jwk.x, "y": self.jwk.y}
        found = {"alg": "ES256", "typ": "dpop+jwt", "jwk": public} | changes
        return {name: value for name, value in found.items() if value is not None}

    def claims(self, token: str | None, *, now: datetime = NOW, **changes: Any) -> dict[str, Any]:
        self._count += 1
        found = {"jti": f"proof-{self._count:08}", "htm": "POST", "htu": URL, "iat": int(now.timestamp())}
        found |= {"ath": None if token is None else dpop.access_token_hash(token)} | changes
        return {name: value for name, value in found.items() if value is not None}

    def sign(self, header: bytes | Mapping[str, Any], payload: bytes | Mapping[str, Any]) -> str:
        return jws(header, payload, lambda data: raw_signature(self.key, data))

    def proof(self, token: str | None = None, **changes: Any) -> str:
        return self.sign(self.header(), self.claims(token, **changes))


def by_certificate(token: str, der: bytes = LEAF) -> Presented:
    return Presented(token=token, certificate_sha256=hashlib.sha256(der).digest())


def by_proof(token: str, proof: str) -> Presented:
    return Presented(token=token, proof=proof, method="POST", urls=(URL,))


async def guard_for(signer: Issuer, **changes: Any) -> Guard:
    """A guard with a memory of its own and the signer's keys at hand. changes: its arguments."""

    async def fetch() -> bytes:
        return signer.jwks()

    keys = KeyCache(fetch)
    assert await keys.refetch()
    arguments = {"issuer": ISSUER, "audience": AUDIENCE, "keys": keys, "memory": Memory(), "clock": lambda: NOW}
    return Guard(**(arguments | changes))


def as_minted(claims: Mapping[str, Any]) -> bytes:
    """The payload as our own encoder writes these claims."""
    return action_token.encode(action_token._decoder.decode(json.dumps(claims)))
