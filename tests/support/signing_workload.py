"""Somebody of another user, in a process of its own: a build agent, or one who approves.

usage: python -m support.signing_workload agent|approver UID SOCKET [STATE_FD]. It starts as root, loads all its code
and then works as that user, who may not be able to read the interpreter. An approver follows the commands of
support/approver.py for good. An agent reads JSON, one a line, and answers so:

    {"do": "grant", "action": {…}, "provenance": [base64], "request_id": …}     {"reason": "" or why not, "grant_id"}
    {"do": "sign", "idempotency_id": …, "statement": base64}                    {"reason", "bundle", "chain": [base64]}
    {"do": "hand_over"}        {"state": …}: its key and its grant, for another process
    {"do": "take", "state": …} {}: as what it has from now on
    {"do": "replace", "exe": …} what the program that takes its place says: "ready"; that one has key and grant, too
"""

import asyncio
import base64
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from support import approver
from support.signing_calls import ask_grant, ask_sign
from support.whole_broker import Wire

from broker._proto.actionbroker.v1 import action_pb2
from broker.cli.log import configure_log
from broker.credentials.dpop import ProofKey


def become(uid: int) -> None:
    """Real and effective user and group. The saved ones stay root's, for `replace`: what is attested is the effective.

    Groups first, while we may.
    """
    os.setgroups([])
    os.setresgid(uid, uid, 0)
    os.setresuid(uid, uid, 0)


class Agent:
    """What the commands do."""

    def __init__(self, uid: int, socket: str) -> None:
        self._uid, self._socket = uid, socket
        self.wire = Wire(f"unix:{socket}")
        self._grant, self._provenance = "", []

    async def grant(self, action: dict[str, str], provenance: list[str], request_id: str) -> dict[str, str]:
        """Keeps the grant."""
        shown = [base64.b64decode(one) for one in provenance]
        said = await ask_grant(self.wire, action_pb2.Action(**action), shown, request_id=request_id)
        if said.message is None:
            return {"reason": said.reason or said.details, "correlation_id": said.correlation_id}
        self._grant, self._provenance = said.message.grant.grant, shown
        return {"reason": "", "grant_id": said.message.grant.grant_id}

    async def sign(self, idempotency_id: str, statement: str = "") -> dict[str, Any]:
        """By the grant that it has."""
        said = await ask_sign(
            self.wire,
            self._grant,
            self._provenance,
            idempotency_id=idempotency_id,
            statement=base64.b64decode(statement),
        )
        if said.message is None:
            return {"reason": said.reason or said.details, "correlation_id": said.correlation_id}
        chain = [base64.b64encode(one).decode() for one in said.message.certificate_chain]
        return {"reason": "", "bundle": said.message.bundle, "chain": chain, "correlation_id": said.correlation_id}

    async def hand_over(self) -> dict[str, Any]:
        """All that a thief could want."""
        key = self.wire.key._private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        shown = [base64.b64encode(one).decode() for one in self._provenance]
        return {"state": {"key": base64.b64encode(key).decode(), "grant": self._grant, "provenance": shown}}

    async def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """See `hand_over`."""
        self.wire.key = ProofKey(load_der_private_key(base64.b64decode(state["key"]), None))
        self._grant = state["grant"]
        self._provenance = [base64.b64decode(one) for one in state["provenance"]]
        return {}

    async def replace(self, exe: str) -> dict[str, Any]:
        """Another program in the same process: another file, though it does the same."""
        state = os.memfd_create("state", 0)  # is not closed by exec
        os.write(state, json.dumps(await self.hand_over()).encode())
        os.lseek(state, 0, os.SEEK_SET)
        os.seteuid(0)
        again = [exe, "-m", "support.signing_workload", "agent", str(self._uid), self._socket, str(state)]
        libraries = str(Path(sys.base_prefix) / "lib")
        os.execve(  # noqa: S606
            exe,
            again,
            {
                **os.environ,
                "PYTHONHOME": sys.base_prefix,
                "PYTHONPATH": ":".join(sys.path),
                "LD_LIBRARY_PATH": libraries,
            },
        )


def tell(answer: object) -> None:
    """One line, in one write."""
    os.write(1, f"{json.dumps(answer)}\n".encode())


async def follow(uid: int, socket: str, state: int | None) -> None:
    """An agent follows commands until there are no more."""
    agent = Agent(uid, socket)
    if state is not None:
        with os.fdopen(state) as held:
            await agent.take(json.load(held)["state"])
    async with agent.wire:
        tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            tell(await functools.partial(getattr(agent, command.pop("do")), **command)())


if __name__ == "__main__":
    configure_log("error", as_json=True)
    "".encode("utf-16be")  # which canonical JSON loads when it is first needed
    become(int(sys.argv[2]))
    if sys.argv[1] == "approver":
        asyncio.run(approver.main(sys.argv[3]))
    else:
        asyncio.run(follow(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]) if len(sys.argv) > 4 else None))
