"""Trust bundles: kept apart by trust domain, read from the Workload API's forms, forward compatible, never repaired."""

import dataclasses
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import CA, CURVES, JwtAuthority, der, jwks, seeded_ec_key, snapshot

from broker.errors import Invalid, Reason, Refused
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import (
    TrustBundle,
    TrustSnapshot,
    parse_jwt_authorities,
    parse_x509_authorities,
    split_der,
)

ACME = TrustDomain(name="acme.test")
GOOD = JwtAuthority(kid="good", key=seeded_ec_key("good"))
OTHER = JwtAuthority(kid="other", key=seeded_ec_key("other"))


def test_a_domain_without_a_bundle_is_refused() -> None:
    root = CA()
    found = snapshot(root.bundle())
    assert found.bundle_for(ACME).x509_authorities == (root.certificate,)
    for foreign in ("other.test", "acme.test.other", "test"):
        with pytest.raises(Refused) as error:
            found.bundle_for(TrustDomain(name=foreign))
        assert error.value.reason is Reason.UNAUTHENTICATED


def test_a_bundle_cannot_stand_under_another_domains_name() -> None:
    with pytest.raises(ValueError, match=r"other\.test stands under spiffe://acme\.test"):
        TrustSnapshot(own=None, bundles={ACME: CA("other.test").bundle()}, revision=1)


def test_what_is_trusted_cannot_be_changed_afterwards() -> None:
    bundles = {ACME: CA().bundle()}
    found = TrustSnapshot(own=None, bundles=bundles, revision=1)
    bundles.clear()
    assert ACME in found.bundles
    with pytest.raises(TypeError):
        found.bundles[ACME] = CA().bundle()  # type: ignore[index]
    with pytest.raises(TypeError):
        found.bundle_for(ACME).jwt_authorities["k"] = ()  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.revision = 2  # type: ignore[misc]


def test_bundles_are_the_same_exactly_when_they_trust_the_same() -> None:
    root, second = CA(), CA()
    same = TrustBundle(trust_domain=ACME, x509_authorities=(root.certificate,))
    assert same == root.bundle()
    assert same.fingerprint == root.bundle().fingerprint
    others = [
        second.bundle(),
        root.bundle(GOOD),
        root.bundle(OTHER),
        TrustBundle(trust_domain=ACME),
        TrustBundle(trust_domain=ACME, x509_authorities=(root.certificate, second.certificate)),
        TrustBundle(trust_domain=TrustDomain(name="other.test"), x509_authorities=(root.certificate,)),
        root.bundle(dataclasses.replace(GOOD, kid="renamed")),
    ]
    assert len({item.fingerprint for item in (same, *others)}) == 1 + len(others)


def test_our_own_key_shows_in_no_repr() -> None:
    svid = CA().svid().own()
    assert svid.bundle_trust_domain == ACME
    assert "private" not in repr(svid)
    assert repr(svid.private_key_pkcs8)[2:40] not in repr(svid)
    assert "PRIVATE" not in repr(TrustSnapshot(own=svid, bundles={}, revision=1)).upper()


def test_concatenated_der_is_split_where_its_lengths_say() -> None:
    first, second = der(CA().certificate), der(CA("other.test").certificate)
    assert split_der(first + second) == (first, second)
    assert split_der(b"\x30\x00\x30\x01\x05") == (b"\x30\x00", b"\x30\x01\x05")
    assert split_der(b"") == ()


@pytest.mark.parametrize(
    "data",
    [
        b"\x30",
        b"\x30\x05\x01",
        b"\x30\x82\x01",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\xff",
        b"\x30\x80",
        b"\x30\x80\x00\x00",
        b"\x31\x00",
        b"\x30\x00\x00",
        b"-----BEGIN CERTIFICATE-----",
    ],
)
def test_der_that_does_not_add_up_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid):
        split_der(data)


def test_an_x509_bundle_may_hold_no_or_many_authorities_but_nothing_else() -> None:
    roots = [CA().certificate, CA().certificate]
    assert parse_x509_authorities(b"".join(map(der, roots))) == tuple(roots)
    assert parse_x509_authorities(b"") == ()
    for data in (der(roots[0]) + b"\x30\x00", der(roots[0])[:-1], roots[0].public_bytes(Encoding.PEM)):
        with pytest.raises(Invalid):
            parse_x509_authorities(data)


