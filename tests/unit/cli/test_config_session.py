"""The table `[session]`: what can be said, every mistake with its key, and what comes of it."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.ledger_records import open_ledger
from support.oidc import JWKS, OidcServer, oidc_server
from support.security_events import SECRET, Transmitting

from broker.cli.config import Config, ConfigError, load
from broker.cli.doctor_session import transmitters
from broker.cli.serve_sessions import open_sessions
from broker.cli.serve_signing import SetupError, Watches

ISSUER = "https://caep.acme.test/tenant-1/"
OURS = "https://broker.acme.test"


class Written:
    """A configuration with one transmitter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jwks = Transmitting().write_keys(folder / "keys.jwks")
        self.secret = self.file("secret", f"{SECRET}\n")

    def file(self, name: str, content: str, mode: int = 0o600) -> Path:
        found = self.folder / name
        found.write_text(content)
        found.chmod(mode)
        return found

    def config(self, issuer: str = ISSUER, http: str = "127.0.0.1:0", **changes: Any) -> Config:
        """changes: keys of the transmitter; None leaves one out."""
        keys = {"jwks_file": str(self.jwks), "bearer_file": str(self.secret)} | changes
        lines = [f'issuer = "{OURS}"', 'trust_domain = "acme.test"', f'http.listen = "{http}"']
        lines += [f'[session.transmitters."{issuer}"]']
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None]
        return load(self.file("broker.toml", "\n".join(lines) + "\n"))

    def mistakes(self, **changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            self.config(**changes)
        return str(error.value)

    async def found(self, **changes: Any) -> list[tuple[str, str]]:
        """What `doctor` says."""
        every = [one async for one in transmitters(self.config(**changes))]
        assert all(one.verdict == "ok" or one.fix for one in every)
        assert all(SECRET not in one.detail + one.fix for one in every)
        return [(one.verdict, one.detail) for one in every]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OidcServer]:
    async with oidc_server(tmp_path / "transmitter") as running:
        yield running


def test_without_the_table_nobody_moves_sessions_from_outside(written: Written) -> None:
    file = written.file("broker.toml", f'issuer = "{OURS}"\ntrust_domain = "acme.test"\n')
    assert load(file).session.transmitters == {}


def test_little_has_to_be_said_and_all_of_it_can_be(written: Written) -> None:
    (table,) = written.config(jwks_file=None, bearer_file=None).session.transmitters.values()
    assert (table.audience, table.jwks_url, table.jwks_file, table.principals, table.lowers) == (
        "",
        None,
        None,
        (),
        True,
    )
    (table,) = written.config(
        audience="receiver-7",
        jwks_file=None,
        jwks_url="https://caep.acme.test/jwks",
        ca_file="/etc/ca.pem",
        principals=["spiffe://acme.test/build/", "spiffe://acme.test/agent"],
        lowers=False,
    ).session.transmitters.values()
    assert (table.audience, table.lowers, table.bearer_file) == ("receiver-7", False, written.secret)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"issuer": "http://caep.acme.test"}, "https"),
        ({"jwks_url": "http://caep.acme.test/jwks", "jwks_file": None}, "jwks_url: "),
        ({"jwks_url": "https://u@caep.acme.test/jwks", "jwks_file": None}, "jwks_url: "),
        ({"jwks_url": "https://caep.acme.test/jwks"}, "keys are in jwks_file, or fetched"),
        ({"ca_file": "/etc/ca.pem"}, "keys are in jwks_file, or fetched"),
        ({"jwks_file": "keys.jwks"}, "paths are absolute"),
        ({"bearer_file": "secret"}, "paths are absolute"),
        ({"principals": ["agent"]}, "SPIFFE ID does not start with"),
        ({"principals": "spiffe://acme.test/x"}, "principals: "),
        ({"lowers": "sometimes"}, "lowers: "),
        ({"verify": False}, "verify: "),
    ],
)
def test_a_mistake_is_told_with_its_key(written: Written, changes: dict[str, Any], why: str) -> None:
    assert why in written.mistakes(**changes)


async def test_a_transmitter_is_made_of_it_and_its_files_are_watched(written: Written) -> None:
    async with await open_ledger(written.folder) as ledger:
        watches = Watches()
        parts = open_sessions(written.config(), ledger, watches)
        (transmitter,) = parts.transmitters
        assert (transmitter.settings.issuer, transmitter.settings.audience) == (ISSUER, OURS)
        assert transmitter.secrets() == (SECRET.encode(),)
        written.file("secret", "another-secret-of-theirs\n")
        assert len(watches.files) == 2
        watches.reload()
        assert transmitter.secrets() == (b"another-secret-of-theirs",)
        written.file("secret", "short\n")
        watches.reload()
        assert transmitter.secrets() == (b"another-secret-of-theirs",), "what cannot be used changes nothing"


async def test_each_thing_that_cannot_be_used_is_told_at_once(written: Written) -> None:
    written.file("secret", f"{SECRET}\n", 0o644)
    async with await open_ledger(written.folder) as ledger:
        for changes in ({}, {"jwks_file": "/nowhere.jwks", "bearer_file": None}, {"jwks_file": None, "ca_file": "/no"}):
            with pytest.raises(SetupError) as error:
                open_sessions(written.config(**changes), ledger, Watches())
            assert f"session.transmitters.{ISSUER}" in str(error.value)


async def test_doctor_says_what_is_in_order_and_what_is_not(written: Written, server: OidcServer) -> None:
    assert await written.found() == [
        ("ok", f"its keys are in {written.jwks}"),
        ("ok", f"POST {OURS}/ssf/events, with one of its secrets"),
    ]
    fetched = {"jwks_file": None, "jwks_url": server.issuer + JWKS, "ca_file": str(server.ca_file)}
    assert (await written.found(**fetched))[0] == ("ok", "answers; 1 keys")
    assert [one[0] for one in await written.found(bearer_file=None)] == ["ok", "warning"]
    assert [one[0] for one in await written.found(http="")] == ["ok", "broken"]
    assert [one[0] for one in await written.found(jwks_file="/nowhere.jwks")] == ["broken"]
    server.published = []
    assert (await written.found(**fetched))[0] == ("broken", "it has no key that signs here")
    server.says(JWKS, b"", status=404)
    verdict, detail = (await written.found(**fetched))[0]
    assert (verdict, "status 404" in detail) == ("broken", True)
    discovering = {"issuer": server.issuer, "jwks_file": None, "ca_file": str(server.ca_file)}
    assert (await written.found(**discovering))[0][0] == "broken", "it describes nothing"
