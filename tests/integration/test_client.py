"""broker.client over a real Unix front and a real gRPC server that keeps the wire contract (support/wire_broker.py)."""

import asyncio
import contextlib
import os
import traceback
from datetime import UTC, datetime

import msgspec
import pytest
from support.wire_broker import ISSUER, WireBroker, serve_unix

from broker.action import Action
from broker.client import ActionToken, Client, Invalid, Reason, Refused, Unavailable
from broker.credentials.action_token import Confirmation
from broker.credentials.dpop import ProofKey, verify_proof
from broker.errors import BrokerError

ORDERS = "spiffe://acme.test/service/orders"
RESOURCE = "https://orders.acme.test/v1/orders/17"
REFUND = ("orders.refund", RESOURCE, ORDERS, {"amount": 30})


def act(name: str = "orders.refund", number: int = 17) -> Action:
    return Action(name, f"https://orders.acme.test/v1/orders/{number}", ORDERS)


@pytest.fixture
async def wire(tmp_path):
    async with serve_unix(WireBroker(), tmp_path / "front.sock", tmp_path / "private") as broker:
        yield broker


@pytest.fixture
async def client(wire, tmp_path):
    async with Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER) as opened:
        yield opened
    wire.release.set()


# -- what a token is bound to ----------------------------------------------------------------------------------------


async def test_a_token_is_for_the_act_and_bound_to_a_key_that_only_this_client_has(wire, client):
    token = await client.request(*REFUND)
    claims = wire.verify(token.access_token)
    assert claims.action().covers(Action(*REFUND))
    assert (token.token_type, token.use, token.correlation_id) == ("DPoP", "once", "0123")
    assert claims.cnf.jkt == token.key.jkt == wire.proofs[0].jkt
    assert token.is_usable()
    [(_, authorization), (_, proof)] = token.grpc_metadata("/acme.Orders/Refund", authority="orders.acme.test")
    assert authorization == f"DPoP {token.access_token}"
    url = "https://orders.acme.test/acme.Orders/Refund"
    proven = verify_proof(proof, method="POST", url=url, now=datetime.now(UTC), token=token.access_token)
    assert proven.jkt == claims.cnf.jkt


async def test_two_clients_of_one_process_share_no_key(wire, client, tmp_path):
    async with Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER) as other:
        ours, theirs = await client.request(*REFUND), await other.request(*REFUND)
    assert ours.key.jkt != theirs.key.jkt


async def test_an_answer_for_another_action_is_never_handed_out(wire, client):
    wire.spoil = lambda claims: msgspec.structs.replace(claims, action_digest=act(number=18).digest.hex())
    with pytest.raises(Unavailable, match="another action"):
        await client.request_action(act())
    wire.spoil = lambda claims: claims
    assert await client.request_action(act())


async def test_an_answer_bound_to_another_key_is_never_handed_out(wire, client):
    other = Confirmation(jkt=ProofKey().jkt)
    wire.spoil = lambda claims: msgspec.structs.replace(claims, cnf=other)
    with pytest.raises(Unavailable, match="not ours"):
        await client.request_action(act())


@pytest.mark.parametrize(("token_type", "use"), [("Bearer", "once"), ("DPoP", "forever"), ("DPoP", "")])
async def test_an_answer_that_contradicts_its_token_is_never_handed_out(wire, client, token_type, use):
    wire.token_type, wire.use = token_type, use
    with pytest.raises(Unavailable, match="a token of type"):
        await client.request_action(act())


async def test_the_named_identity_is_asked_for_in_every_form(wire, tmp_path):
    wanted = "spiffe://acme.test/build/agent"
    async with Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER, spiffe_id=wanted) as client:
        await client.request_action(act())
        await client.request_many([act()])
    assert set(wire.wanted_ids) == {wanted}


# -- nonces ----------------------------------------------------------------------------------------------------------


async def test_only_the_first_call_of_a_connection_is_challenged_for_a_nonce(wire, client):
    for number in range(5):
        await client.request_action(act(number=number))
    assert (wire.challenges, wire.calls["RequestActionToken"]) == (1, 6)


async def test_concurrent_calls_never_use_a_nonce_twice(wire, client):
    for _ in range(3):
        tokens = await asyncio.gather(*(client.request_action(act(number=n)) for n in range(40)))
        assert [token.action.resource for token in tokens] == [act(number=n).resource for n in range(40)]
    assert len({proof.nonce for proof in wire.proofs}) == len(wire.proofs) == 120
    assert wire.challenges <= 40


async def test_a_broker_that_was_restarted_is_served_with_new_nonces_and_no_word_to_the_caller(tmp_path):
    path, folder = tmp_path / "front.sock", tmp_path / "private"
    async with Client.unix(str(path), issuer=ISSUER) as client:
        async with serve_unix(WireBroker(), path, folder):
            await asyncio.gather(*(client.request_action(act(number=n)) for n in range(10)))
        async with serve_unix(WireBroker(), path, folder) as second:
            for number in range(10):
                await client.request_action(act(number=number))
            assert second.challenges == 1  # what was held of the first broker's was forgotten at once


