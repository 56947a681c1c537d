"""The tables of signing: what may be left out, what cannot be, and that nothing of a secret is told."""

from datetime import timedelta
from pathlib import Path

import pytest

from broker.cli.config import ConfigError, load

GOOD = 'issuer = "https://broker.acme.test"\ntrust_domain = "acme.test"\n'
TOKEN = 'signing.tokens.hsm = { module = "/lib/p11.so", label = "acme", pin_file = "/etc/pin" }\n'
SECRET = "hunter2-do-not-show"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def mistakes(file: Path, text: str) -> str:
    file.write_text(GOOD + text)
    with pytest.raises(ConfigError) as error:
        load(file)
    return str(error.value)


def test_without_the_tables_nothing_is_signed_and_nobody_is_believed(file: Path) -> None:
    file.write_text(GOOD)
    config = load(file)
    assert (config.signing.ca_folder, config.signing.keys, config.signing.tokens) == (None, {}, {})
    assert (config.signing.timestamp.url, config.provenance.trust_file) == (None, None)
    assert (config.approval.templates_folder, config.approval.issuers) == (None, {})
    assert config.signing.certificate_ttl == timedelta(seconds=120)
    assert config.approval.remembered == timedelta(hours=1)


def test_all_of_it_can_be_said(file: Path) -> None:
    file.write_text(
        GOOD
        + """
[signing]
ca_folder = "/etc/action-broker/ca"
certificate_ttl_s = 300
node = "node-7.acme.test"
[signing.timestamp]
url = "https://tsa.acme.test/api/v1/timestamp"
chain_file = "/etc/action-broker/tsa.pem"
ca_file = "/etc/action-broker/tls.pem"
timeout_ms = 900
[signing.tokens.hsm]
module = "/usr/lib/softhsm/libsofthsm2.so"
label = "acme"
pin_file = "/etc/action-broker/pin"
sessions = 8
[signing.keys.release]
token = "hsm"
label = "release-key"
[signing.keys.dev]
file = "/etc/action-broker/dev.pem"
[provenance]
trust_file = "/etc/action-broker/trust.toml"
sigstore_trusted_root = "public"
[approval]
templates_folder = "/etc/action-broker/approval"
remembered_s = 86400
[approval.issuers."https://login.acme.test"]
audience = "action-broker"
max_auth_age_s = 60
ca_file = "/etc/action-broker/login-ca.pem"
groups_claim = "groups"
"""
    )
    config = load(file)
    assert config.signing.keys["release"].label == "release-key"
    assert config.signing.tokens["hsm"].sessions == 8
    assert config.approval.issuers["https://login.acme.test"].max_auth_age_s == 60
    assert config.approval.remembered == timedelta(days=1)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('signing.ca_folder = "ca"', "signing.ca_folder"),
        ("signing.certificate_ttl_s = 301", "signing.certificate_ttl_s"),
        ("signing.certificate_ttl_s = 0", "signing.certificate_ttl_s"),
        ('signing.node = "node 7"', "signing.node"),
        ('signing.nod = "x"', "signing.nod"),
        ('signing.timestamp = { url = "https://tsa.test" }', "signing.timestamp"),
        ('signing.timestamp = { url = "ftp://t.test", chain_file = "/c" }', "signing.timestamp.url"),
        ('signing.timestamp = { url = "https://u:p@t.test", chain_file = "/c" }', "signing.timestamp.url"),
        ('signing.timestamp = { url = "https://t.test", chain_file = "c" }', "signing.timestamp.chain_file"),
        ("signing.timestamp.timeout_ms = 60000", "signing.timestamp.timeout_ms"),
        ('signing.tokens.hsm = { module = "p11.so", label = "a", pin_file = "/p" }', "signing.tokens.hsm.module"),
        ('signing.tokens.hsm = { module = "/p11.so", label = "", pin_file = "/p" }', "signing.tokens.hsm.label"),
        ('signing.tokens.hsm = { module = "/p11.so", label = "a" }', "signing.tokens.hsm.pin_file"),
        ('signing.tokens.hsm = { module = "/p11.so", label = "a", pin = "1" }', "signing.tokens.hsm.pin"),
        ('signing.tokens."H S M" = { module = "/m", label = "a", pin_file = "/p" }', "signing.tokens.H S M.[key]"),
        (TOKEN + "signing.keys.a = {}", "signing.keys.a"),
        (TOKEN + 'signing.keys.a = { token = "hsm" }', "signing.keys.a"),
        (TOKEN + 'signing.keys.a = { label = "x", file = "/k" }', "signing.keys.a"),
        (TOKEN + 'signing.keys.a = { token = "hsm", label = "x", file = "/k" }', "signing.keys.a"),
        (TOKEN + 'signing.keys.a = { token = "other", label = "x" }', "signing"),
        ('signing.keys.a = { file = "k.pem" }', "signing.keys.a.file"),
        ('signing.keys."key:a" = { file = "/k.pem" }', "signing.keys.key:a.[key]"),
        ('provenance.trust_file = "trust.toml"', "provenance.trust_file"),
        ('provenance.sigstore_trusted_root = "root.json"', "provenance.sigstore_trusted_root"),
        ('provenance.builders = ["anybody"]', "provenance.builders"),
        ('approval.templates_folder = "texts"', "approval.templates_folder"),
        ("approval.remembered_s = 86401", "approval.remembered_s"),
        ("approval.remembered_s = 0", "approval.remembered_s"),
        ('approval.issuers."http://login.test" = { audience = "a" }', "approval.issuers.http://login.test.[key]"),
        ('approval.issuers."https://login.test" = {}', "approval.issuers.https://login.test.audience"),
        (
            'approval.issuers."https://login.test" = { audience = "a", max_auth_age_s = 3601 }',
            "approval.issuers.https://login.test.max_auth_age_s",
        ),
        (
            'approval.issuers."https://login.test" = { audience = "a", skip_nonce = true }',
            "approval.issuers.https://login.test.skip_nonce",
        ),
    ],
)
def test_a_value_that_cannot_be_is_named_by_its_key(file: Path, line: str, key: str) -> None:
    assert f"\n  {key}: " in mistakes(file, line)


