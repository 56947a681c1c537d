"""The configuration: environment over file, every mistake in one report, nothing of a secret in it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli.config import ConfigError, load

GOOD = 'issuer = "https://broker.acme.test"\ntrust_domain = "acme.test"\n'
SECRET = "hunter2-do-not-show"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """None of ours, and put back afterwards."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith("ACTION_BROKER_"):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "broker.toml"
    found.write_text(GOOD)
    return found


def mistakes(file: Path, text: str | None = None) -> str:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    return str(error.value)


def test_a_file_with_the_two_keys_that_have_no_default_is_enough(file: Path) -> None:
    config = load(file)
    assert (config.issuer, config.trust_domain) == ("https://broker.acme.test", "acme.test")
    assert config.ledger_file == config.state_folder / "ledger.sqlite"
    assert config.ledger_name == "broker.acme.test"


def test_the_environment_stands_over_the_file_key_by_key(file: Path) -> None:
    file.write_text(GOOD + '[grpc]\nlisten = "127.0.0.1:1"\nmax_connection_age_s = 60\n')
    os.environ["ACTION_BROKER_GRPC__LISTEN"] = "127.0.0.1:2"
    os.environ["ACTION_BROKER_TRUST_DOMAIN"] = "other.test"
    config = load(file)
    assert (config.grpc.listen, config.grpc.max_connection_age_s) == ("127.0.0.1:2", 60)
    assert config.trust_domain == "other.test"


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.cli.config.DEFAULT_FILE", Path("/nonexistent"))
    os.environ |= {"ACTION_BROKER_ISSUER": "https://b.test", "ACTION_BROKER_TRUST_DOMAIN": "b.test"}
    assert load(None).issuer == "https://b.test"
    del os.environ["ACTION_BROKER_ISSUER"]
    with pytest.raises(ConfigError, match=r"1 mistake in the environment:\n  issuer: "):
        load(None)


def test_all_mistakes_of_file_and_environment_come_in_one_report(file: Path) -> None:
    os.environ["ACTION_BROKER_HTTP__LISTEN"] = "nowhere"
    os.environ["ACTION_BROKER_ISUER"] = "https://b.test"
    os.environ["ACTION_BROKER_LIMITS__BRUST"] = "3"
    said = mistakes(
        file,
        'issuer = "http://b.test"\ntrust_domain = "UPPER"\nextra = 1\n'
        '[unix]\nmode = "666"\n[grpc]\nlistn = "x"\n[limits]\nburst = "many"\n[audiences]\n"not a uri" = []\n',
    )
    keys = ("issuer", "trust_domain", "extra", "unix.mode", "grpc.listn", "limits.burst", "limits.brust", "http.listen")
    for key in (*keys, "ACTION_BROKER_ISUER"):
        assert f"\n  {key}: " in said, key
    assert said.startswith("9 mistakes in ")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('issuer = "https://b.test/path"', "issuer"),
        ('issuer = "https://b.test?x=1"', "issuer"),
        ('issuer = "https://B.test"', "issuer"),
        ('trust_domain = "spiffe://acme.test/path"', "trust_domain"),
        ('spire.workload_api = "/run/x.sock"', "spire.workload_api"),
        ('spire.broker_api = "tcp://host"', "spire.broker_api"),
        ('spire.agent_path = "no-slashes"', "spire.agent_path"),
        ('grpc.listen = "host:99999"', "grpc.listen"),
        ("limits.requests_per_second = 0", "limits.requests_per_second"),
        ("limits.signing_key_lifetime_s = 60", "limits.signing_key_lifetime_s"),
        ("limits.signing_key_lifetime_s = 86401", "limits.signing_key_lifetime_s"),
        ('audiences."spiffe://acme.test/a" = ["nobody"]', "audiences.spiffe://acme.test/a.0"),
    ],
)
def test_a_value_that_cannot_be_is_named_by_its_key(file: Path, line: str, why: str) -> None:
    name = line.partition(" ")[0]
    kept = [one for one in GOOD.splitlines() if not one.startswith(f"{name} ")]
    assert f"\n  {why}: " in mistakes(file, "\n".join([*kept, line]))


def test_an_empty_address_is_none_and_nobody_who_could_ask_is_a_mistake(file: Path) -> None:
    os.environ |= {"ACTION_BROKER_UNIX__SOCKET": "", "ACTION_BROKER_GRPC__LISTEN": ""}
    config = load(file)
    assert (config.unix.socket, config.grpc.listen) == (None, None)
    assert config.http.listen is not None
    assert "nobody could ask" in mistakes(file, GOOD + '[http]\nlisten = ""\n')


def test_no_key_switches_a_check_off(file: Path) -> None:
    for key in ("insecure = true", "spire.skip_verification = true", "limits.enabled = false"):
        assert "Extra inputs are not permitted" in mistakes(file, GOOD + key)


def test_a_value_in_the_wrong_place_is_not_told(file: Path) -> None:
    """Somebody's password may stand there; the report goes to logs."""
    os.environ["ACTION_BROKER_UNIX__MODE"] = SECRET
    os.environ["ACTION_BROKER_PASSWORD"] = SECRET
    said = mistakes(
        file,
        f'issuer = "https://user:{SECRET}@b.test"\ntrust_domain = "{SECRET.upper()}"\npassword = "{SECRET}"\n'
        f'[grpc]\nlisten = "{SECRET}"\n[limits]\nburst = "{SECRET}"\n',
    )
    assert said.count("\n") >= 6
    assert SECRET not in said
    assert SECRET.upper() not in said


def test_a_file_that_is_not_there_or_not_toml_is_named(file: Path, tmp_path: Path) -> None:
    assert f"{tmp_path / 'none.toml'} is not there" in mistakes(tmp_path / "none.toml")
    said = mistakes(file, f'issuer = "{SECRET}')
    assert str(file) in said
    assert SECRET not in said
    assert str(tmp_path) in mistakes(tmp_path)
