"""Invariants 9 to 13 of a whole broker: DESIGN section 6, one named test each. See test_broker_invariants.py, too."""

import ast
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from pydantic import BaseModel
from support.grpc_orders import SERVICE as ORDERS_SERVICE
from support.grpc_orders import Orders, resource
from support.http_broker import details
from support.receiving import as_action, by_assertion, claims_of, guard_of, post_token, shown
from support.whole_broker import (
    AGENT,
    HIDDEN,
    ISSUER,
    ORDERS,
    RESOURCE,
    Whole,
    act,
    request,
    utc_now,
    whole_broker,
)

from broker._proto.actionbroker.v1 import broker_pb2
from broker.cli.config import Config
from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.guard import GuardInterceptor, Rule, Table
from broker.ledger.records import Outcome, Refusal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """Left as it was found."""
    with whole_broker(limits={"requests_per_second": 10_000, "burst": 10_000}) as found:
        yield found


async def test_a_refusal_shows_a_reason_and_a_correlation_id_and_nothing_else(whole: Whole) -> None:
    """Invariant 9: a refusal tells the caller a reason code and a correlation id, never the policy or the facts."""
    secrets = (HIDDEN, "no policy permits", "spiffe://", RESOURCE, str(os.getpid()), "SPIRE", "sha256:")
    async with whole.wire() as wire:
        token = await wire.token("orders.charge")
        await wire.redeem(token, "idempotency-id-1")
        said = [
            await wire.ask("RequestActionToken", request("orders.closed")),
            await wire.ask("RequestActionToken", request("orders.unheard")),
            await wire.ask("RequestActionToken", request("orders.refund", parameters='{"amount": 51}')),
            await wire.ask("RequestActionToken", request("orders.refund", parameters='{"amount": "many"}')),
            await wire.ask("RequestActionToken", request(spiffe_id="spiffe://acme.test/somebody/else")),
            await wire.ask("RequestActionToken", request(resource="https://orders.acme.test/../17")),
            await wire.ask("Explain", broker_pb2.ExplainRequest(principal=AGENT, action=act(), spiffe_id=AGENT)),
            await wire.redeem(token, "idempotency-id-2"),
            await wire.redeem(token, "idempotency-id-2", spiffe_id=AGENT),
            await wire.send("RequestActionToken", request(), ["not a proof"]),
        ]
        for one in said:
            assert one.code is not grpc.StatusCode.OK
            assert one.details == one.reason != ""
            assert one.trailers.keys() <= {"dpop-nonce", "x-correlation-id", "grpc-status-details-bin"}
            assert [detail.TypeName() for detail in one.rich.details] == [
                "google.rpc.ErrorInfo",
                "google.rpc.RequestInfo",
            ]
            assert re.fullmatch(r"[0-9a-f]{32}", one.correlation_id)
            whole_answer = repr((one.details, sorted(one.trailers.items())))
            assert not [secret for secret in secrets if secret in whole_answer]

        batch = broker_pb2.RequestActionTokensRequest(actions=[act("orders.closed")], spiffe_id=AGENT)
        (result,) = (await wire.ask("RequestActionTokens", batch)).message.results
        assert {field.name for field, _ in result.refusal.ListFields()} == {"reason", "correlation_id"}
        asked = broker_pb2.CheckRequest(token=token, action=act("orders.charge"), spiffe_id=ORDERS)
        answer = (await wire.ask("Check", asked)).message
        assert {field.name for field, _ in answer.ListFields()} == {"reason", "correlation_id"}

    key, url = ProofKey(), f"{ISSUER}/oauth2/token"
    assertion = whole.domain.jwt_svid("build/agent", ISSUER)
    form = by_assertion(assertion, details(actions=["orders.closed"], parameters={}))
    first = await post_token(whole, form, key.prove("POST", url, utc_now()))
    denied = await post_token(whole, form, key.prove("POST", url, utc_now(), nonce=first.nonce))
    assert denied.body["reason"] == Reason.DENIED
    for answer in (first, denied):
        assert answer.body.keys() <= {"error", "reason", "correlation_id"}
        assert not [secret for secret in secrets if secret in answer.text + repr(sorted(answer.headers.items()))]
    refusal: Any = await whole.recorded(denied.body["correlation_id"], Refusal)
    assert "no policy permits" in refusal.detail, "the ledger has what the caller does not"


