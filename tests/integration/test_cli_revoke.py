"""`revoke`, `standing`, `break-glass` as operators have them: a process of its own beside a whole broker."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from support.broker import ISSUER
from support.cli import COMMAND, LIMIT_S, Ran, clean_environment
from support.operating import CLOSED, EMERGENCY_POLICY, EMERGENCY_SCHEMA, WHY, why
from support.processes import Child
from support.whole_broker import AGENT, ORDERS, POLICIES, RESOURCE, Whole, whole_broker

from broker.client import Client
from broker.ledger.records import BreakGlass, ScopeRefused, StandingDenial, StandingLifted

EMERGENCIES = {**POLICIES, "emergency.cedarschema": EMERGENCY_SCHEMA, "emergency.cedar": EMERGENCY_POLICY}
OPERATOR = "operator"


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    with whole_broker(EMERGENCIES) as found:
        yield found


@contextmanager
def began(whole: Whole, path: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`action-broker ARGUMENTS` as this workload, which is registered before it begins."""
    process = subprocess.Popen(
        ["sh", "-c", 'read begin; exec "$@"', "sh", *COMMAND, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    with process:
        try:
            whole.domain.entry(path, process.pid)
            Child(process).tell("")
            yield process
        finally:
            process.kill()


def cli(whole: Whole, path: str, *arguments: object, told: str = "") -> Ran:
    """The same, to its end, with where the broker is."""
    where = ("--socket", whole.broker.socket, "--issuer", ISSUER)
    with began(whole, path, *arguments, *where) as process:
        out, err = process.communicate(told, LIMIT_S)
        return Ran(process.returncode, out, err)


async def read(client: Client, name: str = "orders.long") -> str:
    return (await client.request(name, RESOURCE, ORDERS)).access_token


def unfolded(ran: Ran) -> str:
    """What a table says, wherever its lines were folded."""
    return " ".join(ran.out.split())


def last(whole: Whole, kind: type) -> object:
    return [one for one in whole.records() if isinstance(one, kind)][-1]


async def test_what_it_would_hit_is_shown_first_and_nothing_happens_unless_somebody_says_yes(whole: Whole) -> None:
    async with whole.client(AGENT) as agent:
        cli(whole, OPERATOR, "revoke", "--trust-domain", "acme.test", "--yes")
        await read(agent)
        for told in ("n\n", "\n", ""):
            ran = cli(whole, OPERATOR, "revoke", "--workload", AGENT, told=told)
            assert (ran.code, "not revoked" in ran.err, "Traceback" in ran.err) == (2, True, False)
            for said in ("hits 1 live credential", AGENT, "orders.long", RESOURCE, "new ones may be given at once"):
                assert said in ran.out
        ran = cli(whole, OPERATOR, "revoke", "--workload", AGENT, "--json")
        assert (ran.code, "--yes" in ran.value["error"]) == (2, True)
        ran = cli(whole, OPERATOR, "revoke", "--workload", AGENT, "--dry-run", "--json")
        assert (ran.code, ran.value["hits"], ran.value["standing_id"]) == (0, 1, "")
        (shown,) = ran.value["credentials"]
        assert (shown["principal"], shown["action"], shown["audience"]) == (AGENT, "orders.long", ORDERS)
        assert await why(read(agent)) == ""

        ran = cli(whole, OPERATOR, "revoke", "--jti", shown["jti"], "--reason", "lost", told="y\n")
        assert (ran.code, "revoked: 1 live credential" in ran.out) == (0, True), ran.err
        record = last(whole, ScopeRefused)
        assert isinstance(record, ScopeRefused)
        assert (record.jtis, record.detail, record.cause) == ((shown["jti"],), "lost", "operator")
        ran = cli(whole, OPERATOR, "revoke", "--jti", shown["jti"])
        assert (ran.code, "nothing to revoke" in ran.out) == (0, True)


async def test_a_denial_stands_is_listed_and_lifted(whole: Whole) -> None:
    async with whole.client(AGENT) as agent:
        ran = cli(whole, OPERATOR, "revoke", "--workload", AGENT, "--until", "30m", "--reason", "broken into", "--yes")
        assert ran.code == 0, ran.err
        assert "new ones are refused until " in ran.out
        denial = last(whole, StandingDenial)
        assert isinstance(denial, StandingDenial)
        assert denial.until is not None
        assert timedelta(minutes=29) < denial.until - datetime.now(UTC) <= timedelta(minutes=30)
        assert f"revoke --lift {denial.id}" in ran.out
        assert await why(read(agent)) == "revoked"
        ran = cli(whole, OPERATOR, "standing")
        for said in (denial.id, "denied", AGENT, "broken into", "by spiffe://acme.test/operator"):
            assert said in unfolded(ran)
        (shown,) = cli(whole, OPERATOR, "standing", "--json").value
        assert (shown["id"], shown["kind"], shown["principal"]) == (denial.id, "denial", AGENT)
        assert shown["until"] == denial.until.isoformat()
        ran = cli(whole, OPERATOR, "revoke", "--lift", denial.id, "--reason", "built anew", "--json")
        assert (ran.code, ran.value) == (0, {"lifted": denial.id})
        assert await why(read(agent)) == ""
        assert "nothing stands" in cli(whole, OPERATOR, "standing").out
        assert cli(whole, OPERATOR, "standing", "--json").value == []
        ran = cli(whole, OPERATOR, "revoke", "--lift", denial.id, "--json")
        assert (ran.code, ran.value["reason"]) == (3, "denied")


async def test_until_a_time_or_until_it_is_lifted_new_ones_are_refused(whole: Whole) -> None:
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=30)
    ran = cli(whole, OPERATOR, "revoke", "--action", "orders.brief", "--until", ends.isoformat(), "--yes", "--json")
    assert ran.code == 0, ran.out
    assert last(whole, StandingDenial).until == ends  # type: ignore[attr-defined]
    more = cli(whole, OPERATOR, "revoke", "--action", "orders.brief", "--standing", "--yes", "--json")
    assert last(whole, StandingDenial).until is None  # type: ignore[attr-defined]
    for one in (ran, more):
        assert cli(whole, OPERATOR, "revoke", "--lift", one.value["standing_id"]).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("revoke", "--workload", AGENT, "--yes"),
        ("revoke", "--workload", AGENT, "--standing", "--yes"),
        ("revoke", "--workload", AGENT, "--dry-run"),
        ("revoke", "--lift", "0011223344556677"),
        ("standing",),
        ("break-glass", AGENT, CLOSED, RESOURCE, "--until", "5m", "--reason", WHY),
    ],
)
async def test_who_is_no_operator_is_refused(whole: Whole, arguments: tuple[str, ...]) -> None:
    async with whole.client(AGENT) as agent:
        await read(agent)
        ran = cli(whole, "service/other", *arguments, "--json")
        assert (ran.code, ran.value["reason"]) == (3, "denied")
        assert await why(read(agent)) == ""
    people = cli(whole, "service/other", *arguments)
    assert (people.code, "refused: denied" in people.err, "hits" in people.out) == (3, True, False)


