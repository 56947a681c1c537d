"""What we keep of what an agent says, and what we do while it says nothing or nonsense."""

import itertools

import grpc
import pytest
from spiffe._proto import workload_pb2 as wl
from support.agents import WorkloadServer, jwt_update, x509_update
from support.pki import CA, JwtAuthority, der, jwks
from support.processes import until

from broker.errors import Reason, Unavailable
from broker.identity import workload_api
from broker.identity.spiffe_id import TrustDomain
from broker.identity.workload_api import WorkloadApi, backoff

ACME, OTHER = TrustDomain.parse("acme.test"), TrustDomain.parse("other.test")
OURS = "spiffe://acme.test/action-broker"
KEYS = JwtAuthority()


@pytest.fixture
def ca():
    return CA()


@pytest.fixture
async def server(ca, tmp_path):
    found = WorkloadServer(f"unix:{tmp_path}/agent.sock")
    found.x509 = x509_update(ca.svid(OURS), ca)
    found.jwt_bundles = jwt_update(acme_test=jwks(KEYS.jwk()))
    await found.start()
    yield found
    await found.stop()


@pytest.fixture
async def api(server):
    async with WorkloadApi(server.target) as found:
        await found.ready()
        yield found


async def changed(api, server):
    before = api.snapshot().revision
    server.say()
    await until(lambda: api.snapshot().revision > before, "a new snapshot")
    return api.snapshot()


async def test_the_first_snapshot_holds_our_svid_and_both_halves_of_our_bundle(api, ca):
    snapshot = api.snapshot()
    assert (str(snapshot.own.spiffe_id), snapshot.revision) == (OURS, 1)
    assert snapshot.bundle_for(ACME).x509_authorities == (ca.certificate,)
    assert snapshot.bundle_for(ACME).jwt_authorities == {KEYS.kid: (KEYS.key.public_key(),)}
    assert api.last_error is None


async def test_the_private_key_is_in_no_repr(api):
    assert str(api.snapshot().own.private_key_pkcs8) not in repr(api.snapshot())


async def test_federated_bundles_stand_apart_and_a_removed_one_is_gone(api, server, ca):
    other = CA("other.test")
    keys = JwtAuthority()
    server.x509 = x509_update(ca.svid(OURS), ca, other_test=der(other.certificate))
    snapshot = await changed(api, server)
    server.jwt_bundles = jwt_update(acme_test=jwks(KEYS.jwk()), other_test=jwks(keys.jwk()))
    snapshot = await changed(api, server)
    assert snapshot.bundle_for(OTHER).x509_authorities == (other.certificate,)
    assert snapshot.bundle_for(OTHER).jwt_authorities == {keys.kid: (keys.key.public_key(),)}
    assert snapshot.bundle_for(ACME).x509_authorities == (ca.certificate,)

    server.x509, server.jwt_bundles = x509_update(ca.svid(OURS), ca), jwt_update(acme_test=jwks(KEYS.jwk()))
    await changed(api, server)
    await until(lambda: OTHER not in api.snapshot().bundles, "the end of the federation")
    assert OTHER in snapshot.bundles, "an old snapshot does not change"


async def test_each_renewal_is_a_snapshot_with_a_higher_revision_and_a_repetition_is_none(api, server, ca):
    first, told = api.snapshot(), []
    end = api.subscribe(told.append)
    server.say()  # the same again
    server.x509 = x509_update(ca.svid(OURS), ca)
    second = await changed(api, server)
    assert (second.revision, told) == (first.revision + 1, [second])
    end()
    server.x509 = x509_update(ca.svid(OURS), ca)
    await changed(api, server)
    assert told == [second]


async def test_a_listener_that_raises_stops_neither_the_others_nor_the_streams(api, server, ca):
    def fail(_snapshot):
        raise ValueError("a listener's fault")

    told = []
    api.subscribe(fail)
    api.subscribe(told.append)
    for _ in range(2):
        server.x509 = x509_update(ca.svid(OURS), ca)
        await changed(api, server)
    assert len(told) == 2


