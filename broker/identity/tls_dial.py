"""Dialling a server that is known by its SPIFFE ID.

TLS 1.3 with our own SVID. The server's chain must lead to the bundle of the trust domain that it is expected from, and
to no other one, and its SPIFFE ID must be the expected one; its DNS names mean nothing here. What changes later is
looked at as well: a connection is cut within `RECHECK_S` of its server's SVID expiring or losing its bundle.
"""

import asyncio
import ssl
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.identity.hop import CLOSE_S, CONNECT_S, End, Hop
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.tls_context import client_context, own_svid, peer_chain
from broker.identity.trust import OwnSvid, TrustSnapshot
from broker.identity.x509_svid import verify_x509_svid

RECHECK_S = 1.0

Matcher = Callable[[SpiffeId], bool]


class SpiffeDialer:
    """A hop to the server at `target` (`host:port`, `tcp://host:port`, `unix:/path`, `unix:///path`).

    expected: its SPIFFE ID, or a matcher, which is asked about IDs of our own trust domain only.
    snapshot: the newest one; raises Unavailable while there is none. Each connection uses what it then says.
    alpn: "http/1.1" for what is no gRPC.

    Raises: Invalid when the target is of none of these forms.
    """

    def __init__(
        self,
        target: str,
        expected: SpiffeId | Matcher,
        snapshot: Callable[[], TrustSnapshot],
        clock: Callable[[], datetime],
        *,
        alpn: str = "h2",
    ) -> None:
        self._target = target
        self._address = _address(target)
        self._expected = expected
        self._snapshot = snapshot
        self._clock = clock
        self._alpn = alpn
        self._context: tuple[tuple[int, OwnSvid], ssl.SSLContext] | None = None
        self._live: dict[End, Sequence[bytes]] = {}
        self._presented: SpiffeId | None = None
        self._watch: asyncio.Task[None] | None = None
        self._hop = Hop(self._connect, rejected=self._explain_rejection)

    @property
    def last_error(self) -> str | None:
        """Why the newest connection failed, in words for an operator; gRPC says only "Socket closed"."""
        return self._hop.last_error

    async def start(self) -> str:
        """The target for an insecure gRPC channel."""
        self._watch = asyncio.create_task(self._recheck(), name="spiffe-dialer")
        return await self._hop.start()

    async def close(self) -> None:
        """Close the channel first."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._hop.close()

    async def _connect(self) -> End:
        snapshot = self._snapshot()
        trust_domain, own = self._trust_domain(snapshot), own_svid(snapshot)
        if own.not_after <= self._clock():
            raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "our own SVID has expired: is the SPIRE agent running?")
        if self._context is None or self._context[0] != (snapshot.revision, own):
            self._context = ((snapshot.revision, own), client_context(snapshot, trust_domain, self._alpn))
        self._presented = own.spiffe_id
        end = await _open(self._address, self._context[1])
        try:
            chain = peer_chain(end.transport.get_extra_info("ssl_object"))
            self._check(chain, snapshot)
        except BaseException:
            end.transport.abort()
            raise
        self._live[end] = chain
        return end

    def _trust_domain(self, snapshot: TrustSnapshot) -> TrustDomain:
        return (
            self._expected.trust_domain
            if isinstance(self._expected, SpiffeId)
            else own_svid(snapshot).bundle_trust_domain
        )

    def _check(self, chain: Sequence[bytes], snapshot: TrustSnapshot) -> None:
        svid = verify_x509_svid(chain, snapshot, self._clock(), peer="server")
        if isinstance(self._expected, SpiffeId):
            if svid.spiffe_id != self._expected:
                raise Refused(Reason.UNAUTHENTICATED, f"the server is {svid.spiffe_id}, expected {self._expected}")
        elif svid.spiffe_id.trust_domain != self._trust_domain(snapshot) or not self._expected(svid.spiffe_id):
            raise Refused(Reason.UNAUTHENTICATED, f"the server is {svid.spiffe_id}, which is not one that we expect")

    async def _recheck(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_S)
            for end, chain in tuple(self._live.items()):
                if end.transport.is_closing():
                    del self._live[end]
                    continue
                try:
                    self._check(chain, self._snapshot())  # remembered, so a look-up while nothing changes
                except BrokerError as error:
                    self._hop.last_error = f"cut off: {error.detail}"
                    end.transport.abort()

    def _explain_rejection(self) -> str:
        return (
            f"{self._target} ended the connection right after the handshake: it may not accept our SVID "
            f"({self._presented}): is our trust domain federated there, and our ID allowed?"
        )


def _address(target: str) -> str | tuple[str, int]:
    """A path, or host and port."""
    scheme, _, rest = target.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        return "/" + rest.lstrip("/")
    host, _, port = target.removeprefix("tcp://").rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise Invalid(f"{target} is no server: write host:port, tcp://host:port or unix:///path")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def _open(address: str | tuple[str, int], context: ssl.SSLContext) -> End:
    loop = asyncio.get_running_loop()
    options: dict[str, Any] = {
        "ssl": context,
        "server_hostname": "",  # no name to send: the server is known by its SPIFFE ID
        "ssl_handshake_timeout": CONNECT_S,
        "ssl_shutdown_timeout": CLOSE_S,
    }
    if isinstance(address, str):
        return (await loop.create_unix_connection(End, address, **options))[1]
    return (await loop.create_connection(End, *address, **options))[1]
