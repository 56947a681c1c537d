"""People's names: one spelling each, and what the exchange sees of them."""

import base64
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, Refused
from broker.identity.identify import Identified
from broker.identity.person import PersonId
from broker.identity.spiffe_id import SpiffeId

ISSUER = "https://login.acme.test"
NAMES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=255)
ISSUERS = st.sampled_from([ISSUER, f"{ISSUER}/", f"{ISSUER}:8443/realms/acme", "https://10.0.0.1/subject/x"])


def encoded(subject: bytes) -> str:
    return base64.urlsafe_b64encode(subject).rstrip(b"=").decode()


@given(issuer=ISSUERS, subject=NAMES)
def test_a_person_has_one_spelling_which_reads_back_as_the_same_person(issuer: str, subject: str) -> None:
    person = PersonId(issuer=issuer, subject=subject)
    assert str(person) == f"{issuer}/subject/{encoded(subject.encode())}"
    assert PersonId.parse(str(person)) == person


@given(one=st.tuples(ISSUERS, NAMES), other=st.tuples(ISSUERS, NAMES))
def test_two_people_never_share_a_spelling(one: tuple[str, str], other: tuple[str, str]) -> None:
    names = [str(PersonId(issuer=issuer, subject=subject)) for issuer, subject in (one, other)]
    assert (names[0] == names[1]) == (one == other)


def test_the_same_subject_of_another_issuer_is_another_person() -> None:
    assert PersonId(issuer=ISSUER, subject="17") != PersonId(issuer=f"{ISSUER}/", subject="17")


@pytest.mark.parametrize(
    "issuer",
    [
        "",
        "login.acme.test",
        "http://login.acme.test",
        "https://",
        "https://Login.acme.test",
        "https://login.acme.test:443",
        "https://user@login.acme.test",
        "https://login.acme.test?tenant=1",
        "https://login.acme.test#top",
        "https://login.acme.test//",
        "https://login.acme.test/a/../b",
        "https://login.acme.test/%2e%2e",
        "https://login.acme.test\n",
        "spiffe://acme.test",
    ],
)
def test_what_cannot_be_an_issuer_names_nobody(issuer: str) -> None:
    with pytest.raises(Invalid):
        PersonId(issuer=issuer, subject="17")


@pytest.mark.parametrize("subject", ["", "a" * 256, "a\nb", "a\x00", "jürgen", "\ud800", "\x7f"])
def test_what_cannot_be_a_subject_names_nobody(subject: str) -> None:
    with pytest.raises(Invalid):
        PersonId(issuer=ISSUER, subject=subject)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ISSUER,
        f"{ISSUER}/subject/",
        f"{ISSUER}/subject/{encoded(b'17')}/",
        f"{ISSUER}/subject/{encoded(b'17')}\n",
        f"{ISSUER}/subject/{encoded(b'17')}=",
        f"{ISSUER}/subject/MTe",  # reads as "17" too, with a stray bit
        f"{ISSUER}/subject/A",
        f"{ISSUER}/subject/{encoded(b'a' * 256)}",
        f"{ISSUER}/subject/{encoded('ü'.encode())}",
        f"http://login.acme.test/subject/{encoded(b'17')}",
        "spiffe://acme.test/build/agent",
    ],
)
def test_another_spelling_of_a_person_is_refused_without_being_repeated(text: str) -> None:
    assert str(PersonId.parse(f"{ISSUER}/subject/{encoded(b'17')}"))
    with pytest.raises(Invalid) as refused:
        PersonId.parse(text)
    assert not text or text not in refused.value.detail


def test_a_person_is_never_taken_for_a_workload() -> None:
    until = datetime(2026, 11, 23, tzinfo=UTC)
    person = PersonId(issuer=ISSUER, subject="17")
    identity = Identified(principal=person, transport="id-token", expires_at=until)
    assert identity.principal == person
    with pytest.raises(Refused):
        _ = identity.spiffe_id
    workload = SpiffeId.parse("spiffe://acme.test/build/agent")
    assert Identified(principal=workload, transport="mtls", expires_at=until).spiffe_id == workload
