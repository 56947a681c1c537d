"""`request`, `check`, `explain` against a broker: what comes back, in words, as JSON and as an exit code."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli import cli
from support.dev_broker import CALLER, ORDER, REFUND, SERVICE, DevBroker, dev_broker
from support.processes import script

AMOUNT = ("--parameters", '{"amount": 30}')
TOO_MUCH = ("--parameters", '{"amount": 101}')
FACTS = ("--facts", json.dumps({"spire": {"ids": [CALLER]}}))

# Asks for a token, says it, and lives on until it is ended.
ASKS = """
import asyncio
from broker.client import Client
async def main():
    async with Client.unix(sys.argv[1], issuer=sys.argv[2]) as broker:
        tell((await broker.request(*sys.argv[3:6], {"amount": 30})).access_token)
        hear()
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def dev() -> Iterator[DevBroker]:
    with dev_broker() as found:
        yield found


def test_a_token_is_shown_as_what_it_is(dev: DevBroker) -> None:
    ran = dev.cli_as("/support/agent", "--json", "request", *REFUND, *AMOUNT)
    assert (ran.code, ran.err) == (0, "")
    assert ran.value["allowed"] is True
    assert (ran.value["token_type"], ran.value["use"], ran.value["headers"]) == ("DPoP", "once", {})
    assert ran.value["access_token"].count(".") == 2
    people = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT)
    assert (people.code, "allowed orders.refund on" in people.out, "eyJ" in people.out) == (0, True, False)


def test_the_headers_for_one_request_are_printed_for_curl_and_grpcurl(dev: DevBroker) -> None:
    ran = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--http", "post", ORDER)
    authorization, proof = ran.out.splitlines()
    assert authorization.startswith("authorization: DPoP eyJ")
    assert proof.startswith("dpop: eyJ")
    ran = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--json", "--grpc", "/acme.Orders/Refund", "o.test")
    assert set(ran.value["headers"]) == {"authorization", "dpop"}
    ran = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--http", "POST", "ftp://orders.dev.test/")
    assert (ran.code, "not an http or https URL" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("spiffe_id", "arguments", "reason"),
    [
        ("/support/agent", (*REFUND, *TOO_MUCH), "denied"),
        ("/build/agent", (*REFUND, *AMOUNT), "denied"),
        ("/support/agent", ("orders.unheard_of", *REFUND[1:]), "unknown_action"),
    ],
)
def test_a_refusal_is_a_reason_and_the_way_to_its_record(
    dev: DevBroker, spiffe_id: str, arguments: tuple[str, ...], reason: str
) -> None:
    ran = dev.cli_as(spiffe_id, "request", *arguments, "--json")
    assert (ran.code, ran.value["reason"]) == (3, reason)
    people = dev.cli_as(spiffe_id, "request", *arguments)
    assert people.code == 3
    assert f"refused: {reason}" in people.err
    for said in (ran.out, people.err):
        assert "small-refunds" not in said  # DESIGN invariant 9: never the policy
    correlation = ran.value["correlation_id"]
    record = cli("ledger", "show", "--file", dev.shown["ledger"], "--correlation", correlation, "--json").value
    assert (record["kind"], record["reason"]) == ("refusal", reason)


def test_a_process_that_nobody_vouches_for_gets_nothing(dev: DevBroker) -> None:
    ran = cli("request", *REFUND, *AMOUNT, "--json", **dev.environment)
    assert (ran.code, ran.value["reason"]) == (3, "not_attested")
    assert dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT).code == 0