@pytest.mark.parametrize("alg", ["ES256", "ES384", "ES512", "RS256"])
def test_each_key_type_that_signs_jwt_svids_is_read(alg: str) -> None:
    made = JwtAuthority(alg=alg, kid="k")
    assert parse_jwt_authorities(jwks(made.jwk())) == {"k": (made.key.public_key(),)}


def test_a_key_without_use_counts_because_spire_leaves_it_out() -> None:
    assert set(parse_jwt_authorities(jwks(GOOD.jwk(use=None)))) == {"good"}


def test_a_bundle_without_keys_trusts_nobody() -> None:
    assert parse_jwt_authorities(b'{"keys":[]}') == {}
    assert parse_jwt_authorities(b'{"keys":[],"spiffe_sequence":7,"unknown":{}}') == {}


@pytest.mark.parametrize(
    "jwk",
    [
        OTHER.jwk(use="x509-svid"),
        OTHER.jwk(use="wit-svid"),
        OTHER.jwk(use="JWT-SVID"),
        OTHER.jwk(use="sig"),
        OTHER.jwk(use=None) | {"use": None},
        OTHER.jwk(kty="OKP"),
        OTHER.jwk(kty="oct", k="AAAA"),
        OTHER.jwk(kty="new-and-unknown"),
        OTHER.jwk(kty=None),
        OTHER.jwk(kty=["EC"]),
        OTHER.jwk(kid=None),
        OTHER.jwk(kid=7),
        OTHER.jwk(kid=""),
        OTHER.jwk(crv="P-257"),
        OTHER.jwk(crv="P-384"),
        OTHER.jwk(crv="secp256k1"),
        OTHER.jwk(x=None),
        OTHER.jwk(x=1),
        OTHER.jwk(x="AA"),
        OTHER.jwk(x="!"),
        OTHER.jwk(y=GOOD.jwk()["y"]),  # a point on no curve
        {"kid": "other", "use": "jwt-svid", "kty": "RSA", "n": "AQAB"},
        {"kid": "other", "use": "jwt-svid", "kty": "RSA", "n": "", "e": ""},
        {"kid": "other", "use": "jwt-svid", "kty": "RSA", "n": "AQAB", "e": "AA"},
        {},
        [],
        "key",
        None,
    ],
    ids=repr,
)
def test_a_key_we_cannot_use_is_ignored_and_those_beside_it_count(jwk: object) -> None:
    found = parse_jwt_authorities(json.dumps({"keys": [jwk, GOOD.jwk()]}).encode())
    assert found == {"good": (GOOD.key.public_key(),)}


def test_a_private_key_in_a_bundle_is_read_as_its_public_half() -> None:
    private = GOOD.jwk(d="AAAA")
    (key,) = parse_jwt_authorities(jwks(private))["good"]
    assert isinstance(key, ec.EllipticCurvePublicKey)


def test_keys_that_share_a_kid_all_count() -> None:
    second = JwtAuthority(alg="RS256", kid="good")
    keys = parse_jwt_authorities(jwks(GOOD.jwk(), second.jwk()))["good"]
    assert [type(key).__name__ for key in keys] == ["ECPublicKey", "RSAPublicKey"]
    assert isinstance(keys[1], rsa.RSAPublicKey)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"keys":{}}',
        b'{"keys":null}',
        b'{"keys":[],"keys":[]}',
        b'{"keys":[{"kid":"a","kid":"b"}]}',
        b'{"keys":[NaN]}',
        b'{"keys":[]}x',
        b"\xef\xbb\xbf{}",
        '{"keys":[]}'.encode("utf-16"),
        b'{"keys":["\xff"]}',
        b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_jwk_set_is_refused_whole(data: bytes) -> None:
    with pytest.raises(Invalid):
        parse_jwt_authorities(data)


def test_curves_are_told_apart() -> None:
    for alg, curve in CURVES.items():
        (key,) = parse_jwt_authorities(jwks(JwtAuthority(alg=alg, kid="k").jwk()))["k"]
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == curve.name
