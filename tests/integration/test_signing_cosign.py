"""What a whole broker signs, held to stock cosign and to our verifier after the certificate has ended.

Issue "Signing grants", "shown by": it is accepted with the trusted root that we export, and so is no tampered sibling.
The same on the level of the library, with defects of single fields: test_cosign.py.
"""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from support.processes import PATIENCE_S
from support.signing import AGENT, CONTENT, SigningBroker, digests, signing_broker, statement
from support.signing_calls import NIGHTLY, UNLIMITED
from support.signing_parts import merged, timestamps
from support.sigstore_tools import TimestampServer, timestamp_authority
from support.spire import wait_for
from support.timestamps import Tsa
from support.verifiers import BLOB, STATEMENT, Json, Verdict, Verifiers, changed, kind_of

from broker.signing.timestamp import TimestampAuthority

pytestmark = pytest.mark.cosign

OTHER = b"release 1.1, with a backdoor\n"
TTL_S = 10
KEYS: dict[str, Callable[[], Any]] = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}
KEYS |= {f"{name}-statements": KEYS[name] for name in ("p256", "p384", "rsa")}
STATEMENT_KEYS = ("ed25519", "p256-statements", "p384-statements", "rsa-statements")


def said(content: bytes = CONTENT) -> bytes:
    """A statement about this content."""
    return json.dumps(statement(content)).encode()


@dataclass
class Made:
    """Bundles that brokers gave, by name, and the verifiers that trust the first one. keys: private, by name."""

    verifiers: Verifiers
    keys: dict[str, Any]
    bundles: dict[str, Json] = field(default_factory=dict)

    def certified(self, case: "Case") -> Verdict:
        """Of a bundle with a certificate."""
        return self.verifiers.certified(case.bundle, case.content, root=case.root, **case.expected)


@dataclass(frozen=True)
class Case:
    """A bundle, and what it is held against."""

    bundle: Json
    content: bytes = CONTENT
    root: str = "root.json"
    expected: dict[str, str] = field(default_factory=dict)


async def _sign(broker: SigningBroker, content: bytes, signer: str, said: bytes) -> Json:
    async with broker.client() as agent:
        asked = broker.nightly(content, signer=signer)
        grant = await agent.signing.grant(asked, (broker.builder.envelope(content),))
        return json.loads((await agent.signing.sign(grant, statement=said)).bundle)


async def _make(made: Made, ours: SigningBroker, other: SigningBroker, tsa: TimestampServer) -> None:
    wanted: dict[str, tuple[SigningBroker, bytes, str, bytes]] = {
        f"by {name}": (ours, CONTENT, f"key:{name}", said() if name in STATEMENT_KEYS else b"") for name in KEYS
    }
    for kind, about in ((BLOB, {}), (STATEMENT, {CONTENT: said(), OTHER: said(OTHER)})):
        wanted |= {
            kind: (ours, CONTENT, "keyless", about.get(CONTENT, b"")),
            f"another {kind}": (ours, CONTENT, "keyless", about.get(CONTENT, b"")),
            f"{kind} of another artifact": (ours, OTHER, "keyless", about.get(OTHER, b"")),
            f"{kind} of another broker": (other, CONTENT, "keyless", about.get(CONTENT, b"")),
        }
    for name, how in wanted.items():
        made.bundles[name] = await _sign(*how)
    stranger = Tsa.made(datetime.now(UTC))
    for kind in (BLOB, STATEMENT):
        made.bundles[f"{kind}, stamped by a stranger"] = _stamped(
            made.bundles[kind], stranger.stamp(_signature(made.bundles[kind]), datetime.now(UTC).replace(microsecond=0))
        )
    ends = max(_leaf(one).not_valid_after_utc for one in made.bundles.values() if _leaf(one) is not None)
    wait_for(lambda: datetime.now(UTC) > ends + timedelta(seconds=1), PATIENCE_S)
    async with TimestampAuthority(tsa.url, [tsa.root]) as authority:
        for kind in (BLOB, STATEMENT):
            late = await authority.stamp(_signature(made.bundles[kind]))
            made.bundles[f"{kind}, stamped too late"] = _stamped(made.bundles[kind], late)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """When this is made, all certificates in it have ended, and no broker or authority runs any more."""
    folder = tmp_path_factory.mktemp("signed")
    found = Made(Verifiers(folder), {name: make() for name, make in KEYS.items()})
    tables: dict[str, dict[str, Any]] = {"limits": UNLIMITED, "signing": {"certificate_ttl_s": TTL_S}}
    for name, key in found.keys.items():
        file = folder / f"{name}.pem"
        file.touch(mode=0o600)
        file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        tables[f"signing.keys.{name}"] = {"file": str(file)}
        if name in STATEMENT_KEYS:
            tables[f"signing.keys.{name}"]["signs"] = "statements"
    with timestamp_authority() as tsa, ExitStack() as stack:
        tables = merged(tables, timestamps(folder, tsa.url, tsa.pem))
        ours, other = (stack.enter_context(signing_broker(NIGHTLY, **tables)) for _ in range(2))
        found.verifiers.export(ours.ca_folder, tsa.pem)
        found.verifiers.export(other.ca_folder, tsa.pem, "other.json")
        found.verifiers.export(ours.ca_folder, Tsa.made(datetime.now(UTC)).pem, "other-tsa.json")
        asyncio.run(_make(found, ours, other, tsa))
    root = json.loads((folder / "root.json").read_text())
    found.verifiers.write("no-tsa.json", root | {"timestampAuthorities": []})
    return found


