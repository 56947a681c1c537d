"""`doctor` on signing: the CA, keys, tokens, timestamps, trusted builders, templates and issuers, right and wrong."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.cli import cli
from support.oidc import CLIENT_ID, oidc_server
from support.softhsm import SoftHsm
from support.timestamps import Tsa

from broker.cli.config import load
from broker.cli.doctor_evidence import approvals, provenance
from broker.cli.doctor_finding import Finding
from broker.cli.doctor_signing import signing
from broker.decision.policy_init import policy_init
from broker.identity.spiffe_id import SpiffeId

ISSUER = "https://broker.acme.test"
BUILDER = "https://ci.acme.test/builders/release"


class Place:
    """A folder, and a configuration of these tables."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ca = folder, folder / "ca"
        policy_init(folder / "policy", SpiffeId.parse("spiffe://acme.test/operator"))

    def made_ca(self, *options: object, issuer: str = ISSUER) -> None:
        ran = cli("ca", "init", self.ca, "--issuer", issuer, *options)
        assert ran.code == 0, ran.err

    def key(self, name: str = "key.pem", mode: int = 0o600) -> Path:
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key = ec.generate_private_key(ec.SECP256R1())
        return self.file(name, key.private_bytes(encoding, form, serialization.NoEncryption()), mode)

    def public_key(self) -> Path:
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        key = ec.generate_private_key(ec.SECP256R1()).public_key()
        return self.file("builder.pub", key.public_bytes(encoding, form))

    def file(self, name: str, content: bytes | str, mode: int = 0o644) -> Path:
        found = self.folder / name
        found.write_bytes(content.encode() if isinstance(content, str) else content)
        found.chmod(mode)
        return found

    async def look(self, now: datetime | None = None, **keys: Any) -> dict[str, list[Finding]]:
        """What doctor finds, by what it looked at. keys: of the configuration, with __ for a dot."""
        given: Mapping[str, Any] = {
            "issuer": ISSUER,
            "trust_domain": "acme.test",
            "policy_folder": str(self.folder / "policy"),
        } | {name.replace("__", "."): value for name, value in keys.items()}
        file = self.file("broker.toml", "".join(f"{name} = {_toml(value)}\n" for name, value in given.items()))
        config, found = load(file), {}
        every = [finding async for finding in signing(config, now or datetime.now(UTC))]
        every += [*provenance(config), *[finding async for finding in approvals(config)]]
        for finding in every:
            assert finding.verdict == "ok" or finding.fix, finding
            found.setdefault(finding.what, []).append(finding)
        return found


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml(one)}" for name, one in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda one: ("ok", "warning", "broken").index(one.verdict))


async def test_where_nothing_of_it_is_configured_there_is_nothing_to_say(place: Place) -> None:
    assert await place.look() == {}


# -- the CA ----------------------------------------------------------------------------------------------------------


async def test_a_ca_tells_who_signs_and_until_when_and_that_its_roots_key_belongs_elsewhere(place: Place) -> None:
    place.made_ca()
    found = await place.look(signing__ca_folder=place.ca)
    fine, root = found["signing CA"]
    assert (fine.verdict, "issuing-1 signs, its key in a file" in fine.detail) == ("ok", True)
    assert (root.verdict, str(place.ca / "root-1.key.pem") in root.detail) == ("warning", True)
    assert "stops verifying when its certificate ends" in found["timestamp authority"][0].detail
    (place.ca / "root-1.key.pem").unlink()
    assert [one.verdict for one in (await place.look(signing__ca_folder=place.ca))["signing CA"]] == ["ok"]


async def test_a_ca_that_ends_soon_or_has_ended(place: Place) -> None:
    place.made_ca("--issuing-days", "31")
    (place.ca / "root-1.key.pem").unlink()
    for days, verdict in ((0, "ok"), (2, "warning"), (40, "broken")):
        (finding,) = (await place.look(datetime.now(UTC) + timedelta(days=days), signing__ca_folder=place.ca))[
            "signing CA"
        ]
        assert (finding.verdict, days) == (verdict, days)
    assert "ca show" in finding.fix


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda ca: ca.chmod(0o755), "is open to others"),
        (lambda ca: (ca / "ca.json").unlink(), "cannot be read"),
        (lambda ca: (ca / "ca.json").write_text("{"), "damaged"),
        (lambda ca: (ca / "issuing-1.key.pem").chmod(0o644), "can be read or written by others"),
        (lambda ca: (ca / "issuing-1.key.pem").unlink(), "cannot be read"),
        (lambda ca: (ca / "issuing-1.key.pem").write_bytes((ca / "root-1.key.pem").read_bytes()), "not the one"),
    ],
)
async def test_a_ca_that_cannot_sign(place: Place, wrong: Any, why: str) -> None:
    place.made_ca()
    wrong(place.ca)
    finding = worst((await place.look(signing__ca_folder=place.ca))["signing CA"])
    assert (finding.verdict, why in finding.detail) == ("broken", True), finding


