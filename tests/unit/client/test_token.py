"""A token in its holder's hands: used for one request, with what it is bound to, or not at all."""

import re
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from support.pki import CA

from broker._proto.actionbroker.v1 import broker_pb2
from broker.action import Action
from broker.client.token import ActionToken, Holder
from broker.credentials import jose
from broker.credentials.dpop import ProofKey, verify_proof
from broker.credentials.keys import SigningKey
from broker.errors import Invalid, Refused, Unavailable

NOW = datetime.now(UTC).replace(microsecond=0)
ACTION = Action("orders.refund", "https://orders.acme.test/v1/orders/17", "spiffe://acme.test/service/orders")
KEY = ProofKey()
CERTIFICATES = CA("acme.test", now=NOW)
SVID = CERTIFICATES.svid().own()
BROKERS_KEY = SigningKey.generate(NOW)
ACCESS_TOKEN = "header.payload.signature"


def x5t(svid):
    holder = Holder()
    holder.remember(svid)
    [name] = holder._svids
    return name


def token(**changes):
    usual = {
        "access_token": ACCESS_TOKEN,
        "token_type": "DPoP",
        "expires_at": NOW + timedelta(seconds=60),
        "use": "once",
        "action": ACTION,
        "correlation_id": "1",
        "key": KEY,
    }
    return ActionToken(**(usual | changes))


def answer(cnf, action=ACTION, *, typ="at+jwt", **changes):
    header = msgspec.json.encode({"alg": "ES256", "typ": typ, "kid": "k"})
    payload = msgspec.json.encode({"cnf": cnf, "action_digest": action.digest.hex(), "iss": "not looked at"})
    expires = Timestamp()
    expires.FromDatetime((NOW + timedelta(seconds=60)).replace(tzinfo=None))
    usual = {
        "access_token": jose.sign(header, payload, BROKERS_KEY.private),
        "token_type": "DPoP" if "jkt" in cnf else "Bearer",
        "expires_at": expires,
        "use": "once",
    }
    return broker_pb2.ActionToken(**(usual | changes))


def proof_of(headers, url, method="POST", **more):
    return verify_proof(headers["dpop"], method=method, url=url, now=NOW, token=ACCESS_TOKEN, **more)


# -- using it --------------------------------------------------------------------------------------------------------


def test_grpc_metadata_prove_the_key_for_that_call_and_that_token():
    metadata = dict(token().grpc_metadata("/acme.Orders/Refund", authority="orders.acme.test:8443", now=NOW))
    assert metadata["authorization"] == f"DPoP {ACCESS_TOKEN}"
    proof = proof_of(metadata, "https://orders.acme.test:8443/acme.Orders/Refund")
    assert proof.jkt == KEY.jkt
    with pytest.raises(Refused):
        proof_of(metadata, "https://orders.acme.test:8443/acme.Orders/Cancel")


def test_each_use_has_a_proof_of_its_own():
    one, two = (dict(token().grpc_metadata("/a.B/C", authority="a.test", now=NOW))["dpop"] for _ in range(2))
    assert one != two


def test_a_services_nonce_is_in_the_proof():
    headers = token().http_headers("POST", "https://a.test/x", nonce="n-1", now=NOW)
    assert proof_of(headers, "https://a.test/x").nonce == "n-1"


def test_a_certificate_bound_token_goes_without_a_proof():
    bound = token(token_type="Bearer", key=None, svid=SVID)
    assert bound.grpc_metadata("/a.B/C", authority="a.test") == (("authorization", f"Bearer {ACCESS_TOKEN}"),)


@pytest.mark.parametrize(
    ("url", "htu"),
    [
        ("https://a.test/x?q=1#f", "https://a.test/x"),
        ("https://a.test", "https://a.test/"),
        ("https://A.test:443/x", "https://a.test/x"),
        ("https://a.test:8443/x/", "https://a.test:8443/x/"),
        ("http://127.0.0.1:80/x", "http://127.0.0.1/x"),
        ("https://[::1]:8443/x", "https://[::1]:8443/x"),
        ("https://a.test/a%2Fb;c", "https://a.test/a%2Fb;c"),
    ],
)
def test_a_proof_names_the_url_in_normal_form_without_its_query(url, htu):
    assert proof_of(token().http_headers("post", url, now=NOW), htu).jkt == KEY.jkt


@pytest.mark.parametrize(
    "url",
    ["", "a.test/x", "ftp://a.test/x", "https:///x", "https://u:p@a.test/", "https://a.test:x/", "https://[::1/x"],
)
def test_a_url_that_is_none_gets_no_proof(url):
    with pytest.raises(Invalid):
        token().http_headers("POST", url)


@pytest.mark.parametrize(
    ("method", "authority"),
    [
        ("acme.Orders/Refund", "a.test"),
        ("/acme.Orders", "a.test"),
        ("/acme.Orders/Refund/", "a.test"),
        ("/acme.Orders/Refund?x", "a.test"),
        ("/acme.Orders/Refund\n", "a.test"),
        ("/acme.Orders/Refund", "https://a.test"),
        ("/acme.Orders/Refund", "A.test"),
        ("/acme.Orders/Refund", "a.test/x"),
        ("/acme.Orders/Refund", "u@a.test"),
        ("/acme.Orders/Refund", "a.test\n"),
        ("/acme.Orders/Refund", "a.test:"),
        ("/acme.Orders/Refund", ""),
    ],
)
def test_a_call_that_cannot_exist_gets_no_proof(method, authority):
    with pytest.raises(Invalid):
        token().grpc_metadata(method, authority=authority)
    assert token().grpc_metadata("/acme.Orders/Refund", authority="a.test")