def _material(bundle: Json) -> Json:
    return bundle["verificationMaterial"]


def _leaf(bundle: Json) -> x509.Certificate | None:
    certificate = _material(bundle).get("certificate")
    return certificate and x509.load_der_x509_certificate(base64.b64decode(certificate["rawBytes"]))


def _place(bundle: Json) -> tuple[Json, str]:
    """Where the signature stands."""
    if kind_of(bundle) == BLOB:
        return bundle["messageSignature"], "signature"
    return bundle["dsseEnvelope"]["signatures"][0], "sig"


def _signature(bundle: Json) -> bytes:
    holder, name = _place(bundle)
    return base64.b64decode(holder[name])


def _stamps(bundle: Json) -> list[Json]:
    return _material(bundle)["timestampVerificationData"]["rfc3161Timestamps"]


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _stamped(bundle: Json, stamp: bytes) -> Json:
    """The bundle with another timestamp."""
    return changed(bundle, lambda one: _stamps(one)[0].update(signedTimestamp=_b64(stamp)))


def _flipped(text: str, at: int = -5) -> str:
    data = bytearray(base64.b64decode(text))
    data[at] ^= 1
    return _b64(bytes(data))


def _edited(bundle: Json, edit: Callable[[Json], None]) -> Json:
    """The bundle with another statement in it."""
    document = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    edit(document)
    payload = _b64(json.dumps(document).encode())
    return changed(bundle, lambda one: one["dsseEnvelope"].update(payload=payload))


def _signature_of(bundle: Json, other: Json) -> Json:
    def change(one: Json) -> None:
        holder, name = _place(one)
        holder[name] = _b64(_signature(other))

    return changed(bundle, change)


def _certificate_of(bundle: Json, other: Json) -> Json:
    return changed(bundle, lambda one: _material(one).update(certificate=_material(other)["certificate"]))


def _bit_of_signature(bundle: Json) -> Json:
    def change(one: Json) -> None:
        holder, name = _place(one)
        holder[name] = _flipped(holder[name])

    return changed(bundle, change)


def _renamed(bundle: Json) -> Json:
    """One character of the SPIFFE ID in the certificate."""
    inner = base64.b64decode(_material(bundle)["certificate"]["rawBytes"]).replace(b"/build/agent", b"/build/agenx", 1)
    return changed(bundle, lambda one: _material(one)["certificate"].update(rawBytes=_b64(inner)))


def _without_stamp(bundle: Json) -> Json:
    return changed(bundle, lambda one: _material(one).pop("timestampVerificationData"))


def _named(bundle: Json, content: bytes) -> Json:
    """Says that it is about this content."""
    digest = _b64(bytes.fromhex(digests(content)["sha256"]))
    return changed(bundle, lambda one: one["messageSignature"]["messageDigest"].update(digest=digest))


def _about_other(document: Json) -> None:
    document["subject"][0]["digest"] = digests(OTHER)


def _about_both(document: Json) -> None:
    document["subject"].append({"name": "other", "digest": digests(OTHER)})