async def test_a_ca_of_another_issuer(place: Place) -> None:
    place.made_ca(issuer="https://other.test")
    finding = worst((await place.look(signing__ca_folder=place.ca))["signing CA"])
    assert (finding.verdict, "made for the issuer https://other.test" in finding.detail) == ("broken", True)


# -- keys ------------------------------------------------------------------------------------------------------------


async def test_a_key_in_a_file_is_for_development_and_one_that_others_can_read_is_none(place: Place) -> None:
    keys = {"dev": {"file": place.key()}, "open": {"file": place.key("open.pem", 0o644)}}
    found = await place.look(signing__keys=keys)
    assert (found["signing key dev"][0].verdict, found["signing key open"][0].verdict) == ("warning", "broken")
    assert "chmod 600" in found["signing key open"][0].detail
    assert set(found) == {"signing key dev", "signing key open"}


async def test_a_library_that_is_none(place: Place) -> None:
    token = {"hsm": {"module": place.file("p11.so", "no library"), "label": "acme", "pin_file": place.file("pin", "1")}}
    found = await place.look(signing__tokens=token, signing__keys={"a": {"token": "hsm", "label": "a"}})
    assert set(found) == {"PKCS#11 token hsm"}
    assert found["PKCS#11 token hsm"][0].verdict == "broken"


@pytest.mark.softhsm
async def test_keys_in_a_token_are_opened_and_what_does_not_confine_them_is_told(place: Place, tmp_path: Path) -> None:
    with SoftHsm(tmp_path / "hsm") as hsm:
        hsm.make_key("p256", "release")
        hsm.make_key("p384", "loose", EXTRACTABLE=True)
        token = {"hsm": {"module": hsm.module, "label": hsm.label, "pin_file": hsm.pin_file}}
        keys = {name: {"token": "hsm", "label": name} for name in ("release", "loose", "missing")}
        found = await place.look(signing__tokens=token, signing__keys=keys)
        assert {what: worst(findings).verdict for what, findings in found.items()} == {
            "signing key release": "ok",
            "signing key loose": "warning",
            "signing key missing": "broken",
        }
        assert "ecdsa-p256" in found["signing key release"][0].detail
        hsm.take_away()
        away = await place.look(signing__tokens=token, signing__keys={"release": keys["release"]})
        assert away["signing key release"][0].verdict == "broken"
        hsm.put_back()
        hsm.write_pin("00000000")
        wrong = await place.look(signing__tokens=token, signing__keys={"release": keys["release"]})
        assert (wrong["signing key release"][0].verdict, "00000000" in str(wrong)) == ("broken", False)


