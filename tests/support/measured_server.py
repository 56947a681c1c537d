"""A broker's gRPC edge with everything real but attestor I/O, for processes that are measured.

Who measures gives the policies, the attestors and what is signed with. The process says {"port": …} on stdout, then
answers each line on stdin; it ends when stdin does. In its folder it leaves a caller's SVID and the root to trust.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import CA, snapshot

from attestors.contract import Attestor
from attestors.process import ProcessAttestor
from broker.acts import Means
from broker.approval_text import Texts
from broker.approvals import Approvals
from broker.cli.log import configure_log
from broker.cli.serve_scope import ScopeParts, open_scope, watching
from broker.credentials.keyring import KeyRing
from broker.decision.attest import Attestation
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.edges.grpc_approvals import ApprovalsService
from broker.edges.grpc_peer import Identifier
from broker.edges.grpc_revocation import RevocationCalls
from broker.edges.grpc_scope import ScopeService
from broker.edges.grpc_server import ActionBrokerService, GrpcServer
from broker.edges.grpc_sessions import SessionCalls
from broker.edges.metrics import Metrics
from broker.exchange import Exchange
from broker.identity.identify import Entitlements
from broker.identity.server_tls import ServerTls
from broker.identity.trust import TrustSnapshot
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.session_store import Sessions
from broker.ledger.store import Ledger
from broker.operate import Operators
from broker.recheck import Recheck
from broker.scoring import Scoring
from broker.sign import Signing

BROKER = "spiffe://acme.test/action-broker"
ISSUER = "https://broker.acme.test"


def now() -> datetime:
    """The clock."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What serves. chain: the caller's SVID, DER, leaf first. trust: who is trusted."""

    exchange: Exchange
    chain: tuple[bytes, ...]
    scope: ScopeParts
    desk: Approvals
    server: GrpcServer
    trust: TrustSnapshot


@asynccontextmanager
async def measured(
    folder: Path,
    caller: str,
    policies: Mapping[str, str],
    *,
    attestors: Callable[[Ledger, PolicyStore], Mapping[str, Attestor]] = lambda *_: {},
    entitlements: Entitlements | None = None,
    means: Means | None = None,
    audiences: Mapping[str, frozenset[str]] = MappingProxyType({}),
) -> AsyncIterator[Measured]:
    """Serves over mutual TLS while the block lasts, and says where. caller: whose SVID is left in the folder.

    audiences: who else than itself may ask, and hear, about an audience.
    """
    configure_log("warning", as_json=True)
    authority = CA("acme.test", now=now())
    trust = snapshot(authority.bundle(), own=authority.svid(BROKER, dns=["broker.acme.test"]).own())
    svid = authority.svid(caller)
    (folder / "client.pem").write_bytes(svid.chain_pem)
    (folder / "client.key").write_bytes(svid.key_pem)
    (folder / "root.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    (folder / "policy").mkdir()
    for name, text in policies.items():
        (folder / "policy" / name).write_text(text)
    checkpoint = Checkpointer(folder / "checkpoint.key", folder / "checkpoint", "broker.acme.test")
    async with await Ledger.open(folder / "ledger.sqlite", checkpoint=checkpoint, clock=now) as ledger:
        keyring = KeyRing(ledger, lambda: trust, issuer=ISSUER)
        await keyring.start(now())
        policies = PolicyStore(folder / "policy")
        looking = dict(attestors(ledger, policies))
        exchange = Exchange(
            issuer=ISSUER,
            snapshot=lambda: trust,
            entitlements=entitlements or _no_process,
            policies=policies,
            attestation=Attestation(looking, 1.0),
            ledger=ledger,
            keyring=keyring,
            quota=Quota(1e6, 1_000_000, 10),
        )
        signing = Signing(exchange, means or Means(issuer=ISSUER))
        approvals = exchange.desk = Approvals(exchange, Texts(), None)
        process = looking.get("process")
        follow = process.follow if isinstance(process, ProcessAttestor) else lambda _: None
        scope = await open_scope(exchange, looking, follow, now)
        server = _server(exchange, signing, approvals, scope, audiences)
        port = server.listen_tls("127.0.0.1:0", ServerTls(trust).grpc_credentials())
        async with watching(scope, exchange, now):
            await server.start()
            _say(port=port)
            yield Measured(
                exchange=exchange,
                chain=svid.chain,
                scope=scope,
                desk=approvals,
                server=server,
                trust=trust,
            )
            await server.close(0)
            await signing.close()


def _server(
    exchange: Exchange,
    signing: Signing,
    approvals: Approvals,
    scope: ScopeParts,
    audiences: Mapping[str, frozenset[str]],
) -> GrpcServer:
    metrics, identifier = Metrics(), Identifier(exchange, lambda _: None)
    broker = ActionBrokerService(
        exchange,
        Recheck(exchange, scope.again, scope.deciding, audiences),
        Operators(exchange),
        signing,
        identifier=identifier,
        metrics=metrics,
        clock=now,
    )
    desk = ApprovalsService(approvals, exchange, identifier=identifier, metrics=metrics, clock=now)
    sessions = SessionCalls(Scoring(exchange, Sessions(exchange.ledger.submit)), identifier)
    revocation = RevocationCalls(scope.revocations, scope.emergencies, identifier)
    told = ScopeService(
        exchange, scope.feed, audiences, sessions, revocation, identifier=identifier, metrics=metrics, clock=now
    )
    server = GrpcServer(broker, desk, told, max_concurrent=4096, max_connection_age_s=3600)
    empty = grpc.method_handlers_generic_handler("bench.Empty", {"Call": grpc.unary_unary_rpc_method_handler(_empty)})
    server._server.add_generic_rpc_handlers((empty,))
    return server


async def obey(work: Callable[[str], Awaitable[Mapping[str, Any]]]) -> None:
    """Answers each line with what `work` has to say, and with its CPU seconds: so far, or of that work alone."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        spent, told = time.process_time(), {}
        if command := line.strip():
            told = dict(await work(command))
            spent = time.process_time() - spent
        _say(cpu=spent, **told)


def _say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


async def _empty(request: bytes, _context: object) -> bytes:
    return request


async def _no_process(*_: object) -> None:
    raise AssertionError("nobody is a process here")