def test_a_token_is_usable_until_it_or_its_certificate_ends():
    assert token().is_usable(NOW)
    assert token().is_usable(NOW + timedelta(seconds=59))
    assert not token().is_usable(NOW + timedelta(seconds=60))
    ended = CERTIFICATES.svid(lifetime=timedelta(seconds=-1)).own()
    assert not token(svid=ended).is_usable(NOW)
    assert token(svid=SVID).is_usable(NOW)


def test_repr_shows_neither_token_nor_key():
    shown = repr(token(svid=SVID))
    assert ACCESS_TOKEN not in shown
    assert "ProofKey" not in shown
    assert "OwnSvid" not in shown
    assert "orders.refund" in shown


# -- taking it out of an answer ---------------------------------------------------------------------------------------


def test_a_token_bound_to_our_key_is_taken():
    taken = Holder(KEY).take(answer({"jkt": KEY.jkt}), ACTION, "c")
    assert (taken.key, taken.svid, taken.token_type, taken.use) == (KEY, None, "DPoP", "once")
    assert taken.expires_at == NOW + timedelta(seconds=60)


def test_a_token_bound_to_an_older_certificate_of_ours_is_taken_with_it():
    holder, newer = Holder(), CERTIFICATES.svid().own()
    holder.remember(SVID)
    holder.remember(newer)
    for svid in (SVID, newer):
        taken = holder.take(answer({"x5t#S256": x5t(svid)}), ACTION, "c")
        assert (taken.key, taken.svid, taken.token_type) == (None, svid, "Bearer")


def test_a_certificate_is_forgotten_when_it_has_ended():
    holder = Holder()
    holder.remember(CERTIFICATES.svid(lifetime=timedelta(seconds=-1)).own())
    holder.remember(SVID)
    assert list(holder._svids.values()) == [SVID]


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (answer({"jkt": ProofKey().jkt}), "not ours"),
        (answer({"x5t#S256": x5t(CERTIFICATES.svid().own())}), "not ours"),
        (answer({"jkt": KEY.jkt}, Action("orders.cancel", ACTION.resource, ACTION.audience)), "another action"),
        (answer({"jkt": KEY.jkt}, Action(ACTION.name, ACTION.resource, ACTION.audience, {"a": 1})), "another action"),
        (answer({"jkt": KEY.jkt}, token_type="Bearer"), "of type 'Bearer'"),
        (answer({"jkt": KEY.jkt}, token_type="dpop"), "of type 'dpop'"),
        (answer({"x5t#S256": x5t(SVID)}, token_type="DPoP"), "of type 'DPoP'"),
        (answer({"jkt": KEY.jkt}, use="many"), "for use 'many'"),
        (answer({"jkt": KEY.jkt, "x5t#S256": x5t(SVID)}), "exactly one key"),
        (answer({}), "exactly one key"),
        (answer({"jkt": KEY.jkt}, typ="JWT"), "type at+jwt"),
        (answer({"jkt": KEY.jkt}, access_token="x.y"), "compact JWS"),
        (answer({"jkt": KEY.jkt}, access_token=""), "compact JWS"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_not_taken(message, why):
    holder = Holder(KEY)
    holder.remember(SVID)
    assert holder.take(answer({"jkt": KEY.jkt}), ACTION, "c")
    assert holder.take(answer({"x5t#S256": x5t(SVID)}), ACTION, "c")
    with pytest.raises(Unavailable, match=re.escape(why)):
        holder.take(message, ACTION, "c")


def test_a_call_of_a_tool_over_stdio_carries_its_token_and_a_proof_for_that_tool() -> None:
    """Key names as MCP has them: a prefix of labels that it does not reserve for itself, a slash, a name."""
    meta = token().mcp_meta("query", now=NOW)
    for key in meta:
        prefix, _, name = key.partition("/")
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?)*", prefix)
        assert prefix.split(".")[1:2] not in (["mcp"], ["modelcontextprotocol"])
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name)
    assert meta["action-broker/authorization"] == f"DPoP {ACCESS_TOKEN}"
    proof, url = meta["action-broker/dpop"], "spiffe://acme.test/service/orders/query"
    assert verify_proof(proof, method="POST", url=url, now=NOW, token=ACCESS_TOKEN).jkt == KEY.jkt
    with pytest.raises(Refused):
        verify_proof(proof, method="POST", url=f"{url}-all", now=NOW, token=ACCESS_TOKEN)


@pytest.mark.parametrize("tool", ["", "a/b", "../query", "query\n", "q" * 129, "Qu\u00e9ry"])
def test_no_tool_has_such_a_name(tool: str) -> None:
    with pytest.raises(Invalid):
        token().mcp_meta(tool)
    assert token().mcp_meta("q" * 128)


def test_a_token_bound_to_a_certificate_is_of_no_use_over_stdio() -> None:
    with pytest.raises(Invalid):
        token(token_type="Bearer", key=None, svid=SVID).mcp_meta("query")
