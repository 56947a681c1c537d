"""The guard's configuration: every mistake in one report, nothing of a secret in it, nobody far away to answer to."""

import re
import textwrap
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from broker.cli.config import ConfigError
from broker.cli.guard_config import GuardConfig, load
from broker.guard import declared
from broker.guard.declared import DeclaredRule, Rules

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy/envoy"
PAGE = (ROOT / "docs/api.md").read_text(encoding="utf-8")
GOOD = """
issuer = "https://broker.acme.test"
audience = "spiffe://acme.test/service/orders"
authorities = ["orders.acme.test"]
[[rules]]
method = "POST"
path = "/orders"
action = "orders.create"
resource = "https://orders.acme.test/orders"
ignore = ["body"]
"""
SECRET = "hunter2-do-not-show"
NETWORK = '[broker]\ntarget = "broker.acme.test:8443"\n'
ID, API = 'id = "spiffe://acme.test/action-broker"\n', 'workload_api = "unix:///run/spire/agent/public/api.sock"\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guard.toml"


def loaded(file: Path, text: str) -> GuardConfig:
    file.write_text(text)
    return load(file)


def mistakes(file: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        loaded(file, text)
    return str(error.value)


def test_the_file_that_is_shipped_holds() -> None:
    config = load(DEPLOY / "guard.toml")
    assert config.broker.socket is None
    assert config.listen == "unix:///run/action-broker/guard.sock"


def rows(first: str) -> dict[str, str]:
    """Key and default in the table of docs/api.md that begins so."""
    text = PAGE[PAGE.index(f"| {first} | default |") :].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([a-z_.]+)` \| (.*?) \|", text, re.MULTILINE))


def keys(model: type[BaseModel], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{above}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            found[above + name] = "required" if field.is_required() else "none" if default is None else str(default)
    return found


def test_the_page_has_every_key_with_its_default() -> None:
    assert rows("key of guard.toml") == keys(GuardConfig)
    assert rows("key of a rule") == keys(DeclaredRule)


def test_the_files_that_are_shown_hold(file: Path) -> None:
    shown = re.findall(r"^```toml guard\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [len(loaded(file, text).rules) for text in shown] == [2]
    written = (declared.__doc__ or "").partition("\n\n")[2].partition("\n\nWhat is not")[0]
    assert len(Rules(**tomllib.loads(textwrap.dedent(written))).rules) == 2


def test_what_has_a_default_may_be_left_out(file: Path) -> None:
    config = loaded(file, GOOD)
    assert config.broker.socket == "/run/action-broker/broker.sock"
    assert (config.socket_mode, config.operations_listen) == ("0660", "127.0.0.1:9465")
    assert loaded(file, f'operations_listen = ""\n{GOOD}').operations_listen is None


def test_all_mistakes_come_in_one_report(file: Path) -> None:
    said = mistakes(
        file,
        'issuer = "http://b.test"\naudience = "orders"\nauthorities = ["Orders.test", "orders.test/x"]\n'
        'socket_mode = "660"\nlisten = "0.0.0.0:1"\nfail_open = true\npublic = ["healthz"]\n'
        '[broker]\ntarget = "nowhere"\n[[rules]]\nmethod = "POST"\naction = "a"\nresource = "x"\n',
    )
    keys = ("issuer", "audience", "authorities.0", "authorities.1", "socket_mode", "listen", "fail_open", "public.0")
    for key in (*keys, "broker.target", "rules.0.resource"):
        assert f"\n  {key}: " in said, key
    assert said.startswith("10 mistakes in ")


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:9191", "192.0.2.1:9191", "[::]:9191", "127.0.0.1:99999", "unix:relative", "localhost.evil.test:1"],
)
def test_it_answers_to_nobody_far_away(file: Path, listen: str) -> None:
    """What Envoy tells it is not encrypted."""
    assert "\n  listen: " in mistakes(file, f'listen = "{listen}"\n{GOOD}')
    for near in ("127.0.0.1:9191", "[::1]:0", "localhost:9191", "unix:/run/guard.sock", "unix:///run/guard.sock"):
        assert loaded(file, f'listen = "{near}"\n{GOOD}').listen == near


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (NETWORK, "needs id"),
        (NETWORK + ID, "needs id"),
        (NETWORK + API, "needs id"),
        (NETWORK + ID + API + "server_uids = [0]\n", "are for a broker behind a socket"),
        (NETWORK + ID + API + 'spiffe_id = "spiffe://acme.test/x"\n', "are for a broker behind a socket"),
        ("[broker]\n" + ID, "are for a broker at HOST:PORT"),
        ("[broker]\n" + API, "are for a broker at HOST:PORT"),
    ],
)
def test_who_the_broker_is_is_said_for_the_way_to_it_and_for_no_other(file: Path, table: str, why: str) -> None:
    assert "\n  broker: Value error, " in (said := mistakes(file, GOOD + table))
    assert why in said
    assert loaded(file, GOOD + NETWORK + ID + API).broker.target == "broker.acme.test:8443"
    assert loaded(file, GOOD + "[broker]\nserver_uids = [0, 1600]\n").broker.server_uids == (0, 1600)


def test_a_service_without_a_name_is_a_mistake(file: Path) -> None:
    assert "\n  authorities: " in mistakes(file, GOOD.replace('["orders.acme.test"]', "[]"))


def test_a_value_in_the_wrong_place_is_not_told(file: Path) -> None:
    """Somebody's password may stand there; the report goes to logs."""
    said = mistakes(
        file,
        f'issuer = "https://user:{SECRET}@b.test"\naudience = "{SECRET}"\nauthorities = ["{SECRET}@b.test"]\n'
        f'password = "{SECRET}"\nlisten = "{SECRET}"\n[broker]\ntarget = "{SECRET}@b"\nid = "{SECRET}"\n',
    )
    assert said.count("\n") >= 6
    assert SECRET not in said


def test_a_file_that_is_not_there_or_not_toml_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml is not there"):
        load(tmp_path / "none.toml")
    assert str(file) in mistakes(file, f'issuer = "{SECRET}')
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=str(file)):
        load(file)
