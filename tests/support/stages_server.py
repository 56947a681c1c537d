"""A broker's gRPC edge with everything real but attestor I/O, in a process of its own, for measuring.

Says {"port": …} on stdout, then answers each line on stdin: an empty one with its CPU seconds so far, a number with the
CPU seconds of so many requests made right here, without a transport; ends when stdin does.
usage: python -m support.stages_server FOLDER
"""

import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import grpc
import uvloop
from cryptography.hazmat.primitives.serialization import Encoding
from support.pki import CA, snapshot

from broker.action import Action
from broker.credentials.keyring import KeyRing
from broker.decision.attest import Attestation
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.edges.grpc_peer import Identifier, correlation_id
from broker.edges.grpc_server import ActionBrokerService, GrpcServer
from broker.edges.metrics import Metrics
from broker.exchange import Exchange, KeyProof
from broker.identity.server_tls import ServerTls
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.store import Ledger
from broker.operate import Operators
from broker.recheck import Recheck

BROKER = "spiffe://acme.test/action-broker"
CALLER = "spiffe://acme.test/build/w7"
ISSUER = "https://broker.acme.test"
POLICIES_IN_SLICE = 20
CONCURRENT = 32


def now() -> datetime:
    return datetime.now(UTC)


def write_policies(folder: Path) -> None:
    """20 policies that all could apply to the action, one of which does: the slice of the budget."""
    folder.mkdir()
    (folder / "p.cedarschema").write_text(
        'action "orders.refund" appliesTo { principal: [Workload], resource: [Resource],'
        " context: { parameters: { amount: Long } } };"
    )
    (folder / "p.cedar").write_text(
        "\n".join(
            f'@id("p{n}") @max_ttl("60s") permit (principal == Workload::"spiffe://acme.test/build/w{n}",'
            f' action == Action::"orders.refund", resource in Resource::"https://orders.acme.test/v1")'
            " when { context.parameters.amount < 100 };"
            for n in range(POLICIES_IN_SLICE)
        )
    )


async def _empty(request: bytes, _context: object) -> bytes:
    return request


async def main(folder: Path) -> None:
    authority = CA("acme.test", now=now())
    trust = snapshot(authority.bundle(), own=authority.svid(BROKER, dns=["broker.acme.test"]).own())
    caller = authority.svid(CALLER)
    (folder / "client.pem").write_bytes(caller.chain_pem)
    (folder / "client.key").write_bytes(caller.key_pem)
    (folder / "root.pem").write_bytes(authority.certificate.public_bytes(Encoding.PEM))
    write_policies(folder / "policy")
    checkpoint = Checkpointer(folder / "checkpoint.key", folder / "checkpoint", "broker.acme.test")
    async with await Ledger.open(folder / "ledger.sqlite", checkpoint=checkpoint, clock=now) as ledger:
        keyring = KeyRing(ledger, lambda: trust, issuer=ISSUER)
        await keyring.start(now())
        exchange = Exchange(
            issuer=ISSUER,
            snapshot=lambda: trust,
            entitlements=_no_process,
            policies=PolicyStore(folder / "policy"),
            attestation=Attestation({}, 1.0),
            ledger=ledger,
            keyring=keyring,
            quota=Quota(1e6, 1_000_000, 10),
        )
        service = ActionBrokerService(
            exchange,
            Recheck(exchange, {}),
            Operators(exchange),
            identifier=Identifier(exchange, lambda _: None),
            metrics=Metrics(),
            clock=now,
        )
        server = GrpcServer(service, max_concurrent=4096, max_connection_age_s=3600)
        empty = grpc.method_handlers_generic_handler(
            "bench.Empty", {"Call": grpc.unary_unary_rpc_method_handler(_empty)}
        )
        server._server.add_generic_rpc_handlers((empty,))
        port = server.listen_tls("127.0.0.1:0", ServerTls(trust).grpc_credentials())
        await server.start()
        print(json.dumps({"port": port}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            spent = time.process_time()
            if line.strip():
                await _stages(exchange, caller.chain, int(line))
                spent = time.process_time() - spent
            print(json.dumps({"cpu": spent}), flush=True)
        await server.close(0)


async def _stages(exchange: Exchange, chain: tuple[bytes, ...], requests: int) -> None:
    """Everything between reading a request and writing its answer, 32 at a time."""
    proof = KeyProof(proof=None, method="POST", url=ISSUER, binding="mtls")
    left = iter(range(requests))

    def asked() -> Action:
        return Action.parse(
            "orders.refund",
            "https://orders.acme.test/v1/orders/17",
            "spiffe://acme.test/service/orders",
            '{"amount": 30}',
        )

    async def caller() -> None:
        for _ in left:
            moment, correlation = now(), correlation_id()
            identified = exchange.identify_certificate(chain, proof, moment, correlation)
            await exchange.request(identified, asked, moment, correlation)

    await asyncio.gather(*(caller() for _ in range(CONCURRENT)))


async def _no_process(*_: object) -> None:
    raise AssertionError("nobody is a process here")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
