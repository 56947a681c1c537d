"""The embedded trust domain speaks SPIRE's protocols: the broker's own clients cannot tell them apart."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from spiffe._proto import workload_pb2, workload_pb2_grpc
from structlog.testing import capture_logs
from support.processes import on_both_loops, running, script, until

from broker._proto.actionbroker.v1 import dev_pb2, dev_pb2_grpc
from broker._proto.spiffe_broker import brokerapi_pb2, brokerapi_pb2_grpc
from broker.dev.domain import Lifetimes
from broker.dev.run_as import register
from broker.dev.server import DevTrustDomain
from broker.errors import Invalid, Reason, Refused, Unavailable
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId
from broker.identity.spire_broker_api import SpireBrokerApi
from broker.identity.tls_dial import SpiffeDialer
from broker.identity.trust import TrustSnapshot
from broker.identity.workload_api import WorkloadApi
from broker.identity.x509_svid import verify_x509_svid

BROKER = "spiffe://dev.test/action-broker"
BUILD = "spiffe://dev.test/build/agent"
WL_HEADER = (("workload.spiffe.io", "true"),)
BROKER_HEADER = (("broker.spiffe.io", "true"),)
REPOSITORY = str(Path(__file__).parents[2])
WAITS = "tell('ready'); hear()"


def now() -> datetime:
    return datetime.now(UTC)


def selector(pid: int) -> str:
    process = read_process(pid)
    return f"dev:process:{process.pid}:{process.start_time}"


def executable(pid: int) -> Path:
    return Path(f"/proc/{pid}/exe").readlink()


def target(path: Path) -> str:
    return f"unix:{path}"


@asynccontextmanager
async def domain_in(folder: Path, **options: Any) -> AsyncIterator[DevTrustDomain]:
    async with DevTrustDomain(folder / "td", now, **options) as dev:
        yield dev


@dataclass(frozen=True)
class Setting:
    """A trust domain in which this process is the broker, and the broker's own clients of it."""

    dev: DevTrustDomain
    workload_api: WorkloadApi
    broker_api: SpireBrokerApi
    own_entry: str


@asynccontextmanager
async def setting_in(folder: Path, **options: Any) -> AsyncIterator[Setting]:
    async with domain_in(folder, **options) as dev:
        own_entry = dev.create_entry(BROKER, [selector(os.getpid())])
        async with WorkloadApi(target(dev.workload_socket)) as workload_api:
            async with asyncio.timeout(10):
                await workload_api.ready()
            async with SpireBrokerApi(target(dev.broker_socket), workload_api.snapshot, now) as broker_api:
                yield Setting(dev, workload_api, broker_api, own_entry)


@asynccontextmanager
async def workload_stub(dev: DevTrustDomain) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(target(dev.workload_socket)) as channel:
        yield workload_pb2_grpc.SpiffeWorkloadAPIStub(channel)


@asynccontextmanager
async def broker_stub(setting: Setting, snapshot: TrustSnapshot | None = None) -> AsyncIterator[Any]:
    """A plain stub behind the broker's own TLS, to send what the broker's client would not."""
    dialer = SpiffeDialer(
        target(setting.dev.broker_socket),
        setting.dev.agent,
        lambda: snapshot or setting.workload_api.snapshot(),
        now,
    )
    async with grpc.aio.insecure_channel(await dialer.start(), [("grpc.default_authority", "localhost")]) as channel:
        yield brokerapi_pb2_grpc.APIStub(channel)
    await dialer.close()


def asks(pid: int, *audience: str) -> brokerapi_pb2.FetchJWTSVIDRequest:
    request = brokerapi_pb2.FetchJWTSVIDRequest(audience=audience)
    request.reference.reference.Pack(brokerapi_pb2.WorkloadPIDReference(pid=pid))
    return request


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


