"""What holders and receiving services ask a broker about credentials, over its HTTP edge."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.exchanging import CORRELATION
from support.http_broker import AUDIENCE, CALLER, ORDERS, Answer, HttpBroker, details
from support.pki import Svid

from broker.credentials.action_token import VerifiedClaims, verify
from broker.errors import BrokerError
from broker.exchange import KeyProof
from broker.ledger.records import Record, Refusal

INTROSPECT, REVOKE = "/oauth2/introspect", "/oauth2/revoke"
ONE, MANY = "/access/v1/evaluation", "/access/v1/evaluations"
RESOURCE = "https://orders.acme.test/orders/17"
SINGLE = """
@id("charges") @single_use permit (principal, action == Action::"orders.charge", resource);
"""
CHARGE_SCHEMA = """
action "orders.charge" appliesTo { principal: [Workload], resource: [Resource], context: {} };
"""


def with_charges(folder: Path) -> None:
    """Adds an action whose tokens are single-use to a broker's policy folder."""
    (folder / "policies" / "charges.cedarschema").write_text(CHARGE_SCHEMA)
    (folder / "policies" / "charges.cedar").write_text(SINGLE)


async def token(broker: HttpBroker, svid: Svid | None = None, **changes: Any) -> str:
    """One for a refund, bound to the certificate of who asks."""
    answer = await broker.send(broker.credentials(authorization_details=details(**changes)), svid=svid or broker.svid())
    assert answer.status == 200, answer.text
    return answer.body["access_token"]


async def introspect(broker: HttpBroker, shown: str, spiffe_id: str = ORDERS, **more: str) -> Answer:
    return await broker.send({"token": shown, **more}, svid=broker.svid(spiffe_id), path=INTROSPECT)


async def is_active(broker: HttpBroker, shown: str, spiffe_id: str = ORDERS) -> bool:
    """What introspection says; what is inactive is told alike, whatever it is."""
    answer = await introspect(broker, shown, spiffe_id)
    assert answer.status == 200
    assert answer.body["active"] or answer.body == {"active": False}
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.body["active"]


async def revoke(broker: HttpBroker, shown: str, spiffe_id: str, **more: str) -> Answer:
    return await broker.send({"token": shown, **more}, svid=broker.svid(spiffe_id), path=REVOKE)


def claims_of(broker: HttpBroker, shown: str) -> VerifiedClaims:
    exchange = broker.exchange
    return verify(shown, issuer=exchange.issuer, key_for=exchange.keyring.public, now=broker.now())


def suspend(broker: HttpBroker, shown: str) -> Any:
    """Suspends one, as a change does that cannot be looked at; what ends it."""
    live = broker.exchange.scope.live.get(claims_of(broker, shown).jti)
    suspending = broker.scope.deciding.suspending
    suspension = suspending.begin("test", [live], None)
    return lambda: suspending.end(suspension)


async def check(broker: HttpBroker, shown: str, spiffe_id: str = ORDERS) -> str:
    """What Check says of it: the reason why not, or ""."""
    claims = claims_of(broker, shown)
    recheck = broker.scope.recheck({claims.aud: frozenset({ORDERS})})
    none = KeyProof(proof=None, method="POST", url="", binding="")
    caller = broker.exchange.identify_certificate(broker.svid(spiffe_id).chain, none, broker.now(), CORRELATION)
    try:
        await recheck.check(caller, shown, claims.action, broker.now(), CORRELATION)
    except BrokerError as error:
        return error.reason
    return ""


def refusals(found: list[Record], stage: str) -> list[Refusal]:
    return [one for one in found if isinstance(one, Refusal) and one.stage == stage]


def ledger_bytes(folder: Path) -> bytes:
    """All that the ledger left on the disk."""
    files = [file for file in folder.iterdir() if file.name.startswith("ledger")]
    assert files
    return b"".join(file.read_bytes() for file in files)


def subject(spiffe_id: str) -> dict[str, str]:
    return {"type": "workload", "id": spiffe_id}


async def ask(
    broker: HttpBroker,
    body: Mapping[str, Any] | str | bytes,
    *,
    spiffe_id: str = ORDERS,
    path: str = ONE,
    **how: Any,
) -> Answer:
    """One AuthZEN request, by mutual TLS unless `svid` says otherwise."""
    data = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    headers = {"Content-Type": "application/json"} | dict(how.pop("headers", {}))
    svid = how.pop("svid", None) or (None if how.pop("nobody", False) else broker.svid(spiffe_id))
    return await broker.send(data, svid=svid, headers=headers, path=path, **how)


def refund(amount: int = 5, **changes: Any) -> dict[str, Any]:
    """Whether CALLER may refund at AUDIENCE; the policy lets it up to 50."""
    return {
        "subject": subject(CALLER),
        "action": {"name": "orders.refund", "properties": {"amount": amount}},
        "resource": {"type": "order", "id": RESOURCE},
        "context": {"audience": AUDIENCE},
    } | changes


def shown(text: str, **more: str) -> dict[str, str]:
    return {"audience": AUDIENCE, "access_token": text, **more}


def decided(answer: Answer) -> Any:
    """True, or the reason of a no, which tells nothing else."""
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json"), answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return verdict(answer.body)


def verdict(body: dict[str, Any]) -> Any:
    if body["decision"]:
        return True
    assert body["decision"] is False
    assert set(body["context"]) == {"reason", "correlation_id"}
    return body["context"]["reason"]


async def verdicts(broker: HttpBroker, body: Any, **how: Any) -> list[Any]:
    answer = await ask(broker, body, path=MANY, **how)
    assert answer.status == 200, answer.text
    assert set(answer.body) == {"evaluations"}
    return [verdict(one) for one in answer.body["evaluations"]]