async def test_no_secret_is_in_the_ledger_the_log_or_the_metrics() -> None:
    """Invariant 10: no credential, key or token in ledger, log, metric or error: hashes only."""
    with whole_broker() as whole:
        spied: list[str] = []
        async with whole.wire() as wire, whole.client() as client, guard_of(whole) as guard:
            names = ("orders.read", "orders.refund", "orders.charge", "orders.attested")
            spied += [await wire.token(name) for name in names]
            await wire.check(spied[0])
            await wire.redeem(spied[2], "idempotency-id-of-mine")
            await wire.redeem(spied[2], "another-idempotency-id")
            spied += ["idempotency-id-of-mine", "another-idempotency-id"]
            await guard.admit(shown(spied[0], wire.key), as_action("orders.read"))
            for proof in (wire.proof("RequestActionToken"), wire.proof("RequestActionToken", nonce="x" * 43)):
                for _ in range(2):  # the second time it is replayed
                    await wire.send("RequestActionToken", request("orders.closed"), [proof])
                await wire.send("RequestActionToken", request(), [proof, proof])
                spied.append(proof)
            spied.append((await client.request("orders.read", RESOURCE, ORDERS)).access_token)
            await wire.check(spied[0] + "x")
            await wire.check("malformed." + spied[0])

        key, url = ProofKey(), f"{ISSUER}/oauth2/token"
        assertion = whole.domain.jwt_svid("build/agent", ISSUER)
        form = by_assertion(assertion, details(actions=["orders.read"], parameters={}))
        nonce = (await post_token(whole, form, key.prove("POST", url, utc_now()))).nonce
        proof = key.prove("POST", url, utc_now(), nonce=nonce)
        spied += [assertion, proof, (await post_token(whole, form, proof)).body["access_token"]]
        assert (await post_token(whole, form, proof)).body["reason"] == Reason.PROOF_REPLAYED

        own_key = load_der_private_key(whole.domain.svid("action-broker", 0).own.private_key_pkcs8, None)
        own_secret = own_key.private_numbers().private_value.to_bytes(32)
        metrics = whole.get("/metrics")[1]
        whole.broker.stop()
        written = [file.read_bytes() for file in sorted((whole.broker.folder / "state").iterdir()) if file.is_file()]
        everything = b"\n".join([*written, metrics.encode(), json.dumps(whole.broker.log).encode()])
        for secret in spied:
            for part in secret.split("."):  # of a JWS: its header says nothing, its payload and its signature all
                assert part.startswith("eyJhbGciOiJFUzI1NiIs") or part.encode() not in everything, secret
        public = own_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        assert public in everything, "its public half is there, in the record of the signing key"
        assert own_secret not in everything
        issued = {one.credential_sha256 for one in whole.records() if isinstance(one, Outcome)}
        assert hashlib.sha256(spied[0].encode()).hexdigest() in issued, "hashes only, but those"


CACHES = re.compile(r"lru_cache|functools\.cache\b|OrderedDict\(|class \w*(Cache|Memory)\b|_remembered\b")
"""What a cache looks like in code: the ways that there are to make one here."""


def test_each_cache_is_in_the_table_of_what_may_be_stale() -> None:
    """Invariant 11: whatever is cached is in docs/staleness.md with what bounds it. There is no other cache."""
    table = (ROOT / "docs/staleness.md").read_text()
    listed = set(re.findall(r"`((?:broker|attestors)/[a-z0-9_/]+\.py)`", table))
    assert listed, "a row of the table names its module: `broker/identity/x509_svid.py`"
    assert [name for name in sorted(listed) if not (ROOT / name).is_file()] == [], "rows of what is no more"
    caching = {
        str(file.relative_to(ROOT))
        for folder in ("broker", "attestors")
        for file in (ROOT / folder).rglob("*.py")
        if "_proto" not in file.parts and CACHES.search(_code_of(file))
    }
    assert "broker/identity/x509_svid.py" in caching, "the search finds what it is to find"
    assert sorted(caching - listed) == []


