"""The token request as strangers may write it, and what they are told."""

import json
import re
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.action import Action
from broker.edges import oauth
from broker.edges.oauth import GrantType, TokenRequestRefused, parse_form, parse_token_request
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.status import STATUS

WORKLOAD = "spiffe://acme.test/build/agent"
REFUND = Action("orders.refund", "https://orders.acme.test/orders/17", "https://orders.acme.test", {"amount": 5})
DETAIL = {
    "type": "action",
    "actions": [REFUND.name],
    "identifier": REFUND.resource,
    "locations": [REFUND.audience],
    "parameters": {"amount": 5},
}
JWT_SVID = "eyJhbGciOiJFUzI1NiJ9.e30.c2ln"


def form(**changes: str | None) -> bytes:
    """A client's own request with these parameters changed; None leaves one out."""
    fields = {"grant_type": "client_credentials", "authorization_details": json.dumps([DETAIL])} | changes
    return urlencode({name: value for name, value in fields.items() if value is not None}).encode()


def exchange(**changes: str | None) -> bytes:
    own = {
        "grant_type": GrantType.TOKEN_EXCHANGE.value,
        "subject_token": JWT_SVID,
        "subject_token_type": oauth.JWT,
    }
    return form(**(own | changes))


def assertion(**changes: str | None) -> bytes:
    return form(**({"client_assertion_type": oauth.JWT_SPIFFE, "client_assertion": JWT_SVID} | changes))


def detail(**changes: Any) -> str:
    return json.dumps([{name: value for name, value in (DETAIL | changes).items() if value is not ...}])


def action(body: bytes, principal: str = WORKLOAD) -> Action:
    return parse_token_request(body).action(principal)


def refused(body: bytes) -> TokenRequestRefused:
    with pytest.raises(TokenRequestRefused) as caught:
        action(body)
    return caught.value


def test_a_client_asks_for_its_own_action_by_certificate_assertion_or_exchange() -> None:
    for body, presented in ((form(), None), (assertion(), JWT_SVID), (exchange(), JWT_SVID)):
        asked = parse_token_request(body)
        assert asked.assertion == presented
        assert asked.action(WORKLOAD).digest == REFUND.digest


def test_a_parameter_without_value_counts_as_not_sent() -> None:
    assert action(form(audience="", client_id="", actor_token="")).digest == REFUND.digest
    assert "client_id" not in parse_form(b"client_id=&x=1")


def test_an_unknown_parameter_is_ignored_but_not_twice() -> None:
    assert action(form(state="x")).digest == REFUND.digest
    assert refused(form() + b"&state=x&state=x").error == "invalid_request"


@pytest.mark.parametrize("name", ["grant_type", "authorization_details", "client_id", "client_assertion", "nobody"])
def test_a_parameter_sent_twice_is_refused_even_with_the_same_or_no_value(name: str) -> None:
    for pair in (f"&{name}=a&{name}=a", f"&{name}=a&{name}=", f"&{name}=&{name}="):
        assert refused(form(**{name: None}) + pair.encode()).error == "invalid_request"


@pytest.mark.parametrize("name", ["audience", "resource"])
def test_more_than_one_target_is_invalid_target(name: str) -> None:
    assert action(form(**{name: REFUND.audience})).digest == REFUND.digest
    assert refused(form() + f"&{name}={REFUND.audience}&{name}=https://b.test".encode()).error == "invalid_target"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"grant_type",
        b"&",
        b"=&=",
        b"grant_type=client_credentials&",
        b"grant_type=client_credentials;x=1 ",
        b"grant_type=client_credentials&x=%zz",
        b"grant_type=client_credentials&x=%4",
        b"grant_type=client_credentials&x=%ff",
        b"grant_type=client_credentials&x=\xc3\xa4",
        b"grant_type=client_credentials\x00",
        b"grant_type=client_credentials\n",
        b'{"grant_type":"client_credentials"}',
        b"&".join(b"x%d=1" % number for number in range(oauth.MAX_FIELDS + 1)),
    ],
)
def test_a_body_that_is_no_form_is_refused(body: bytes) -> None:
    assert refused(body).error == "invalid_request"
    assert parse_form(b"grant_type=client_credentials&x=%C3%A4+1") == {
        "grant_type": "client_credentials",
        "x": "ä 1",
    }


@pytest.mark.parametrize(
    "grant_type",
    ["authorization_code", "refresh_token", "password", "Client_Credentials", "client_credentials ", "token-exchange"],
)
def test_a_grant_type_that_we_do_not_have_is_unsupported(grant_type: str) -> None:
    assert refused(form(grant_type=grant_type)).error == "unsupported_grant_type"


