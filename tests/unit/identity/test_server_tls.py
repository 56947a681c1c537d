"""Our servers' side of TLS: it follows each snapshot, drops nobody, and lets a handshake through to be judged later."""

import asyncio
import contextlib
import ssl

import grpc
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.serialization import Encoding
from support.agents import clock
from support.pki import CA, snapshot
from support.processes import on_both_loops

from broker.errors import Unavailable
from broker.identity.server_tls import ServerTls
from broker.identity.spiffe_id import TrustDomain
from broker.identity.tls_context import client_context, peer_chain

BROKER = "spiffe://acme.test/action-broker"
DNS = "broker.acme.test"  # for the client of grpcio, which knows nothing of SPIFFE IDs
NOW = clock()
ACME, OTHER = CA("acme.test", now=NOW), CA("other.test", now=NOW)
INTERMEDIATE = CA("acme.test", parent=ACME, now=NOW)
CALLER = INTERMEDIATE.svid("spiffe://acme.test/build/agent")
STRANGER = OTHER.svid("spiffe://other.test/build/agent")


def ours(*bundles, revision=1):
    """A snapshot with a new SVID of ours."""
    return snapshot(*(bundles or [ACME.bundle()]), own=ACME.svid(BROKER, dns=[DNS]).own(), revision=revision)


@contextlib.asynccontextmanager
async def grpc_server(tls):
    async def answer(_request, context):
        return context.auth_context()["x509_pem_cert"][0]

    server = grpc.aio.server()
    handlers = {"Leaf": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Tls", handlers),))
    port = server.add_secure_port("127.0.0.1:0", tls.grpc_credentials())
    await server.start()
    yield port
    await server.stop(None)


@contextlib.asynccontextmanager
async def http_server(tls):
    async def answer(request):
        return web.json_response([len(item) for item in peer_chain(request.transport.get_extra_info("ssl_object"))])

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls.http_context())
    await site.start()
    yield runner.addresses[0][1]
    await runner.cleanup()


def as_client(svid):
    context = client_context(snapshot(ACME.bundle(), own=svid.own()), TrustDomain.parse("acme.test"), "h2")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def anonymous():
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def leaf_at(port, context, name=""):
    """The server's certificate, after a handshake that the server accepted too."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        # In TLS 1.3 only what the server says next tells whether it took our certificate.
        http = writer.get_extra_info("ssl_object").selected_alpn_protocol() != "h2"
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" if http else b"PRI * HTTP/2.0\r\n\r\n")
        if not (await reader.read(1)):
            raise ConnectionResetError("the server hung up")
        return writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.transport.abort()


SERVERS = pytest.mark.parametrize("server", [grpc_server, http_server], ids=["grpc", "http"])


@SERVERS
@on_both_loops
async def test_each_handshake_uses_the_newest_snapshot(server):
    first, second = ours(), ours(revision=2)
    tls = ServerTls(first)
    async with server(tls) as port:
        assert await leaf_at(port, as_client(CALLER)) == first.own.chain[0]
        tls.offer(second)
        for name in ("", "broker.acme.test"):
            assert await leaf_at(port, as_client(CALLER), name) == second.own.chain[0]
        tls.offer(first)
        assert await leaf_at(port, as_client(CALLER)) == second.own.chain[0], "an older one changes nothing"


@SERVERS
@on_both_loops
async def test_a_trust_domain_is_let_through_exactly_while_we_federate_with_it(server):
    tls = ServerTls(ours())
    async with server(tls) as port:
        with pytest.raises(OSError):
            await leaf_at(port, as_client(STRANGER))
        tls.offer(ours(ACME.bundle(), OTHER.bundle(), revision=2))
        assert await leaf_at(port, as_client(STRANGER))
        tls.offer(ours(ACME.bundle(), revision=3))
        with pytest.raises(OSError):
            await leaf_at(port, as_client(STRANGER))
        assert await leaf_at(port, as_client(CALLER))


async def test_a_client_without_a_certificate_is_heard_over_http_and_not_over_grpc():
    tls = ServerTls(ours())
    async with http_server(tls) as port:
        assert await leaf_at(port, anonymous())
    async with grpc_server(tls) as port:
        assert await leaf_at(port, as_client(CALLER))
        with pytest.raises(OSError):
            await leaf_at(port, anonymous())


def test_tls_before_1_3_is_not_spoken_over_http():
    def talk(client_context):
        """The version both agree on, in memory. Raises: ssl.SSLError."""
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = client_context.wrap_bio(to_client, to_server)
        server = ServerTls(ours()).http_context().wrap_bio(to_server, to_client, server_side=True)
        for _ in range(4):
            for side in (client, server):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        return server.version()

    old = anonymous()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert talk(anonymous()) == "TLSv1.3"
    with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
        talk(old)


@on_both_loops
async def test_over_http_the_whole_chain_of_a_client_can_be_read():
    async with http_server(ServerTls(ours())) as port:
        for context, sizes in ((as_client(CALLER), [len(item) for item in CALLER.chain]), (anonymous(), [])):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="")
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert str(sizes).encode() in await reader.read()
            writer.transport.abort()


async def test_a_connection_outlives_the_svid_it_was_made_with():
    first = ours()
    tls = ServerTls(first)
    async with grpc_server(tls) as port:
        credentials = grpc.ssl_channel_credentials(
            ACME.certificate.public_bytes(Encoding.PEM), CALLER.key_pem, CALLER.chain_pem
        )
        options = [("grpc.ssl_target_name_override", DNS)]
        async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
            ask = channel.unary_unary("/test.Tls/Leaf")
            for revision in range(2, 7):
                assert await ask(b"", timeout=10)
                tls.offer(ours(revision=revision))


async def test_a_snapshot_without_an_svid_of_ours_is_refused_and_changes_nothing():
    with pytest.raises(Unavailable):
        ServerTls(snapshot(ACME.bundle()))
    first = ours()
    tls = ServerTls(first)
    with pytest.raises(Unavailable):
        tls.offer(snapshot(ACME.bundle(), revision=2))
    async with http_server(tls) as port:
        assert await leaf_at(port, anonymous()) == first.own.chain[0]
    tls.offer(ours(revision=3))
    assert tls.revision == 3