def _code_of(file: Path) -> str:
    """Without docstrings and comments."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


CLOCKS = {"now", "utcnow", "today", "time", "time_ns", "clock_gettime", "clock_gettime_ns"}
ENTRY_POINTS = ("broker/cli/", "broker/guard/", "broker/client/")


def test_the_clock_is_an_argument_and_no_check_has_a_switch() -> None:
    """Invariant 12: `now` is an argument, read once a decision; no check can be switched off by configuration."""
    readers = {
        str(file.relative_to(ROOT))
        for folder in ("broker", "attestors")
        for file in (ROOT / folder).rglob("*.py")
        if "_proto" not in file.parts and _reads_clock(file)
    }
    assert "broker/cli/serve.py" in readers, "the search finds what it is to find"
    assert [name for name in sorted(readers) if not name.startswith(ENTRY_POINTS)] == []

    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"datetime.datetime.now", "time.time"} <= ruff["flake8-tidy-imports"]["banned-api"].keys()
    exempt = {name for name, rules in ruff["per-file-ignores"].items() if "TID251" in rules}
    others = {"tests/**", "deploy/**"}  # what runs beside the broker, in processes of its own
    assert exempt == others | {f"{name}**" for name in ENTRY_POINTS}

    switches = [name for name, kind in _settings(Config) if kind is bool or kind is Any]
    assert switches == ["session.transmitters.lowers"], "a right of one transmitter; whatever it says is checked alike"
    assert ("limits.burst", int) in list(_settings(Config)), "the walk sees nested settings"


def _reads_clock(file: Path) -> bool:
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CLOCKS
        and isinstance(node.func.value, ast.Name | ast.Attribute)
        and ast.unparse(node.func.value) in {"datetime", "datetime.datetime", "dt.datetime", "time", "date"}
        for node in ast.walk(ast.parse(file.read_text()))
    )


def _settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        for kind in _kinds(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _settings(kind, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", kind


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) is not None or isinstance(annotation, UnionType):
        return [kind for argument in get_args(annotation) for kind in _kinds(argument)]
    return [annotation]


async def test_a_decision_reads_the_clock_once(whole: Whole) -> None:
    """Invariant 12: all that a decision writes down has the same moment."""
    async with whole.wire() as wire:
        token = await wire.token("orders.once")
    intent = whole.intents()[claims_of(token).jti]
    at = intent.at
    assert claims_of(token).iat == int(at.timestamp())
    assert claims_of(token).expires_at == datetime.fromtimestamp(int(at.timestamp()) + 60, UTC)
    outcome: Any = await whole.recorded(intent.correlation_id, Outcome)
    assert outcome.at == at


async def test_what_is_executed_is_what_was_approved(whole: Whole) -> None:
    """Invariant 13: the guard rebuilds the whole Action from the request and compares digests; no mapping: refused."""
    orders = Orders()
    rule = Rule(
        method=f"/{ORDERS_SERVICE}/Refund",
        action="orders.refund",
        resource=resource,
        parameters=lambda message: {"amount": int(message.split(b"/")[1])},
    )
    async with whole.wire() as wire, guard_of(whole) as guard:
        interceptor = GuardInterceptor(guard, Table([rule]), authorities=["orders.acme.test"])
        server = grpc.aio.server(interceptors=[interceptor])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(ORDERS_SERVICE, orders.handlers()),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

                async def call(token: str, method: str, message: bytes) -> str:
                    url = f"https://orders.acme.test/{ORDERS_SERVICE}/{method}"
                    proof = wire.key.prove("POST", url, utc_now(), token=token)
                    metadata = [("authorization", f"DPoP {token}"), ("dpop", proof)]
                    try:
                        await channel.unary_unary(f"/{ORDERS_SERVICE}/{method}")(message, metadata=metadata, timeout=10)
                    except grpc.aio.AioRpcError as error:
                        return error.details() or ""
                    return "done"

                approved = {"parameters": '{"amount": 30}', "resource": "https://orders.acme.test/v1/orders/17"}
                token = await wire.token("orders.refund", **approved)
                assert await call(token, "Refund", b"17/31") == Reason.OUT_OF_SCOPE, "another amount"
                assert await call(token, "Refund", b"18/30") == Reason.OUT_OF_SCOPE, "another order"
                assert await call(token, "Unmapped", b"17/30") == Reason.OUT_OF_SCOPE, "no mapping"
                assert await call(token, "Refund", b"17") == Reason.OUT_OF_SCOPE, "a mapping that fails"
                assert await call(token, "Refund", b"17/30") == "done"
                assert await call(token, "Refund", b"17/30") == Reason.ALREADY_USED
                assert orders.seen == [b"17/30"]
        finally:
            await server.stop(None)


async def test_the_broker_too_compares_the_whole_action(whole: Whole) -> None:
    """Invariant 13: Check and Redeem are about the act at hand, not about the token alone."""
    async with whole.wire() as wire:
        token = await wire.token("orders.refund", parameters='{"amount": 30}')
        assert await wire.check(token, "orders.refund", parameters='{"amount": 30}') == ""
        assert await wire.check(token, "orders.refund", parameters='{"amount": 31}') == Reason.OUT_OF_SCOPE
        assert await wire.check(token, "orders.read") == Reason.OUT_OF_SCOPE
        other = "https://orders.acme.test/orders/18"
        assert (
            await wire.check(token, "orders.refund", parameters='{"amount": 30}', resource=other) == Reason.OUT_OF_SCOPE
        )
        charge = await wire.token("orders.charge")
        said = await wire.redeem(charge, "idempotency-id-1", resource=other)
        assert said.reason == Reason.OUT_OF_SCOPE
        assert (await wire.redeem(charge, "idempotency-id-1")).code is grpc.StatusCode.OK
