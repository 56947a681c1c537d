"""What token vectors are made of: keys from a seed, sound tokens and proofs, and ways to damage them."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from support.issuer import LEAF, NOW, REFUND, URL, Issuer, Prover, as_minted
from support.pki import base64url, jws, seeded_ec_key

from broker.action import Action

SEED = "action broker token vectors"
SIGNER, CALLER, THIEF = Issuer(SEED), Prover(f"{SEED}/caller"), Prover(f"{SEED}/thief")
ISSUED = int(NOW.timestamp())
Vector = dict[str, Any]


def certificate(token: str, leaf: bytes = LEAF) -> dict[str, Any]:
    return {"token": token, "certificate_sha256": hashlib.sha256(leaf).hexdigest()}


def proved(token: str, proof: str) -> dict[str, Any]:
    return {"token": token, "proof": proof, "method": "POST", "urls": [URL]}


def vector(expect: str, *shown: dict[str, Any], action: Action = REFUND, control: str | None = None) -> Vector:
    parts = {"name": action.name, "resource": action.resource, "audience": action.audience}
    found = {"expect": expect, "action": parts | {"parameters": dict(action.parameters)}, "shown": list(shown)}
    return found | ({} if control is None else {"control": control})


def token(**changes: Any) -> str:
    return SIGNER.sign(SIGNER.header(), as_minted(SIGNER.claims(**changes)))


def proof(access: str, number: int = 1, **changes: Any) -> str:
    return CALLER.sign(CALLER.header(), CALLER.claims(access, **({"jti": f"proof-{number:04}"} | changes)))


SOUND, SOUND_KEY = token(), token(cnf=CALLER.cnf)


def unsecured(access: str) -> str:
    header = base64url(json.dumps({"alg": "none", "typ": "at+jwt", "kid": SIGNER.kid}).encode())
    return f"{header}.{access.split('.')[1]}."


def hs256(access: str) -> str:
    secret = SIGNER.jwks()
    payload = base64.urlsafe_b64decode(access.split(".")[1] + "==")
    return jws(SIGNER.header(alg="HS256"), payload, lambda data: hmac.digest(secret, data, "sha256"))


def es384() -> str:
    key = seeded_ec_key(f"{SEED}/p384", ec.SECP384R1())

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA384(), deterministic_signing=True)))
        return r.to_bytes(48) + s.to_bytes(48)

    return jws(SIGNER.header(alg="ES384"), SIGNER.claims(), sign)


def signature(change: Callable[[bytes], bytes], access: str = SOUND) -> str:
    signed, _, last = access.rpartition(".")
    return f"{signed}.{base64url(change(base64.urlsafe_b64decode(last + '==')))}"


def twice(claims: dict[str, Any], member: str, value: Any) -> bytes:
    text = json.dumps(claims)
    return f'{{"{member}": {json.dumps(value)}, {text[1:]}'.encode()


def parts(access: str, *, header: str | None = None, payload: str | None = None, signature: str | None = None) -> str:
    first, second, third = access.split(".")
    return f"{first if header is None else header}.{payload or second}.{third if signature is None else signature}"


def non_canonical(access: str) -> str:
    """The same signature with other trailing bits in its last character: another spelling of the same bytes."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return access[:-1] + alphabet[alphabet.index(access[-1]) ^ 1]


def json_serialization(access: str) -> str:
    protected, payload, signature = access.split(".")
    return json.dumps({"payload": payload, "signatures": [{"protected": protected, "signature": signature}]})


def changed(access: str, **changes: Any) -> str:
    """Other claims under the old signature."""
    return parts(access, payload=base64url(as_minted(SIGNER.claims(**changes))))