def test_all_mistakes_of_all_tables_come_in_one_report(file: Path) -> None:
    said = mistakes(
        file,
        'grpc.listen = "nowhere"\nsigning.ca_folder = "ca"\nsigning.keys.a = {}\nprovenance.trust_file = "t"\n'
        'approval.remembered_s = -1\napproval.issuers."https://login.test" = {}\n',
    )
    assert said.startswith("6 mistakes in ")


def test_a_secret_in_the_wrong_place_is_not_told(file: Path) -> None:
    said = mistakes(
        file,
        f'signing.tokens.hsm = {{ module = "/m", label = "a", pin_file = "{SECRET}", pin = "{SECRET}" }}\n'
        f'signing.timestamp = {{ url = "https://me:{SECRET}@tsa.test", chain_file = "/c" }}\n'
        f'signing.keys.a = {{ file = "{SECRET}" }}\nprovenance.sigstore_trusted_root = "{SECRET}"\n'
        f'approval.issuers."https://login.test" = {{ audience = "a", client_secret = "{SECRET}" }}\n',
    )
    assert said.count("\n") == 6
    assert SECRET not in said


def test_the_environment_says_it_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD + 'provenance.trust_file = "/t"\n')
    monkeypatch.setenv("ACTION_BROKER_SIGNING__CA_FOLDER", "/ca")
    monkeypatch.setenv("ACTION_BROKER_PROVENANCE__TRUST_FILE", "")
    monkeypatch.setenv("ACTION_BROKER_APPROVAL__REMEMBERED_S", "600")
    config = load(file)
    assert (config.signing.ca_folder, config.provenance.trust_file) == (Path("/ca"), None)
    assert config.approval.remembered == timedelta(minutes=10)
