"""The demo's processes: `python -m broker.cli.demo_roles orders|agent ARGUMENTS`. Each is told what to do line by line.

They hold no secret and read no file: who they are, the trust domain knows by their PID. Run by broker/cli/demo.py.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

import grpc

from broker import guard
from broker.cli.log import configure_log
from broker.cli.starter_policy import ORDERS, SERVICE
from broker.client import ActionToken, Client
from broker.credentials.dpop import ProofKey
from broker.errors import BrokerError
from broker.guard import Guard, GuardInterceptor, KeyCache, Rule, Table, spiffe_fetch
from broker.identity.spiffe_id import SpiffeId
from broker.identity.workload_api import WorkloadApi
from broker.status import DETAILS, reason_of

AUTHORITY: Final = "orders.dev.test"
REFUND: Final = "/demo.Orders/Refund"
CAREFUL: Final = "/demo.Orders/RefundCarefully"  # the same act; asks the broker whether it would still be granted
DEADLINE_S: Final = 10.0

Told = Mapping[str, Any]
Answer = dict[str, Any]


async def orders(socket: str, broker_socket: str, issuer: str, key_set: str, broker_id: str, workload_api: str) -> None:
    """The service: carries refunds out, and says how many. Its messages are JSON; a real one's would be protobuf.

    It listens on a Unix socket in the demo's private folder. Tokens here are bound to their callers' keys, not to a
    connection, so a guard needs no more; a real service has TLS as well.
    """
    carried_out: list[Any] = []

    async def refund(request: Any, _: object) -> Answer:
        carried_out.append(request)
        return {"refunded": request["amount"], "by": guard.current().principal}

    async with WorkloadApi(workload_api) as own, Client.unix(broker_socket, issuer=issuer) as broker:
        async with asyncio.timeout(DEADLINE_S):
            await own.ready()
        keys = KeyCache(spiffe_fetch(key_set, SpiffeId.parse(broker_id), own.snapshot))
        admits = GuardInterceptor(
            Guard(issuer=issuer, audience=SERVICE, keys=keys, broker=broker),
            Table([_rule(REFUND), _rule(CAREFUL, check=True)]),
            authorities=[AUTHORITY],
        )
        server = grpc.aio.server(interceptors=[admits])
        handler = grpc.unary_unary_rpc_method_handler(refund, json.loads, _dump)
        methods = {method.rpartition("/")[2]: handler for method in (REFUND, CAREFUL)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("demo.Orders", methods),))
        server.add_insecure_port(f"unix:{socket}")
        await server.start()

        async def tell(_: Told) -> Answer:
            return {"carried_out": carried_out}

        await _follow({"carried_out": tell})
        await server.stop(None)
        await keys.close()


def _rule(method: str, *, check: bool = False) -> Rule:
    """What a request means: everything that changes what `refund` does is in it."""
    return Rule(
        method=method,
        action="orders.refund",
        resource=lambda request: f"{ORDERS}/{request['order']}",
        parameters=lambda request: {"amount": request["amount"]},
        check=check,
    )


class Agent:
    """A caller. It keeps its tokens to itself, unless it is told to leak one."""

    def __init__(self, broker: Client, service: grpc.aio.Channel) -> None:
        self._broker, self._service = broker, service
        self._token: ActionToken | None = None

    async def ask(self, told: Told) -> Answer:
        """Asks the broker for a token for one refund."""
        try:
            self._token = await self._broker.request(
                "orders.refund", f"{ORDERS}/{told['order']}", SERVICE, {"amount": told["amount"]}
            )
        except BrokerError as error:
            return {"came": str(error.reason)}
        return {"came": "token", "lives_s": round((self._token.expires_at - _now()).total_seconds())}

    async def refund(self, told: Told) -> Answer:
        """Calls the service with the token at hand."""
        if self._token is None:
            return {"came": "no token"}
        return await self._call(told, self._token.grpc_metadata(_method(told), authority=AUTHORITY))

    async def leak(self, _: Told) -> Answer:
        """Gives the token away, as a log line, a core dump or a curious proxy might."""
        return {"token": self._token.access_token if self._token else ""}

    async def steal(self, told: Told) -> Answer:
        """Calls the service with another's token, and the best proof that a thief can make: of its own key."""
        url = f"https://{AUTHORITY}{_method(told)}"
        proof = ProofKey().prove("POST", url, _now(), token=told["token"])
        return await self._call(told, (("authorization", f"DPoP {told['token']}"), ("dpop", proof)))

    async def _call(self, told: Told, metadata: tuple[tuple[str, str], ...]) -> Answer:
        call = self._service.unary_unary(_method(told), request_serializer=_dump, response_deserializer=json.loads)
        request = {"order": told["order"], "amount": told["amount"]}
        try:
            answer: Answer = await call(request, metadata=metadata, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            details = dict(error.trailing_metadata() or ()).get(DETAILS)
            reason = reason_of(details if isinstance(details, bytes) else None)
            return {"came": str(reason or error.code().name.lower())}
        return {"came": "refunded", **answer}


async def agent(service: str, broker_socket: str, issuer: str) -> None:
    """Asks and calls as it is told. It is the support agent while it is registered as that: nothing in it says so."""
    options = [("grpc.default_authority", AUTHORITY)]
    async with (
        Client.unix(broker_socket, issuer=issuer) as broker,
        grpc.aio.insecure_channel(f"unix:{service}", options=options) as channel,
    ):
        one = Agent(broker, channel)
        await _follow({"ask": one.ask, "refund": one.refund, "leak": one.leak, "steal": one.steal})


def _method(told: Told) -> str:
    return CAREFUL if told.get("carefully") else REFUND


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def _now() -> datetime:
    return datetime.now(UTC)


async def _follow(acts: Mapping[str, Callable[[Told], Awaitable[Answer]]]) -> None:
    """Does what each line on standard input says, answers with a line, and ends with the last."""
    _say({"came": "ready"})
    while line := await asyncio.to_thread(sys.stdin.readline):
        told = json.loads(line)
        _say(await acts[told["do"]](told))


def _say(answer: Answer) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    configure_log("warning", as_json=True)
    asyncio.run(orders(*sys.argv[2:]) if sys.argv[1] == "orders" else agent(*sys.argv[2:]))
