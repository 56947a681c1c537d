"""Whom our client talks to: the server with the expected SPIFFE ID that its own trust domain vouches for, no other."""

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from support.agents import clock, serving
from support.pki import CA, snapshot
from support.processes import on_both_loops, script, until

from broker.errors import Invalid
from broker.identity import hop, tls_dial
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_dial import SpiffeDialer

BROKER = "spiffe://acme.test/action-broker"
CLIENT = "spiffe://acme.test/build/agent"
NOW = clock()  # OpenSSL looks at the machine's clock
ACME = CA("acme.test", now=NOW)
INTERMEDIATE = CA("acme.test", parent=ACME, now=NOW)
OTHER = CA("other.test", now=NOW)
# Both domains are trusted, each for itself.
TRUSTED = snapshot(ACME.bundle(), OTHER.bundle(), own=INTERMEDIATE.svid(CLIENT).own())


def echo(server):
    """Answers with what it got, or with who asked."""

    async def answer(request, context):
        return context.auth_context()["peer_spiffe_id"][0] if request == b"who" else request

    handler = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": handler}),))


@asynccontextmanager
async def dialling(target, expected=SpiffeId.parse(BROKER), trusted=lambda: TRUSTED, now=clock):  # noqa: B008
    """A channel through the dialer, and the dialer."""
    dialer = SpiffeDialer(target, expected, trusted, now)
    channel = grpc.aio.insecure_channel(
        await dialer.start(),
        options=[
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 50),
        ],
    )
    try:
        yield channel, dialer
    finally:
        await channel.close()
        await dialer.close()


async def ask(channel, data=b"hello"):
    return await channel.unary_unary("/test.Echo/Echo")(data, timeout=10)


async def assert_refused(channel):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


@on_both_loops
async def test_the_expected_server_is_reached_over_tcp_and_unix_without_any_dns_name(tmp_path):
    for address in ("127.0.0.1:0", f"unix:{tmp_path}/s"):
        async with (
            serving(INTERMEDIATE.svid(BROKER), TRUSTED, echo, address) as target,
            dialling(target) as (channel, dialer),
        ):
            assert await ask(channel) == b"hello"
            assert await ask(channel, b"who") == CLIENT.encode()
            assert dialer.last_error is None


@pytest.mark.parametrize("form", ["tcp://{}", "{}"])
async def test_a_target_may_name_its_scheme(form):
    async with (
        serving(ACME.svid(BROKER), TRUSTED, echo) as target,
        dialling(form.format(target)) as (channel, _),
    ):
        assert await ask(channel) == b"hello"


@on_both_loops
async def test_a_server_with_another_id_is_refused():
    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target:
        async with dialling(target) as (channel, _):
            assert await ask(channel) == b"hello"
        for expected in (BROKER + "2", BROKER[:-1], "spiffe://acme.test/Action-broker", "spiffe://acme.test/a/b"):
            async with dialling(target, SpiffeId.parse(expected)) as (channel, dialer):
                await assert_refused(channel)
                assert dialer.last_error == f"the server is {BROKER}, expected {expected}"


NESTED = INTERMEDIATE.svid(BROKER)
FORGERIES = {
    "another-domains-ca-says-it-is-ours": OTHER.svid(BROKER),
    "a-ca-that-nobody-trusts": CA("acme.test", now=NOW).svid(BROKER),
    "two-uri-names-one-of-them-right": ACME.svid(uris=[BROKER, BROKER + "2"]),
    "right-dns-name-and-wrong-id": ACME.svid("spiffe://acme.test/intruder", dns=["localhost", "acme.test"]),
    "a-leaf-that-is-a-ca": ACME.svid(BROKER, basic_constraints=x509.BasicConstraints(ca=True, path_length=None)),
    "expired": ACME.svid(BROKER, not_before=NOW - timedelta(hours=2), lifetime=-timedelta(seconds=2)),
    "not-yet-valid": ACME.svid(BROKER, not_before=NOW + timedelta(hours=1), lifetime=timedelta(hours=2)),
    "for-clients-only": ACME.svid(BROKER, purposes=[x509.ExtendedKeyUsageOID.CLIENT_AUTH]),
    "an-intermediate-left-out": replace(NESTED, chain=NESTED.chain[:1]),
}


@pytest.mark.parametrize("forged", FORGERIES.values(), ids=FORGERIES.keys())
@on_both_loops
async def test_a_server_that_its_own_domain_does_not_vouch_for_is_refused(forged):
    async with serving(ACME.svid(BROKER), TRUSTED, echo) as honest, dialling(honest) as (channel, _):
        assert await ask(channel) == b"hello"
    async with serving(forged, TRUSTED, echo) as target, dialling(target) as (channel, dialer):
        await assert_refused(channel)
        assert dialer.last_error


async def test_a_matcher_is_asked_about_our_own_domain_only():
    asked = []

    def matcher(spiffe_id):
        asked.append(str(spiffe_id))
        return spiffe_id.path == "/action-broker"

    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target, dialling(target, matcher) as (channel, _):
        assert await ask(channel) == b"hello"
    for svid in (OTHER.svid("spiffe://other.test/action-broker"), ACME.svid("spiffe://acme.test/other")):
        async with serving(svid, TRUSTED, echo) as target, dialling(target, matcher) as (channel, _):
            await assert_refused(channel)
    assert set(asked) == {BROKER, "spiffe://acme.test/other"}