def test_a_request_without_grant_type_is_invalid() -> None:
    assert refused(form(grant_type=None)).error == "invalid_request"


@pytest.mark.parametrize(
    "changes",
    [
        {"client_assertion_type": None},
        {"client_assertion": None},
        {"client_assertion": ""},
        {"client_assertion": "x" * (oauth.MAX_ASSERTION + 1)},
    ],
)
def test_half_or_oversized_client_assertions_are_refused(changes: dict[str, str | None]) -> None:
    assert refused(assertion(**changes)).error == "invalid_request"
    assert parse_token_request(assertion(client_assertion="x" * oauth.MAX_ASSERTION)).assertion is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
        {"client_assertion_type": "jwt-spiffe"},
        {"client_secret": "hunter2"},
    ],
)
def test_other_ways_to_authenticate_a_client_are_invalid_client(changes: dict[str, str]) -> None:
    error = refused(assertion(**changes))
    assert (error.error, error.http) == ("invalid_client", 401)


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_token": None},
        {"subject_token_type": None},
        {"subject_token_type": "urn:ietf:params:oauth:token-type:access_token"},
        {"subject_token_type": "urn:ietf:params:oauth:token-type:saml2"},
        {"subject_token": "x" * (oauth.MAX_ASSERTION + 1)},
        {"actor_token": JWT_SVID},
        {"actor_token_type": oauth.JWT},
        {"client_assertion_type": oauth.JWT_SPIFFE, "client_assertion": f"{JWT_SVID}AA"},
        {"requested_token_type": "urn:ietf:params:oauth:token-type:jwt"},
        {"requested_token_type": "urn:ietf:params:oauth:token-type:txn_token"},
        {"requested_token_type": "urn:ietf:params:oauth:token-type:refresh_token"},
    ],
)
def test_exchanging_anything_but_ones_own_svid_for_an_access_token_is_refused(changes: dict[str, str | None]) -> None:
    assert refused(exchange(**changes)).error == "invalid_request"


def test_ones_own_svid_may_stand_in_both_places_of_an_exchange() -> None:
    both = exchange(
        client_assertion_type=oauth.JWT_SPIFFE,
        client_assertion=JWT_SVID,
        requested_token_type=oauth.ACCESS_TOKEN,
    )
    assert action(both).digest == REFUND.digest


def test_an_unoffered_token_type_is_told_what_is_offered() -> None:
    error = refused(exchange(requested_token_type="urn:ietf:params:oauth:token-type:jwt"))
    assert oauth.ACCESS_TOKEN in error.description


def test_a_subject_token_outside_an_exchange_is_refused_not_ignored() -> None:
    assert refused(form(subject_token=JWT_SVID, subject_token_type=oauth.JWT)).error == "invalid_request"


def test_a_client_id_of_somebody_else_is_invalid_client() -> None:
    assert action(form(client_id=WORKLOAD)).digest == REFUND.digest
    for other in ("spiffe://acme.test/build", f"{WORKLOAD}/", f"{WORKLOAD} ", "https://acme.test/client.json"):
        assert refused(form(client_id=other)).error == "invalid_client"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"audience": "https://billing.acme.test"}, "invalid_target"),
        ({"audience": f"{REFUND.audience}/"}, "invalid_target"),
        ({"resource": "https://orders.acme.test/orders"}, "invalid_target"),
        ({"resource": "https://orders.acme.test/orders/18"}, "invalid_target"),
        ({"scope": "orders.read"}, "invalid_scope"),
        ({"scope": "orders.refund orders.read"}, "invalid_scope"),
    ],
)
def test_a_target_or_scope_beside_the_details_must_say_the_same(changes: dict[str, str], error: str) -> None:
    for body in (form(**changes), exchange(**changes)):
        assert refused(body).error == error


@pytest.mark.parametrize("resource", [REFUND.audience, REFUND.resource])
def test_a_target_and_scope_that_say_the_same_are_taken(resource: str) -> None:
    assert action(form(audience=REFUND.audience, resource=resource, scope=REFUND.name)).digest == REFUND.digest


