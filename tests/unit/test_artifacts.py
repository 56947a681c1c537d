"""What is asked for when a signature is: read strictly, and the same again however often it is written."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.action import Action
from broker.artifacts import (
    AGENT_KEY,
    HEX_DIGITS,
    KEYLESS,
    MAX_ARTIFACTS,
    SigningRequest,
    parse_signing_request,
    signing_request,
)
from broker.errors import Invalid

ISSUER = "https://broker.acme.test"
SHA256 = "ab" * 32
GOOD = {"artifacts": [{"sha256": SHA256}], "purpose": "release", "signer": KEYLESS}

digest = st.fixed_dictionaries(
    {"sha256": st.binary(min_size=32, max_size=32).map(bytes.hex)},
    optional={
        "sha384": st.binary(min_size=48, max_size=48).map(bytes.hex),
        "sha512": st.binary(min_size=64, max_size=64).map(bytes.hex),
    },
)
asked = st.fixed_dictionaries(
    {
        "artifacts": st.lists(digest, min_size=1, max_size=MAX_ARTIFACTS, unique_by=lambda one: one["sha256"]),
        "purpose": st.from_regex(r"[a-z][a-z0-9-]{0,63}", fullmatch=True),
        "signer": st.one_of(
            st.sampled_from([KEYLESS, AGENT_KEY]), st.from_regex(r"key:[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
        ),
    }
)


def action(signing: object, *, audience: str = ISSUER, **more: object) -> Action:
    return Action("release.sign", "https://releases.acme.test/app", audience, {"signing": signing, **more})


@given(asked)
def test_what_is_well_formed_is_read_and_written_as_it_was(found: dict[str, object]) -> None:
    parsed = parse_signing_request(found)
    assert parsed.to_json() == found
    assert parse_signing_request(json.loads(json.dumps(parsed.to_json()))) == parsed


def test_a_named_key_is_told_by_its_name_alone() -> None:
    assert parse_signing_request(GOOD | {"signer": "key:release.v2"}).key_name == "release.v2"
    assert [parse_signing_request(GOOD | {"signer": one}).key_name for one in (KEYLESS, AGENT_KEY)] == [None, None]


def test_what_was_read_cannot_be_changed_any_more() -> None:
    """Invariant 13: what was granted stays what it was, whoever holds on to what was sent."""
    sent = {"artifacts": [{"sha256": SHA256}], "purpose": "release", "signer": KEYLESS}
    found = parse_signing_request(sent)
    sent["artifacts"][0]["sha256"] = "cd" * 32
    assert found.artifacts[0]["sha256"] == SHA256
    with pytest.raises(TypeError):
        found.artifacts[0]["sha256"] = "cd" * 32
    with pytest.raises(AttributeError):
        found.signer = "key:release"


@pytest.mark.parametrize("algorithm", HEX_DIGITS)
def test_a_digest_has_lower_case_hexadecimal_digits_alone(algorithm: str) -> None:
    """All other characters, first and last: a newline at the end as well."""
    right = "a" * (HEX_DIGITS[algorithm] - 1)
    others = [chr(code) for code in range(256) if chr(code) not in "0123456789abcdef"]
    for wrong in (*[one + right for one in others], *[right + one for one in others], right, right + "aa", ""):
        with pytest.raises(Invalid, match=algorithm):
            parse_signing_request(GOOD | {"artifacts": [{"sha256": SHA256, algorithm: wrong}]})
    assert parse_signing_request(GOOD | {"artifacts": [{"sha256": SHA256, algorithm: right + "a"}]})


@pytest.mark.parametrize("name", ["", "a" * 65, "Release", ".release", "-", "a|b", "a\n", "a\0", "ä", "key:a", " a"])
def test_the_name_of_a_key_is_a_word(name: str) -> None:
    with pytest.raises(Invalid, match="signer"):
        parse_signing_request(GOOD | {"signer": f"key:{name}"})
    assert parse_signing_request(GOOD | {"signer": "key:" + "a" * 64})


PURPOSES = ["", "a" * 65, "1a", "-a", "Release", "a_b", "a|b", "a\n", "a\0", "ä", 1, None, ["a"]]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_the_purpose_is_a_word(purpose: object) -> None:
    with pytest.raises(Invalid, match="purpose"):
        parse_signing_request(GOOD | {"purpose": purpose})


SIGNERS = [None, 1, ["keyless"], "Keyless", "keyless ", "keyless\n", "agent", "key", "ca:issuing"]


@pytest.mark.parametrize("signer", SIGNERS)
def test_there_are_three_ways_to_sign_and_no_more(signer: object) -> None:
    with pytest.raises(Invalid, match="signer"):
        parse_signing_request(GOOD | {"signer": signer})


def test_the_number_of_artifacts_is_bounded() -> None:
    many = [{"sha256": f"{number:064x}"} for number in range(MAX_ARTIFACTS + 1)]
    assert len(parse_signing_request(GOOD | {"artifacts": many[:-1]}).artifacts) == MAX_ARTIFACTS
    for wrong in (many, [], {"0": many[0]}, "ab", None):
        with pytest.raises(Invalid, match="artifacts"):
            parse_signing_request(GOOD | {"artifacts": wrong})


def test_one_artifact_is_not_two_by_its_other_digests() -> None:
    with pytest.raises(Invalid, match="twice"):
        parse_signing_request(GOOD | {"artifacts": [{"sha256": SHA256}, {"sha256": SHA256, "sha512": "ab" * 64}]})


def test_an_action_that_asks_for_a_signature_asks_us_and_for_nothing_beside_it() -> None:
    assert isinstance(signing_request(action(GOOD, environment="staging"), issuer=ISSUER), SigningRequest)
    for wrong in (GOOD | {"more": 1}, {name: GOOD[name] for name in ("artifacts", "purpose")}, [GOOD], "x", 7):
        with pytest.raises(Invalid, match="artifacts, purpose and signer alone"):
            signing_request(action(wrong), issuer=ISSUER)
    with pytest.raises(Invalid, match="artifacts, purpose and signer alone"):
        signing_request(Action("release.sign", "https://releases.acme.test/app", ISSUER, {}), issuer=ISSUER)
    for audience in (f"{ISSUER}/", f"{ISSUER}.evil.test", "https://BROKER.acme.test".lower() + "/sign"):
        with pytest.raises(Invalid, match="audience"):
            signing_request(action(GOOD, audience=audience), issuer=ISSUER)
