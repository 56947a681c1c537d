"""The signing calls of actionbroker.v1.ActionBroker: messages to values and back. grpc_server.py ends the calls."""

from datetime import datetime

from broker._proto.actionbroker.v1 import signing_pb2
from broker.credentials.signing_grant import csr_nonce
from broker.edges.grpc_peer import Context, Identifier
from broker.edges.grpc_wire import timestamp, to_action
from broker.errors import Refused
from broker.exchange import Caller
from broker.presented import Presented
from broker.sign import Signing
from broker.spending import Spending


class SigningCalls:
    """Identifies, hands to `Signing`, and writes the answer. Raises what they raise."""

    def __init__(self, signing: Signing, identifier: Identifier) -> None:
        self._signing, self._identifier = signing, identifier

    async def grant(
        self, request: signing_pb2.RequestSigningGrantRequest, context: Context, now: datetime, correlation: str
    ) -> signing_pb2.RequestSigningGrantResponse:
        """One signing grant."""
        caller = await self._identifier.identify_call(
            context, "RequestSigningGrant", request.spiffe_id, now, correlation
        )
        presented = Presented(request_id=request.request_id, ticket=request.ticket, session=request.session)
        issued = await self._signing.grant(
            caller, lambda: to_action(request.action), request.provenance, presented, now, correlation
        )
        grant = signing_pb2.SigningGrant(
            grant=issued.token,
            expires_at=timestamp(issued.claims.expires_at),
            grant_id=issued.claims.jti,
            csr_nonce=csr_nonce(issued.token),
        )
        return signing_pb2.RequestSigningGrantResponse(grant=grant, correlation_id=correlation)

    async def sign(
        self, request: signing_pb2.SignRequest, context: Context, now: datetime, correlation: str
    ) -> signing_pb2.SignResponse:
        """One signature."""
        caller = await self._spender(context, "Sign", request, now, correlation)
        signed = await self._signing.sign(caller, _spending(request), request.statement, now, correlation)
        return signing_pb2.SignResponse(
            signature=signed.signature,
            certificate_chain=signed.certificate_chain,
            public_key=signed.public_key,
            timestamp=signed.timestamp,
            bundle=signed.bundle,
            correlation_id=correlation,
        )

    async def certify(
        self,
        request: signing_pb2.IssueSigningCertificateRequest,
        context: Context,
        now: datetime,
        correlation: str,
    ) -> signing_pb2.IssueSigningCertificateResponse:
        """One certificate for the caller's own key."""
        caller = await self._spender(context, "IssueSigningCertificate", request, now, correlation)
        chain = await self._signing.certify(caller, _spending(request), request.csr, now, correlation)
        return signing_pb2.IssueSigningCertificateResponse(certificate_chain=chain, correlation_id=correlation)

    async def _spender(
        self,
        context: Context,
        method: str,
        request: signing_pb2.SignRequest | signing_pb2.IssueSigningCertificateRequest,
        now: datetime,
        correlation: str,
    ) -> Caller:
        """Who spends a grant. A caller of it that is no longer known has spent it for nothing. Raises: BrokerError.

        Not where it is bound to a DPoP key over mutual TLS: nothing has proven that key by then (Redemption.forsake).
        """
        try:
            return await self._identifier.identify_call(context, method, request.spiffe_id, now, correlation)
        except Refused as error:
            await self._signing.forsake(
                self._identifier.presenter(context, request.spiffe_id), request.grant, error, now, correlation
            )
            raise


def _spending(request: signing_pb2.SignRequest | signing_pb2.IssueSigningCertificateRequest) -> Spending:
    return Spending(grant=request.grant, idempotency_id=request.idempotency_id, provenance=tuple(request.provenance))
