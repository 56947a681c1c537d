"""A build agent in a process of its own, whose proof key is in a file that others may have, too.

usage: python -m support.build_agent SOCKET KEY_FILE SPIFFE_ID. It reads commands, one a line, and answers each with a
line:

    grant ACTION ENVELOPE_FILE      a grant for the nightly action in this JSON file, or the reason why not
    sign GRANT ENVELOPE_FILE ID     "signed", or the reason why not
    exec PROGRAM                    "ready", said by this program, run by another interpreter in the same process
"""

import asyncio
import json
import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from support.signing_calls import ask_grant, ask_sign
from support.whole_broker import Wire

from broker._proto.actionbroker.v1 import action_pb2
from broker.credentials.dpop import ProofKey


def tell(text: str) -> None:
    """One line, in one write."""
    os.write(1, f"{text}\n".encode())


def read(file: str) -> bytes:
    """A file of the test's."""
    return Path(file).read_bytes()


async def follow(wire: Wire, spiffe_id: str, words: list[str]) -> str:
    """Does one command."""
    match words:
        case ["grant", action, envelope]:
            asked = action_pb2.Action(**json.loads(read(action)))
            said = await ask_grant(wire, asked, [read(envelope)], spiffe_id=spiffe_id)
            return said.reason or said.message.grant.grant
        case ["sign", grant, envelope, idempotency_id]:
            said = await ask_sign(wire, grant, [read(envelope)], idempotency_id=idempotency_id, spiffe_id=spiffe_id)
            return said.reason or "signed"
    raise ValueError(words)


async def main(socket: str, key_file: str, spiffe_id: str) -> list[str]:
    """Follows commands until there are no more; what to run then in this process, [] for nothing."""
    async with Wire(f"unix:{socket}") as wire:
        wire.key = ProofKey(serialization.load_pem_private_key(read(key_file), None))
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            words = line.split()
            if words[0] == "exec":
                return [words[1], "-m", "support.build_agent", socket, key_file, spiffe_id]
            tell(await follow(wire, spiffe_id, words))
    return []


if __name__ == "__main__":
    if command := asyncio.run(main(*sys.argv[1:])):
        os.execv(command[0], command)  # noqa: S606
