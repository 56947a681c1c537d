"""`action-broker grant …`: the steps of signing one by one, over mutual TLS, each in a process of its own."""

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from support.broker import ISSUER
from support.cli import Ran, cli
from support.signing import CONTENT
from support.signing_cli import AGENT, ALICE, OWN_KEY_AGENT, SigningPlace, signing_place

from broker.ledger.records import Intent


@pytest.fixture(scope="module")
def place() -> Iterator[SigningPlace]:
    with signing_place() as found:
        yield found


def key_file(place: SigningPlace, key: object, name: str = "agent.key") -> Path:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return place.file(key.private_bytes(encoding, form, serialization.NoEncryption()), name)


def own_grant(place: SigningPlace, name: str) -> Path:
    """One for a key of the agent's own."""
    out = place.folder / name
    asked = ("grant", "request", place.file(), *place.asking_remotely(), "--agent-key", "--out", out, "--json")
    ran = place.cli(OWN_KEY_AGENT, *asked)
    assert ran.code == 0, ran.out
    assert ran.value["file"] == str(out)
    return out


def csr(place: SigningPlace, grant: Path, key: Path, name: str = "request.der") -> Path:
    ran = cli("grant", "csr", "--grant", grant, "--key", key, "--out", place.folder / name, "--json")
    assert (ran.code, ran.value) == (0, {"csr": str(place.folder / name)})
    return place.folder / name


def certify(place: SigningPlace, grant: Path, request: Path, out: str = "chain.pem", path: str = OWN_KEY_AGENT) -> Ran:
    given = ("--grant", grant, "--csr", request, "--provenance", place.provenance(), "--out", place.folder / out)
    return place.cli(path, "grant", "certify", *given, *place.mtls, "--json")


def intents(place: SigningPlace, credential: str) -> int:
    return sum(isinstance(one, Intent) and one.credential == credential for one in place.broker.whole.records())


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())],
    ids=["p256", "p384"],
)
def test_an_agents_own_key_is_certified_step_by_step(place: SigningPlace, key: ec.EllipticCurvePrivateKey) -> None:
    grant = own_grant(place, "own.grant")
    assert stat.S_IMODE(grant.stat().st_mode) == 0o600
    request = csr(place, grant, key_file(place, key))
    ran = certify(place, grant, request)
    assert ran.code == 0, ran.out
    leaf, issuing, _ = x509.load_pem_x509_certificates((place.folder / "chain.pem").read_bytes())
    leaf.verify_directly_issued_by(issuing)
    assert leaf.public_key() == key.public_key()
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://acme.test/build/own-key-agent"]
    # The same step again is the same certificate, and not another one.
    issued = intents(place, "signing_certificate")
    again = certify(place, grant, request, "again.pem")
    assert again.code == 0, again.out
    assert (place.folder / "again.pem").read_bytes() == (place.folder / "chain.pem").read_bytes()
    assert intents(place, "signing_certificate") == issued


def test_a_grant_is_spent_on_one_request(place: SigningPlace) -> None:
    grant = own_grant(place, "once.grant")
    first = csr(place, grant, key_file(place, ec.generate_private_key(ec.SECP256R1())), "first.der")
    other = csr(place, grant, key_file(place, ec.generate_private_key(ec.SECP256R1())), "other.der")
    assert certify(place, grant, first).code == 0
    ran = certify(place, grant, other, "other.pem")
    assert (ran.code, ran.value["reason"]) == (3, "already_used")
    assert not (place.folder / "other.pem").exists()


def test_a_request_that_was_made_for_another_grant_is_not_certified(place: SigningPlace) -> None:
    grant, another = own_grant(place, "this.grant"), own_grant(place, "another.grant")
    request = csr(place, another, key_file(place, ec.generate_private_key(ec.SECP256R1())))
    ran = certify(place, grant, request, "wrong.pem")
    assert (ran.code, ran.value["reason"]) == (3, "proof_replayed")
    assert not (place.folder / "wrong.pem").exists()
    right = csr(place, grant, key_file(place, ec.generate_private_key(ec.SECP256R1())), "right.der")
    assert certify(place, grant, right, "right.pem").code == 0
    assert certify(place, another, request).code == 0


