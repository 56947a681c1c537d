"""Sessions of a whole broker: scored by commands of other workloads, moved by a real transmitter, kept over kill -9."""

import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from support.broker import ISSUER, RunningBroker
from support.cli import COMMAND, LIMIT_S, Ran, clean_environment
from support.oidc import JWKS, OidcServer, oidc_server
from support.processes import Child
from support.security_events import REVOKED, SECRET, Transmitting, opaque
from support.sessions import POLICIES
from support.whole_broker import AGENT, ORDERS, Whole, ended, launch, served, whole_broker

from broker.client import Client
from broker.edges.http_events import CONTENT_TYPE, PATH
from broker.errors import BrokerError, Reason, Refused
from broker.ledger.records import Intent, Refusal
from broker.ledger.scope_records import SecurityEvent, SessionBound, SessionScored

TOOL = ("https://tools.acme.test/search", ORDERS)


@dataclass
class Place:
    """A broker with a transmitter beside it."""

    whole: Whole
    keys: OidcServer
    by: Transmitting

    def cli(self, path: str, *arguments: str) -> Ran:
        """`action-broker session ARGUMENTS` as this workload, which is registered before it begins."""
        where = ("--socket", self.whole.broker.socket, "--issuer", ISSUER)
        process = subprocess.Popen(
            ["sh", "-c", 'read begin; exec "$@"', "sh", *COMMAND, "session", *arguments, *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        with process:
            try:
                entry = self.whole.domain.entry(path, process.pid)
                Child(process).tell("")
                out, err = process.communicate("", LIMIT_S)
                self.whole.domain.delete(entry)
            finally:
                process.kill()
        return Ran(process.returncode, out, err)

    def score(self, level: str, session: str = "s-1", *more: str, by: str = "operator-of-sessions") -> Ran:
        return self.cli(by, "score", session, "--principal", AGENT, "--level", level, *more)

    async def push(self, token: str, shown: str = SECRET) -> int:
        """As the transmitter does it. The broker's certificate names no host: its own tests look at that."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        headers = {"Content-Type": CONTENT_TYPE, "Authorization": f"Bearer {shown}"}
        url = f"https://127.0.0.1:{self.whole.broker.http_port}{PATH}"
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session,
            session.post(url, data=token, headers=headers) as answer,
        ):
            return answer.status

    def token(self, level: str = "HIGH", **how: object) -> str:
        return self.by.token(datetime.now(UTC), level, **how)


POLICY = POLICIES | {
    "scores.cedar": """
@id("who-scores") permit (
  principal == Workload::"spiffe://acme.test/operator-of-sessions", action == Action::"broker.score", resource
) when { context has spire };
"""
}


@contextmanager
def beside(keys: OidcServer, folder: Path) -> Iterator[Whole]:
    secret = folder / "secret"
    secret.write_text(f"{SECRET}\n")
    secret.chmod(0o600)
    table = {
        "jwks_url": keys.issuer + JWKS,
        "ca_file": str(keys.ca_file),
        "bearer_file": str(secret),
        "principals": ["spiffe://acme.test/build/"],
    }
    with whole_broker(POLICY, **{f'session.transmitters."{keys.issuer}"': table}) as whole:
        yield whole


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with oidc_server(tmp_path / "transmitter") as keys:
        by = Transmitting(issuer=keys.issuer, audience=ISSUER, signer=keys.signer)
        with beside(keys, tmp_path) as whole:
            yield Place(whole, keys, by)


async def why_not(client: Client, name: str = "narrow", session: str = "s-1") -> str:
    try:
        await client.request(f"tools.{name}", *TOOL, session=session)
    except BrokerError as error:
        return error.reason
    return ""


async def test_a_session_from_its_first_score_to_its_revocation(place: Place) -> None:
    """The agent is this process; who scores are commands of others, and a transmitter over TLS."""
    async with place.whole.client(AGENT) as agent, place.whole.client(AGENT) as thief:
        assert await why_not(agent) == Reason.SESSION_RISK, "nobody scored it"
        assert await why_not(agent, session="") == Reason.DENIED, "policy wants one"
        ran = place.score("LOW", "s-1", "--reason", "a new task", "--json")
        assert (ran.code, ran.value["session"], ran.value["level"]) == (0, "s-1", "LOW")
        assert await why_not(agent) == ""
        assert await why_not(thief) == Reason.SESSION_RISK, "the same workload with another key"
        assert await place.push(place.token("HIGH")) == 202
        assert await why_not(agent) == Reason.SESSION_RISK
        assert await why_not(agent, session="s-2") == Reason.SESSION_RISK, "a new name is no way out"
        ran = place.score("MEDIUM")
        assert (ran.code, "scored" in ran.out, "is MEDIUM" in ran.out) == (0, True, True)
        assert await why_not(agent) == "", "the narrow tool"
        assert await why_not(agent, "wide") == Reason.DENIED, "and not the wide one"
        assert await place.push(place.token(kind=REVOKED, subject=opaque())) == 202
        assert await why_not(agent) == Reason.SESSION_RISK
    records = place.whole.records()
    scores = [(one.level, one.by) for one in records if isinstance(one, SessionScored)]
    operator, transmitter = "spiffe://acme.test/operator-of-sessions", place.keys.issuer
    assert scores == [("LOW", operator), ("HIGH", transmitter), ("MEDIUM", operator), ("HIGH", transmitter)]
    assert [one.effect for one in records if isinstance(one, SecurityEvent)] == ["scored"] * 2
    assert len([one for one in records if isinstance(one, SessionBound)]) == 1
    assert {one.session for one in records if isinstance(one, Intent)} == {"s-1"}


async def test_what_was_given_in_a_session_ends_with_it_and_a_better_score_brings_it_not_back(place: Place) -> None:
    """Current scope: whoever asks hears of it at once."""
    async with place.whole.client(AGENT) as agent, place.whole.client(ORDERS) as service:
        for session in ("s-1", "s-2"):
            assert place.score("LOW", session).code == 0
        given = await agent.request("tools.narrow", *TOOL, session="s-1")
        beside = await agent.request("tools.narrow", *TOOL, session="s-2")
        await service.check(given.access_token, given.action)
        assert await place.push(place.token("HIGH")) == 202
        with pytest.raises(Refused) as refused:
            await service.check(given.access_token, given.action)
        assert refused.value.reason is Reason.SESSION_RISK
        assert place.score("LOW").code == 0
        with pytest.raises(Refused) as refused:
            await service.check(given.access_token, given.action)
        assert refused.value.reason is Reason.SESSION_RISK, "refused is final"
        await service.check(beside.access_token, beside.action)
        again = await agent.request("tools.narrow", *TOOL, session="s-1")
        await service.check(again.access_token, again.action)


async def test_who_may_not_score_is_told_no_more_than_that(place: Place) -> None:
    for by in ("build/agent", "service/other"):
        ran = place.score("LOW", by=by)
        assert (ran.code, "refused: denied" in ran.err) == (3, True)
        ran = place.score("LOW", "s-1", "--json", by=by)
        assert ran.value["reason"] == "denied"
        assert (await place.whole.recorded(ran.value["correlation_id"], Refusal)).stage == "score"
    assert not [one for one in place.whole.records() if isinstance(one, SessionScored)]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("score", "a b", "--principal", AGENT, "--level", "LOW"), "1 to 128 characters of A-Z"),
        (("score", "s", "--principal", "agent", "--level", "LOW"), "SPIFFE ID does not start with"),
        (("score", "s", "--principal", AGENT, "--level", "NONE"), "is not one of"),
        (("score", "s", "--level", "LOW"), "Missing option '--principal'"),
        (("score", "s", "--principal", AGENT), "Missing option '--level'"),
        (("score",), "Missing argument 'SESSION'"),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(arguments: tuple[str, ...], why: str) -> None:
    ran = subprocess.run(
        [*COMMAND, "session", *arguments], capture_output=True, text=True, check=False, env=clean_environment()
    )
    assert (ran.returncode, why in ran.stderr) == (2, True), ran.stderr


async def test_what_was_scored_and_what_was_bound_survive_kill_9(place: Place) -> None:
    low = place.token("LOW")
    async with place.whole.client(AGENT) as agent:
        assert await place.push(low) == 202
        assert await why_not(agent) == ""
        assert place.score("LOW", "s-2").code == 0
        assert await place.push(place.token("HIGH")) == 202
        place.whole.broker.kill()
    again = restarted(place.whole)
    try:
        place.whole.broker = again
        async with place.whole.client(AGENT) as agent, place.whole.client(AGENT) as thief:
            assert await why_not(agent) == Reason.SESSION_RISK
            assert await place.push(low) == 202
            assert await why_not(agent) == Reason.SESSION_RISK, "the event that made it LOW was taken before"
            assert await why_not(thief, session="s-2") == "", "it had no key yet"
            assert await why_not(agent, session="s-2") == Reason.SESSION_RISK
            assert place.score("LOW").code == 0
            assert await why_not(agent) == Reason.SESSION_RISK, "its key went with the process that had it"
    finally:
        ended(again)


def restarted(whole: Whole) -> RunningBroker:
    """The broker again, as a process of the trust domain."""
    broker = launch(whole.broker.folder / "broker.toml")
    whole.domain.entry("action-broker", broker.process.pid)
    return served(broker)


async def test_a_transmitter_that_is_no_longer_who_it_was_moves_nothing(place: Place) -> None:
    assert await place.push(place.token("LOW"), shown="guessed-secret-of-theirs") == 400
    assert await place.push(place.token("LOW", subject=opaque("s-9"), iss="https://evil.test")) == 400
    old = Transmitting(issuer=place.keys.issuer, audience=ISSUER, signer=place.by.signer)
    place.by.signer = place.keys.rotate("RS256")
    assert await place.push(place.token("LOW")) == 202, "with the key that it publishes now"
    assert await place.push(old.token(datetime.now(UTC), "LOW", jti="old")) == 400
    late = datetime.now(UTC) - timedelta(hours=2)
    assert await place.push(place.by.token(late, "LOW")) == 400
    async with place.whole.client(AGENT) as agent:
        assert await why_not(agent) == ""