def test_a_broker_that_is_not_there_is_unavailable(dev: DevBroker) -> None:
    for where in (("--socket", dev.folder / "nothing.sock"), ("--socket", dev.folder / "policy")):
        ran = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--json", *where)
        assert (ran.code, "no broker at" in ran.value["error"]) == (4, True)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("request", *REFUND[:2]), "Missing argument 'AUDIENCE'"),
        (("request", *REFUND, "--parameters", "{"), "parameters"),
        (("request", "orders refund", *REFUND[1:]), "action"),
        (("request", REFUND[0], "https://orders.dev.test/../x", SERVICE), "resource"),
        (("request", *REFUND, "--as", "nobody"), "SPIFFE ID"),
        (("request", *REFUND, "--address", "127.0.0.1:1"), "--address needs --broker-id"),
        (("explain", CALLER, *REFUND, "--facts", "[]"), "--facts"),
        (("nonsense",), "No such command"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anybody_is(arguments: tuple[str, ...], why: str) -> None:
    nowhere = {"ACTION_BROKER_ISSUER": "https://broker.dev.test", "ACTION_BROKER_UNIX__SOCKET": "unix:///nowhere.sock"}
    ran = cli(*arguments, **nowhere)
    assert ran.code == 2
    assert why in ran.err


def test_without_any_word_of_where_the_broker_is_it_says_what_to_give(tmp_path: Path) -> None:
    ran = cli("request", *REFUND, "--config", tmp_path / "none.toml", "--json")
    assert ran.code == 2
    assert "without --issuer and --socket" in ran.value["error"]


def test_a_token_is_checked_by_its_own_audience_and_nobody_else(dev: DevBroker) -> None:
    with_token = dev.cli_as("/support/agent", "request", *REFUND, *AMOUNT, "--json").value["access_token"]
    # Its process has ended, so what was attested is gone: the broker looks again, at each Check.
    ended = dev.cli_as("/service/orders", "check", *REFUND, *AMOUNT, "--json", told=with_token)
    assert (ended.code, ended.value["reason"]) == (3, "not_attested")
    other = dev.cli_as("/service/other", "check", *REFUND, *AMOUNT, "--json", told=with_token)
    assert (other.code, other.value["reason"]) == (3, "wrong_audience")
    garbage = dev.cli_as("/service/orders", "check", *REFUND, *AMOUNT, "--json", told="garbage")
    assert garbage.code == 3


def test_a_living_callers_token_passes_check_for_its_act_alone(dev: DevBroker) -> None:
    with script(ASKS, dev.socket, dev.shown["issuer"], *REFUND, wrapper=dev.command_as("/support/agent")) as child:
        token = child.process.stdout.readline().strip()
        good = dev.cli_as("/service/orders", "check", *REFUND, *AMOUNT, "--json", told=token)
        assert (good.code, good.value) == (0, {"allowed": True})
        other = dev.cli_as("/service/orders", "check", *REFUND, *TOO_MUCH, "--json", told=token)
        assert (other.code, other.value["reason"]) == (3, "out_of_scope")


def test_an_operator_whom_policy_permits_is_told_which_condition_fails(dev: DevBroker) -> None:
    ran = dev.cli_as("/operator", "explain", CALLER, *REFUND, *TOO_MUCH, *FACTS, "--json")
    assert (ran.code, ran.value["allowed"], ran.value["reason"]) == (3, False, "denied")
    (failed,) = [policy["failed"] for policy in ran.value["policies"] if not policy["satisfied"]]
    assert "<= 100" in " ".join(failed)
    people = dev.cli_as("/operator", "explain", CALLER, *REFUND, *TOO_MUCH, *FACTS)
    assert people.code == 3
    assert "orders.cedar#small-refunds" in people.out
    assert "amount" in people.out
    good = dev.cli_as("/operator", "explain", CALLER, *REFUND, *AMOUNT, *FACTS, "--json")
    assert (good.code, good.value["allowed"]) == (0, True)


def test_who_is_no_operator_learns_nothing_from_explain(dev: DevBroker) -> None:
    ran = dev.cli_as("/support/agent", "explain", CALLER, *REFUND, *AMOUNT, *FACTS, "--json")
    assert (ran.code, ran.value["reason"]) == (3, "denied")
    assert "small-refunds" not in ran.out + ran.err


def test_mutual_tls_serves_as_well_as_the_socket_and_only_the_broker_that_was_named(dev: DevBroker) -> None:
    where = ("--address", dev.shown["grpc"], "--workload-api", dev.environment["SPIFFE_ENDPOINT_SOCKET"])
    asked = ("explain", CALLER, *REFUND, *AMOUNT, *FACTS, "--json", *where, "--broker-id")
    ran = dev.cli_as("/operator", *asked, dev.shown["broker_id"])
    assert (ran.code, ran.value["allowed"]) == (0, True)
    other = dev.cli_as("/operator", *asked, CALLER)
    assert other.code == 4
    assert dev.shown["broker_id"] in other.value["error"]
