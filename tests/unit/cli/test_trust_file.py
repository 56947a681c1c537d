"""The trust file: whose provenance is believed, and every mistake in it in one report."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from attestors.provenance_config import TrustError
from broker.cli.trust_file import read_trust_file

BUILDER = "https://ci.acme.test/builders/release"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "builder.pub").write_bytes(key.public_bytes(serialization.Encoding.PEM, form))
    found = tmp_path / "trust.toml"
    found.write_text(f'max_age_s = 60\n[builders."{BUILDER}"]\nkeys = {{ release = "{tmp_path}/builder.pub" }}\n')
    return found


def problems(file: Path, text: str) -> tuple[str, ...]:
    file.write_text(text)
    with pytest.raises(TrustError) as error:
        read_trust_file(file).load()
    return error.value.problems


def test_a_builder_with_a_key_is_believed_for_as_long_as_it_says(file: Path) -> None:
    read = read_trust_file(file)
    trust = read.load()
    assert (list(trust.builders), trust.max_age) == ([BUILDER], timedelta(seconds=60))
    assert read.files == (file.parent / "builder.pub",)


def test_a_file_without_builders_believes_nobody(file: Path) -> None:
    file.write_text("max_age_s = 60\n")
    assert read_trust_file(file).load().builders == {}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "max_age_s"),
        ("max_age_s = 0\n", "max_age_s"),
        ("max_age_s = 60\ntrust_all = true\n", "trust_all"),
        ("max_age_s = 60\nbuilders = []\n", "builders"),
        ("max_age_s = [\n", "trust.toml"),
        ('max_age_s = 60\ntimestamp_chains = ["relative.pem"]\n', "timestamp_chains"),
        ('max_age_s = 60\ntimestamp_chains = ["/nonexistent.pem"]\n', "/nonexistent.pem"),
        (f'max_age_s = 60\n[builders."{BUILDER}"]\n', BUILDER),
        (f'max_age_s = 60\n[builders."{BUILDER}"]\nkeys = {{ a = "/nonexistent" }}\n', "/nonexistent"),
        (f'max_age_s = 60\n[builders."{BUILDER}"]\nspiffe_ids = ["nobody"]\n', "nobody"),
        (f'max_age_s = 60\n[builders."{BUILDER}"]\nsigstore = [{{ issuer = "x" }}]\n', "identity"),
        ('max_age_s = 60\n[builders."no uri"]\nspiffe_ids = ["spiffe://a.test/b"]\n', "no uri"),
    ],
)
def test_what_cannot_be_is_named(file: Path, text: str, why: str) -> None:
    assert why in "; ".join(problems(file, text))


def test_all_mistakes_come_at_once(file: Path) -> None:
    builder = '[builders."https://{0}.test"]\nkeys = {{ a = "/nonexistent/{0}" }}\n'
    found = problems(file, "max_age_s = 60\n" + builder.format("one") + builder.format("two"))
    assert len(found) == 2
    assert (
        "max_age_s" in problems(file, "max_age_s = -1\nnothing = 1\n")[0] + problems(file, "max_age_s = -1\nx = 1\n")[1]
    )


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"none\.toml"):
        read_trust_file(tmp_path / "none.toml")
