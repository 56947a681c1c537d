"""Our identity and those we trust, as a real SPIRE gives and takes them."""

import os

import pytest
from support.processes import until
from support.spire import Spire, clock, identity_from

from broker.errors import Reason, Refused, Unavailable
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.spiffe_id import TrustDomain
from broker.identity.trust import TrustSnapshot
from broker.identity.workload_api import WorkloadApi
from broker.identity.x509_svid import verify_x509_svid

pytestmark = pytest.mark.spire

ACME, OTHER = TrustDomain.parse("acme.test"), TrustDomain.parse("other.test")
AUDIENCE = "https://receiver.acme.test"


async def test_what_spire_gives_us_verifies_by_its_own_bundle_alone(spire, new_spire):
    stranger = new_spire(name="acme.test")  # same name, other keys
    async with identity_from(spire) as ours, identity_from(stranger) as theirs:
        snapshot = ours.snapshot()
        assert str(snapshot.own.spiffe_id) == spire.id("action-broker")
        assert (
            verify_x509_svid(snapshot.own.chain, snapshot, clock(), peer="client").spiffe_id == snapshot.own.spiffe_id
        )
        token = await ours.fetch_jwt_svid(AUDIENCE)
        assert verify_jwt_svid(token, snapshot, clock(), audience=AUDIENCE).spiffe_id == snapshot.own.spiffe_id

        with pytest.raises(Refused) as forged:
            verify_x509_svid(theirs.snapshot().own.chain, snapshot, clock(), peer="client")
        assert forged.value.reason is Reason.UNAUTHENTICATED
        with pytest.raises(Refused) as forged:
            verify_jwt_svid(await theirs.fetch_jwt_svid(AUDIENCE), snapshot, clock(), audience=AUDIENCE)
        assert forged.value.reason is Reason.UNAUTHENTICATED


async def test_a_rotated_svid_arrives_as_a_new_snapshot_and_the_streams_stay(new_spire):
    brief: Spire = new_spire(name="brief.test", x509_ttl=16)
    seen: list[TrustSnapshot] = []
    async with identity_from(brief) as identity:
        seen.append(identity.snapshot())
        identity.subscribe(seen.append)
        await until(lambda: len({item.own.chain for item in seen}) >= 3, "two renewals")
        assert identity.last_error is None
    assert [item.revision for item in seen] == list(range(seen[0].revision, seen[0].revision + len(seen)))
    assert [item.own.not_after for item in seen] == sorted(item.own.not_after for item in seen)
    assert {item.own.spiffe_id for item in seen} == {seen[0].own.spiffe_id}


async def test_federated_bundles_are_kept_apart_and_gone_when_the_federation_ends(new_spire):
    home: Spire = new_spire(name="acme.test", broker=False)
    away: Spire = new_spire(name="other.test")
    home.federate(away)
    home.create_entry("action-broker", uid=os.geteuid(), federates_with=["other.test"])
    async with identity_from(home) as ours, identity_from(away) as theirs:
        foreign = theirs.snapshot().own.chain
        await until(lambda: OTHER in ours.snapshot().bundles, "the federated bundle")
        snapshot = ours.snapshot()
        await until(lambda: ours.snapshot().bundle_for(OTHER).jwt_authorities, "its JWT half")
        assert verify_x509_svid(foreign, snapshot, clock(), peer="client").spiffe_id.trust_domain == OTHER
        assert verify_x509_svid(snapshot.own.chain, snapshot, clock(), peer="client").spiffe_id.trust_domain == ACME

        # Trusting both is not trusting each for the other: neither domain's keys verify the other one's SVIDs.
        assert set(snapshot.bundles) == {ACME, OTHER}
        for svid, left in ((foreign, ACME), (snapshot.own.chain, OTHER)):
            alone = TrustSnapshot(own=None, bundles={left: snapshot.bundle_for(left)}, revision=1)
            with pytest.raises(Refused) as refused:
                verify_x509_svid(svid, alone, clock(), peer="client")
            assert refused.value.reason is Reason.UNAUTHENTICATED
        assert OTHER in theirs.snapshot().bundles
        assert ACME not in theirs.snapshot().bundles, "federation has a direction"

        home.defederate(away)
        await until(lambda: OTHER not in ours.snapshot().bundles, "the end of the federation")
        with pytest.raises(Refused) as refused:
            verify_x509_svid(foreign, ours.snapshot(), clock(), peer="client")
        assert refused.value.reason is Reason.UNAUTHENTICATED


async def test_without_an_entry_there_is_no_identity_and_one_made_later_needs_no_restart(new_spire):
    spire: Spire = new_spire(broker=False)
    async with WorkloadApi(spire.workload_api) as identity:
        await until(lambda: identity.last_error, "a refusal")
        assert "create one for this process" in identity.last_error
        with pytest.raises(Unavailable) as nothing:
            identity.snapshot()
        assert nothing.value.reason is Reason.IDENTITY_UNAVAILABLE

        spire.create_entry("action-broker", uid=os.geteuid())
        await until(lambda: identity.last_error is None, "an identity")
        assert str(identity.snapshot().own.spiffe_id) == spire.id("action-broker")


async def test_an_agent_that_is_away_leaves_us_our_identity_until_it_is_back(new_spire):
    spire: Spire = new_spire(x509_ttl=16)
    async with identity_from(spire) as identity:
        before = identity.snapshot()
        spire.kill_agent()
        await until(lambda: identity.last_error, "the loss")
        assert identity.snapshot() == before
        spire.start_agent()
        await until(lambda: identity.last_error is None, "both streams again")
        await until(lambda: identity.snapshot().own.chain != before.own.chain, "a renewed SVID")
        assert identity.snapshot().revision > before.revision