async def test_a_broker_that_takes_no_nonce_is_asked_once_more_and_not_for_ever(wire, client, monkeypatch):
    monkeypatch.setattr(wire, "confirm", lambda *_: (_ for _ in ()).throw(Refused(Reason.NONCE_REQUIRED)))
    with pytest.raises(Refused) as refused:
        await client.request_action(act())
    assert refused.value.reason is Reason.NONCE_REQUIRED
    assert wire.calls["RequestActionToken"] == 2


async def test_a_proof_names_the_issuer_and_no_other(wire, tmp_path):
    async with Client.unix(str(tmp_path / "front.sock"), issuer="https://other.test") as client:
        with pytest.raises(Refused, match="is `issuer` the broker's own") as refused:
            await client.request_action(act())
    assert refused.value.reason is Reason.INVALID_PROOF


# -- what is repeated, and what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Reason.DENIED, Reason.NOT_ATTESTED, Reason.ALREADY_USED, Reason.PROOF_REPLAYED])
async def test_a_refusal_is_final_and_asked_for_once(wire, client, reason):
    await client.request_action(act())
    wire.calls.clear()
    with pytest.raises(Refused) as refused:
        await client.request_action(act(f"refuse.{reason}"))
    assert refused.value.reason is reason
    assert wire.calls["RequestActionToken"] == 1


async def test_an_unavailable_that_the_broker_says_itself_is_not_repeated(wire, client):
    await client.request_action(act())
    wire.calls.clear()
    with pytest.raises(Unavailable) as unavailable:
        await client.request_action(act(f"unavailable.{Reason.LEDGER_UNAVAILABLE}"))
    assert unavailable.value.reason is Reason.LEDGER_UNAVAILABLE
    assert unavailable.value.correlation_id
    assert wire.calls["RequestActionToken"] == 1


@pytest.mark.parametrize("failures", [1, 2])
async def test_a_broken_transport_is_tried_again_with_a_new_proof(wire, client, failures):
    wire.fail_next = failures
    assert await client.request_action(act())
    assert len({proof.jti for proof in wire.proofs}) == failures + 1


async def test_a_broken_transport_is_tried_three_times_and_no_more(wire, client):
    await client.request_action(act())
    wire.calls.clear()
    wire.fail_next = 10
    with pytest.raises(Unavailable, match="Socket closed"):
        await client.request_action(act())
    assert wire.calls["RequestActionToken"] == 3


async def test_every_call_ends_at_its_deadline(wire, client):
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(Unavailable, match=r"within 0\.2 s"):
        await client.request_action(act("hang"), deadline_s=0.2)
    assert loop.time() - begun < 1
    wire.release.set()
    assert await client.request_action(act("hang"))


async def test_a_quota_says_how_long_to_wait(client):
    with pytest.raises(Refused) as refused:
        await client.request_action(act(f"refuse.{Reason.QUOTA}"))
    assert (refused.value.reason, refused.value.retry_after_ms) == (Reason.QUOTA, 1500)


# -- whom it talks to --------------------------------------------------------------------------------------------------


async def test_without_a_socket_the_error_names_its_path_and_what_to_do(tmp_path):
    path = str(tmp_path / "nowhere.sock")
    async with Client.unix(path, issuer=ISSUER) as client:
        with pytest.raises(Unavailable) as unavailable:
            await client.request_action(act())
    assert path in str(unavailable.value)
    assert "action-broker doctor" in str(unavailable.value)
    assert "No such file" in str(unavailable.value)


async def test_a_socket_served_by_another_user_gets_no_proof(wire, tmp_path):
    path = str(tmp_path / "front.sock")
    async with Client.unix(path, issuer=ISSUER, server_uids={os.geteuid() + 1}) as client:
        with pytest.raises(Unavailable, match=f"is served by user {os.geteuid()}"):
            await client.request_action(act())
    assert not wire.calls
    async with Client.unix(path, issuer=ISSUER, server_uids={os.geteuid()}) as client:
        assert await client.request_action(act())


@pytest.mark.parametrize("issuer", ["http://broker.acme.test", "broker.acme.test", "https://Broker.acme.test", ""])
def test_an_issuer_that_is_no_https_url_is_found_at_once(issuer):
    with pytest.raises(Invalid):
        Client.unix(issuer=issuer)
    assert Client.unix(issuer=ISSUER)


async def test_a_client_that_is_not_entered_says_so(tmp_path):
    client = Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER)
    with pytest.raises(RuntimeError, match="async with"):
        await client.request_action(act())
    with pytest.raises(RuntimeError, match="async with"):
        client.stream()


