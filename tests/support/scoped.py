"""A receiving service that hears the broker's scope feed, and what tests ask of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from support.broker import ISSUER
from support.processes import Child
from support.receiving import URL, claims_of
from support.whole_broker import ORDERS, Whole, utc_now

from broker.client import ActionToken, Client
from broker.errors import BrokerError
from broker.guard import Guard, Memory, Presented, ScopeFeed
from broker.guard.verify import Allowed

PATIENCE_S = 20.0


@dataclass
class Receiver:
    """A guard of ORDERS with the feed behind it."""

    guard: Guard
    feed: ScopeFeed
    client: Client
    clock: Callable[[], datetime] = utc_now

    def reason(self, token: str) -> str:
        """What the feed says of a token that was held up to nothing else; "" while it counts."""
        try:
            self.feed.require(claims_of(token), self.clock())
        except BrokerError as error:
            return error.reason
        return ""

    async def admit(self, token: ActionToken) -> Allowed:
        """One request with it, as a service behind the guard gets it."""
        headers = token.http_headers("POST", URL)
        scheme, _, text = headers["authorization"].partition(" ")
        assert scheme in {"DPoP", "Bearer"}
        shown = Presented(token=text, proof=headers["dpop"], method="POST", urls=(URL,))
        return await self.guard.admit(shown, token.action)

    async def refused(self, token: ActionToken) -> str:
        """Why such a request is refused; "" where it is not."""
        try:
            await self.admit(token)
        except BrokerError as error:
            return error.reason
        return ""

    async def hears(self, token: str, reason: str) -> None:
        """Waits until the feed says this of the token; a suspension in between is one."""
        seen = None
        with self.feed.changes() as changed:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    while (seen := self.reason(token)) != reason:
                        changed.clear()
                        try:
                            async with asyncio.timeout(0.05):
                                await changed.wait()
                        except TimeoutError:
                            continue
            except TimeoutError:
                raise AssertionError(f"never {reason!r}, but {seen!r}; feed: {self.feed.last_error}") from None


@asynccontextmanager
async def receiver(
    whole: Whole, audience: str = ORDERS, *, socket: str = "", **options: Any
) -> AsyncIterator[Receiver]:
    """Up, and told everything, when the block begins. socket: another way to the broker."""
    async with receiving(socket or whole.broker.socket, audience, **options) as found:
        yield found


@asynccontextmanager
async def receiving(
    socket: str, audience: str, *, clock: Callable[[], datetime] = utc_now, **options: Any
) -> AsyncIterator[Receiver]:
    """The same on any broker, of whom this process has the ID `audience`. clock: the service's own."""
    async with (
        Client.unix(socket, issuer=ISSUER, spiffe_id=audience) as client,
        ScopeFeed(client, audiences=[audience], clock=clock, **options) as feed,
    ):
        async with asyncio.timeout(PATIENCE_S):
            await feed.ready()
        guard = Guard(issuer=ISSUER, audience=audience, scope=feed, broker=client, memory=Memory(), clock=clock)
        yield Receiver(guard, feed, client, clock)


@asynccontextmanager
async def holding(whole: Whole, action: str = "orders.read") -> AsyncIterator[tuple[Child, str]]:
    """A process of its own, and a token that it was given."""
    with whole.caller() as child:
        assert await child.line() == "ready"
        child.tell(f"token {action}")
        yield child, await child.line()


def write_policy(whole: Whole, text: str) -> None:
    """Replaces the policy in one step."""
    folder = whole.broker.folder / "policy"
    new = folder / "new"
    new.write_text(text)
    new.replace(folder / "orders.cedar")
