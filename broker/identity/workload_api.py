"""Our own identity and whom we trust, streamed from the SPIFFE Workload API.

Two streams feed one immutable TrustSnapshot: `FetchX509SVID` (our SVID, our trust domain's X.509 bundle and the
federated ones, which change together) and `FetchJWTBundles`. `FetchX509Bundles` would say part of the first again, a
moment earlier or later; it is not used, so that a snapshot is never made of two versions of one fact.

When the agent is gone the last snapshot stays: our identity lasts until our SVID expires, which whoever uses it checks
against `now`. Source: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Workload_API.md
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from spiffe._proto import workload_pb2, workload_pb2_grpc

from broker.errors import BrokerError, Invalid, Reason, Unavailable
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import (
    JwtKey,
    OwnSvid,
    TrustBundle,
    TrustSnapshot,
    parse_jwt_authorities,
    parse_x509_authorities,
    split_der,
)

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
MAX_MESSAGE = 4 * 1024 * 1024  # bytes; some thousand certificates, and what gRPC takes by default
METADATA = (("workload.spiffe.io", "true"),)  # Workload Endpoint section 6: against requests forged by a third party

# The standard library's: callers and guards import this module into programs of their own, whose logs are theirs.
_log = logging.getLogger(__name__)

_X509 = tuple[OwnSvid, Mapping[TrustDomain, tuple[x509.Certificate, ...]]]
_Jwt = Mapping[TrustDomain, Mapping[str, tuple[JwtKey, ...]]]


class WorkloadApi:
    """Keeps a TrustSnapshot fresh while it is entered (`async with`) or while `run()` runs.

    socket: `unix:/path`, `unix:///path` or `tcp://host:port` (SPIFFE_ENDPOINT_SOCKET).
    last_error: why the streams are not live now, for `doctor`; None while they are.
    """

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._x509: _X509 | None = None
        self._jwt: _Jwt | None = None
        self._snapshot: TrustSnapshot | None = None
        self._ready = asyncio.Event()
        self._subscribers: list[Callable[[TrustSnapshot], None]] = []
        self._errors: dict[str, str] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self.run(), name="workload-api")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @property
    def last_error(self) -> str | None:
        """The streams that are broken, and why."""
        return "; ".join(f"{stream}: {error}" for stream, error in sorted(self._errors.items())) or None

    def snapshot(self) -> TrustSnapshot:
        """The newest one. Raises: Unavailable(identity_unavailable) before the first.

        Not checked: that our own SVID has not expired.
        """
        if self._snapshot is None:
            why = self.last_error or "no answer yet"
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, f"nothing from the Workload API at {self._socket}: {why}")
        return self._snapshot

    async def ready(self) -> TrustSnapshot:
        """The first snapshot, waited for without end: bound it with asyncio.timeout."""
        await self._ready.wait()
        return self.snapshot()

    def subscribe(self, callback: Callable[[TrustSnapshot], None]) -> Callable[[], None]:
        """Calls back with each new snapshot, in the event loop. Call what it returns to end that.

        A callback that raises is logged; the other ones and the streams go on.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    async def run(self) -> None:
        """Holds both streams open, with back-off between attempts, until it is cancelled."""
        async with _channel(self._socket) as channel, asyncio.TaskGroup() as group:
            stub = _stub(channel)
            group.create_task(self._follow("FetchX509SVID", stub, workload_pb2.X509SVIDRequest(), self._take_x509))
            group.create_task(self._follow("FetchJWTBundles", stub, workload_pb2.JWTBundlesRequest(), self._take_jwt))

    async def fetch_jwt_svid(self, audience: str, *, deadline_s: float = 5.0) -> str:
        """Our own JWT-SVID for this audience, as a token. It is a bearer token: bind it to a key at once.

        Raises: Unavailable(identity_unavailable). Not checked: the token, which its receiver verifies.
        """
        request = workload_pb2.JWTSVIDRequest(audience=[audience])
        async with _channel(self._socket) as channel:
            try:
                answer = await _stub(channel).FetchJWTSVID(request, metadata=METADATA, timeout=deadline_s)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(Reason.IDENTITY_UNAVAILABLE, f"FetchJWTSVID: {_explain(error)}") from error
        if not answer.svids:
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "FetchJWTSVID: no SVID: create a registration entry for us")
        return str(answer.svids[0].svid)

    async def _follow(self, method: str, stub: Any, request: object, take: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        waits, wait = backoff(), 0.0
        while True:
            opened = loop.time()
            try:
                async for message in getattr(stub, method)(request, metadata=METADATA):
                    self._receive(method, message, take)
                self._errors[method] = "the agent ended the stream"
            except grpc.aio.AioRpcError as error:
                self._errors[method] = _explain(error)
            if loop.time() - opened > wait:  # it held longer than we had waited for it: this is a new trouble
                waits = backoff()
            wait = next(waits)
            _log.warning("%s is down, again in %.1f s: %s", method, wait, self._errors[method])
            await asyncio.sleep(wait)

    def _receive(self, method: str, message: object, take: Callable[[Any], None]) -> None:
        try:
            take(message)
        except BrokerError as error:
            # What we had before is still true as far as we know; half of an update would be a guess.
            self._errors[method] = f"kept the previous snapshot, the agent sent a malformed update: {error.detail}"
            _log.error("%s: kept what we had, the agent sent a malformed update: %s", method, error.detail)
        else:
            self._errors.pop(method, None)

    def _take_x509(self, message: workload_pb2.X509SVIDResponse) -> None:
        if not message.svids:
            raise Invalid("an update without an SVID")
        first = message.svids[0]  # Workload API section 5.3: the default identity
        own = _own_svid(first)
        bundles = {_trust_domain(name): parse_x509_authorities(der) for name, der in message.federated_bundles.items()}
        bundles[own.spiffe_id.trust_domain] = parse_x509_authorities(first.bundle)
        self._x509 = (own, bundles)
        self._publish()

    def _take_jwt(self, message: workload_pb2.JWTBundlesResponse) -> None:
        self._jwt = {_trust_domain(name): parse_jwt_authorities(jwks) for name, jwks in message.bundles.items()}
        self._publish()

    def _publish(self) -> None:
        """Makes a new snapshot if anything in it is new."""
        if self._x509 is None or self._jwt is None:
            return
        own, authorities = self._x509
        bundles = {
            name: TrustBundle(
                trust_domain=name, x509_authorities=authorities.get(name, ()), jwt_authorities=self._jwt.get(name, {})
            )
            for name in {*authorities, *self._jwt}
        }
        before = self._snapshot
        if before is not None and before.own == own and before.bundles == bundles:
            return  # the agent repeats itself when we reconnect
        self._snapshot = TrustSnapshot(own=own, bundles=bundles, revision=before.revision + 1 if before else 1)
        self._ready.set()
        domains = ", ".join(sorted(name.name for name in bundles))
        _log.info(
            "snapshot %d: %s until %s, trusting %s", self._snapshot.revision, own.spiffe_id, own.not_after, domains
        )
        for callback in tuple(self._subscribers):
            try:
                callback(self._snapshot)
            except Exception:  # noqa: BLE001 - whatever a listener does, the streams go on
                _log.exception("a subscriber of trust snapshots failed")


def _own_svid(svid: workload_pb2.X509SVID) -> OwnSvid:
    chain = split_der(svid.x509_svid)
    if not chain or not svid.x509_svid_key:
        raise Invalid("an SVID without a certificate or key")
    try:
        leaf = x509.load_der_x509_certificate(chain[0])
        key = serialization.load_der_private_key(svid.x509_svid_key, password=None)
        pair = key.public_key() == leaf.public_key()
        not_after = leaf.not_valid_after_utc
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise Invalid("an SVID whose certificate or key cannot be read") from error
    if not pair:
        raise Invalid("an SVID whose key is another certificate's")
    return OwnSvid(
        spiffe_id=SpiffeId.parse(svid.spiffe_id),
        chain=chain,
        private_key_pkcs8=svid.x509_svid_key,
        not_after=not_after,
    )


def _trust_domain(name: str) -> TrustDomain:
    return TrustDomain.parse(name.removesuffix("/"))  # bundles are keyed by the trust domain's own SPIFFE ID


def _stub(channel: grpc.aio.Channel) -> Any:
    return workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)  # type: ignore[no-untyped-call]


def _channel(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        target.removeprefix("tcp://"),  # as SPIFFE_ENDPOINT_SOCKET has it; gRPC takes host:port
        options=[
            ("grpc.default_authority", "localhost"),  # a socket's path is no authority that an HTTP/2 server takes
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            # Our own back-off paces the attempts; gRPC's, up to two minutes, would come on top of it.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ],
    )


def backoff() -> Iterator[float]:
    """Seconds to wait before each next attempt: doubling, bounded, with jitter so that a fleet spreads out."""
    longest = FIRST_WAIT_S
    while True:
        yield random.uniform(longest / 2, longest)  # noqa: S311 - spreads load, hides nothing
        longest = min(longest * 2, LONGEST_WAIT_S)


def _explain(error: grpc.aio.AioRpcError) -> str:
    hint = {
        grpc.StatusCode.PERMISSION_DENIED: "no registration entry matches us: create one for this process",
        grpc.StatusCode.UNAVAILABLE: "is the agent running, and may we open its socket?",
    }.get(error.code())
    said = f"{error.code().name} {error.details()}"
    return f"{said} ({hint})" if hint else said
