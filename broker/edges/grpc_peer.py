"""Who is at the other end of a gRPC call, and what it sent about itself."""

import base64
import functools
import secrets
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

import grpc

from broker.errors import Reason, Refused
from broker.exchange import Caller, Exchange, KeyProof
from broker.identity.identify import Identified
from broker.identity.peer import Peer
from broker.spending import Presenter

Context = grpc.aio.ServicerContext[Any, Any]
MetadataItem = tuple[str, str | bytes]
SERVICE: Final = "actionbroker.v1.ActionBroker"
PeerOf = Callable[[str], Peer | None]


def correlation_id() -> str:
    """Finds a request in answer, log and ledger."""
    return secrets.token_hex(16)


@functools.lru_cache(maxsize=1024)  # pure: connections repeat their chain with every request
def _ders(pem: bytes) -> tuple[bytes, ...]:
    """The DER certificates of concatenated PEM, as gRPC wrote it."""
    blocks = pem.split(b"-----END CERTIFICATE-----")[:-1]
    return tuple(base64.b64decode(block.partition(b"-----BEGIN CERTIFICATE-----")[2]) for block in blocks)


def certificate_chain(context: Context) -> tuple[bytes, ...]:
    """The client's certificates, DER, leaf first. Raises: Refused where it showed none."""
    auth = context.auth_context()
    leaf = b"".join(auth.get("x509_pem_cert", ()))
    if not leaf:
        raise Refused(Reason.UNAUTHENTICATED, "no client certificate")
    leaf_der = _ders(leaf)
    rest = _ders(b"".join(auth.get("x509_pem_cert_chain", ())))
    return leaf_der + tuple(der for der in rest if der not in leaf_der)


def single_metadata(metadata: Iterable[MetadataItem] | None, name: str) -> str | None:
    """The one value of `name`. Raises: Refused where it was sent twice: two readers may take different ones."""
    found = [value for key, value in metadata or () if key == name]
    if len(found) > 1:
        raise Refused(Reason.INVALID_PROOF, f"metadata {name} was sent more than once")
    if not found:
        return None
    value = found[0]
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


class Identifier:
    """Turns a gRPC context into a Caller.

    authority: of our issuer; a proof's `htu` is https://<authority>/<package.Service>/<Method> on every transport, so
    that it does not depend on how a client happens to reach us.
    """

    def __init__(self, exchange: Exchange, peer_of: PeerOf) -> None:
        self._exchange, self._peer_of = exchange, peer_of
        self._authority = urlsplit(exchange.issuer).netloc

    def next_nonce(self, context: Context, now: datetime, *, proves: bool = False) -> str:
        """The nonce for this caller's next proof: bound to the connection, or to TCP callers at large.

        Over mutual TLS only who sends proofs (in metadata, or else `proves`) gets one, all others "": they have their
        certificate to be bound to.
        """
        peer = self._peer_of(context.peer())
        if peer is not None:
            return self._exchange.nonces.issue(peer.connection, now)
        if proves or any(key == "dpop" for key, _ in context.invocation_metadata() or ()):
            return self._exchange.nonces.issue("mtls", now)
        return ""

    def nonce_metadata(self, context: Context, now: datetime) -> tuple[tuple[str, str], ...]:
        """The same as metadata, none where there is none."""
        nonce = self.next_nonce(context, now)
        return (("dpop-nonce", nonce),) if nonce else ()

    def uid(self, context: Context) -> int | None:
        """The user behind a connection of the Unix socket; None over mutual TLS."""
        peer = self._peer_of(context.peer())
        return None if peer is None else peer.process.uid

    def presenter(self, context: Context, named: str) -> Presenter:
        """Who is there, by kernel and handshake alone; verified for nothing. named: the SPIFFE ID that it names."""
        peer = self._peer_of(context.peer())
        if peer is not None:
            return Presenter(named=named, process=peer.process)
        try:
            return Presenter(named=named, leaf=certificate_chain(context)[0])
        except Refused:
            return Presenter(named=named)

    def holder(self, context: Context, now: datetime) -> Identified:
        """Who holds a connection over mutual TLS, by its certificate. Raises: BrokerError."""
        with self._exchange.counted():
            chain = certificate_chain(context)
        return self._exchange.holder_of(chain, now)

    async def identify_call(
        self,
        context: Context,
        method: str,
        wanted: str,
        now: datetime,
        correlation: str,
        service: str = SERVICE,
    ) -> Caller:
        """Who makes this call, by the proof in its metadata. Raises: BrokerError."""
        with self._exchange.counted():
            proof = single_metadata(context.invocation_metadata(), "dpop")
        return await self.identify(context, method, wanted, proof, now, correlation, service)

    async def identify(
        self,
        context: Context,
        method: str,
        wanted: str,
        proof: str | None,
        now: datetime,
        correlation: str,
        service: str = SERVICE,
    ) -> Caller:
        """Who sends this, with this proof of a key. Raises: BrokerError."""
        url = f"https://{self._authority}/{service}/{method}"
        peer = self._peer_of(context.peer())
        if peer is not None:
            key_proof = KeyProof(proof=proof, method="POST", url=url, binding=peer.connection)
            return await self._exchange.identify_process(peer, key_proof, wanted, now, correlation)
        key_proof = KeyProof(proof=proof, method="POST", url=url, binding="mtls")
        with self._exchange.counted():
            chain = certificate_chain(context)
        return self._exchange.identify_certificate(chain, key_proof, now, correlation)
