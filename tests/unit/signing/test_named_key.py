"""A named key signs artifacts or statements, never both."""

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from support.signing import CONTENT, digests

from broker.artifacts import SigningRequest
from broker.errors import Invalid
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey, Signs, require_one_kind

P384 = FileSigner.from_key(ec.generate_private_key(ec.SECP384R1()), "p384")
ED25519 = FileSigner.from_key(ed25519.Ed25519PrivateKey.generate(), "ed25519")
ARTIFACT = digests(CONTENT)


def asked(*artifacts: dict[str, str]) -> SigningRequest:
    return SigningRequest(artifacts=artifacts, purpose="release", signer="key:p384")


@pytest.mark.parametrize("signs", Signs)
def test_a_key_signs_the_one_kind_that_it_is_for(signs: Signs) -> None:
    key = NamedKey(signer=P384, signs=signs)
    key.require_kind(statement=signs is Signs.STATEMENTS)
    with pytest.raises(Invalid, match=f"the key p384 signs {signs} alone"):
        key.require_kind(statement=signs is Signs.ARTIFACTS)


def test_an_ed25519_key_signs_statements_or_is_not_taken() -> None:
    assert NamedKey(signer=ED25519, signs=Signs.STATEMENTS)
    with pytest.raises(ValueError, match='set signs = "statements"'):
        NamedKey(signer=ED25519)


def test_a_signer_of_which_nothing_is_said_signs_artifacts_where_it_can() -> None:
    assert NamedKey.of(P384) == NamedKey(signer=P384, signs=Signs.ARTIFACTS)
    assert NamedKey.of(ED25519).signs is Signs.STATEMENTS
    assert NamedKey.of(P384, Signs.STATEMENTS).signs is Signs.STATEMENTS
    with pytest.raises(ValueError, match='set signs = "statements"'):
        NamedKey.of(ED25519, Signs.ARTIFACTS)


def test_a_key_for_artifacts_needs_one_artifact_and_its_digest() -> None:
    """So that nobody approves what the key cannot sign. A statement is about as many as there are."""
    key, statements = (NamedKey(signer=P384, signs=signs) for signs in Signs)
    key.require(asked(ARTIFACT))
    for wrong in (asked({"sha256": ARTIFACT["sha256"]}), asked(ARTIFACT, digests(b"another"))):
        statements.require(wrong)
        with pytest.raises(Invalid, match=r"sha384 digest|several are signed"):
            key.require(wrong)


def test_a_key_is_not_of_both_kinds_by_two_names() -> None:
    one, other = (FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), name) for name in ("one", "other"))
    again = FileSigner(one._private, "again")
    require_one_kind([NamedKey(signer=one), NamedKey(signer=again), NamedKey(signer=other, signs=Signs.STATEMENTS)])
    with pytest.raises(ValueError, match="one and again are one key"):
        require_one_kind([NamedKey(signer=one), NamedKey(signer=again, signs=Signs.STATEMENTS)])
