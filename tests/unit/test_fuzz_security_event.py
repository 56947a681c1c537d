"""The fuzz target of security events, briefly: random bytes and edits of a sound token, so that it cannot rot."""

import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from fuzz import fuzz_security_event
from hypothesis import given
from hypothesis import strategies as st
from support.pki import jws

VECTORS = Path(__file__).parents[1] / "vectors" / "security_event" / "refused"
names = ("iss", "aud", "events", "sub_id", "format", "opaque", "id", "uri")
leaves = [*(f'"{name}"' for name in names), "1e999", "NaN", "null", "0"]
json_like = st.recursive(
    st.sampled_from(leaves),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(inner, max_size=6).map(lambda items: "{" + ",".join(map(":".join, pairwise(items))) + "}")
    ),
)


def edited(sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound bytes with a piece of them replaced."""
    at = st.integers(0, len(sound))
    return st.tuples(at, at, st.binary(max_size=4) | json_like.map(str.encode)).map(
        lambda edit: sound[: min(edit[:2])] + edit[2] + sound[max(edit[:2]) :]
    )


@given(
    st.binary(max_size=200)
    | json_like.map(str.encode)
    | edited(fuzz_security_event.HEADER)
    | edited(fuzz_security_event.PAYLOAD)
    | edited(fuzz_security_event.SUBJECT)
)
def test_no_bytes_make_an_event_that_its_transmitter_did_not_sign(data: bytes) -> None:
    fuzz_security_event.one_input(data)


@pytest.mark.parametrize("file", sorted(VECTORS.iterdir()), ids=lambda file: file.stem)
def test_no_known_defect_makes_an_event_that_nobody_signed(file: Path) -> None:
    vector = tomllib.loads(file.read_text())
    for part in (vector.get("claims", {}), vector.get("header", {}), vector.get("event", {})):
        fuzz_security_event.one_input(repr(part).replace("'", '"').encode())


def test_the_event_that_is_edited_is_sound_and_none_of_its_parts_alone_is() -> None:
    sound = jws(fuzz_security_event.HEADER, fuzz_security_event.PAYLOAD, fuzz_security_event.BY.signer.sign)
    assert fuzz_security_event.verified(sound, signed=True)
    head, body, _ = sound.split(".")
    for wrong in (f"{head}.{body}.", f"{sound}=", sound.replace(".", "..", 1), f" {sound}"):
        assert not fuzz_security_event.verified(wrong, signed=False)
    secretive = fuzz_security_event.SECRETIVE
    shown = f"Bearer {fuzz_security_event.SECRET}"
    assert fuzz_security_event.verified(sound, signed=True, events=secretive, shown=shown)
    assert not fuzz_security_event.verified(sound, signed=True, events=secretive)