@pytest.mark.parametrize(
    "details",
    [
        "",
        "x",
        "null",
        "[]",
        "{}",
        json.dumps(DETAIL),
        json.dumps([DETAIL, DETAIL]),
        detail(type="payment"),
        detail(type=...),
        detail(type=None),
        detail(actions=...),
        detail(actions=[]),
        detail(actions=["orders.refund", "orders.read"]),
        detail(actions="orders.refund"),
        detail(actions=[7]),
        detail(identifier=...),
        detail(identifier=7),
        detail(locations=...),
        detail(locations=[]),
        detail(locations=["https://a.test", "https://b.test"]),
        detail(parameters=[]),
        detail(parameters=None),
        detail(privileges=["admin"]),
        detail(Type="action"),
        detail(identifier="https://orders.acme.test/orders/../17"),
        detail(identifier="https://orders.acme.test/orders%2F17"),
        detail(locations=["https://Orders.acme.test"]),
        detail(actions=["orders refund"]),
        detail(parameters={"amount": 2**53}),
        detail(parameters={"amount": 10**30}),
        detail(parameters={"x": None}),
        detail(parameters={"x": "y" * 17_000}),
        detail(parameters={"x": [[[[[[[[[[1]]]]]]]]]]}),
        detail().replace("5", "1e999"),
        detail().replace("5", "NaN"),
        detail().replace('"amount": 5', '"amount": 5, "amount": 6'),
        detail().replace('"amount": 5', '"amount": {"v": 1, "v": 2}'),
        detail().replace('"type": "action"', '"type": "action", "type": "action"'),
        detail().replace('"amount"', '"\\ud800"'),
        detail() + " x",
        "[" * 5000 + "]" * 5000,
    ],
)
def test_authorization_details_that_are_not_exactly_one_action_are_refused(details: str) -> None:
    error = refused(form(authorization_details=details))
    assert error.error == ("invalid_authorization_details" if details else "invalid_request")
    assert error.reason is Reason.MALFORMED


def test_parameters_may_be_left_out() -> None:
    assert action(form(authorization_details=detail(parameters=...))).parameters == {}


@given(st.dictionaries(st.text(max_size=8), st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=20), max_size=4))
def test_what_is_asked_for_is_what_is_decided_whatever_the_parameters(parameters: dict[str, int | str]) -> None:
    asked = Action(REFUND.name, REFUND.resource, REFUND.audience, parameters)
    assert action(form(authorization_details=detail(parameters=parameters))).digest == asked.digest


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(body: bytes) -> None:
    for tried in (body, b"grant_type=client_credentials&authorization_details=" + body):
        with pytest.raises(TokenRequestRefused):
            action(tried)


def test_a_failed_client_assertion_is_invalid_client_and_a_failed_subject_token_invalid_request() -> None:
    for reason in (Reason.EXPIRED, Reason.WRONG_AUDIENCE, Reason.UNAUTHENTICATED, Reason.KEY_MISMATCH):
        for grant, expected in (
            (GrantType.CLIENT_CREDENTIALS, (401, "invalid_client")),
            (GrantType.TOKEN_EXCHANGE, (400, "invalid_request")),
        ):
            http, body = oauth.error_answer(oauth.while_authenticating(Refused(reason), grant), "c1")
            assert (http, body["error"], body["reason"]) == (*expected, reason)


@pytest.mark.parametrize("reason", [Reason.NONCE_REQUIRED, Reason.INVALID_PROOF, Reason.PROOF_REPLAYED, Reason.QUOTA])
def test_what_went_wrong_with_the_proof_keeps_its_own_code_while_authenticating(reason: Reason) -> None:
    error = Refused(reason)
    assert oauth.while_authenticating(error, GrantType.CLIENT_CREDENTIALS) is error
    assert oauth.error_answer(error, "c1")[1]["error"] == STATUS[reason].oauth


def test_an_outage_while_authenticating_stays_an_outage() -> None:
    error = Unavailable(Reason.IDENTITY_UNAVAILABLE, "no SVID")
    http, body = oauth.error_answer(oauth.while_authenticating(error, GrantType.TOKEN_EXCHANGE), "c1")
    assert (http, body["error"]) == (503, "temporarily_unavailable")


@pytest.mark.parametrize("reason", list(Reason))
def test_a_refusal_tells_reason_and_correlation_id_and_nothing_of_its_detail(reason: Reason) -> None:
    """DESIGN invariant 9."""
    for error in (Refused(reason, "policy 'vip' said no"), Invalid("vip", reason), BrokerError(reason, "vip")):
        http, body = oauth.error_answer(error, "c1")
        assert 400 <= http < 600
        assert body == {"error": STATUS[reason].oauth, "reason": reason, "correlation_id": "c1"}


def test_a_description_holds_only_what_rfc_6749_lets_it_hold() -> None:
    for body in (form(authorization_details="x"), form(grant_type="x"), form(client_id="x"), b"\xff"):
        described = oauth.error_answer(refused(body), "c1")[1]["error_description"]
        assert re.fullmatch(r"[\x20-\x21\x23-\x5B\x5D-\x7E]+", described)


def test_secrets_of_a_request_are_not_in_its_repr() -> None:
    assert JWT_SVID not in repr(parse_token_request(assertion()))
