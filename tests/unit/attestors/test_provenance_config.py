"""Whom to trust is read from files; a mistake is told with its place, all at once, and changes nothing."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as form
from support.provenance import BUILD_AGENT, BUILDER, KEY, OTHER_BUILDER, OTHER_KEY, builders, spki_pem
from support.timestamps import Tsa

from attestors.provenance_config import MAX_KEYS, BuilderConfig, CurrentTrust, TrustError, load_trust
from attestors.provenance_trust import SigstoreIdentity

DAY = timedelta(days=1)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "release.pem"
    path.write_text(spki_pem(KEY))
    return path


def test_everything_that_can_sign_is_loaded(tmp_path: Path, key: Path) -> None:
    chain = tmp_path / "tsa.pem"
    tsa = Tsa.made()
    chain.write_bytes(tsa.pem)
    identity = SigstoreIdentity(issuer="https://issuer.test", identity="https://git.test/w.yml@refs/heads/main")
    found = load_trust(
        {
            BUILDER: BuilderConfig(keys={"release": key}),
            OTHER_BUILDER: BuilderConfig(spiffe_ids=[BUILD_AGENT], sigstore=[identity], threshold=2),
        },
        max_age=DAY,
        timestamp_chains=[chain],
    )
    assert found.builders[BUILDER] == builders()[BUILDER]
    assert found.builders[OTHER_BUILDER].spiffe_ids == {BUILD_AGENT}
    assert found.all_identities() == (identity,)
    assert found.timestamp_roots == (tsa.root,)


def test_all_mistakes_are_told_at_once_with_their_places(tmp_path: Path, key: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    with pytest.raises(TrustError) as refused:
        load_trust(
            {
                "builder": BuilderConfig(keys={"release": key}),
                BUILDER: BuilderConfig(keys={"A b": key, "gone": tmp_path / "gone.pem", "empty": empty}),
                OTHER_BUILDER: BuilderConfig(spiffe_ids=["spiffe://acme.test", "spiffe://acme.test/a/../b"]),
                "https://none.test/": BuilderConfig(),
                "https://twice.test/": BuilderConfig(keys={"a": key, "b": key}),
                "https://who.test/": BuilderConfig(sigstore=[SigstoreIdentity(issuer="", identity="x")]),
            },
            max_age=timedelta(0),
            timestamp_chains=[empty],
        )
    told = "\n".join(refused.value.problems)
    for piece in (
        "max_age: it is above zero",
        "builder builder: its id is not a URI",
        "key name 'A b'",
        f"key gone in {tmp_path}/gone.pem: No such file",
        "no public key in PEM: export it",
        "'spiffe://acme.test' is not the SPIFFE ID of a workload",
        "'spiffe://acme.test/a/../b' is not the SPIFFE ID",
        "https://none.test/: a builder needs at least as many signers",
        "https://twice.test/: a key has two names",
        "https://who.test/: a Sigstore identity needs",
        f"timestamp chain {empty}",
    ):
        assert piece in told, piece


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(KEY.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    with pytest.raises(TrustError, match="no public key in PEM") as refused:
        load_trust({BUILDER: BuilderConfig(keys={"release": path})}, max_age=DAY)
    assert "PRIVATE" not in str(refused.value)


@pytest.mark.parametrize("threshold", [0, 2])
def test_a_threshold_that_nobody_or_everybody_meets_is_refused(key: Path, threshold: int) -> None:
    assert load_trust({BUILDER: BuilderConfig(keys={"release": key})}, max_age=DAY)
    with pytest.raises(TrustError, match="as many signers as its threshold"):
        load_trust({BUILDER: BuilderConfig(keys={"release": key}, threshold=threshold)}, max_age=DAY)


def test_builders_and_keys_are_bounded(key: Path) -> None:
    """Each key is tried with each signature that a caller sends."""
    one = BuilderConfig(keys={"release": key})
    assert load_trust({f"https://{i}.test/": one for i in range(MAX_KEYS)}, max_age=DAY)
    with pytest.raises(TrustError, match="at most 64 are trusted; builders: they have at most 64 keys"):
        load_trust({f"https://{i}.test/": one for i in range(MAX_KEYS + 1)}, max_age=DAY)


def test_a_reload_that_fails_changes_nothing_and_one_that_succeeds_does(key: Path) -> None:
    configured = {BUILDER: BuilderConfig(keys={"release": key})}
    current = CurrentTrust(lambda: load_trust(configured, max_age=DAY))
    before = current()
    key.write_text("nothing")
    with pytest.raises(TrustError):
        current.reload()
    assert current() is before
    key.write_text(spki_pem(OTHER_KEY))
    current.reload()
    assert current().builders[BUILDER].keys["release"] != before.builders[BUILDER].keys["release"]
    configured.clear()
    current.reload()
    assert not current().builders
