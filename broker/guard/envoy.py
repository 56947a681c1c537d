"""The guard as Envoy's external authorization service: `envoy.service.auth.v3.Authorization/Check`.

Envoy asks about each request before it goes on, and the answer is yes or no; whatever goes wrong here is a no. After a
yes the service gets two headers that no client can write, `x-action-broker-principal` and `x-action-broker-action`, and
no longer the credential: it was for this one act, and belongs into nobody's logs.

Envoy asks once, when a request begins. It cannot be told to end one that goes on when its credential dies.
"""

import base64
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from google.rpc import code_pb2, status_pb2

from broker._proto.envoy.config.core.v3 import base_pb2
from broker._proto.envoy.service.auth.v3 import external_auth_pb2, external_auth_pb2_grpc
from broker._proto.envoy.type.v3 import http_status_pb2
from broker.action import Action, check_uri
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.guard.credential import log_refusal, read_credential
from broker.guard.envoy_request import OURS, Asked, MisconfiguredEnvoy
from broker.guard.http_edge import HttpEdge, refusal_headers, refuse, values
from broker.guard.mapping import Table
from broker.guard.verify import Allowed, Guard
from broker.status import CORRELATION_ID, DETAILS, STATUS, rich_status

PRINCIPAL: Final = f"{OURS}principal"
ACTION: Final = f"{OURS}action"
_TAKEN_OFF: Final = ("authorization", "dpop")
_OVERWRITE: Final = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_log = logging.getLogger("broker.guard")


class EnvoyAuthorization(external_auth_pb2_grpc.AuthorizationServicer):
    """Answers Envoy. Add it to a grpc.aio server that listens where Envoy alone connects.

    table: rules; those for gRPC methods are given an `http_request.Request` without a body, since Envoy tells none.
    authorities: the names (host or host:port) under which clients call the service; for another one nobody is admitted.

    Raises: Invalid for an authority that no URI has; ValueError where there is none.
    """

    def __init__(self, guard: Guard, table: Table, *, authorities: Iterable[str]) -> None:
        self._guard, self._table = guard, table
        names: dict[str, tuple[str, HttpEdge]] = {}
        for authority in authorities:
            base = check_uri(f"https://{authority}", "an authority")
            names[authority] = base, HttpEdge(guard, table, base)
            if ":" not in authority.rpartition("]")[2]:
                names[f"{authority}:443"] = names[authority]  # as some gRPC clients have it
        if not names:
            raise ValueError("name the authorities under which clients call this service")
        self._names: Final = names

    async def Check(  # noqa: N802 - Envoy's name
        self, request: external_auth_pb2.CheckRequest, context: Any
    ) -> external_auth_pb2.CheckResponse:
        """Decides on one request."""
        del context
        asked = Asked.of(request)
        try:
            return _yes(await self._admit(asked), asked)
        except BrokerError as error:
            if isinstance(error, MisconfiguredEnvoy):
                _log.error("everybody is refused: %s", error.detail)
            return _no(error, asked)
        except Exception as error:  # noqa: BLE001 - the one broad except of this edge
            _log.exception("refused for want of an answer")
            return _no(Unavailable(Reason.SCOPE_STALE, f"unforeseen: {type(error).__name__}"), asked)

    async def _admit(self, asked: Asked) -> Allowed | None:
        """Who is admitted; None for a public method. Raises: Refused, Unavailable."""
        asked.check()
        if asked.host not in self._names:
            raise Refused(Reason.OUT_OF_SCOPE, "a request for a host that is none of ours")
        base, edge = self._names[asked.host]
        if asked.is_grpc or asked.path in self._table.rpc:
            return await self._admit_call(asked, base + asked.path)
        admitted = await edge.admit(asked.incoming())
        return admitted[0] if admitted is not None else None

    async def _admit_call(self, asked: Asked, url: str) -> Allowed | None:
        """The same for a gRPC method."""
        rule = self._table.rpc.get(asked.path)
        if asked.method != "POST" or "?" in asked.target or (rule is None and asked.path not in self._table.public):
            raise Refused(Reason.OUT_OF_SCOPE, "no rule for this method: declare what it means")
        if rule is None:
            return None
        presented = read_credential(
            values(asked.headers, "authorization"),
            values(asked.headers, "dpop"),
            leaf_pem=asked.leaf_pem,
            method="POST",
            urls=(url,),
        )

        async def rebuild() -> Action:
            return rule.rebuild(asked.call(), self._guard.audience)

        return await self._guard.admit(presented, rebuild, check=rule.check)


def _yes(allowed: Allowed | None, asked: Asked) -> external_auth_pb2.CheckResponse:
    """Lets it go on. A public method keeps its Authorization, which is then not ours to read."""
    told = {} if allowed is None else {PRINCIPAL: allowed.principal, ACTION: allowed.action.name}
    # Envoy sets first and removes then, so what is set must not be on the list.
    off = [name for name in asked.forged if name not in told] + ([] if allowed is None else [*_TAKEN_OFF])
    answer = external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=code_pb2.OK),
        ok_response=external_auth_pb2.OkHttpResponse(headers=_options(told), headers_to_remove=off),
    )
    answer.dynamic_metadata.update({name.removeprefix(OURS): value for name, value in told.items()})
    return answer


def _no(error: BrokerError, asked: Asked) -> external_auth_pb2.CheckResponse:
    """A problem document for HTTP; for gRPC what GuardInterceptor answers, as far as Envoy passes it on."""
    status = STATUS[error.reason]
    if asked.is_grpc:
        correlation_id = log_refusal(error, asked.path)
        rich = rich_status(error.reason, correlation_id, retry_after_ms=error.retry_after_ms)
        details = base64.b64encode(rich.SerializeToString()).decode().rstrip("=")
        headers = refusal_headers(error, correlation_id, asked.headers)
        headers |= {"grpc-status": str(status.grpc.value[0]), DETAILS: details}
        body = str(error.reason)
    else:
        refusal = refuse(error, asked.method, asked.path, asked.headers)
        headers, body = {**refusal.headers}, refusal.body.decode()
        headers.pop("content-length")  # Envoy's
    answer = external_auth_pb2.CheckResponse(
        status=status_pb2.Status(code=status.grpc.value[0]),
        denied_response=external_auth_pb2.DeniedHttpResponse(
            status=http_status_pb2.HttpStatus(code=status.http),  # type: ignore[arg-type]  # a number of an open enum
            headers=_options(headers),
            body=body,
        ),
    )
    answer.dynamic_metadata.update({"reason": str(error.reason), "correlation_id": headers[CORRELATION_ID]})
    return answer


def _options(headers: Mapping[str, str]) -> list[base_pb2.HeaderValueOption]:
    return [
        base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=name, value=value), append_action=_OVERWRITE)
        for name, value in headers.items()
    ]