async def test_a_server_of_a_federated_domain_is_reached_by_that_domains_bundle_alone():
    away = "spiffe://other.test/action-broker"
    async with serving(OTHER.svid(away), TRUSTED, echo) as target:
        async with dialling(target, SpiffeId.parse(away)) as (channel, _):
            assert await ask(channel) == b"hello"
        ours_alone = snapshot(ACME.bundle(), own=TRUSTED.own)
        async with dialling(target, SpiffeId.parse(away), lambda: ours_alone) as (channel, dialer):
            await assert_refused(channel)
            assert "federate with it first" in dialer.last_error


async def test_without_a_valid_svid_of_our_own_nothing_is_dialled():
    reached = []
    async with serving(ACME.svid(BROKER), TRUSTED, lambda server: echo(server) or reached.append(server)) as target:
        late = lambda: TRUSTED.own.not_after  # noqa: E731
        for trusted, now in ((snapshot(ACME.bundle()), clock), (TRUSTED, late)):
            async with dialling(target, trusted=lambda trusted=trusted: trusted, now=now) as (channel, dialer):
                await assert_refused(channel)
                assert "SVID" in dialer.last_error
        async with dialling(target) as (channel, _):
            assert await ask(channel) == b"hello"


async def test_each_connection_shows_the_svid_of_that_moment():
    current = [TRUSTED]
    renewed = snapshot(*TRUSTED.bundles.values(), own=ACME.svid("spiffe://acme.test/renewed").own(), revision=2)
    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target:
        dialer = SpiffeDialer(target, SpiffeId.parse(BROKER), lambda: current[0], clock)
        address = await dialer.start()
        for trusted, name in ((TRUSTED, CLIENT), (renewed, "spiffe://acme.test/renewed")):
            current[0] = trusted
            async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                assert await ask(channel, b"who") == name.encode()
        await dialer.close()


async def test_a_server_that_refuses_our_svid_is_explained():
    async with (
        serving(ACME.svid(BROKER), snapshot(OTHER.bundle()), echo) as target,
        dialling(target) as (channel, dialer),
    ):
        await assert_refused(channel)
        assert f"it may not accept our SVID ({CLIENT})" in dialer.last_error


@pytest.mark.parametrize(
    "target",
    ["", "host", "host:", ":443", "host:0", "host:65536", "host:٤٤٣", "unix:s", "unix:", "https://host", "a:-1"],
)
def test_a_target_that_is_no_server_is_refused_before_anything_is_dialled(target):
    assert SpiffeDialer("[::1]:443", SpiffeId.parse(BROKER), lambda: TRUSTED, clock)._address == ("::1", 443)
    with pytest.raises(Invalid):
        SpiffeDialer(target, SpiffeId.parse(BROKER), lambda: TRUSTED, clock)


async def test_nobody_there_is_explained(tmp_path):
    async with dialling(f"unix:{tmp_path}/nobody") as (channel, dialer):
        await assert_refused(channel)
        assert "FileNotFoundError" in dialer.last_error


@on_both_loops
async def test_a_server_that_never_answers_costs_a_bounded_time(monkeypatch):
    monkeypatch.setattr(hop, "CONNECT_S", 0.2)
    accepted = []
    silent = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    async with dialling(f"{host}:{port}") as (channel, dialer):
        await assert_refused(channel)
        assert dialer.last_error == "no connection within 0.2 s"
    silent.close()
    for writer in accepted:
        writer.transport.abort()
    await silent.wait_closed()


@on_both_loops
async def test_a_connection_ends_when_its_servers_bundle_or_svid_does(monkeypatch):
    monkeypatch.setattr(tls_dial, "RECHECK_S", 0.02)
    current, now = [TRUSTED], [clock()]
    async with (
        serving(ACME.svid(BROKER), TRUSTED, echo) as target,
        dialling(target, trusted=lambda: current[0], now=lambda: now[0]) as (channel, dialer),
    ):
        assert await ask(channel) == b"hello"
        current[0] = snapshot(CA("acme.test", now=NOW).bundle(), own=TRUSTED.own, revision=2)
        await until(lambda: "cut off" in str(dialer.last_error), "the cut")
        await assert_refused(channel)
        current[0] = snapshot(ACME.bundle(), own=TRUSTED.own, revision=3)
        await asyncio.wait_for(channel.channel_ready(), 10)
        assert await ask(channel) == b"hello"
        assert dialer.last_error is None
        now[0] += timedelta(hours=2)
        await until(lambda: "cut off: a certificate in the chain has expired" in str(dialer.last_error), "the cut")


@on_both_loops
async def test_large_messages_pass_whole_in_both_directions():
    data = os.urandom(3 * 1024 * 1024)
    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target, dialling(target) as (channel, _):
        answers = await asyncio.gather(*(ask(channel, data + bytes([n])) for n in range(4)))
    assert answers == [data + bytes([n]) for n in range(4)]


async def test_another_process_cannot_speak_with_our_identity():
    code = "tell(len(rest(connect(sys.argv[1]))))"
    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target, dialling(target) as (channel, dialer):
        assert await ask(channel) == b"hello"
        folder = dialer._hop._folder
        assert folder.stat().st_mode & 0o777 == 0o700
        with script(code, str(folder / "s")) as stranger:
            assert await stranger.line() == "0"
        assert await ask(channel) == b"hello"


@on_both_loops
async def test_a_closed_dialer_leaves_no_task_file_or_descriptor():
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    async with serving(ACME.svid(BROKER), TRUSTED, echo) as target:
        async with dialling(target) as (channel, _):
            await ask(channel)  # what gRPC opens once and for all
        before = descriptors()
        for _ in range(5):
            async with dialling(target) as (channel, dialer):
                await ask(channel)
                folder = dialer._hop._folder
            assert not folder.exists()
        await until(lambda: descriptors() <= before, "all descriptors back")
        ours = {task for task in asyncio.all_tasks() if "broker/identity" in task.get_coro().cr_code.co_filename}
        assert not ours
