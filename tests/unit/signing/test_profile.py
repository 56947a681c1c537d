"""A signing certificate says what its content says, all of it, and nothing else; else it is not signed."""

import copy
import dataclasses
import hashlib
import pickle
import re
import subprocess
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from support.certificates import AGENT, ISSUER, NOW, PROVENANCE, SHA256, content, make_authority

from broker.errors import Invalid, Reason, Refused
from broker.signing import der, extensions
from broker.signing.content import MAX_LIFETIME, MAX_TEXT, validity
from broker.signing.profile import Issuing, NotInProfile, ToBeSigned, to_be_signed

HOSTILE = {
    "nul": "https://git.acme.test/shop\0https://git.other.test",
    "line-end": "main\nissuer: https://other.test",
    "direction-mark": "https://git.acme.test/\u202epohs",
    "lone-surrogate": "\ud800",
    "escape": "\x1b[2J",
    "2^16": "a" * 2**16,
    "one-byte-too-long": "é" * (MAX_TEXT // 2) + "x",
    "no-text": ["refs/heads/main"],
    "null": None,
}


@pytest.fixture(scope="module")
def issuing(tmp_path_factory: pytest.TempPathFactory) -> Issuing:
    return make_authority(tmp_path_factory.mktemp("profile") / "ca").issuing


def whole(tbs: ToBeSigned, issuing: Issuing) -> x509.Certificate:
    """A certificate around the bytes, so that a parser takes them; its signature is nothing."""
    algorithm = der.sequence(der.object_identifier("1.2.840.10045.4.3.2"))
    return x509.load_der_x509_certificate(der.sequence(tbs.content, algorithm, der.bit_string(b"\0")))


def asn1parse(encoded: bytes) -> list[tuple[str, str]]:
    """Type and value of each primitive, as OpenSSL reads them."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(encoded)
        file.flush()
        command = ["openssl", "asn1parse", "-inform", "DER", "-in", file.name]
        told = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    rows = (
        re.fullmatch(r" *\d+:d=\d+ +hl=\d+ +l= *\d+ prim: +([A-Z0-9 ]*[A-Z0-9]) *(?::|(?=\[))(.*)", row)
        for row in told.split("\n")
    )
    return [(row[1], row[2]) for row in rows if row]


def by_openssl(certificate: x509.Certificate) -> dict[str, list[tuple[str, str]]]:
    """OID → what OpenSSL finds inside the extension."""
    rows = asn1parse(certificate.public_bytes(Encoding.DER))
    found, last = {}, ""
    for kind, value in rows:
        if kind == "OBJECT":
            last = value
        elif kind == "OCTET STRING" and value.startswith("[HEX DUMP]:"):
            found[last] = asn1parse(bytes.fromhex(value.removeprefix("[HEX DUMP]:")))
    return found


def printable(most: int = 200) -> st.SearchStrategy[str]:
    return st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=most)


FACTS = st.fixed_dictionaries(
    {name: st.one_of(st.just(""), printable()) for name in ("builder", "source", "source_ref", "invocation", "runner")}
)
DIGESTS = st.lists(st.binary(min_size=32, max_size=32).map(bytes.hex), min_size=1, max_size=5, unique=True)


@settings(max_examples=25, deadline=None)
@given(facts=FACTS, digests=DIGESTS, revision=printable(), node=st.one_of(st.just(""), printable()))
def test_whatever_is_known_is_read_back_by_cryptography_and_by_openssl(
    issuing: Issuing, facts: dict[str, str], digests: list[str], revision: str, node: str
) -> None:
    artifacts = tuple({"sha256": digest, "sha512": digest * 2} for digest in digests)
    wanted = content(provenance=facts, artifacts=artifacts, policy_revision=revision, node=node)
    certificate = whole(to_be_signed(wanted, issuing), issuing)
    texts = {
        8: ISSUER,
        9: facts["builder"],
        11: facts["runner"],
        12: facts["source"],
        14: facts["source_ref"],
        21: facts["invocation"],
        24: str(AGENT),
    }
    known = {f"1.3.6.1.4.1.57264.1.{arc}": text for arc, text in texts.items() if text}
    ours = {
        1: {wanted.grant_id},
        2: {"sha256:" + bytes(range(32)).hex()},
        3: {f"{name}:{digest}" for artifact in artifacts for name, digest in artifact.items()},
        4: {revision},
        5: {node} - {""},
        6: {wanted.pod_uid},
    }
    seen = {one.oid.dotted_string: one for one in certificate.extensions}
    assert [oid for oid in seen if oid.startswith("1.3.6.1.4.1.57264")] == list(known)
    openssl = by_openssl(certificate)
    for oid, text in known.items():
        assert not seen[oid].critical
        assert der.read_utf8(seen[oid].value.public_bytes()) == text
        assert openssl[oid] == [("UTF8STRING", text)]
    arc = "2.25.44012727524414043203381243493637502922"
    attributes = openssl["X509v3 Subject Directory Attributes"]
    read: dict[str, set[str]] = {}
    for kind, value in attributes:
        if kind == "OBJECT":
            read[value] = last = set()
        else:
            last.add(value)
    assert read == {f"{arc}.{number}": values for number, values in ours.items() if values}
    certified = extensions.read(certificate)
    assert (certified.uri, certified.issuer, certified.node) == (str(AGENT), ISSUER, node)
    assert set(certified.artifacts) == ours[3]
    assert certified.build["token_subject"] == str(AGENT)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text(min_size=1).map(lambda text: text * 700)))
def test_any_text_of_a_stranger_is_refused_or_stands_there_as_it_is(issuing: Issuing, text: str) -> None:
    facts = PROVENANCE | {"source": text}
    if not text.isprintable() or len(text.encode()) > MAX_TEXT:
        with pytest.raises(Refused) as error:
            content(provenance=facts)
        assert error.value.reason == Reason.PROVENANCE_REJECTED
        return
    tbs = to_be_signed(content(provenance=facts), issuing)
    assert extensions.read(whole(tbs, issuing)).build.get("source_repository_uri", "") == text


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("fact", ["builder", "source", "source_digest", "source_ref", "invocation", "config_uri"])
def test_a_hostile_fact_is_refused_and_the_longest_sound_one_is_certified(
    issuing: Issuing, fact: str, name: str
) -> None:
    longest = "é" * (MAX_TEXT // 2)
    sound = extensions.read(whole(to_be_signed(content(provenance=PROVENANCE | {fact: longest}), issuing), issuing))
    assert longest in sound.build.values()
    with pytest.raises(Refused) as error:
        content(provenance=PROVENANCE | {fact: HOSTILE[name]})
    assert error.value.reason == Reason.PROVENANCE_REJECTED
    assert len(str(error.value)) < 300


def test_what_is_not_known_is_left_out_and_never_an_empty_string(issuing: Issuing) -> None:
    bare = content(provenance=None, node="", pod_uid="")
    certificate = whole(to_be_signed(bare, issuing), issuing)
    certified = extensions.read(certificate)
    assert dict(certified.build) == {"token_subject": str(AGENT)}
    assert (certified.node, certified.pod_uid) == ("", "")
    assert len(list(certificate.extensions)) == 8
    assert b"\x0c\x00" not in certificate.tbs_certificate_bytes


def test_the_certificate_is_fulcios_empty_subject_one_critical_uri_and_code_signing(issuing: Issuing) -> None:
    wanted = content()
    certificate = whole(to_be_signed(wanted, issuing), issuing)
    assert certificate.subject.rdns == []
    assert certificate.issuer == issuing.certificate.subject
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert list(names.value) == [x509.UniformResourceIdentifier(str(AGENT))]
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.CODE_SIGNING]
    above = issuing.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == above
    own = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert own == x509.SubjectKeyIdentifier.from_public_key(wanted.public_key)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == timedelta(seconds=130)
    assert certificate.serial_number.bit_length() > 96


def test_no_extension_has_an_oid_that_go_cannot_parse(issuing: Issuing) -> None:
    """crypto/x509 takes arcs below 2^31 alone, and a certificate with a longer one not at all: cosign is in Go."""
    certificate = whole(to_be_signed(content(), issuing), issuing)
    arcs = [int(arc) for one in certificate.extensions for arc in one.oid.dotted_string.split(".")]
    assert max(arcs) < 2**31


KEYS: dict[str, Callable[[], Any]] = {
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("kind", KEYS)
def test_an_agents_key_of_each_kind_is_certified(issuing: Issuing, kind: str) -> None:
    key = KEYS[kind]().public_key()
    tbs = to_be_signed(content(public_key=key), issuing)
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert tbs.spki_sha256 == hashlib.sha256(spki).digest()
    assert whole(tbs, issuing).public_key() == key


def test_a_content_that_no_certificate_may_have_is_refused(issuing: Issuing) -> None:
    assert content()
    begin = NOW
    for times in ((begin, begin + MAX_LIFETIME + timedelta(seconds=1)), (begin.replace(tzinfo=None), begin)):
        with pytest.raises(ValueError, match=r"lives|aware"):
            content(not_before=times[0], not_after=times[1])
    for end in (begin, begin - timedelta(seconds=1), begin + timedelta(microseconds=900_000)):
        with pytest.raises(Refused) as refused:
            content(not_before=begin, not_after=end)
        assert refused.value.reason == Reason.EXPIRED
    with pytest.raises(Invalid):
        content(public_key=ec.generate_private_key(ec.SECP521R1()).public_key())
    for wrong in ({"action_digest": b""}, {"artifacts": ()}, {"grant_id": ""}, {"node": "a\0b"}, {"issuer": "a\n"}):
        with pytest.raises(ValueError):
            content(**wrong)
    with pytest.raises(NotInProfile, match="CA's own"):
        to_be_signed(content(public_key=issuing.certificate.public_key()), issuing)


def test_a_certificate_lives_neither_longer_than_five_minutes_nor_than_what_it_hangs_on() -> None:
    for lifetime in (timedelta(seconds=10), timedelta(seconds=120), timedelta(minutes=5)):
        begin, end = validity(NOW, until=NOW + timedelta(days=1), lifetime=lifetime)
        assert NOW < end <= NOW + lifetime
        assert end - begin <= MAX_LIFETIME
    assert validity(NOW, until=NOW + timedelta(seconds=7))[1] == NOW + timedelta(seconds=7)
    late = NOW + timedelta(milliseconds=300)
    assert validity(late, until=NOW + timedelta(seconds=1))[1] == NOW + timedelta(seconds=1)
    for until in (NOW, late, NOW + timedelta(milliseconds=900)):
        with pytest.raises(Refused) as refused:
            validity(late, until=until)
        assert refused.value.reason is Reason.EXPIRED, "whole seconds count, and none is left"


def test_a_certificate_never_lives_outside_its_cas_life(issuing: Issuing) -> None:
    last = issuing.certificate.not_valid_after_utc
    assert to_be_signed(content(not_before=last - timedelta(seconds=60), not_after=last), issuing)
    with pytest.raises(NotInProfile, match="ca rotate"):
        to_be_signed(content(not_before=last - timedelta(seconds=60), not_after=last + timedelta(seconds=1)), issuing)
    first = issuing.certificate.not_valid_before_utc
    with pytest.raises(NotInProfile, match="ca rotate"):
        to_be_signed(content(not_before=first - timedelta(seconds=1), not_after=first + timedelta(seconds=9)), issuing)


def test_nothing_else_makes_what_the_ca_signs(issuing: Issuing) -> None:
    tbs = to_be_signed(content(), issuing)
    fields = {name: getattr(tbs, name) for name in ("content", "issuing_sha256", "spki_sha256", "serial", "not_after")}
    with pytest.raises(TypeError, match="only to_be_signed"):
        ToBeSigned(**fields, seal=object())
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(tbs, content=b"\x30\x00")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            copied(tbs)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tbs.content = b"\x30\x00"  # type: ignore[misc]
    assert tbs.spend() == tbs.content
    assert SHA256 not in repr(tbs)


def test_an_attribute_that_is_not_encoded_as_we_do_it_is_not_read() -> None:
    values = {"grant_id": ("g",), "artifact": ("sha256:aa", "sha256:bb")}
    sound = extensions.attributes_extension(values).value
    assert extensions.read_attributes(sound) == values
    grant = der.object_identifier(f"{extensions.OUR_ARC}.1")
    wrong = {
        "trailing": sound + b"\0",
        "empty-set": der.sequence(der.sequence(grant, der.set_of([]))),
        "twice": der.sequence(*[der.sequence(grant, der.set_of([der.utf8("g")]))] * 2),
        "unordered": der.sequence(der.sequence(grant, der.tlv(der.SET, der.utf8("b") + der.utf8("a")))),
        "same-twice": der.sequence(der.sequence(grant, der.tlv(der.SET, der.utf8("a") * 2))),
        "another-string": der.sequence(der.sequence(grant, der.set_of([der.tlv(0x13, b"g")]))),
        "no-utf-8": der.sequence(der.sequence(grant, der.set_of([der.tlv(der.UTF8_STRING, b"\xff")]))),
        "ber-length": sound[:1] + b"\x81" + sound[1:],
        "cut": sound[:-1],
    }
    for encoded in wrong.values():
        with pytest.raises(ValueError):
            extensions.read_attributes(encoded)
    foreign = der.sequence(der.sequence(der.object_identifier("2.5.4.3"), der.set_of([b"\x05\x00"])))
    assert extensions.read_attributes(foreign) == {}