async def test_what_an_operator_may_not_deny_is_refused_with_a_reason(whole: Whole) -> None:
    for chosen in (("--trust-domain", "acme.test"), ("--action", "broker.operate")):
        ran = cli(whole, OPERATOR, "revoke", *chosen, "--standing", "--yes", "--json")
        assert (ran.code, ran.value["reason"]) == (3, "malformed")
    assert cli(whole, OPERATOR, "standing", "--json").value == []


@pytest.mark.parametrize(
    ("arguments", "why_not"),
    [
        (("revoke",), "nothing is selected"),
        (("revoke", "--workload", "build/agent"), "SPIFFE ID"),
        (("revoke", "--workload", "spiffe://acme.test/"), "trust domain is named as such"),
        (("revoke", "--action", "orders read"), "dotted name"),
        (("revoke", "--trust-domain", "ACME"), "trust domain"),
        (("revoke", "--jti", "x"), "16 to 64"),
        (("revoke", "--jti", "0" * 32, "--standing"), "never minted again"),
        (("revoke", "--jti", "0" * 32, "--until", "5m"), "never minted again"),
        (("revoke", "--workload", AGENT, "--until", "yesterday"), "write a time such as"),
        (("revoke", "--workload", AGENT, "--until", "2001-01-01T00:00:00Z"), "over already"),
        (("revoke", "--workload", AGENT, "--until", "2099-01-01T00:00:00"), "time zone"),
        (("revoke", "--workload", AGENT, "--reason", "x" * 501), "at most 500"),
        (("revoke", "--lift", "0011223344556677", "--workload", AGENT), "--reason alone"),
        (("break-glass", AGENT, CLOSED, RESOURCE, "--reason", WHY), "--until"),
        (("break-glass", AGENT, CLOSED, RESOURCE, "--until", "5m"), "--reason"),
        (("break-glass", AGENT, "broker.operate", RESOURCE, "--until", "5m", "--reason", WHY), "policy alone"),
        (("break-glass", "agent", CLOSED, RESOURCE, "--until", "5m", "--reason", WHY), "SPIFFE ID"),
        (("break-glass", AGENT, CLOSED, "x/../y", "--until", "5m", "--reason", WHY), "resource"),
        (
            ("break-glass", AGENT, CLOSED, RESOURCE, "--until", "5m", "--reason", WHY, "--request-id", "short"),
            "16 to 64",
        ),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(whole: Whole, arguments: tuple[str, ...], why_not: str) -> None:
    ran = cli(whole, OPERATOR, *arguments)
    assert ran.code == 2, (ran.out, ran.err)
    assert why_not in ran.err.replace("\n", " "), ran.err
    assert "Traceback" not in ran.err


async def test_broken_glass_is_approved_asked_again_used_listed_and_lifted(whole: Whole) -> None:
    asked = ("break-glass", AGENT, CLOSED, RESOURCE, "--reason", WHY)
    ran = cli(whole, OPERATOR, *asked, "--until", "30m", "--json")
    assert (ran.code, ran.value["reason"]) == (3, "approval_required")
    again = ("--until", ran.value["until"], "--request-id", ran.value["request_id"])
    for said in (AGENT, CLOSED, WHY):
        assert said in ran.value["text"]
    people = cli(whole, OPERATOR, *asked, *again)
    assert f"action-broker approve {ran.value['request_digest']}" in people.out
    assert " ".join(again) in people.out
    for name in ("ann", "bob"):
        done = cli(whole, f"approvers/{name}", "approve", ran.value["request_digest"], "--yes", "--json")
        assert done.code == 0, done.out
    opened = cli(whole, OPERATOR, *asked, *again)
    assert (opened.code, "permitted" in opened.out) == (0, True), opened.err
    permit = last(whole, BreakGlass)
    assert isinstance(permit, BreakGlass)
    assert permit.approvers == ("spiffe://acme.test/approvers/ann", "spiffe://acme.test/approvers/bob")
    async with whole.client(AGENT) as agent:
        assert await why(read(agent, CLOSED)) == ""
        listed = unfolded(cli(whole, OPERATOR, "standing"))
        for said in (permit.id, "permitted", CLOSED, RESOURCE, WHY):
            assert said in listed
        assert cli(whole, OPERATOR, "revoke", "--lift", permit.id).code == 0
        assert await why(read(agent, CLOSED)) == "denied"
    lifted = last(whole, StandingLifted)
    assert isinstance(lifted, StandingLifted)
    assert lifted.id == permit.id
    used = cli(whole, OPERATOR, *asked, *again, "--json")
    assert (used.code, used.value["reason"]) == (3, "already_used")


async def test_it_waits_for_approvals_where_it_is_told_to(whole: Whole) -> None:
    where = ("--socket", whole.broker.socket, "--issuer", ISSUER)
    asked = ("break-glass", AGENT, CLOSED, RESOURCE, "--until", "30m", "--reason", WHY, "--approval-wait", "1m")
    with began(whole, OPERATOR, *asked, *where) as process:
        assert process.stdout is not None
        digest = ""
        while "action-broker approve" not in digest:
            digest = process.stdout.readline()
            assert digest, "it ended"
        digest = digest.split()[-1]
        for name in ("ann", "bob"):
            assert cli(whole, f"approvers/{name}", "approve", digest, "--yes", "--json").code == 0
        out, err = process.communicate(None, LIMIT_S)
        assert (process.returncode, "permitted" in out) == (0, True), err
    (entry,) = [one for one in cli(whole, OPERATOR, "standing", "--json").value if one["kind"] == "break_glass"]
    assert cli(whole, OPERATOR, "revoke", "--lift", entry["id"]).code == 0


def test_who_waits_in_vain_is_told_how_to_go_on(whole: Whole) -> None:
    asked = ("break-glass", AGENT, CLOSED, RESOURCE, "--until", "30m", "--reason", WHY, "--approval-wait", "1s")
    ran = cli(whole, OPERATOR, *asked)
    assert (ran.code, "refused: approval_required" in ran.err) == (3, True)
    assert "--request-id" in ran.out
