"""The table `[ticket]`: what can be said, every mistake with its key, and that no secret is told."""

from pathlib import Path
from typing import Any

import pytest

from broker.cli.config import ConfigError, load

GOOD = 'issuer = "https://broker.acme.test"\ntrust_domain = "acme.test"\n'
URL = "https://tickets.acme.test/t/rest/data/issue/{id}?@verbose=2"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "broker.toml"


def written(file: Path, webhook: str = "", name: str = "desk", **changes: str | None) -> Path:
    """changes: TOML values of keys of the system; None leaves one out."""
    keys = {"url": f'"{URL}"', "state": '"/data/status"', "open_states": '["open"]', "authorises": '"/data/tables"'}
    lines = [f"{key} = {value}" for key, value in (keys | changes).items() if value is not None]
    text = "\n".join([f"[ticket.systems.{name}]", *lines])
    file.write_text(f"{GOOD}{text}\n" + (f"[ticket.systems.{name}.webhook]\n{webhook}\n" if webhook else ""))
    return file


def mistakes(file: Path, *arguments: Any, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(written(file, *arguments, **changes))
    return str(error.value)


def test_without_the_table_there_is_no_ticket_system(file: Path) -> None:
    file.write_text(GOOD)
    assert load(file).ticket.systems == {}


def test_little_has_to_be_said(file: Path) -> None:
    (system,) = load(written(file)).ticket.systems.values()
    assert (system.poll_ms, system.timeout_ms, system.webhook, system.credentials) == (1000, 1500, None, None)


def test_all_of_it_can_be_said(file: Path) -> None:
    webhook = """secret_file = "/etc/action-broker/desk.hook"
id = "/issue/id"
scheme = "hmac"
header = "X-Signature"
delivery_header = "X-Delivery"
timestamp_header = "X-Timestamp"
"""
    found = load(
        written(
            file,
            webhook,
            id_pattern='"[1-9][0-9]*"',
            credentials='"basic"',
            credentials_file='"/etc/action-broker/desk.credentials"',
            headers='{ "X-Requested-With" = "rest" }',
            authorises_each='"/name"',
            authorised_by='"/data/owner/login"',
            id='"/data/id"',
            ca_file='"/etc/action-broker/desk.pem"',
            timeout_ms="900",
            poll_ms="5000",
        )
    ).ticket.systems["desk"]
    assert found.headers == {"X-Requested-With": "rest"}
    assert found.webhook is not None
    assert (found.webhook.header, found.webhook.timestamp_header) == ("X-Signature", "X-Timestamp")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("url", None),
        ("url", '"https://tickets.acme.test/"'),
        ("url", '"http://tickets.acme.test/{id}"'),
        ("url", '"https://user:hunter2@tickets.acme.test/{id}"'),
        ("state", None),
        ("state", '"data/status"'),
        ("open_states", None),
        ("open_states", "[]"),
        ("open_states", '"open"'),
        ("authorises", None),
        ("authorises", '"tables"'),
        ("authorises_each", '"name"'),
        ("authorised_by", '"/~"'),
        ("id", '"id"'),
        ("id_pattern", '"["'),
        ("credentials", '"digest"'),
        ("credentials_file", '"desk.credentials"'),
        ("headers", '{ Authorization = "Basic aHVudGVyMg==" }'),
        ("headers", '{ "X-A" = "hunter2\\r\\nX-B: y" }'),
        ("ca_file", '"desk.pem"'),
        ("timeout_ms", "50"),
        ("timeout_ms", "60000"),
        ("poll_ms", "100"),
        ("poll_ms", "3600000"),
        ("verify", "false"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_without_its_value(file: Path, key: str, value: str | None) -> None:
    told = mistakes(file, **{key: value})
    assert f"ticket.systems.desk.{key}" in told
    assert "hunter2" not in told
    assert "aHVudGVyMg" not in told


@pytest.mark.parametrize("name", ["Desk", '"a:b"', '"a/b"', '""', '"-x"'])
def test_a_system_has_a_name_that_callers_can_say(file: Path, name: str) -> None:
    assert "ticket.systems" in mistakes(file, name=name)


@pytest.mark.parametrize(
    "changes", [{"credentials": '"basic"'}, {"credentials_file": '"/etc/action-broker/desk.credentials"'}]
)
def test_credentials_come_with_their_kind(file: Path, changes: dict[str, str]) -> None:
    assert "go together" in mistakes(file, **changes)
    load(written(file, credentials='"bearer"', credentials_file='"/etc/desk"'))


HOOK = 'secret_file = "/etc/hook"\nid = "/id"\n'


@pytest.mark.parametrize(
    ("webhook", "why"),
    [
        ('id = "/id"', "secret_file"),
        ('secret_file = "/etc/hook"', "id"),
        (HOOK + 'scheme = "none"', "scheme"),
        (HOOK + 'header = "a b"', "header"),
        (HOOK + 'header = "Authorization"', "a header of its own"),
        (HOOK + 'timestamp_header = "X\\nY"', "timestamp_header"),
        (HOOK + 'scheme = "bearer"\ntimestamp_header = "X-Timestamp"', "proves nothing"),
        (HOOK + 'scheme = "bearer"\ndelivery_header = "X-Delivery"', "proves nothing"),
        (HOOK + 'secret = "hunter2"', "secret"),
    ],
)
def test_a_webhook_that_would_prove_nothing_is_a_mistake(file: Path, webhook: str, why: str) -> None:
    told = mistakes(file, webhook)
    assert "ticket.systems.desk.webhook" in told
    assert why in told
    assert "hunter2" not in told
    for good in (HOOK, HOOK + 'scheme = "bearer"\nheader = "X-Gitlab-Token"'):
        load(written(file, good))
