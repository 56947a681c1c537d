"""Gives this process a SPIFFE ID of the embedded trust domain, then becomes another program."""

import os
from collections.abc import Sequence
from typing import NoReturn

import grpc

from broker._proto.actionbroker.v1 import dev_pb2, dev_pb2_grpc
from broker.errors import Invalid, Reason, Unavailable
from broker.identity.peer import read_process

_DEADLINE_S = 5.0


def run_as(socket: str, spiffe_id: str, argv: Sequence[str]) -> NoReturn:
    """Registers this process by PID and start time, which outlive exec, and runs `argv` in its place.

    socket: the path of the DevEntries socket. The registration ends with the process.

    Raises: Invalid when the trust domain refuses the ID; Unavailable when it cannot be reached; OSError when there is
    no such program.
    """
    register(socket, spiffe_id, os.getpid())
    os.execvp(argv[0], list(argv))  # noqa: S606 - to run what the user asked for, without a shell, is the point


def register(socket: str, spiffe_id: str, pid: int) -> str:
    """Gives a process an ID while it lives; returns the entry's id. Raises as run_as does, or ProcessLookupError."""
    process = read_process(pid)
    request = dev_pb2.CreateEntryRequest(
        spiffe_id=spiffe_id, selectors=[f"dev:process:{process.pid}:{process.start_time}"]
    )
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "localhost")]) as channel:
        try:
            return dev_pb2_grpc.DevEntriesStub(channel).CreateEntry(request, timeout=_DEADLINE_S).entry_id
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                raise Invalid(str(details)) from error
            raise Unavailable(
                Reason.IDENTITY_UNAVAILABLE,
                f"the embedded trust domain at {socket} does not answer ({code.name}: {details}): "
                "start it with `action-broker dev`",
            ) from error
