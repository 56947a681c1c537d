"""`pending`, `show`, `approve`, `withdraw`: by workloads, and by people who log in."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from support.approving import digest_of, publish
from support.approving_people import Place, approving_people
from support.cli import COMMAND, Ran, clean_environment
from support.oidc import CLIENT_ID
from support.signing_cli import AGENT, ALICE, BOB, SigningPlace, signing_place
from support.whole_broker import BROKER

from broker.errors import ApprovalRequired
from broker.ledger.records import Approved

NOBODY = "ab" * 32


@pytest.fixture(scope="module")
def place() -> Iterator[SigningPlace]:
    with signing_place() as found:
        yield found


def asked(place: SigningPlace, environment: str = "staging") -> str:
    """The digest of a new request that waits."""
    asking = (*place.asking(environment), "--bundle", place.folder / "unused.json", *place.socket, "--json")
    return place.cli(AGENT, "sign", place.file(), *asking).value["waiting"][0]["request_digest"]


# -- workloads -------------------------------------------------------------------------------------------------------


def test_who_may_approve_sees_what_waits_and_others_see_nothing(place: SigningPlace) -> None:
    digest = asked(place)
    ran = place.cli(ALICE, "pending", *place.socket, "--json")
    (found,) = [one for one in ran.value if one["request_digest"] == digest]
    assert (ran.code, found["principal"], found["state"]) == (0, "spiffe://acme.test/build/agent", "waiting")
    assert found["parameters"]["signing"]["purpose"] == "release"
    assert digest in place.cli(ALICE, "pending", *place.socket).out
    assert place.cli("service/other", "pending", *place.socket, "--json").value == []
    assert "nothing waits" in place.cli("service/other", "pending", *place.socket).out


def test_one_request_is_shown_with_all_that_its_digest_is_over(place: SigningPlace) -> None:
    digest = asked(place)
    ran = place.cli(ALICE, "show", digest, *place.socket)
    assert ran.code == 0
    for said in (digest, "release.sign", "https://releases.acme.test/app", '"environment": "staging"', "│ signer"):
        assert said in ran.out
    assert place.cli("service/other", "show", digest, *place.socket, "--json").value["reason"] == "denied"


def test_somebody_who_is_asked_back_and_says_no_approves_nothing(place: SigningPlace) -> None:
    digest = asked(place)
    for told in ("n\n", "\n", ""):
        ran = place.cli(ALICE, "approve", digest, *place.socket, told=told)
        assert (ran.code, "not approved" in ran.err, "Traceback" in ran.err) == (2, True, False)
    ran = place.cli(ALICE, "approve", digest, *place.socket, "--json")
    assert (ran.code, "--yes" in ran.value["error"]) == (2, True)
    assert place.cli(ALICE, "show", digest, *place.socket, "--json").value["approvals"] == []
    ran = place.cli(ALICE, "approve", digest, "--reason", "ok", "--valid-for", "90s", *place.socket, told="y\n")
    assert (ran.code, "approved as spiffe://acme.test/release-managers/alice" in ran.out) == (0, True)
    (given,) = place.cli(ALICE, "show", digest, *place.socket, "--json").value["approvals"]
    assert (given["by"], given["reason"]) == ("spiffe://acme.test/release-managers/alice", "ok")


def test_an_approval_that_is_withdrawn_counts_for_nothing(place: SigningPlace) -> None:
    digest = asked(place)
    place.approve(digest, ALICE)
    assert place.cli(BOB, "withdraw", digest, *place.socket, "--json").value["reason"] == "denied"  # it is not Bob's
    ran = place.cli(ALICE, "withdraw", digest, "--reason", "second thoughts", *place.socket, "--json")
    assert (ran.code, ran.value) == (0, {"withdrawn": digest})
    assert place.cli(BOB, "show", digest, *place.socket, "--json").value["approvals"] == []
    assert place.cli(ALICE, "withdraw", digest, *place.socket, "--json").code == 3


@pytest.mark.parametrize(
    ("path", "digest", "reason"),
    [(AGENT, None, "denied"), ("service/other", None, "denied"), (ALICE, NOBODY, "denied")],
    ids=["the caller itself", "who may not", "what nobody asked for"],
)
def test_whom_policy_does_not_permit_approves_nothing(
    place: SigningPlace, path: str, digest: str | None, reason: str
) -> None:
    ran = place.cli(path, "approve", digest or asked(place), "--yes", *place.socket, "--json")
    assert (ran.code, ran.value["reason"]) == (3, reason)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("approve", "nothing"), "64 lower-case hexadecimal digits"),
        (("show", NOBODY.upper()), "64 lower-case hexadecimal digits"),
        (("withdraw",), "Missing argument 'DIGEST'"),
        (("approve", NOBODY, "--valid-for", "2d"), "such as 90s, 10m or 1h"),
        (("approve", NOBODY, "--client-id", "x"), "--login ISSUER or --id-token-file FILE"),
        (("approve", NOBODY, "--login", "https://login.test", "--id-token-file", __file__), "choose one"),
        (("approve", NOBODY, "--login", "https://login.test"), "--login needs --client-id"),
        (("approve", NOBODY, "--login", "http://login.test", "--client-id", "x"), "https"),
        (("approve", NOBODY, "--id-token-file", __file__, "--url", "https://b.test"), "a person needs --broker-id"),
        (("show", NOBODY, "--id-token-file", __file__, "--broker-id", BROKER), "a person needs --trust-bundle"),
        (
            ("show", NOBODY, "--id-token-file", __file__, "--broker-id", "broker", "--trust-bundle", __file__),
            "SPIFFE ID",
        ),
        (
            ("show", NOBODY, "--id-token-file", __file__, "--broker-id", BROKER, "--trust-bundle", __file__),
            "no trust bundle in PEM",
        ),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(place: SigningPlace, arguments: tuple[str, ...], why: str) -> None:
    ran = place.cli(ALICE, *arguments, *place.socket)
    assert (ran.code, why in ran.err) == (2, True), ran.err
    assert "Traceback" not in ran.err


# -- people ----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def people(tmp_path: Path) -> AsyncIterator[Place]:
    async with approving_people(tmp_path) as running:
        bundle = running.desk.parts.authority.root.certificate.public_bytes(Encoding.PEM)
        (tmp_path / "bundle.pem").write_bytes(bundle)
        yield running


def reach(people: Place, broker_id: str = BROKER) -> tuple[str, ...]:
    return ("--url", people.url, "--broker-id", broker_id, "--trust-bundle", str(people.folder / "bundle.pem"))


def token_file(people: Place, digest: str = "", **claims: Any) -> tuple[str, ...]:
    file = people.folder / "token"
    file.write_text(people.token(digest, **claims) + "\n")
    return ("--id-token-file", str(file))


async def cli(*arguments: object) -> Ran:
    """Broker and issuer are in this process, so it must not stand still."""
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    out, err = await process.communicate()
    return Ran(process.returncode or 0, out.decode(), err.decode())


async def test_people_with_an_id_token_look_approve_and_take_it_back(people: Place) -> None:
    digest = people.desk.digest
    shown = await cli("show", digest, *token_file(people), *reach(people), "--json")
    assert (shown.code, shown.value["resource"]) == (0, publish().resource), shown.out
    for sub in ("ada", "eve"):
        token = token_file(people, sub=sub)
        ran = await cli("approve", digest, "--yes", "--reason", "looked at it", *token, *reach(people), "--json")
        assert (ran.code, ran.value["by"].startswith(people.oidc.issuer)) == (0, True), ran.out
    ran = await cli("withdraw", digest, *token_file(people, sub="eve"), *reach(people))
    assert (ran.code, ran.out) == (0, "withdrawn\n")
    with pytest.raises(ApprovalRequired):
        await people.desk.ask()
    assert (await cli("approve", digest, "--yes", *token_file(people, sub="eve"), *reach(people))).code == 0
    assert (await people.desk.ask()).token
    records = [one for one in await people.desk.parts.records() if isinstance(one, Approved)]
    assert [(one.method, one.reason) for one in records] == [("id-token", "looked at it")] * 2 + [("id-token", "")]


async def test_a_person_logs_in_at_the_issuer_in_a_browser(people: Place) -> None:
    login = ("--login", people.oidc.issuer, "--client-id", CLIENT_ID, "--login-ca", str(people.oidc.ca_file))
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        *("approve", people.desk.digest, "--yes", "--json", "--no-browser", "--scope", "groups", *login),
        *reach(people),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(),
    )
    assert process.stderr is not None
    assert (await process.stderr.readline()).decode() == "log in at\n"
    url = (await process.stderr.readline()).decode().strip()
    tls = aiohttp.TCPConnector(ssl=_issuers_tls(people))
    async with aiohttp.ClientSession(connector=tls) as browser, browser.get(url) as answer:
        assert answer.status == 200
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert Ran(0, out.decode(), "").value["approved"] == people.desk.digest
    assert people.oidc.asked["scope"] == "openid email groups"
    assert people.oidc.asked["nonce"] == people.desk.digest


def _issuers_tls(people: Place) -> Any:
    import ssl  # noqa: PLC0415

    return ssl.create_default_context(cafile=str(people.oidc.ca_file))


async def test_a_login_that_does_not_fit_approves_nothing_and_says_what_to_do(people: Place) -> None:
    digest = people.desk.digest
    for claims, reason, advice in (
        ({"aud": "shop"}, "wrong_audience", "another client id"),
        ({"auth_time": 1}, "expired", "log in again"),
        ({"nonce": NOBODY}, "unauthenticated", "is it about this request"),
    ):
        token = token_file(people, **claims)
        ran = await cli("approve", digest, "--yes", *token, *reach(people), "--json")
        assert (ran.code, ran.value["reason"]) == (3, reason)
        assert advice in ran.value["error"]
        assert (people.folder / "token").read_text().strip() not in ran.out + ran.err
    people.oidc.person = {"sub": "visitor", "groups": ["staff"]}
    ran = await cli("approve", digest, "--yes", *token_file(people), *reach(people), "--json")
    assert (ran.code, ran.value["reason"]) == (3, "denied")
    assert digest_of(publish()) == digest


async def test_no_token_is_shown_to_who_is_not_the_broker(people: Place) -> None:
    ran = await cli("show", people.desk.digest, *token_file(people), *reach(people, AS_ANOTHER), "--json")
    assert (ran.code, BROKER in ran.value["error"]) == (4, True)
    people.folder.joinpath("bundle.pem").write_bytes(people.oidc.ca_file.read_bytes())
    ran = await cli("show", people.desk.digest, *token_file(people), *reach(people), "--json")
    assert (ran.code, ran.value["reason"]) == (4, "broker_unreachable")


AS_ANOTHER = "spiffe://acme.test/another-broker"


async def test_an_issuer_that_is_away_is_unavailable(people: Place) -> None:
    login = ("--login", "https://127.0.0.1:9", "--client-id", CLIENT_ID, "--no-browser")
    ran = await cli("show", people.desk.digest, *login, *reach(people), "--json")
    assert (ran.code, ran.value["reason"]) == (4, "identity_unavailable")
