"""A caller in a process of its own, with one SPIFFE ID and our own client.

usage: python -m support.caller SOCKET. It reads commands, one a line, and answers each with a line:

    token ACTION      the token, or the reason why not
    flood ACTION      "flooding"; from then on it asks without end
    replace           "replaced", said by the program that has taken its place in the same process
"""

import asyncio
import os
import sys

from support.whole_broker import ISSUER, ORDERS, RESOURCE

from broker.client import Client
from broker.errors import BrokerError

TASKS = 8


def tell(text: str) -> None:
    """One line, in one write: a kill never tears it."""
    os.write(1, f"{text}\n".encode())


async def ask(client: Client, action: str) -> str:
    """A token, or the reason why not."""
    try:
        return (await client.request(action, RESOURCE, ORDERS)).access_token
    except BrokerError as error:
        return str(error.reason)


async def flood(client: Client, action: str) -> None:
    """Asks until the process ends."""
    while True:
        await ask(client, action)


async def main(socket: str) -> None:
    """Follows commands until there are no more."""
    async with Client.unix(socket, issuer=ISSUER) as client, asyncio.TaskGroup() as group:
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            match line.split():
                case ["token", action]:
                    tell(await ask(client, action))
                case ["flood", action]:
                    for _ in range(TASKS):
                        group.create_task(flood(client, action))
                    tell("flooding")
                case ["replace"]:
                    os.execv("/bin/sh", ["sh", "-c", "echo replaced; read -r _"])  # noqa: S606


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
