"""What we believe of SPIRE's Broker API, and what each of its answers means to us."""

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta

import grpc
import pytest
from support.agents import BrokerApiServer, clock, serving
from support.pki import CA, JwtAuthority, snapshot
from support.processes import until

from attestors.contract import AttestationFailed, AttestationUnavailable
from broker._proto.spiffe_broker import brokerapi_pb2, brokerapi_pb2_grpc
from broker.errors import BrokerError, Reason, Unavailable
from broker.identity import spire_broker_api
from broker.identity.spiffe_id import SpiffeId
from broker.identity.spire_broker_api import ENTITLEMENT_AUDIENCE, AttestorEntitlements, SpireBrokerApi, any_agent

OURS, AGENT = "spiffe://acme.test/action-broker", "spiffe://acme.test/spire/agent/join_token/1"
BUILD, ORDERS = "spiffe://acme.test/build/agent", "spiffe://acme.test/service/orders"
NOW = clock()
ACME, OTHER = CA("acme.test", now=NOW), CA("other.test", now=NOW)
KEYS, OTHER_KEYS = JwtAuthority(), JwtAuthority(kid="other")
TRUSTED = snapshot(ACME.bundle(KEYS), OTHER.bundle(OTHER_KEYS), own=ACME.svid(OURS).own())


def svid(spiffe_id=BUILD, keys=KEYS, token_id=None, **claims):
    """As the agent gives it. token_id: whom the token itself names, where that differs."""
    token = keys.token(now=NOW, **{"sub": token_id or spiffe_id, "aud": [ENTITLEMENT_AUDIENCE], **claims})
    return brokerapi_pb2.JWTSVID(spiffe_id=spiffe_id, svid=token)


def says(*svids):
    return lambda _pid, _audience: brokerapi_pb2.FetchJWTSVIDResponse(svids=svids)


@pytest.fixture
def agent():
    return BrokerApiServer()


@asynccontextmanager
async def asking(server, /, trusted=lambda: TRUSTED, now=lambda: NOW, agent_id=AGENT, **options):
    def register(grpc_server):
        brokerapi_pb2_grpc.add_APIServicer_to_server(server, grpc_server)

    async with (
        serving(ACME.svid(agent_id), TRUSTED, register) as target,
        SpireBrokerApi(f"tcp://{target}", trusted, now, **options) as api,
    ):
        yield api


@pytest.fixture
async def api(agent):
    async with asking(agent) as found:
        yield found


async def reason(api, pid=4711):
    with pytest.raises(BrokerError) as error:
        await api.fetch(pid)
    return error.value.reason


async def test_a_processes_ids_are_what_verified_tokens_say_sorted_and_with_their_end(agent, api):
    agent.answer = says(svid(ORDERS), svid(BUILD))
    found = await api.fetch(4711)
    assert [str(item.spiffe_id) for item in found] == [BUILD, ORDERS]
    assert {item.expires_at for item in found} == {NOW.replace(microsecond=0) + timedelta(seconds=300)}
    assert agent.asked == [4711]


async def test_the_agent_is_asked_anew_each_time_and_for_the_reserved_audience_alone(agent, api):
    audiences = []

    def answer(_pid, audience):
        audiences.append(audience)
        return brokerapi_pb2.FetchJWTSVIDResponse(svids=[svid()])

    agent.answer = answer
    for _ in range(3):
        await api.fetch(4711)
    assert audiences == [[ENTITLEMENT_AUDIENCE]] * 3
    agent.answer = says()
    assert await reason(api) is Reason.NOT_ATTESTED, "nothing of the answers before is left"


UNTRUE = {
    "for-another-audience": svid(aud=["https://broker.acme.test"]),
    "expired": svid(exp=int(NOW.timestamp()) - 1),
    "signed-by-nobody-we-trust": svid(keys=JwtAuthority()),
    "signed-by-another-domain": svid(keys=OTHER_KEYS),
    "of-another-domain": svid("spiffe://other.test/build/agent", keys=OTHER_KEYS),
    "token-of-another-id": svid(BUILD, token_id=ORDERS),
    "no-token": brokerapi_pb2.JWTSVID(spiffe_id=BUILD),
    "noise": brokerapi_pb2.JWTSVID(spiffe_id=BUILD, svid="noise"),
}


@pytest.mark.parametrize("untrue", UNTRUE.values(), ids=UNTRUE.keys())
async def test_an_answer_that_does_not_verify_is_not_attested_also_beside_one_that_does(agent, api, untrue):
    agent.answer = says(svid())
    assert await api.fetch(4711)
    for answer in ([untrue], [svid(), untrue], [untrue, svid()]):
        agent.answer = says(*answer)
        assert await reason(api) is Reason.NOT_ATTESTED


CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]
UNASKED = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
async def test_every_error_is_a_no_and_only_not_having_asked_is_unavailable(agent, api, code):
    agent.answer = says(svid())
    assert await api.fetch(4711)
    agent.answer = lambda _pid, _audience: code
    assert await reason(api) is (Reason.ATTESTATION_UNAVAILABLE if code in UNASKED else Reason.NOT_ATTESTED)