def test_another_workload_can_do_nothing_with_a_grant(place: SigningPlace) -> None:
    grant = own_grant(place, "theirs.grant")
    request = csr(place, grant, key_file(place, ec.generate_private_key(ec.SECP256R1())))
    ran = certify(place, grant, request, "theirs.pem", AGENT)
    assert ran.code == 3
    assert not (place.folder / "theirs.pem").exists()


def test_a_grant_is_spent_on_a_signature_that_can_be_fetched_again(place: SigningPlace) -> None:
    file, out, bundle = place.file(), place.folder / "sign.grant", place.folder / "steps.json"
    asked = ("grant", "request", file, *place.asking_remotely(), "--out", out, "--json")
    lacking = place.cli(AGENT, *asked)
    assert (lacking.code, lacking.value["reason"]) == (3, "approval_required")
    assert "remote.sign" in lacking.value["text"]
    place.approve(lacking.value["request_digest"], ALICE)
    granted = place.cli(AGENT, *asked, "--request-id", lacking.value["request_id"])
    assert granted.code == 0, granted.out
    spending = ("grant", "sign", "--grant", out, "--provenance", place.provenance(), *place.mtls, "--json", "--bundle")
    before = intents(place, "signature")
    ran = place.cli(AGENT, *spending, bundle)
    assert ran.code == 0, ran.out
    again = place.cli(AGENT, *spending, place.folder / "again.json")
    # Another process of the workload has another SVID, and the grant is bound to the first one's certificate.
    assert again.code in {0, 3}
    assert intents(place, "signature") == before + 1
    root = place.file(cli("ca", "trusted-root", place.broker.ca_folder).out.encode(), "root.json")
    assert cli("verify", file, "--bundle", bundle, "--trusted-root", root, "--issuer", ISSUER).code == 0
    file.write_bytes(CONTENT + b"!")
    assert cli("verify", file, "--bundle", bundle, "--trusted-root", root, "--issuer", ISSUER).code == 3


def test_over_the_unix_socket_it_says_why_not(place: SigningPlace) -> None:
    ran = cli("grant", "request", place.file(), *place.asking(), "--out", place.folder / "g", *place.socket)
    assert (ran.code, "--address is needed" in ran.err) == (2, True)


def test_what_is_no_grant_or_no_key_is_told_before_anybody_is_asked(place: SigningPlace) -> None:
    grant, key = own_grant(place, "good.grant"), key_file(place, ec.generate_private_key(ec.SECP256R1()))
    kept = json.loads(grant.read_bytes())
    del kept["csr_nonce"]
    broken = [place.file(one, f"broken-{n}") for n, one in enumerate((b"", b"{}", b"[]", json.dumps(kept).encode()))]
    for file in broken:
        ran = cli("grant", "csr", "--grant", file, "--key", key, "--out", place.folder / "x.der")
        assert (ran.code, "is not what `action-broker grant request` writes" in ran.err) == (2, True)
    for other in (place.file(b"no key", "none.key"), key_file(place, ed448(), "ed448.key")):
        ran = cli("grant", "csr", "--grant", grant, "--key", other, "--out", place.folder / "x.der")
        assert (ran.code, str(other) in ran.err) == (2, True)
    ran = cli("grant", "csr", "--grant", grant, "--key", key, "--out", place.folder)
    assert (ran.code, "is a folder" in ran.err) == (2, True)
    both = ("--key", "release", "--agent-key", "--out", place.folder / "g")
    ran = cli("grant", "request", place.file(), *place.asking_remotely(), *both)
    assert (ran.code, "choose one" in ran.err) == (2, True)


def ed448() -> object:
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey  # noqa: PLC0415

    return Ed448PrivateKey.generate()


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (ed25519.Ed25519PrivateKey.generate(), 0),
        (rsa.generate_private_key(65537, 1024), 3),  # noqa: S505 - that is the point
    ],
    ids=["ed25519", "rsa-1024"],
)
def test_which_keys_are_certified_is_the_brokers_to_say(place: SigningPlace, key: object, code: int) -> None:
    grant = own_grant(place, "kinds.grant")
    ran = certify(place, grant, csr(place, grant, key_file(place, key)), "kinds.pem")
    assert ran.code == code, ran.out
