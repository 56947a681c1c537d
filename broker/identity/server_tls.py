"""The broker's own side of TLS, changing with each TrustSnapshot and dropping no connection.

Both transports take what they need at each handshake: gRPC from a fetcher, aiohttp by swapping the context in its SNI
callback, which OpenSSL calls also for clients that send no name. Both get things made beforehand: if gRPC's fetcher
raised, the old certificate would go on in silence.

The handshake pools all trust domains' authorities, so it is not the check. That is made on each request, against the
bundle of the SVID's own trust domain (identify.py).
"""

import ssl

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from broker.identity.tls_context import chain_pem, key_pem, own_svid, pooled_authorities, server_context
from broker.identity.trust import TrustSnapshot


class ServerTls:
    """Credentials for our servers. Feed it: `workload_api.subscribe(tls.offer)`.

    Raises: Unavailable when `snapshot` has no SVID of our own.
    """

    def __init__(self, snapshot: TrustSnapshot) -> None:
        self.revision = 0
        self.offer(snapshot)

    def offer(self, snapshot: TrustSnapshot) -> None:
        """From now on handshakes use this one. An older one than we have is left aside.

        Raises: Unavailable when it has no SVID of our own; what we had before then stays.
        """
        if snapshot.revision <= self.revision:
            return
        grpc_configuration, http_context = _grpc_configuration(snapshot), server_context(snapshot)
        self._grpc, self._http, self.revision = grpc_configuration, http_context, snapshot.revision
        self._snapshot = snapshot

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For one `add_secure_port`: each port has to hear of a change itself. A client certificate is required."""
        first = served = self._grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:  # in gRPC's threads, at each handshake
            nonlocal served
            if self._grpc is served:
                return None  # "unchanged"
            served = self._grpc
            return served

        return grpc.dynamic_ssl_server_credentials(
            first,
            fetch,  # type: ignore[arg-type]  # the stubs do not know that None means "unchanged"
            require_client_authentication=True,
        )

    def http_context(self) -> ssl.SSLContext:
        """For aiohttp. A client certificate is optional: a client may prove itself otherwise."""
        outer = server_context(self._snapshot)

        def swap(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._http

        outer.sni_callback = swap
        return outer


def _grpc_configuration(snapshot: TrustSnapshot) -> grpc.ServerCertificateConfiguration:
    own = own_svid(snapshot)
    roots = b"".join(authority.public_bytes(Encoding.PEM) for authority in pooled_authorities(snapshot))
    return grpc.ssl_server_certificate_configuration([(key_pem(own), chain_pem(own))], root_certificates=roots)
