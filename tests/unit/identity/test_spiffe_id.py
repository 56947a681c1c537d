"""SPIFFE IDs by SPIFFE-ID.md: what is one, what only looks like one, and that there is one spelling of each."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, Reason
from broker.identity.spiffe_id import MAX_ID, MAX_TRUST_DOMAIN, SpiffeId, TrustDomain

DOMAIN_CHARACTERS = string.ascii_lowercase + string.digits + "._-"
PATH_CHARACTERS = string.ascii_letters + string.digits + "._-"

domains = st.text(DOMAIN_CHARACTERS, min_size=1, max_size=MAX_TRUST_DOMAIN)
segments = st.text(PATH_CHARACTERS, min_size=1, max_size=64).filter(lambda text: text not in {".", ".."})
paths = st.lists(segments, max_size=12).map(lambda parts: "".join(f"/{part}" for part in parts))


def refused(text: str) -> None:
    with pytest.raises(Invalid) as error:
        SpiffeId.parse(text)
    assert error.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(
    ("text", "domain", "path"),
    [
        ("spiffe://acme.test", "acme.test", ""),
        ("spiffe://acme.test/build/agent", "acme.test", "/build/agent"),
        ("spiffe://acme.test/ns/prod/sa/Default_2", "acme.test", "/ns/prod/sa/Default_2"),
        ("spiffe://192.0.2.7/x", "192.0.2.7", "/x"),  # section 2.1: treated no differently than a DNS name
        ("spiffe://under_score-1.test/x", "under_score-1.test", "/x"),
        ("spiffe://-.-/x", "-.-", "/x"),  # no DNS name, and section 2.1 does not ask for one
        ("spiffe://acme.test/...", "acme.test", "/..."),  # three dots are no relative segment
        ("spiffe://acme.test/.hidden/a..b", "acme.test", "/.hidden/a..b"),
    ],
)
def test_what_the_standard_calls_an_id_is_one(text: str, domain: str, path: str) -> None:
    found = SpiffeId.parse(text)
    assert (found.trust_domain.name, found.path, str(found)) == (domain, path, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "acme.test/x",
        "https://acme.test/x",
        "spiffe:/acme.test/x",
        "spiffe:acme.test",
        "spiffe://",
        "spiffe:///x",
        "SPIFFE://acme.test/x",
        "Spiffe://acme.test/x",
        "spiffe://Acme.test/x",
        "spiffe://acme.test:443/x",
        "spiffe://acme.test:/x",
        "spiffe://user@acme.test/x",
        "spiffe://@acme.test/x",
        "spiffe://[2001:db8::1]/x",
        "spiffe://acm%65.test/x",
        "spiffe://acme.test?",
        "spiffe://acme.test/x?",
        "spiffe://acme.test/x?a=b",
        "spiffe://acme.test/x#",
        "spiffe://acme.test/x#y",
        "spiffe://acme.test#y",
        "spiffe://acme.test/",
        "spiffe://acme.test/x/",
        "spiffe://acme.test//x",
        "spiffe://acme.test/x//y",
        "spiffe://acme.test/.",
        "spiffe://acme.test/..",
        "spiffe://acme.test/x/../y",
        "spiffe://acme.test/x/.",
        "spiffe://acme.test/%2e%2e/y",
        "spiffe://acme.test/a%20b",
        "spiffe://acme.test/a b",
        "spiffe://acme.test/a\\b",
        "spiffe://acme.test/x\n",
        "spiffe://acme.test\n/x",
        "spiffe://acme.test/x\x00",
        " spiffe://acme.test/x",
        "spiffe://acme.test/x ",
        "spiffe://acme.test/x|spiffe://acme.test/y",
        "spiffe://acmé.test/x",
        "spiffe://acme.test/é",
        "spiffe://acme.test/\uff41",  # full-width a, which case folding and isalnum() take for a letter
        "spiffe://acme.test/\u0661",  # a digit to str.isdigit and to \d
        "spiffe://acme.test/\ud800",
        "spiffe://\u212acme.test/x",  # the Kelvin sign, which lower-cases to k
    ],
)
def test_what_only_looks_like_an_id_is_refused(text: str) -> None:
    refused(text)


def test_an_id_of_the_longest_length_is_one_and_a_byte_more_is_refused() -> None:
    longest = "spiffe://acme.test/" + "x" * (MAX_ID - len("spiffe://acme.test/"))
    assert len(str(SpiffeId.parse(longest))) == 2048
    refused(longest + "x")
    with pytest.raises(Invalid):
        SpiffeId(trust_domain=TrustDomain(name="acme.test"), path="/" + "x" * 2048)


def test_a_trust_domain_of_the_longest_length_is_one_and_a_byte_more_is_refused() -> None:
    assert SpiffeId.parse(f"spiffe://{'d' * 255}/x").trust_domain.name == "d" * 255
    refused(f"spiffe://{'d' * 256}/x")


def test_a_refusal_does_not_repeat_what_a_stranger_sent() -> None:
    with pytest.raises(Invalid) as error:
        SpiffeId.parse("spiffe://acme.test/secret?token=abc")
    assert "secret" not in str(error.value)
    assert "abc" not in str(error.value)


def test_paths_differ_by_case() -> None:
    assert SpiffeId.parse("spiffe://acme.test/A") != SpiffeId.parse("spiffe://acme.test/a")


def test_an_id_of_another_trust_domain_is_another_id() -> None:
    assert SpiffeId.parse("spiffe://acme.test/x") != SpiffeId.parse("spiffe://acme.test.evil/x")
    assert len({SpiffeId.parse("spiffe://acme.test/x"), SpiffeId.parse("spiffe://acme.test/x")}) == 1


def test_a_value_cannot_be_made_or_changed_around_the_rules() -> None:
    with pytest.raises(Invalid):
        TrustDomain(name="Acme.test")
    with pytest.raises(Invalid):
        SpiffeId(trust_domain=TrustDomain(name="acme.test"), path="build")
    with pytest.raises(AttributeError):
        SpiffeId.parse("spiffe://acme.test/x").path = "/y"  # type: ignore[misc]


@pytest.mark.parametrize("text", ["acme.test", "spiffe://acme.test"])
def test_a_trust_domain_is_read_from_its_name_or_its_id(text: str) -> None:
    found = TrustDomain.parse(text)
    assert (found.name, str(found)) == ("acme.test", "spiffe://acme.test")


@pytest.mark.parametrize("text", ["", "spiffe://", "spiffe://acme.test/x", "spiffe://spiffe://a", "acme.test/", "a:1"])
def test_an_id_with_a_path_is_no_trust_domain(text: str) -> None:
    with pytest.raises(Invalid):
        TrustDomain.parse(text)


@given(domains, paths)
def test_every_id_reads_back_as_itself(domain: str, path: str) -> None:
    text = f"spiffe://{domain}{path}"
    found = SpiffeId.parse(text)
    assert str(found) == text
    assert SpiffeId.parse(str(found)) == found == SpiffeId(trust_domain=TrustDomain(name=domain), path=path)


@given(st.text(max_size=80).map(lambda text: f"spiffe://{text}") | st.text(max_size=80))
def test_whatever_is_accepted_has_one_spelling(text: str) -> None:
    try:
        found = SpiffeId.parse(text)
    except Invalid:
        return
    assert str(found) == text
    assert set(found.trust_domain.name) <= set(DOMAIN_CHARACTERS)
    assert set(found.path) <= set(PATH_CHARACTERS + "/")


@pytest.mark.parametrize("byte", range(256))
def test_a_byte_outside_the_alphabet_is_refused_wherever_it_stands(byte: int) -> None:
    character = chr(byte)
    for position in range(4):
        domain = "acme"[:position] + character + "acme"[position:]
        if character in DOMAIN_CHARACTERS:
            assert SpiffeId.parse(f"spiffe://{domain}/x").trust_domain.name == domain
        elif character == "/":
            continue  # ends the trust domain: the next test's matter
        else:
            refused(f"spiffe://{domain}/x")
        segment = "path"[:position] + character + "path"[position:]
        if character in PATH_CHARACTERS:
            assert SpiffeId.parse(f"spiffe://acme.test/{segment}").path == f"/{segment}"
        elif character != "/":
            refused(f"spiffe://acme.test/{segment}")


@given(paths, st.sampled_from(["/", "//", "/.", "/..", "/./x", "/../x", "?", "#", "%", "\n", "\0", "|", ":", "@"]))
def test_no_path_becomes_another_by_an_ending(path: str, ending: str) -> None:
    refused(f"spiffe://acme.test{path}{ending}")
