"""A whole broker behind its HTTP edge: real policy, ledger, keys and TLS; only time and trust are the test's."""

import json
import os
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aiohttp
from multidict import CIMultiDict
from support.pki import CA, JwtAuthority, Svid, der, snapshot
from support.scope import ScopeAround

from attestors.contract import Attestor, Facts, Process
from broker.credentials.dpop import ProofKey
from broker.credentials.keyring import KeyRing
from broker.decision.attest import Attestation
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.edges.http_app import build_app, build_operations_app
from broker.edges.http_asking import add_asking
from broker.edges.http_server import HttpServer
from broker.edges.metrics import Metrics
from broker.exchange import Exchange
from broker.identity.server_tls import ServerTls
from broker.identity.trust import TrustSnapshot
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.reading import read
from broker.ledger.records import Record
from broker.ledger.store import Ledger

ISSUER = "https://broker.acme.test"
CALLER = "spiffe://acme.test/build/agent"
BROKER = "spiffe://acme.test/action-broker"
ORDERS = "spiffe://acme.test/service/orders"
"""It speaks for AUDIENCE, which is no SPIFFE ID."""
AUDIENCE = "https://orders.acme.test"
LOCALHOST = "127.0.0.1"

SCHEMA = """
action "orders.refund" appliesTo {
  principal: [Workload], resource: [Resource], context: { parameters: { amount: Long } }
};
action "orders.read", "orders.delete" appliesTo { principal: [Workload], resource: [Resource], context: {} };
action "orders.export" appliesTo { principal: [Workload], resource: [Resource], context: { process: Process } };
"""
POLICY = """
@id("refunds") permit (
  principal in Path::"spiffe://acme.test/build", action == Action::"orders.refund",
  resource in Resource::"https://orders.acme.test/orders"
) when { context.parameters.amount <= 50 };
@id("reads") permit (principal, action == Action::"orders.read", resource);
@id("exports") permit (principal, action == Action::"orders.export", resource) when { context.process.uid == 0 };
"""


def details(**changes: Any) -> str:
    """authorization_details of a refund that the policy permits, with these members changed."""
    return json.dumps(
        [
            {
                "type": "action",
                "actions": ["orders.refund"],
                "identifier": "https://orders.acme.test/orders/17",
                "locations": [AUDIENCE],
                "parameters": {"amount": 5},
            }
            | changes
        ]
    )


def read_details() -> str:
    return details(actions=["orders.read"], parameters={})


