"""A small broker that keeps the wire contract and decides nothing: it does to each action what its name says.

A real gRPC server with the product's own nonces, proofs and tokens, behind a UnixFront or over mutual TLS. Clients of
the API are tested against it where the broker proper would have to be made to fail.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from google.protobuf.timestamp_pb2 import Timestamp

from broker._proto.actionbroker.v1 import action_pb2, broker_pb2, broker_pb2_grpc
from broker.action import Action
from broker.credentials import action_token, dpop, jose
from broker.credentials.action_token import Attestation, Claims, Confirmation
from broker.credentials.keys import SigningKey
from broker.credentials.nonce import Nonces
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.identity.unix_front import UnixFront
from broker.status import STATUS, error_info_trailers

ISSUER = "https://broker.acme.test"
CALLER = "spiffe://acme.test/build/agent"
_SERVICE = f"{ISSUER}/actionbroker.v1.ActionBroker"

Behaviour = Callable[[Action, "WireBroker"], Any]


class TransportFailed(Exception):
    """What a broken connection looks like: a status and no word of the broker."""


@dataclass
class WireBroker(broker_pb2_grpc.ActionBrokerServicer):
    """calls: methods by number. challenges: how often a nonce was asked for. keys: who proved what, by call."""

    on_unix: bool = True
    calls: Counter[str] = field(default_factory=Counter)
    challenges: int = 0
    proofs: list[dpop.Proof] = field(default_factory=list)
    idempotency_ids: list[str] = field(default_factory=list)
    wanted_ids: list[str] = field(default_factory=list)
    fail_next: int = 0
    streams: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    nonces: Nonces = field(default_factory=Nonces)
    key: SigningKey = field(default_factory=lambda: SigningKey.generate(datetime.now(UTC)))
    spoil: Callable[[Claims], Claims] = lambda claims: claims
    token_type: str | None = None
    use: str = "once"

    # -- what it says ------------------------------------------------------------------------------------------------

    def confirm(self, context: Any, method: str, proof: str | None) -> Confirmation:
        """The caller's key: by its proof, else by its certificate."""
        if proof is None and not self.on_unix:
            leaf = x509.load_pem_x509_certificate(context.auth_context()["x509_pem_cert"][0])
            return Confirmation(x5t_s256=jose.b64url(leaf.fingerprint(hashes.SHA256())))
        if proof is None:
            raise Refused(Reason.NONCE_REQUIRED)
        proven = dpop.verify_proof(proof, method="POST", url=f"{_SERVICE}/{method}", now=datetime.now(UTC))
        self.nonces.consume(proven.nonce, context.peer() if self.on_unix else "mtls", datetime.now(UTC))
        self.proofs.append(proven)
        return Confirmation(jkt=proven.jkt)

    async def decide(self, message: action_pb2.Action, confirmation: Confirmation) -> broker_pb2.ActionToken:
        """A token, or whatever else the action is called."""
        action = Action.parse(message.name, message.resource, message.audience, message.parameters)
        what, _, argument = action.name.partition(".")
        if self.fail_next > 0:
            self.fail_next -= 1
            raise TransportFailed
        if what == "refuse":
            raise Refused(Reason(argument), "a detail that no caller sees", retry_after_ms=1500)
        if what == "unavailable":
            raise Unavailable(Reason(argument))
        if what == "hang":
            await self.release.wait()
        return self.mint(action, confirmation)

    def mint(self, action: Action, confirmation: Confirmation) -> broker_pb2.ActionToken:
        now = datetime.now(UTC)
        claims = self.spoil(
            Claims(
                iss=ISSUER,
                sub=CALLER,
                aud=action.audience,
                exp=int((now + timedelta(seconds=60)).timestamp()),
                iat=int(now.timestamp()),
                jti=secrets.token_hex(16),
                client_id=CALLER,
                scope=action.name,
                authorization_details=(action_token.detail_of(action),),
                cnf=confirmation,
                action_digest=action.digest.hex(),
                use="once",
                attestation=Attestation(environment="sha256:00", policy="sha256:00"),
            )
        )
        header = b'{"alg":"ES256","typ":"at+jwt","kid":"%s"}' % self.key.kid.encode()
        expires = Timestamp()
        expires.FromDatetime(claims.expires_at.replace(tzinfo=None))
        return broker_pb2.ActionToken(
            access_token=jose.sign(header, action_token.encode(claims), self.key.private),
            token_type=self.token_type or ("DPoP" if confirmation.jkt else "Bearer"),
            expires_at=expires,
            use=self.use,
        )

    def verify(self, token: str) -> Claims:
        return action_token.verify(
            token, issuer=ISSUER, key_for=lambda _: self.key.private.public_key(), now=datetime.now(UTC)
        )

    # -- how it says it ----------------------------------------------------------------------------------------------

    def _trailers(self, context: Any, correlation: str) -> tuple[tuple[str, str], ...]:
        binding = context.peer() if self.on_unix else "mtls"
        nonce = self.nonces.issue(binding, datetime.now(UTC))
        return ("x-correlation-id", correlation), ("dpop-nonce", nonce)

    async def _answer(self, method: str, request: Any, context: Any, work: Callable[[Confirmation], Any]) -> Any:
        self.calls[method] += 1
        self.wanted_ids.append(getattr(request, "spiffe_id", ""))
        correlation = secrets.token_hex(16)
        trailers = self._trailers(context, correlation)
        try:
            proof = dict(context.invocation_metadata()).get("dpop")
            answer = await work(self.confirm(context, method, proof))
        except BrokerError as error:
            self.challenges += error.reason is Reason.NONCE_REQUIRED
            details = error_info_trailers(error.reason, correlation, retry_after_ms=error.retry_after_ms)
            await context.abort(STATUS[error.reason].grpc, error.reason.value, (*trailers[1:], *details))
        except TransportFailed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed", trailers[1:])
        context.set_trailing_metadata(trailers)
        return answer

    async def RequestActionToken(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async def work(confirmation: Confirmation) -> Any:
            token = await self.decide(request.action, confirmation)
            return broker_pb2.RequestActionTokenResponse(token=token, correlation_id="0123")

        return await self._answer("RequestActionToken", request, context, work)

    async def RequestActionTokens(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async def work(confirmation: Confirmation) -> Any:
            results = [await self._result(action, confirmation) for action in request.actions]
            return broker_pb2.RequestActionTokensResponse(results=results)

        return await self._answer("RequestActionTokens", request, context, work)

    async def _result(self, action: action_pb2.Action, confirmation: Confirmation) -> broker_pb2.ActionTokenResult:
        correlation = secrets.token_hex(16)
        try:
            token = await self.decide(action, confirmation)
            return broker_pb2.ActionTokenResult(token=token, correlation_id=correlation)
        except BrokerError as error:
            return self._refusal(error, correlation)

    def _refusal(self, error: BrokerError, correlation: str) -> broker_pb2.ActionTokenResult:
        self.challenges += error.reason is Reason.NONCE_REQUIRED
        refusal = action_pb2.Refusal(
            reason=error.reason, correlation_id=correlation, retry_after_ms=error.retry_after_ms or 0
        )
        return broker_pb2.ActionTokenResult(refusal=refusal, correlation_id=correlation)

    async def StreamActionTokens(self, requests: AsyncIterator[Any], context: Any) -> None:  # noqa: N802 - gRPC's name
        self.streams += 1
        writing = asyncio.Lock()

        async def one(message: Any) -> None:
            self.calls["StreamActionTokens"] += 1
            try:
                confirmation = self.confirm(context, "StreamActionTokens", message.dpop or None)
                result = await self._result(message.action, confirmation)
            except BrokerError as error:
                result = self._refusal(error, secrets.token_hex(16))
            nonce = self.nonces.issue(context.peer(), datetime.now(UTC)) if self.on_unix else ""
            async with writing:
                await context.write(
                    broker_pb2.StreamActionTokensResponse(
                        result=result, dpop_nonce=nonce, message_id=message.message_id
                    )
                )

        try:
            async with asyncio.TaskGroup() as group:
                async for message in requests:
                    group.create_task(one(message))
        except* TransportFailed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async def work(_: Confirmation) -> Any:
            known = (
                self.verify(request.token).action_digest
                == Action.parse(
                    request.action.name, request.action.resource, request.action.audience, request.action.parameters
                ).digest.hex()
            )
            reason = "" if known else Reason.OUT_OF_SCOPE
            return broker_pb2.CheckResponse(allowed=known, reason=reason, correlation_id="4567")

        return await self._answer("Check", request, context, work)

    async def Redeem(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async def work(_: Confirmation) -> Any:
            self.idempotency_ids.append(request.idempotency_id)
            if self.fail_next > 0:
                self.fail_next -= 1
                raise TransportFailed
            if len(set(self.idempotency_ids)) > 1:
                raise Refused(Reason.ALREADY_USED)
            return broker_pb2.RedeemResponse(redeemed_at=Timestamp(seconds=1), correlation_id="89ab")

        return await self._answer("Redeem", request, context, work)

    async def Explain(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        async def work(_: Confirmation) -> Any:
            no = broker_pb2.PolicyExplanation(id="p", effect="permit", failed=[f"facts {request.facts} {request.pid}"])
            return broker_pb2.ExplainResponse(
                reason="denied", policy_revision="sha256:1", policies=[no], attestors=["spire"], missing=["ticket"]
            )

        return await self._answer("Explain", request, context, work)


@asynccontextmanager
async def serve_unix(broker: WireBroker, path: Path, folder: Path) -> AsyncIterator[WireBroker]:
    """Behind a front at `path`; folder: private, for the backend."""
    backend = _private(folder) / "grpc.sock"
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1024 * 1024)])
    broker_pb2_grpc.add_ActionBrokerServicer_to_server(broker, server)
    server.add_insecure_port(f"unix:{backend}")
    await server.start()
    front = UnixFront(path, backend)
    await front.start()
    try:
        yield broker
    finally:
        await front.close()
        await server.stop(None)


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "grpc.sock").unlink(missing_ok=True)
    return folder