@on_both_loops
async def test_our_own_clients_get_an_identity_that_verifies(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting:
        snapshot = setting.workload_api.snapshot()
        assert snapshot.own is not None
        svid = verify_x509_svid(snapshot.own.chain, snapshot, now(), peer="client")
        assert str(svid.spiffe_id) == BROKER
        token = await setting.workload_api.fetch_jwt_svid("https://broker.test")
        verified = verify_jwt_svid(token, snapshot, now(), audience="https://broker.test")
        assert str(verified.spiffe_id) == BROKER
        with pytest.raises(Refused) as refused:
            verify_jwt_svid(token, snapshot, now(), audience="https://other.test")
        assert refused.value.reason is Reason.WRONG_AUDIENCE


@on_both_loops
async def test_a_process_is_known_by_its_pid_until_its_entry_is_deleted(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting:
        with script(WAITS) as child:
            assert await child.line() == "ready"
            entry = setting.dev.create_entry(BUILD, [selector(child.pid)])
            (found,) = await setting.broker_api.fetch(child.pid)
            assert str(found.spiffe_id) == BUILD
            assert found.expires_at <= now() + timedelta(minutes=5)
            setting.dev.delete_entry(entry)
            with pytest.raises(Refused, match="PERMISSION_DENIED no identity issued") as refused:
                await setting.broker_api.fetch(child.pid)
            assert refused.value.reason is Reason.NOT_ATTESTED


async def test_a_process_with_two_entries_has_both_ids_and_each_once(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting:
        with script(WAITS) as child:
            assert await child.line() == "ready"
            exe = executable(child.pid)
            setting.dev.create_entry(BUILD, [selector(child.pid)])
            setting.dev.create_entry(BUILD, [f"unix:path:{exe}", f"unix:uid:{os.geteuid()}"])
            setting.dev.create_entry(f"{BUILD}/two", [f"unix:gid:{os.getegid()}", f"unix:path:{exe}"])
            setting.dev.create_entry(f"{BUILD}/never", [selector(child.pid), "unix:uid:4000000000"])
            found = await setting.broker_api.fetch(child.pid)
            assert [str(one.spiffe_id) for one in found] == [BUILD, f"{BUILD}/two"]


async def test_a_process_that_is_dead_or_without_an_entry_is_refused_as_spire_does(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting, broker_stub(setting) as stub:
        with script(WAITS) as child:
            assert await child.line() == "ready"
            pid = child.pid
            call = stub.FetchJWTSVID(asks(pid, "a"), metadata=BROKER_HEADER, timeout=5)
            assert await refusal(call) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
            setting.dev.create_entry(BUILD, [selector(pid)])
            assert await stub.FetchJWTSVID(asks(pid, "a"), metadata=BROKER_HEADER, timeout=5)
        for gone in (pid, 0, -1):
            code, _ = await refusal(stub.FetchJWTSVID(asks(gone, "a"), metadata=BROKER_HEADER, timeout=5))
            assert code is grpc.StatusCode.INTERNAL
        with pytest.raises(Refused, match="INTERNAL"):
            await setting.broker_api.fetch(pid)


async def test_the_broker_api_refuses_what_is_not_asked_as_the_standard_wants(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting, broker_stub(setting) as stub:
        me = os.getpid()
        assert await stub.FetchJWTSVID(asks(me, "a"), metadata=BROKER_HEADER, timeout=5)
        other = asks(me, "a")
        other.reference.reference.Pack(workload_pb2.JWTSVIDRequest())
        without = brokerapi_pb2.FetchJWTSVIDRequest(audience=["a"])
        invalid, denied = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED
        for request, metadata, code, why in [
            (asks(me, "a"), (), invalid, "security header missing from request"),
            (asks(me, "a"), (("broker.spiffe.io", "false"),), invalid, "security header missing from request"),
            (asks(me), BROKER_HEADER, invalid, "audience must be specified"),
            (without, BROKER_HEADER, invalid, "workload reference must be provided"),
            (other, BROKER_HEADER, denied, "reference type"),
        ]:
            got, details = await refusal(stub.FetchJWTSVID(request, metadata=metadata, timeout=5))
            assert got is code
            assert why in details


async def test_a_workload_that_is_not_the_broker_may_not_ask_about_others(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting:
        good = setting.workload_api.snapshot()
        stranger = setting.dev.domain.snapshot(
            setting.dev.domain.x509_svid(SpiffeId.parse("spiffe://dev.test/service/orders"))
        )
        for snapshot, code in ((good, None), (stranger, grpc.StatusCode.PERMISSION_DENIED)):
            async with broker_stub(setting, snapshot) as stub:
                call = stub.FetchJWTSVID(asks(os.getpid(), "a"), metadata=BROKER_HEADER, timeout=5)
                if code is None:
                    assert (await call).svids[0].spiffe_id == BROKER
                else:
                    assert (await refusal(call))[0] is code


async def test_a_caller_of_another_authority_does_not_get_through_tls(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting, domain_in(tmp_path / "other") as impostor:
        good = setting.workload_api.snapshot()
        forged = impostor.domain.x509_svid(setting.dev.broker)
        mixed = TrustSnapshot(own=forged, bundles=good.bundles, revision=good.revision)
        async with broker_stub(setting, mixed) as stub:
            call = stub.FetchJWTSVID(asks(os.getpid(), "a"), metadata=BROKER_HEADER, timeout=5)
            assert (await refusal(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_the_same_audience_gets_the_same_token_as_from_spires_agent(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting, broker_stub(setting) as stub:

        async def token(*audience: str) -> str:
            answer = await stub.FetchJWTSVID(asks(os.getpid(), *audience), metadata=BROKER_HEADER, timeout=5)
            return answer.svids[0].svid

        first = await token("a")
        assert await token("a") == first
        assert await token("b") != first
        setting.dev.domain.rotate()
        assert await token("a") != first


async def test_a_process_without_an_entry_has_no_identity_until_it_gets_one(tmp_path: Path) -> None:
    async with domain_in(tmp_path) as dev, workload_stub(dev) as stub:
        denied = (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        streams = [
            (stub.FetchX509SVID, workload_pb2.X509SVIDRequest()),
            (stub.FetchX509Bundles, workload_pb2.X509BundlesRequest()),
            (stub.FetchJWTBundles, workload_pb2.JWTBundlesRequest()),
        ]
        for method, request in streams:
            assert await refusal(method(request, metadata=WL_HEADER, timeout=5).read()) == denied
        fetch = workload_pb2.JWTSVIDRequest(audience=["a"])
        assert await refusal(stub.FetchJWTSVID(fetch, metadata=WL_HEADER, timeout=5)) == denied
        entry = dev.create_entry(BUILD, [selector(os.getpid())])
        for method, request in streams:
            assert await method(request, metadata=WL_HEADER, timeout=5).read()
            assert (await refusal(method(request, timeout=5).read()))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await stub.FetchJWTSVID(fetch, metadata=WL_HEADER, timeout=5)).svids[0].spiffe_id == BUILD
        assert (await refusal(stub.FetchJWTSVID(fetch, timeout=5)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        fetch.spiffe_id = f"{BUILD}/other"
        assert await refusal(stub.FetchJWTSVID(fetch, metadata=WL_HEADER, timeout=5)) == denied
        empty = workload_pb2.JWTSVIDRequest()
        assert (await refusal(stub.FetchJWTSVID(empty, metadata=WL_HEADER, timeout=5)))[
            1
        ] == "audience must be specified"
        # An open stream hears of a new entry, and of the last one's end.
        stream = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=WL_HEADER, timeout=20)
        assert [svid.spiffe_id for svid in (await stream.read()).svids] == [BUILD]
        second = dev.create_entry(f"{BUILD}/two", [f"unix:uid:{os.geteuid()}"])
        assert [svid.spiffe_id for svid in (await stream.read()).svids] == [BUILD, f"{BUILD}/two"]
        assert dev.delete_entry(second)
        assert [svid.spiffe_id for svid in (await stream.read()).svids] == [BUILD]
        assert dev.delete_entry(entry)
        assert not dev.delete_entry(entry)
        assert await refusal(stream.read()) == denied


async def test_a_jwt_svid_is_validated_for_its_audience_only(tmp_path: Path) -> None:
    async with domain_in(tmp_path) as dev, workload_stub(dev) as stub:
        dev.create_entry(BUILD, [selector(os.getpid())])
        fetch = workload_pb2.JWTSVIDRequest(audience=["a"])
        token = (await stub.FetchJWTSVID(fetch, metadata=WL_HEADER, timeout=5)).svids[0].svid

        def validate(audience: str) -> Any:
            request = workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
            return stub.ValidateJWTSVID(request, metadata=WL_HEADER, timeout=5)

        answer = await validate("a")
        assert answer.spiffe_id == BUILD
        assert dict(answer.claims)["sub"] == BUILD
        assert (await refusal(validate("b")))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_svids_are_renewed_at_half_their_life(tmp_path: Path) -> None:
    lifetimes = Lifetimes(x509_svid=timedelta(seconds=3), jwt_svid=timedelta(seconds=2))
    async with setting_in(tmp_path, lifetimes=lifetimes) as setting:
        first = setting.workload_api.snapshot()
        assert first.own is not None
        (before,) = await setting.broker_api.fetch(os.getpid())
        # Outlive the first SVIDs, the agent's own among them: only renewed ones verify then.
        await until(lambda: now() > first.own.not_after + timedelta(seconds=1), "the first SVID ends")
        second = setting.workload_api.snapshot()
        assert second.own is not None
        assert second.own.chain != first.own.chain
        assert verify_x509_svid(second.own.chain, second, now(), peer="client")
        with pytest.raises(Refused):
            verify_x509_svid(first.own.chain, second, now(), peer="client")
        (after,) = await setting.broker_api.fetch(os.getpid())
        assert after.expires_at > before.expires_at


async def test_federated_bundles_are_pushed_and_kept_apart(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting, domain_in(tmp_path / "acme", trust_domain="acme.test") as acme:
        partner = acme.domain.x509_svid(SpiffeId.parse("spiffe://acme.test/shop"))
        forged = acme.domain.authority.x509_svid(setting.dev.broker, now(), timedelta(hours=1))
        snapshot = setting.workload_api.snapshot
        with pytest.raises(Refused):
            verify_x509_svid(partner.chain, snapshot(), now(), peer="client")
        authority = acme.domain.authority
        setting.dev.set_federated_bundle("acme.test", authority.x509_bundle, authority.jwks)
        await until(lambda: all(bundle.jwt_authorities for bundle in snapshot().bundles.values()), "JWT bundles come")
        await until(lambda: len(snapshot().bundles) == 2, "both bundles come")
        await until(
            lambda: all(bundle.x509_authorities for bundle in snapshot().bundles.values()), "X.509 bundles come"
        )
        assert (
            str(verify_x509_svid(partner.chain, snapshot(), now(), peer="client").spiffe_id)
            == "spiffe://acme.test/shop"
        )
        token = acme.domain.jwt_svid(partner.spiffe_id, ["a"])
        assert verify_jwt_svid(token, snapshot(), now(), audience="a").spiffe_id == partner.spiffe_id
        with pytest.raises(Refused):  # acme.test's authority does not speak for dev.test
            verify_x509_svid(forged.chain, snapshot(), now(), peer="client")
        setting.dev.domain.unfederate(acme.domain.trust_domain)
        await until(lambda: len(snapshot().bundles) == 1, "the bundle goes")


async def test_a_process_registers_itself_and_keeps_its_id_through_exec(tmp_path: Path) -> None:
    code = """
sys.path.insert(0, sys.argv[1])
from broker.dev.run_as import run_as
run_as(sys.argv[2], sys.argv[3], ['/bin/sh', '-c', 'echo running; read x'])
"""
    async with setting_in(tmp_path) as setting:
        with script(code, REPOSITORY, str(setting.dev.entries_socket), BUILD) as child:
            assert await child.line() == "running"
            assert executable(child.pid).name in {"sh", "dash", "bash", "busybox"}
            assert [str(one.spiffe_id) for one in await setting.broker_api.fetch(child.pid)] == [BUILD]
        with running("/bin/sleep", "60") as other, pytest.raises(Refused):
            await setting.broker_api.fetch(other.pid)


async def test_an_entry_for_a_process_goes_with_it(tmp_path: Path) -> None:
    async with domain_in(tmp_path) as dev:
        with script(WAITS) as child:
            assert await child.line() == "ready"
            entry = await asyncio.to_thread(register, str(dev.entries_socket), BUILD, child.pid)
            assert entry in dev.domain.entries._entries
        kept = dev.create_entry(BUILD, ["unix:uid:1600"])
        assert list(dev.domain.entries._entries) == [kept]


async def test_what_registers_is_told_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    async with domain_in(tmp_path) as dev:
        with pytest.raises(Invalid, match=r"spiffe://dev\.test"):
            await asyncio.to_thread(register, str(dev.entries_socket), "spiffe://acme.test/x", os.getpid())
        path = str(dev.entries_socket)
    with pytest.raises(Unavailable, match="action-broker dev"):
        await asyncio.to_thread(register, path, BUILD, os.getpid())


@pytest.mark.parametrize(
    ("spiffe_id", "selectors"),
    [
        ("spiffe://acme.test/x", ["unix:uid:1"]),
        ("spiffe://dev.test", ["unix:uid:1"]),
        ("spiffe://dev.test/spire/agent/dev", ["unix:uid:1"]),
        ("spiffe://dev.test/a/../b", ["unix:uid:1"]),
        (BUILD, []),
        (BUILD, ["unix:uid:01"]),
        (BUILD, ["unix:uid:1\n"]),
        (BUILD, ["unix:uid:1|unix:uid:2"]),
        (BUILD, ["unix:path:relative"]),
        (BUILD, ["k8s:ns:default"]),
        (BUILD, ["unix:uid:1"] * 17),
    ],
)
async def test_an_entry_that_means_nothing_is_refused(tmp_path: Path, spiffe_id: str, selectors: list[str]) -> None:
    async with domain_in(tmp_path) as dev, grpc.aio.insecure_channel(target(dev.entries_socket)) as channel:
        stub = dev_pb2_grpc.DevEntriesStub(channel)
        good = await stub.CreateEntry(dev_pb2.CreateEntryRequest(spiffe_id=BUILD, selectors=["unix:uid:1"]), timeout=5)
        call = stub.CreateEntry(dev_pb2.CreateEntryRequest(spiffe_id=spiffe_id, selectors=selectors), timeout=5)
        assert (await refusal(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
        await stub.DeleteEntry(dev_pb2.DeleteEntryRequest(entry_id=good.entry_id), timeout=5)
        again = stub.DeleteEntry(dev_pb2.DeleteEntryRequest(entry_id=good.entry_id), timeout=5)
        assert (await refusal(again))[0] is grpc.StatusCode.NOT_FOUND


@pytest.mark.root
async def test_another_user_registers_nothing(tmp_path: Path) -> None:
    # The socket's mode keeps it out; and where an administrator widened that, the server looks at the peer.
    code = """
sys.path.insert(0, sys.argv[1])
from broker.dev.run_as import register
os.setresuid(1600, 1600, 1600)
try: tell(register(sys.argv[2], 'spiffe://dev.test/evil', os.getpid()))
except Exception as error: tell(error)
"""
    for above in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        above.chmod(0o711)
    async with domain_in(tmp_path) as dev:
        assert stat.S_IMODE(dev.entries_socket.stat().st_mode) == 0o600
        assert await asyncio.to_thread(register, str(dev.entries_socket), BUILD, os.getpid())
        with script(code, REPOSITORY, str(dev.entries_socket)) as child:
            assert "UNAVAILABLE" in await child.line()
        dev.entries_socket.chmod(0o666)
        with script(code, REPOSITORY, str(dev.entries_socket)) as child:
            assert "PERMISSION_DENIED: only for the user" in await child.line()


@pytest.mark.root
async def test_users_are_told_apart_by_their_selectors(tmp_path: Path) -> None:
    for above in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        above.chmod(0o711)
    code = "os.setresgid(1601, 1601, 1601); os.setresuid(int(sys.argv[1]), int(sys.argv[1]), 0); tell('ready'); hear()"
    async with setting_in(tmp_path) as setting:
        setting.dev.create_entry(BUILD, ["unix:uid:1600"])
        setting.dev.create_entry(f"{BUILD}/group", ["unix:gid:1601"])
        with script(code, "1600") as one, script(code, "1700") as other:
            assert [await one.line(), await other.line()] == ["ready", "ready"]
            ids = [[str(x.spiffe_id) for x in await setting.broker_api.fetch(child.pid)] for child in (one, other)]
        assert ids == [[BUILD, f"{BUILD}/group"], [f"{BUILD}/group"]]


@pytest.mark.parametrize("name", ["acme.com", "prod", "test", "dev.test.acme.org"])
def test_a_name_that_could_be_real_is_refused(tmp_path: Path, name: str) -> None:
    assert DevTrustDomain(tmp_path, now, trust_domain="acme.test").domain.trust_domain.name == "acme.test"
    with pytest.raises(Invalid, match=r"dev\.test"):
        DevTrustDomain(tmp_path, now, trust_domain=name)


async def test_it_is_loud_and_keeps_no_key_in_the_log(tmp_path: Path) -> None:
    with capture_logs() as logs:
        async with domain_in(tmp_path) as dev:
            dev.create_entry(BUILD, [selector(os.getpid())])
            key = dev.domain.x509_svid(dev.agent).private_key_pkcs8
    loud = [line for line in logs if "EMBEDDED TRUST DOMAIN" in line["event"]]
    assert [line["log_level"] for line in loud] == ["warning"]
    assert loud[0]["trust_domain"] == "spiffe://dev.test"
    assert key.hex() not in json.dumps(logs, default=str)


async def test_two_do_not_share_a_folder_and_the_sockets_go_at_the_end(tmp_path: Path) -> None:
    async with setting_in(tmp_path) as setting:
        with pytest.raises(OSError, match="another embedded trust domain"):
            await DevTrustDomain(tmp_path / "td", now).start()
        assert await setting.broker_api.fetch(os.getpid())
    assert not [path for path in (tmp_path / "td").rglob("*") if path.is_socket()]
    async with setting_in(tmp_path) as setting:  # and it can be used again
        assert await setting.broker_api.fetch(os.getpid())