Sibling = Callable[[dict[str, Json], str], Case]
EITHER: dict[str, Sibling] = {
    "another blob": lambda all_, kind: Case(all_[kind], OTHER),
    "the bundle of another artifact": lambda all_, kind: Case(all_[f"{kind} of another artifact"]),
    "a bit of the signature": lambda all_, kind: Case(_bit_of_signature(all_[kind])),
    "the signature of another grant": lambda all_, kind: Case(_signature_of(all_[kind], all_[f"another {kind}"])),
    "the certificate of another grant": lambda all_, kind: Case(_certificate_of(all_[kind], all_[f"another {kind}"])),
    "the certificate of another CA": lambda all_, kind: Case(
        _certificate_of(all_[kind], all_[f"{kind} of another broker"])
    ),
    "a name changed in the certificate": lambda all_, kind: Case(_renamed(all_[kind])),
    "the bundle of another broker": lambda all_, kind: Case(all_[f"{kind} of another broker"]),
    "the trusted root of another broker": lambda all_, kind: Case(all_[kind], root="other.json"),
    "a trusted root with another timestamp authority": lambda all_, kind: Case(all_[kind], root="other-tsa.json"),
    "a trusted root without a timestamp authority": lambda all_, kind: Case(all_[kind], root="no-tsa.json"),
    "no timestamp": lambda all_, kind: Case(_without_stamp(all_[kind])),
    "a bit of the timestamp": lambda all_, kind: Case(
        _stamped(all_[kind], base64.b64decode(_flipped(_stamps(all_[kind])[0]["signedTimestamp"])))
    ),
    "the timestamp of another signature": lambda all_, kind: Case(
        _stamped(all_[kind], base64.b64decode(_stamps(all_[f"another {kind}"])[0]["signedTimestamp"]))
    ),
    "a timestamp by another authority": lambda all_, kind: Case(all_[f"{kind}, stamped by a stranger"]),
    "a timestamp from after the end": lambda all_, kind: Case(all_[f"{kind}, stamped too late"]),
    "another identity": lambda all_, kind: Case(all_[kind], expected={"identity": f"{AGENT}/other"}),
    "another issuer": lambda all_, kind: Case(all_[kind], expected={"issuer": "https://other.acme.test"}),
}
OF_A_BLOB: dict[str, Sibling] = {
    "the digest of another artifact": lambda all_, kind: Case(_named(all_[kind], OTHER), OTHER),
    "the signature of another artifact": lambda all_, kind: Case(
        _signature_of(all_[kind], all_[f"{kind} of another artifact"])
    ),
}
OF_A_STATEMENT: dict[str, Sibling] = {
    "another payload": lambda all_, kind: Case(_edited(all_[kind], lambda one: one["predicate"].update(x=1))),
    "another type of payload": lambda all_, kind: Case(
        changed(all_[kind], lambda one: one["dsseEnvelope"].update(payloadType="application/json"))
    ),
    "another subject": lambda all_, kind: Case(_edited(all_[kind], _about_other), OTHER),
    "a second subject": lambda all_, kind: Case(_edited(all_[kind], _about_both), OTHER),
    "the payload of another grant": lambda all_, kind: Case(
        changed(
            all_[kind],
            lambda one: one["dsseEnvelope"].update(
                payload=all_[f"{kind} of another artifact"]["dsseEnvelope"]["payload"]
            ),
        ),
        OTHER,
    ),
}
SIBLINGS = [(BLOB, name, sibling) for name, sibling in (EITHER | OF_A_BLOB).items()] + [
    (STATEMENT, name, sibling) for name, sibling in (EITHER | OF_A_STATEMENT).items()
]


@pytest.mark.parametrize(("kind", "name", "sibling"), SIBLINGS, ids=[f"{kind}-{name}" for kind, name, _ in SIBLINGS])
def test_a_tampered_sibling_is_rejected_beside_the_bundle_that_is_accepted(
    made: Made, kind: str, name: str, sibling: Sibling
) -> None:
    assert not made.certified(sibling(made.bundles, kind)).both, name
    good = Case(made.bundles[kind])
    assert _leaf(good.bundle).not_valid_after_utc < datetime.now(UTC)
    assert made.certified(good).both


@pytest.mark.parametrize("kind", [BLOB, STATEMENT])
def test_each_broker_is_believed_by_its_own_root(made: Made, kind: str) -> None:
    assert made.certified(Case(made.bundles[f"{kind} of another broker"], root="other.json")).both
    assert made.certified(Case(made.bundles[f"{kind} of another artifact"], OTHER)).both
    assert made.certified(Case(made.bundles[f"another {kind}"])).both


def test_a_digest_that_is_wrong_beside_a_good_signature_is_rejected(made: Made) -> None:
    verdict = made.certified(Case(_named(made.bundles[BLOB], OTHER)))
    assert verdict.both is False


# With P-384 cosign hashes by SHA-256, and with RSA it wants PKCS #1 v1.5: these are for our own verifier.
BY_KEY = {name: name.partition("-")[0] in {"p256", "ed25519"} for name in KEYS}


@pytest.mark.parametrize(("name", "known_to_cosign"), BY_KEY.items(), ids=BY_KEY)
def test_a_named_keys_bundle_is_accepted_with_the_key_and_rejected_when_anything_is_another(
    made: Made, name: str, *, known_to_cosign: bool
) -> None:
    kind = STATEMENT if name in STATEMENT_KEYS else BLOB
    bundle, key = made.bundles[f"by {name}"], made.keys[name].public_key()
    assert kind_of(bundle) == kind
    assert _leaf(bundle) is None
    good = made.verifiers.keyed(bundle, CONTENT, key, root="root.json")
    assert (good.ours, good.cosign) == (True, known_to_cosign), good.why
    late = made.bundles[f"{kind}, stamped too late"]
    for case, by in (
        (Case(bundle, OTHER), key),
        (Case(bundle), KEYS[name]().public_key()),
        (Case(_bit_of_signature(bundle)), key),
        (Case(_stamped(bundle, base64.b64decode(_stamps(late)[0]["signedTimestamp"]))), key),
        (Case(made.bundles[kind]), key),
    ):
        assert not made.verifiers.keyed(case.bundle, case.content, by, root=case.root).both