@dataclass(frozen=True)
class Answer:
    """What came back. body: the JSON, where it is JSON."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.text)

    @property
    def nonce(self) -> str:
        return self.headers["DPoP-Nonce"]

    @property
    def said(self) -> tuple[int, str, str]:
        """Status, OAuth error and our reason."""
        return self.status, self.body["error"], self.body["reason"]


@dataclass
class Ready:
    """Readiness as the test wants it."""

    found: list[str] = field(default_factory=list)

    def problems(self, now: datetime) -> Sequence[str]:
        assert now.tzinfo is UTC
        return self.found


@dataclass
class HttpBroker:
    """The parts, for tests to turn. ahead: how far its clock is before the real one."""

    authority: CA
    signer: JwtAuthority
    trust: TrustSnapshot
    exchange: Exchange
    metrics: Metrics
    ready: Ready
    tls: ServerTls
    server: HttpServer
    operations: HttpServer
    scope: ScopeAround
    ahead: timedelta = timedelta()

    ledger_file: Path = field(default_factory=Path)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    @property
    def url(self) -> str:
        return f"https://{LOCALHOST}:{self.server.port}"

    @property
    def token_url(self) -> str:
        """What a proof is for: the issuer's name, wherever the server listens."""
        return f"{self.exchange.issuer}/oauth2/token"

    def assertion(self, **changes: Any) -> str:
        """A JWT-SVID unlike all others: the first key that comes with one is the only one."""
        usual = {"aud": [self.exchange.issuer], "jti": secrets.token_hex(8)}
        return self.signer.token(now=self.now(), **(usual | changes))

    def svid(self, uri: str = CALLER, **how: Any) -> Svid:
        return self.authority.svid(uri, **how)

    def prove(self, key: ProofKey, nonce: str | None = None, **changes: Any) -> str:
        made = {"method": "POST", "url": self.token_url} | changes
        return key.prove(made["method"], made["url"], self.now(), nonce=nonce)

    def client_context(self, svid: Svid | None = None) -> ssl.SSLContext:
        """A client's TLS that knows our authorities, and shows `svid`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # an SVID names no host
        context.load_verify_locations(cadata=der(self.authority.root.certificate))
        if svid is not None:
            load(context, svid)
        return context

    async def send(
        self,
        body: bytes | Mapping[str, str],
        *,
        svid: Svid | None = None,
        dpop: str | Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
        path: str = "/oauth2/token",
    ) -> Answer:
        """One request to the token endpoint on a connection of its own."""
        sent = CIMultiDict({"Content-Type": "application/x-www-form-urlencoded"} | dict(headers or {}))
        for proof in (dpop,) if isinstance(dpop, str) else dpop or ():
            sent.add("DPoP", proof)
        data = body if isinstance(body, bytes) else urlencode(body).encode()
        connector = aiohttp.TCPConnector(ssl=self.client_context(svid))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.post(f"{self.url}{path}", data=data, headers=sent) as response,
        ):
            return Answer(response.status, response.headers, await response.text())

    async def get(
        self, path: str, *, headers: Mapping[str, str] | None = None, method: str = "GET", svid: Svid | None = None
    ) -> Answer:
        connector = aiohttp.TCPConnector(ssl=self.client_context(svid))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"{self.url}{path}", headers=headers) as response,
        ):
            return Answer(response.status, response.headers, await response.text())

    async def nonce(self) -> str:
        """A fresh one, as any client gets it: by asking without."""
        key = ProofKey()
        answer = await self.send(self.by_assertion(self.assertion()), dpop=self.prove(key))
        assert answer.said == (400, "use_dpop_nonce", "use_dpop_nonce")
        return answer.nonce

    async def records(self) -> list[Record]:
        """All that is in the ledger, which is closed for it: what was only counted is written down then."""
        await self.exchange.ledger.close()
        return [row.record() for row in read(self.ledger_file)]

    def credentials(self, **changes: str) -> dict[str, str]:
        return {"grant_type": "client_credentials", "authorization_details": details()} | changes

    def by_assertion(self, assertion: str, **changes: str) -> dict[str, str]:
        return self.credentials(
            client_assertion_type="urn:ietf:params:oauth:client-assertion-type:jwt-spiffe",
            client_assertion=assertion,
            **changes,
        )

    def by_exchange(self, token: str, **changes: str) -> dict[str, str]:
        return {
            "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "subject_token": token,
            "authorization_details": details(),
        } | changes


def load(context: ssl.SSLContext, svid: Svid) -> None:
    """The library takes keys from files only; this one has no name."""
    file = os.memfd_create("svid")
    try:
        os.write(file, svid.key_pem + svid.chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


async def _nobody(_: Process, __: datetime) -> Facts:
    raise AssertionError("nobody comes over a Unix socket here")


@asynccontextmanager
async def http_broker(
    folder: Path,
    *,
    issuer: str = ISSUER,
    burst: int = 1000,
    with_operations: bool = True,
    attestors: Mapping[str, Attestor] | None = None,
    **limits: Any,
) -> AsyncIterator[HttpBroker]:
    """Running, on ports of its own. with_operations: whether health and metrics are on the TLS listener, too."""
    authority, signer = CA(now=datetime.now(UTC)), JwtAuthority()
    trust = snapshot(authority.bundle(signer), own=authority.svid(BROKER).own())
    policies = folder / "policies"
    policies.mkdir()
    (policies / "orders.cedarschema").write_text(SCHEMA)
    (policies / "orders.cedar").write_text(POLICY)
    checkpointer = Checkpointer(folder / "ledger.key", folder / "ledger.checkpoint", "broker.acme.test/ledger")
    metrics, ready = Metrics(), Ready()
    made: list[HttpBroker] = []

    def now() -> datetime:
        return made[0].now() if made else datetime.now(UTC)

    def current() -> TrustSnapshot:
        return made[0].trust if made else trust

    async with await Ledger.open(folder / "ledger.db", checkpoint=checkpointer, clock=now) as ledger:
        keyring = KeyRing(ledger, current, issuer=issuer)
        await keyring.start(now())
        exchange = Exchange(
            issuer=issuer,
            snapshot=current,
            entitlements=_nobody,
            policies=PolicyStore(policies),
            attestation=Attestation(attestors or {}, 5.0),
            ledger=ledger,
            keyring=keyring,
            quota=Quota(0.001, burst, 100),
        )
        tls = ServerTls(trust)
        app, scope = build_app(exchange, metrics, ready, now, operations=with_operations), ScopeAround(exchange, now)
        recheck = scope.recheck({AUDIENCE: frozenset({ORDERS})})
        add_asking(app, exchange, recheck, scope.deciding, metrics, now)
        server = HttpServer(app, (LOCALHOST, 0), tls.http_context(), **limits)
        operations = HttpServer(build_operations_app(metrics, ready, now), (LOCALHOST, 0), None)
        broker = HttpBroker(authority, signer, trust, exchange, metrics, ready, tls, server, operations, scope)
        broker.ledger_file = folder / "ledger.db"
        made.append(broker)
        await server.start()
        await operations.start()
        try:
            yield broker
        finally:
            await server.close()
            await operations.close()
