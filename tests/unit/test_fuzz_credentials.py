"""The fuzz targets of our own tokens and proofs, briefly: random bytes and the vectors as corpus."""

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
from fuzz import fuzz_action_token, fuzz_dpop
from hypothesis import given, settings
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "vectors" / "token"
CORPUS = [json.loads(path.read_text())["shown"][-1] for path in sorted(FOLDER.glob("*/*.json"))]

leaves = ['"alg"', '"ES256"', '"kid"', '"jwk"', '"cnf"', '"jkt"', '"exp"', '"htu"', "1e999", "NaN", "null", "true", "0"]
json_like = st.recursive(
    st.sampled_from(leaves),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(inner, max_size=6).map(lambda items: "{" + ",".join(map(":".join, pairwise(items))) + "}")
    ),
)
TARGETS = pytest.mark.parametrize(
    "target", [fuzz_action_token.one_input, fuzz_dpop.one_input], ids=["action_token", "dpop"]
)


def edited(sound: bytes) -> st.SearchStrategy[bytes]:
    """Sound bytes with a piece of them replaced."""
    at = st.integers(0, len(sound))
    return st.tuples(at, at, st.binary(max_size=4) | json_like.map(str.encode)).map(
        lambda edit: sound[: min(edit[:2])] + edit[2] + sound[max(edit[:2]) :]
    )


anything = (
    st.binary(max_size=200)
    | json_like.map(str.encode)
    | edited(fuzz_action_token.PAYLOAD)
    | edited(fuzz_action_token.HEADER)
    | edited(fuzz_dpop.PAYLOAD)
    | edited(fuzz_dpop.HEADER)
)


@TARGETS
@settings(deadline=None)
@given(data=anything)
def test_no_bytes_make_a_token_or_proof_that_nobody_signed(target: object, data: bytes) -> None:
    target(data)


@TARGETS
@pytest.mark.parametrize("shown", CORPUS)
def test_no_known_defect_makes_a_token_or_proof_that_nobody_signed(target: object, shown: dict[str, str]) -> None:
    text = shown.get("proof", shown["token"])
    target(text.encode(errors="surrogateescape"))
    for part in text.encode(errors="surrogateescape").split(b".")[:2]:
        if part.isalnum():
            target(base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4)))


@TARGETS
def test_the_targets_reach_what_is_sound(target: object) -> None:
    """Otherwise they would prove nothing: our own claims and headers pass both sides."""
    module = fuzz_action_token if target is fuzz_action_token.one_input else fuzz_dpop
    for sound in (module.PAYLOAD, module.HEADER, b" " + module.PAYLOAD):
        target(sound)
    if module is fuzz_action_token:
        signed = module.SIGNER.sign(module.HEADER, module.PAYLOAD)
        with pytest.raises(AssertionError, match="nobody signed"):
            module.one_input(signed.encode())
    else:
        signed = module.CALLER.sign(module.HEADER, module.PAYLOAD)
        with pytest.raises(AssertionError, match="nobody signed"):
            module.one_input(signed.encode())