def _defects():
    ca = CA()
    good = x509_update(ca.svid(OURS), ca)

    def svid(**changes):
        first = wl.X509SVID()
        first.CopyFrom(good.svids[0])
        for name, value in changes.items():
            setattr(first, name, value)
        return wl.X509SVIDResponse(svids=[first])

    yield "no-svid", "x509", wl.X509SVIDResponse()
    yield "certificate-is-noise", "x509", svid(x509_svid=b"noise")
    yield "certificate-is-cut-off", "x509", svid(x509_svid=good.svids[0].x509_svid[:-1])
    yield "certificate-is-another-sequence", "x509", svid(x509_svid=b"\x30\x03\x02\x01\x00")
    yield "no-certificate", "x509", svid(x509_svid=b"")
    yield "no-key", "x509", svid(x509_svid_key=b"")
    yield "key-is-noise", "x509", svid(x509_svid_key=b"noise")
    yield "key-is-another-certificates", "x509", svid(x509_svid_key=ca.svid(OURS).key_pkcs8)
    yield "id-is-no-spiffe-id", "x509", svid(spiffe_id="https://acme.test/x")
    yield "bundle-is-noise", "x509", svid(bundle=b"noise")
    yield "federated-bundle-is-noise", "x509", x509_update(ca.svid(OURS), ca, other_test=b"noise")
    yield "federated-domain-is-no-domain", "x509", x509_update(ca.svid(OURS), ca, Other_test=b"")
    yield "jwks-is-noise", "jwt_bundles", jwt_update(acme_test=b"noise")
    yield "jwks-without-keys", "jwt_bundles", jwt_update(acme_test=b"{}")
    yield "one-bad-bundle-beside-a-good-one", "jwt_bundles", jwt_update(acme_test=jwks(KEYS.jwk()), other_test=b"[")


@pytest.mark.parametrize(("what", "update"), [pytest.param(*rest, id=name) for name, *rest in _defects()])
async def test_a_malformed_update_changes_nothing_and_is_logged(api, server, ca, what, update, caplog):
    before = api.snapshot()
    good = getattr(server, what)
    setattr(server, what, update)
    server.say()
    await until(lambda: api.last_error, "the complaint")
    assert api.snapshot() is before
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "malformed update" in errors[0]

    setattr(server, what, good)
    server.x509 = x509_update(ca.svid(OURS), ca)
    await changed(api, server)
    await until(lambda: api.last_error is None, "all well")


async def test_an_update_beyond_the_size_limit_changes_nothing(api, server, ca, monkeypatch):
    before = api.snapshot()
    server.x509 = x509_update(ca.svid(OURS), ca, other_test=b"\x30" * (workload_api.MAX_MESSAGE + 1))
    server.say()
    await until(lambda: api.last_error, "the complaint")
    assert api.snapshot() is before
    assert "RESOURCE_EXHAUSTED" in api.last_error


async def test_an_agent_that_goes_leaves_the_snapshot_and_is_found_again(api, server, ca):
    before = api.snapshot()
    await server.stop()
    await until(lambda: api.last_error, "the loss")
    assert api.snapshot() is before
    server.x509 = x509_update(ca.svid(OURS), ca)
    await server.start()
    await until(lambda: api.snapshot() is not before, "what is new")
    await until(lambda: api.last_error is None, "both streams")


async def test_nobody_behind_the_socket_is_unavailable_until_somebody_is(server):
    await server.stop()
    async with WorkloadApi(server.target) as api:
        await until(lambda: api.last_error, "the complaint")
        with pytest.raises(Unavailable) as nothing:
            api.snapshot()
        assert nothing.value.reason is Reason.IDENTITY_UNAVAILABLE
        assert "is the agent running" in nothing.value.detail
        await server.start()
        await api.ready()


async def test_no_registration_entry_is_unavailable_with_the_fix_in_words(server):
    good, server.x509 = server.x509, grpc.StatusCode.PERMISSION_DENIED
    async with WorkloadApi(server.target) as api:
        await until(lambda: api.last_error, "the complaint")
        with pytest.raises(Unavailable) as nothing:
            api.snapshot()
        assert "create one for this process" in nothing.value.detail
        server.x509 = good
        await api.ready()


async def test_half_of_an_answer_is_no_snapshot(server):
    good, server.jwt_bundles = server.jwt_bundles, grpc.StatusCode.UNIMPLEMENTED
    async with WorkloadApi(server.target) as api:
        await until(lambda: "FetchJWTBundles" in str(api.last_error), "the complaint")
        with pytest.raises(Unavailable):
            api.snapshot()
        server.jwt_bundles = good
        await api.ready()


async def test_our_jwt_svid_is_fetched_and_its_absence_is_unavailable(api, server):
    server.jwt_svid = wl.JWTSVIDResponse(svids=[wl.JWTSVID(spiffe_id=OURS, svid="a.b.c")])
    assert await api.fetch_jwt_svid("https://broker.acme.test") == "a.b.c"
    for answer in (grpc.StatusCode.PERMISSION_DENIED, wl.JWTSVIDResponse()):
        server.jwt_svid = answer
        with pytest.raises(Unavailable) as nothing:
            await api.fetch_jwt_svid("https://broker.acme.test")
        assert nothing.value.reason is Reason.IDENTITY_UNAVAILABLE


def test_attempts_come_soon_at_first_then_ever_less_often_up_to_a_bound_and_never_in_step():
    waits = list(itertools.islice(backoff(), 20))
    assert 0.05 <= waits[0] <= 0.1
    assert all(wait <= workload_api.LONGEST_WAIT_S for wait in waits)
    assert all(wait >= workload_api.LONGEST_WAIT_S / 2 for wait in waits[10:])
    assert len({round(next(backoff()), 9) for _ in range(20)}) > 1
