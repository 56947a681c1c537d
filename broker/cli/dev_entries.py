"""Asking the embedded trust domain for entries: what `spire-server entry create|delete` is with SPIRE."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from broker._proto.actionbroker.v1 import dev_pb2, dev_pb2_grpc
from broker.errors import Invalid, Reason, Unavailable
from broker.identity.peer import read_process

_DEADLINE_S = 5.0


def selector(pid: int) -> str:
    """For this one process. Raises: ProcessLookupError, PermissionError."""
    process = read_process(pid)
    return f"dev:process:{process.pid}:{process.start_time}"


def create(socket: Path, spiffe_id: str, selectors: Sequence[str]) -> str:
    """The new entry's id. Raises: Invalid when the trust domain refuses it; Unavailable when it does not answer."""
    with _stub(socket) as stub:
        request = dev_pb2.CreateEntryRequest(spiffe_id=spiffe_id, selectors=selectors)
        return stub.CreateEntry(request, timeout=_DEADLINE_S).entry_id


def delete(socket: Path, entry_id: str) -> None:
    """Raises: as `create`."""
    with _stub(socket) as stub:
        stub.DeleteEntry(dev_pb2.DeleteEntryRequest(entry_id=entry_id), timeout=_DEADLINE_S)


@contextmanager
def _stub(socket: Path) -> Iterator[dev_pb2_grpc.DevEntriesStub]:
    with grpc.insecure_channel(f"unix:{socket}", options=[("grpc.default_authority", "localhost")]) as channel:
        try:
            yield dev_pb2_grpc.DevEntriesStub(channel)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
            if code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}:
                raise Invalid(str(details)) from error
            problem = f"the embedded trust domain at {socket} does not answer ({code.name}: {details})"
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, f"{problem}: start `action-broker dev`") from error
