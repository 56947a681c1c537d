"""A process that gets a token, and hands on all that it takes to use it: the token, and proofs made beforehand.

usage: python -m support.handing_on SOCKET NAME RESOURCE AUDIENCE. It says "ready"; then it reads commands, one a line:

    ask         JSON: the headers of `PROOFS` requests for the resource, each good once
    replace     "replaced", said by the shell that has taken its place in the same process. From then on each line is
                the request that the shell sends by sending.py, which answers
    leave       it ends
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from support.caller import tell
from support.whole_broker import ISSUER

from broker.client import Client

PROOFS = 100
SHELL = 'echo replaced; while read -r line; do printf "%s\\n" "$line" | "$1" "$2"; done'


async def main(socket: str, name: str, resource: str, audience: str) -> None:
    """Follows commands until there are no more."""
    async with Client.unix(socket, issuer=ISSUER) as client:
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            match line.strip():
                case "ask":
                    token = await client.request(name, resource, audience)
                    tell(json.dumps([token.http_headers("GET", resource) for _ in range(PROOFS)]))
                case "replace":
                    program = [sys.executable, str(Path(__file__).with_name("sending.py"))]
                    os.execv("/bin/sh", ["sh", "-c", SHELL, "sh", *program])  # noqa: S606
                case "leave":
                    return


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
