"""Somebody who approves, in a process of its own: a process that is also the caller may not approve.

usage: python -m support.approver SOCKET. It reads commands, one a line, and answers each with a line:

    approve DIGEST [SECONDS]    "approved", or the reason why not
    withdraw DIGEST             "withdrawn", or the reason why not
    pending                     how many requests it may approve
"""

import asyncio
import os
import sys

from support.broker import ISSUER

from broker.client import Client
from broker.errors import BrokerError


async def follow(broker: Client, words: list[str]) -> str:
    """Does one command."""
    try:
        match words:
            case ["approve", digest, *seconds]:
                valid_for_s = int(seconds[0]) if seconds else 0
                request = await broker.approvals.show(digest)
                await broker.approvals.approve(request, reason="looks good", valid_for_s=valid_for_s)
                return "approved"
            case ["withdraw", digest]:
                await broker.approvals.withdraw(digest, reason="second thoughts")
                return "withdrawn"
            case ["pending"]:
                return str(len(await broker.approvals.pending()))
    except BrokerError as error:
        return str(error.reason)
    raise ValueError(words)


async def main(socket: str) -> None:
    """Follows commands until there are no more."""
    async with Client.unix(socket, issuer=ISSUER) as broker:
        os.write(1, b"ready\n")
        while line := await asyncio.to_thread(sys.stdin.readline):
            os.write(1, f"{await follow(broker, line.split())}\n".encode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