async def test_a_closed_client_leaves_no_task_and_no_folder_behind(wire, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with Client.unix(str(tmp_path / "front.sock"), issuer=ISSUER) as client, client.stream() as stream:
        await asyncio.gather(client.request_action(act()), stream.request_action(act()))
        assert list(tmp_path.glob("hop-*"))
        assert {"Hop", "_Call"} <= _owners_of_tasks()
    assert not {"Hop", "_Call"} & _owners_of_tasks()
    assert not list(tmp_path.glob("hop-*"))


def _owners_of_tasks() -> set[str]:
    return {task.get_coro().__qualname__.partition(".")[0] for task in asyncio.all_tasks()}


# -- many at once ------------------------------------------------------------------------------------------------------


async def test_a_batch_answers_each_action_for_itself_and_in_order(wire, client):
    asked = [act(), act(f"refuse.{Reason.DENIED}"), act(f"unavailable.{Reason.ATTESTATION_UNAVAILABLE}"), act(number=4)]
    first, denied, away, last = await client.request_many(asked)
    assert isinstance(first, ActionToken)
    assert first.action == asked[0]
    assert isinstance(denied, Refused)
    assert denied.reason is Reason.DENIED
    assert denied.correlation_id
    assert isinstance(away, Unavailable)
    assert isinstance(last, ActionToken)
    assert last.action == asked[3]
    assert len(wire.proofs) == 1


@pytest.mark.parametrize("size", [0, 257])
async def test_a_batch_of_nothing_or_too_much_is_not_sent(wire, client, size):
    with pytest.raises(Invalid, match="1 to 256"):
        await client.request_many([act()] * size)
    assert not wire.calls
    assert len(await client.request_many([act()] * 256)) == 256


async def test_a_batch_larger_than_a_message_is_told_from_a_refusal(client):
    large = Action("orders.refund", RESOURCE, ORDERS, {"note": "x" * 8000})
    with pytest.raises(Invalid, match="ask for less at once"):
        await client.request_many([large] * 200)
    assert len(await client.request_many([large] * 20)) == 20


# -- the receiving side ------------------------------------------------------------------------------------------------


async def test_a_check_returns_or_raises_so_that_nobody_can_overlook_its_answer(client):
    token = await client.request(*REFUND)
    await client.check(token.access_token, Action(*REFUND))
    with pytest.raises(Refused) as refused:
        await client.check(token.access_token, Action(*REFUND[:3], {"amount": 31}))
    assert (refused.value.reason, refused.value.correlation_id) == (Reason.OUT_OF_SCOPE, "4567")


async def test_a_lost_answer_to_a_redemption_is_asked_for_again_under_the_same_id(wire, client):
    token = await client.request(*REFUND)
    wire.fail_next = 2
    redeemed = await client.redeem(token.access_token, Action(*REFUND))
    assert wire.idempotency_ids == [redeemed.idempotency_id] * 3
    assert redeemed.redeemed_at == datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    with pytest.raises(Refused) as refused:
        await client.redeem(token.access_token, Action(*REFUND))
    assert refused.value.reason is Reason.ALREADY_USED


@pytest.mark.parametrize("chosen", ["", "a" * 15, "a" * 65, "a" * 15 + "\n", "a" * 15 + "|", "ä" * 16])
async def test_an_idempotency_id_of_another_shape_is_not_sent(wire, client, chosen):
    with pytest.raises(Invalid, match="16 to 64"):
        await client.redeem("token", act(), chosen)
    assert not wire.idempotency_ids
    await client.redeem("token", act(), "a" * 16)
    assert wire.idempotency_ids == ["a" * 16]


async def test_an_explanation_comes_as_values(client):
    found = await client.explain("spiffe://acme.test/build/agent", act(), facts={"spire": {"ids": []}}, pid=7)
    assert not found.allowed
    assert found.policies[0].failed == ('facts {"spire":{"ids":[]}} 7',)
    assert (found.attestors, found.missing, found.errors) == (("spire",), ("ticket",), ())


# -- nothing secret gets out -------------------------------------------------------------------------------------------


async def test_no_token_key_or_proof_is_in_a_repr_or_in_an_error(wire, client):
    token = await client.request(*REFUND)
    private = token.key._private.private_numbers().private_value
    shown = [repr(token), str(token), repr(client), repr(token.key)]
    for name in (f"refuse.{Reason.DENIED}", f"unavailable.{Reason.LEDGER_UNAVAILABLE}", "hang"):
        with contextlib.suppress(BrokerError):
            try:
                await client.request_action(act(name), deadline_s=0.2)
            except BrokerError as error:
                shown += [repr(error), "".join(traceback.format_exception(error))]
                raise
    wire.fail_next = 1
    with pytest.raises(Unavailable) as unavailable:
        await client.redeem(token.access_token, act(), deadline_s=0.05)
    shown += traceback.format_exception(unavailable.value)
    for text in shown:
        assert token.access_token not in text
        assert token.access_token.rpartition(".")[2] not in text
        assert str(private) not in text
        assert "a detail that no caller sees" not in text
