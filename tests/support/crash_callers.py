"""Callers that work a broker as hard as they can, and go on when it is killed under them.

usage: python -m support.crash_callers SOCKET FILE. Each line in FILE is something that the broker acknowledged, written
after the acknowledgement, so that whoever reads it may hold the ledger to it:

    issued JTI
    redeemed JTI IDEMPOTENCY-ID MICROSECONDS
    twice JTI                                  a second redemption was taken: never to be seen
    strange REASON                             a refusal that there is no reason for: never to be seen
"""

import asyncio
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress

import msgspec
from support.whole_broker import AGENT, ISSUER, ORDERS, RESOURCE

from broker.action import Action
from broker.client import ActionToken, Client, Refused, Unavailable
from broker.credentials import jose
from broker.credentials.action_token import Claims
from broker.errors import Reason
from broker.ledger.transaction import microseconds

TASKS = 4
CHARGE = Action("orders.charge", RESOURCE, ORDERS, {})
KEPT = 50
"""Redeemed tokens kept by each task, to try them again in another life of the broker."""

_claims = msgspec.json.Decoder(Claims)
Tell = Callable[..., None]


def jti_of(token: str) -> str:
    """The token's id, as anybody can read it."""
    return jose.decode_unique(jose.parse(token, typ="at+jwt").payload, _claims, "the token").jti


class Worker:
    """Takes tokens and uses most of them up. What got no answer is asked again, in whatever life of the broker."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._unanswered: deque[tuple[str, str]] = deque()
        self._redeemed: deque[str] = deque(maxlen=KEPT)

    async def work(self, agent: Client, orders: Client) -> None:
        """Until the broker is gone. Raises: Unavailable."""
        for token in list(self._redeemed)[-3:]:
            await self._again(orders, token)
        while True:
            while self._unanswered:
                await self._redeem(orders, *self._unanswered[0])
            token = await self._request(agent)
            self._tell("issued", jti_of(token.access_token))
            if secrets.randbelow(10) > 2:
                self._unanswered.append((token.access_token, secrets.token_urlsafe(16)))

    async def _request(self, agent: Client) -> ActionToken:
        return await agent.request_action(CHARGE)

    async def _redeem(self, orders: Client, token: str, idempotency_id: str) -> None:
        """The same id each time, so that a lost answer burns nothing."""
        found = await orders.redeem(token, CHARGE, idempotency_id)
        self._unanswered.popleft()
        self._redeemed.append(token)
        self._tell("redeemed", jti_of(token), idempotency_id, microseconds(found.redeemed_at))
        if not secrets.randbelow(4):
            await self._again(orders, token)

    async def _again(self, orders: Client, token: str) -> None:
        try:
            await orders.redeem(token, CHARGE, secrets.token_urlsafe(16))
        except Refused as error:
            if error.reason is not Reason.ALREADY_USED and error.reason is not Reason.EXPIRED:
                self._tell("strange", error.reason)
            return
        self._tell("twice", jti_of(token))


async def keep_working(socket: str, tell: Tell) -> None:
    """One task's life: a new connection for each life of the broker, at once."""
    worker = Worker(tell)
    while True:
        with suppress(Unavailable, OSError):
            async with AsyncExitStack() as stack:
                agent, orders = [
                    await stack.enter_async_context(
                        Client.unix(socket, issuer=ISSUER, spiffe_id=spiffe_id, deadline_s=2.0)
                    )
                    for spiffe_id in (AGENT, ORDERS)
                ]
                try:
                    await worker.work(agent, orders)
                except Refused as error:
                    tell("strange", error.reason)
        await asyncio.sleep(0.01)  # the broker is gone: it takes longer than this to come back


async def main(socket: str, file: str) -> None:
    """See the module."""
    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(*words: object) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    await asyncio.gather(*[keep_working(socket, tell) for _ in range(TASKS)])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