# -- timestamps ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def authority(tsa: Tsa, at: datetime, **changes: Any) -> AsyncIterator[str]:
    """It, over HTTP: its URL."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=tsa.answer(await request.read(), at, **changes))

    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def test_a_timestamp_authority_is_asked_and_its_answer_verified(place: Place) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    tsa, other, brief = Tsa.made(now), Tsa.made(now), Tsa.made(now, days=20)
    for asked, believed, changes, verdict in (
        (tsa, tsa, {}, "ok"),
        (tsa, other, {}, "broken"),
        (tsa, tsa, {"imprint": bytes(32)}, "broken"),
        (tsa, tsa, {"nonce": 1}, "broken"),
        (brief, brief, {}, "warning"),
    ):
        chain = place.file("tsa.pem", believed.pem)
        async with authority(asked, now, **changes) as url:
            found = await place.look(now, signing__timestamp={"url": url, "chain_file": chain})
        assert [one.verdict for one in found["timestamp authority"]] == [verdict], (changes, found)
    gone = await place.look(now, signing__timestamp={"url": url, "chain_file": place.file("tsa.pem", tsa.pem)})
    assert gone["timestamp authority"][0].verdict == "broken"
    bad = await place.look(now, signing__timestamp={"url": url, "chain_file": place.file("tsa.pem", "none")})
    assert "chain_file" in bad["timestamp authority"][0].fix


# -- whom we believe -------------------------------------------------------------------------------------------------


async def test_a_trust_file_that_is_right_empty_wrong_or_anybodys(place: Place) -> None:
    builder = f'[builders."{BUILDER}"]\nkeys = {{ release = "{place.public_key()}" }}\n'
    for text, mode, verdict, why in (
        (f"max_age_s = 60\n{builder}", 0o644, "ok", "1 builders"),
        (f"max_age_s = 60\n{builder}", 0o666, "broken", "others can write"),
        ("max_age_s = 60\n", 0o644, "warning", "names no builder"),
        (f"max_age_s = 60\nx = 1\n{builder}", 0o644, "broken", "x: Extra inputs"),
    ):
        found = await place.look(provenance__trust_file=place.file("trust.toml", text, mode))
        finding = worst(found["provenance trust"])
        assert (finding.verdict, why in finding.detail) == (verdict, True), finding
    missing = await place.look(provenance__trust_file=place.folder / "none.toml")
    assert missing["provenance trust"][0].verdict == "broken"


async def test_sigstore_identities_need_a_root_to_be_believed_by(place: Place) -> None:
    identity = '[{ issuer = "https://login.test", identity = "https://ci.test/x" }]'
    trust = place.file("trust.toml", f'max_age_s = 60\n[builders."{BUILDER}"]\nsigstore = {identity}\n')
    found = await place.look(provenance__trust_file=trust)
    assert [one.verdict for one in found["Sigstore trusted root"]] == ["warning"]
    wrong = place.file("root.json", "{}")
    found = await place.look(provenance__trust_file=trust, provenance__sigstore_trusted_root=wrong)
    assert [one.verdict for one in found["Sigstore trusted root"]] == ["broken"]
    found = await place.look(provenance__trust_file=trust, provenance__sigstore_trusted_root="public")
    assert [one.verdict for one in found["Sigstore trusted root"]] == ["ok"]


async def test_templates_are_read_and_those_for_no_action_are_told(place: Place) -> None:
    texts = place.folder / "texts"
    texts.mkdir(mode=0o755)
    (texts / "nothing.here.txt").write_text("${principal}\n")
    found = await place.look(approval__templates_folder=texts)
    assert [one.verdict for one in found["approval templates"]] == ["warning", "ok"]
    (texts / "nothing.here.txt").write_text("${no_such_field}\n")
    (finding,) = (await place.look(approval__templates_folder=texts))["approval templates"]
    assert (finding.verdict, "no_such_field" in finding.detail) == ("broken", True)


async def test_an_oidc_issuer_is_asked_for_its_keys(place: Place, tmp_path: Path) -> None:
    async with oidc_server(tmp_path / "issuer") as oidc:
        what = f"OIDC issuer {oidc.issuer}"
        table = {oidc.issuer: {"audience": CLIENT_ID, "ca_file": oidc.ca_file}}
        found = await place.look(approval__issuers=table)
        assert (found[what][0].verdict, "1 keys" in found[what][0].detail) == ("ok", True)
        oidc.published = []
        assert (await place.look(approval__issuers=table))[what][0].verdict == "broken"
        oidc.metadata = {"issuer": "https://another.test"}
        assert "another issuer" in (await place.look(approval__issuers=table))[what][0].detail
        oidc.behaves()
        untrusted = {oidc.issuer: {"audience": CLIENT_ID}}
        assert (await place.look(approval__issuers=untrusted))[what][0].verdict == "broken"
    assert (await place.look(approval__issuers=table))[what][0].verdict == "broken"


def test_the_command_tells_them_beside_all_else(place: Place) -> None:
    place.made_ca()
    file = place.file(
        "broker.toml",
        f'issuer = "{ISSUER}"\ntrust_domain = "acme.test"\npolicy_folder = "{place.folder}/policy"\n'
        f'signing.ca_folder = "{place.ca}"\nprovenance.trust_file = "{place.folder}/none.toml"\n'
        f'spire.workload_api = "unix://{place.folder}/none.sock"\nunix.socket = "{place.folder}/b.sock"\n',
    )
    ran = cli("doctor", "--config", file, "--json")
    verdicts = {one["what"]: one["verdict"] for one in ran.value["findings"]}
    assert (ran.code, verdicts["provenance trust"], verdicts["signing CA"]) == (3, "broken", "warning")
    assert {"kernel", "agent socket", "policy", "store"} <= set(verdicts)