async def test_impossible_pids_are_not_even_asked_about(agent, api):
    agent.answer = says(svid())
    for pid in (0, -1, 2**31):
        assert await reason(api, pid) is Reason.NOT_ATTESTED
    assert agent.asked == []
    assert await api.fetch(2**31 - 1)


async def test_an_agent_that_is_silent_costs_a_bounded_time(agent):
    agent.answer = says(svid())
    async with asking(agent, deadline_s=0.2) as api:
        assert await api.fetch(4711)
        agent.hold.clear()
        async with asyncio.timeout(5):
            assert await reason(api) is Reason.ATTESTATION_UNAVAILABLE
        agent.hold.set()


@pytest.mark.parametrize(
    ("agent_id", "expected"),
    [
        ("spiffe://acme.test/intruder", any_agent),
        ("spiffe://acme.test/spire/agentx/1", any_agent),
        (AGENT, SpiffeId.parse(AGENT + "2")),
        (AGENT, lambda _: False),
    ],
    ids=["no-agents-path", "almost-an-agents-path", "another-agent", "matcher-says-no"],
)
async def test_whoever_is_not_the_expected_agent_is_not_asked(agent, agent_id, expected):
    agent.answer = says(svid())
    for right in (any_agent, SpiffeId.parse(AGENT)):
        async with asking(agent, agent=right) as api:
            assert await api.fetch(4711)
    agent.asked.clear()
    async with asking(agent, agent_id=agent_id, agent=expected) as api:
        with pytest.raises(Unavailable) as refused:
            await api.fetch(4711)
        assert agent_id in refused.value.detail
    assert agent.asked == []


async def test_a_remembered_token_counts_no_longer_than_itself_and_its_bundle(agent):
    current, now = [TRUSTED], [NOW]
    agent.answer = says(svid())
    async with asking(agent, trusted=lambda: current[0], now=lambda: now[0]) as api:
        assert await api.fetch(4711)
        now[0] = NOW + timedelta(seconds=301)
        assert await reason(api) is Reason.NOT_ATTESTED
        now[0] = NOW
        assert await api.fetch(4711)
        current[0] = snapshot(ACME.bundle(JwtAuthority()), own=TRUSTED.own, revision=2)
        assert await reason(api) is Reason.NOT_ATTESTED


async def test_what_is_remembered_is_bounded(agent, api, monkeypatch):
    monkeypatch.setattr(spire_broker_api, "REMEMBERED", 3)
    for number in range(10):
        agent.answer = says(svid(f"spiffe://acme.test/w/{number}"))
        assert await api.fetch(4711)
    assert len(api._remembered) == 3


async def test_no_question_fails_when_our_svid_changes_under_way(agent):
    current = [TRUSTED]
    agent.answer = says(svid())
    async with asking(agent, trusted=lambda: current[0]) as api:
        await api.fetch(4711)
        agent.hold.clear()
        under_way = asyncio.ensure_future(api.fetch(4711))
        await until(lambda: len(agent.asked) == 2, "the first question")
        current[0] = snapshot(*TRUSTED.bundles.values(), own=ACME.svid(OURS).own(), revision=2)
        second = asyncio.ensure_future(api.fetch(4712))
        await until(lambda: len(agent.asked) == 3, "the second question")
        agent.hold.set()
        assert await under_way == await second


async def test_who_comes_while_a_process_is_asked_about_never_gets_the_answer_to_the_question_before(agent, api):
    agent.answer = says(svid(BUILD))
    agent.hold.clear()
    first = asyncio.ensure_future(api.fetch(4711))
    await until(lambda: len(agent.asked) == 1, "the first question")
    later = [asyncio.ensure_future(api.fetch(4711)) for _ in range(5)]
    another = asyncio.ensure_future(api.fetch(4712))
    await until(lambda: len(agent.asked) == 2, "the question about another process")
    agent.hold.set()
    await first
    agent.answer = says()  # what was said before is no longer so
    for refused in await asyncio.gather(*later, return_exceptions=True):
        assert refused.reason is Reason.NOT_ATTESTED
    assert await another
    assert agent.asked == [4711, 4712, 4711], "the five shared one question of their own"


async def test_the_attestor_hears_it_in_its_own_words(agent, api):
    entitlements = AttestorEntitlements(api)
    agent.answer = says(svid())
    assert list(await entitlements.fetch(4711)) == list(await api.fetch(4711))
    agent.answer = lambda _pid, _audience: grpc.StatusCode.INTERNAL
    with pytest.raises(AttestationFailed):
        await entitlements.fetch(4711)
    agent.answer = lambda _pid, _audience: grpc.StatusCode.UNAVAILABLE
    with pytest.raises(AttestationUnavailable):
        await entitlements.fetch(4711)


async def test_without_an_identity_of_our_own_nobody_is_asked(agent):
    agent.answer = says(svid())

    def none_yet():
        raise Unavailable(Reason.IDENTITY_UNAVAILABLE, "no SVID yet")

    async with asking(agent, trusted=none_yet) as api:
        with pytest.raises(Unavailable):
            await api.fetch(4711)
    async with asking(agent) as api:
        assert await api.fetch(4711)
