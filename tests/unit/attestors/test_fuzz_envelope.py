"""The fuzz target of provenance, briefly: random bytes, edited sound ones, and the vectors as corpus."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from fuzz import fuzz_envelope
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "vectors" / "provenance"
CORPUS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("refused/*.json"))}

leaves = [
    '"_type"',
    '"subject"',
    '"digest"',
    '"sha256"',
    '"predicate"',
    '"payload"',
    '"signatures"',
    '"sig"',
    '"mediaType"',
    '"https://in-toto.io/Statement/v1"',
    '""',
    '"\\ud800"',
    "1e999",
    "NaN",
    "null",
    "true",
    "0",
    "9007199254740993",
]
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


def members_replaced(sound: bytes) -> st.SearchStrategy[bytes]:
    """A sound object with one of its values, at any depth, replaced by other JSON."""
    values = [text for text in _values(json.loads(sound)) if sound.count(text) == 1]
    return st.tuples(st.sampled_from(values), json_like.map(str.encode)).map(lambda edit: sound.replace(*edit))


def _values(found: object) -> list[bytes]:
    inner = [*found.values()] if isinstance(found, dict) else found if isinstance(found, list) else []
    return [json.dumps(found).encode(), *(text for one in inner for text in _values(one))]


anything = (
    st.binary(max_size=200)
    | json_like.map(str.encode)
    | edited(fuzz_envelope.ENVELOPE)
    | edited(fuzz_envelope.PAYLOAD)
    | edited(fuzz_envelope.BUNDLE)
    | members_replaced(fuzz_envelope.PAYLOAD)
    | members_replaced(fuzz_envelope.BUNDLE)
)


@settings(deadline=None, max_examples=300)
@given(data=anything)
def test_no_bytes_make_provenance_that_nobody_signed_and_none_make_it_fail_otherwise(data: bytes) -> None:
    fuzz_envelope.one_input(data)


@pytest.mark.parametrize("name", CORPUS)
def test_no_known_defect_makes_provenance_that_nobody_signed(name: str) -> None:
    fuzz_envelope.one_input(CORPUS[name]["evidence"].encode())


def test_the_target_reaches_what_is_sound() -> None:
    """Otherwise it would prove nothing."""
    for sound in (fuzz_envelope.ENVELOPE, fuzz_envelope.BUNDLE):
        assert fuzz_envelope._judge(sound, signed=True)
    with pytest.raises(AssertionError, match="nobody signed"):
        fuzz_envelope._judge(fuzz_envelope.encoded(fuzz_envelope.envelope(fuzz_envelope.PAYLOAD + b" ")), signed=False)
