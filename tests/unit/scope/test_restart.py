"""A broker that starts knows what was live and refused when the one before ended, and that nobody watched since."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import apsw
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.lives import Reader
from support.redeciding import POLICIES, POLICY, Source, redeciding
from support.signing import BUILDER
from support.signing_calls import NIGHTLY
from support.signing_exchange import SigningExchange, signing_exchange

from attestors.provenance import ProvenanceAttestor
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.signature_keys import SigningKey
from broker.errors import Reason, Refused, Unavailable
from broker.ledger.operations import Evidence
from broker.scope.live import Live

CLOSED = POLICY.replace('Action::"orders.read", ', "")


async def test_what_was_live_is_suspended_until_it_was_decided_again(tmp_path: Path) -> None:
    """Nobody watched while no broker ran: anything may have changed."""
    async with redeciding(tmp_path) as first:
        lives = [await first.token() for _ in range(3)]
    async with redeciding(tmp_path, before=first.parts, watched=False) as second:
        scope = second.parts.exchange.scope
        for one in lives:
            assert second.says(one) == "suspended"
            with pytest.raises(Unavailable) as suspended:
                scope.require(one.jti)
            assert suspended.value.reason is Reason.SUSPENDED
        fresh = await second.token()
        assert second.says(fresh) == "", "what is minted now was decided now"
    async with redeciding(tmp_path, before=first.parts) as third:
        await third.settled()
        assert {third.says(one) for one in (*lives, fresh)} == {""}
        assert len(third.parts.exchange.scope.live) == 4


async def test_what_changed_while_no_broker_ran_is_seen(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as first:
        lost = await first.token("orders.ticketed", ticket="T-1")
        kept = await first.token("orders.ticketed", ticket="T-2")
        plain = await first.token()
    desk = Source()
    desk.said["T-1"] = {"state": "closed"}
    async with redeciding(tmp_path, desk, before=first.parts, policies=POLICIES | {"orders.cedar": CLOSED}) as second:
        await second.settled()
        assert [second.says(one) for one in (lost, kept, plain)] == ["ticket_closed", "", "denied"]
        desk.closes("T-2")
        await second.becomes(kept, "ticket_closed")


async def test_nothing_that_was_refused_comes_back(tmp_path: Path) -> None:
    desk = Source()
    async with redeciding(tmp_path, desk) as first:
        one = await first.token("orders.ticketed", ticket="T-1")
        desk.closes("T-1")
        await first.becomes(one, "ticket_closed")
    desk = Source()  # the ticket is open again
    async with redeciding(tmp_path, desk, before=first.parts) as second:
        await second.settled()
        assert second.says(one) == "ticket_closed"
        with pytest.raises(Refused) as refused:
            second.parts.exchange.scope.require(one.jti)
        assert refused.value.reason is Reason.TICKET_CLOSED


async def test_a_refusal_is_told_after_a_restart_as_long_as_it_would_have_been_before(tmp_path: Path) -> None:
    """Invariant 8: to expiry, leeway and skew. A guard whose clock is behind still takes what has just expired."""
    desk = Source()
    async with redeciding(tmp_path, desk) as first:
        one, kept = [await first.token("orders.ticketed", ticket=ticket) for ticket in ("T-1", "T-2")]
        desk.closes("T-1")
        await first.becomes(one, "ticket_closed")
        left = one.expires_at - first.parts.now().timestamp()
    for after, told in ((timedelta(seconds=8), True), (timedelta(seconds=90), False)):
        ahead = timedelta(seconds=left) + after
        async with redeciding(tmp_path, Source(), before=first.parts, watched=False, ahead=ahead) as second:
            message = Reader(second.scope.feed, one.audience).read()
            assert [refused.jti for refused in message.refused] == ([one.jti] if told else [])
            assert len(second.parts.exchange.scope.live) == 0
            assert not second.parts.exchange.scope.is_refused(kept.jti)


# -- evidence ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def granting(folder: Path) -> AsyncIterator[tuple[SigningExchange, list[Live]]]:
    """Three signing grants on provenance, and the broker that gave them has ended when this goes on."""
    async with signing_exchange(folder) as first:
        grants = [await first.grant() for _ in range(3)]
        lives = list(first.parts.exchange.scope.live)
    assert len(grants) == len(lives) == 3
    yield first, lives


def again(folder: Path, first: SigningExchange, provenance: ProvenanceAttestor) -> object:
    return redeciding(folder, before=first.parts, policies=NIGHTLY, provenance=provenance)


def nobody_presents() -> ProvenanceAttestor:
    """The attestor, to which nobody shows any envelope again."""
    key = SigningKey(ec.generate_private_key(ec.SECP256R1()).public_key())
    trust = ProvenanceTrust(builders={BUILDER: BuilderTrust(keys={"release": key})}, max_age=timedelta(hours=1))
    return ProvenanceAttestor(lambda: trust)


async def test_evidence_that_nobody_shows_again_is_judged_by_what_was_kept_of_it(tmp_path: Path) -> None:
    """DESIGN section 2: by its stored facts and their expiry."""
    async with granting(tmp_path) as (first, lives), again(tmp_path, first, nobody_presents()) as second:
        await second.settled()
        assert {second.says(one) for one in lives} == {""}


TAMPERED = {
    "another source": lambda body: _changed(body, source="https://git.evil.test/shop"),
    "no canonical number": lambda body: _changed(body, more=float(2**60)),
    "no JSON": lambda body: body[:10],
    "no facts": lambda body: b"{" + body[-1:],
    "gone": lambda _: None,
}


@pytest.mark.parametrize("how", TAMPERED)
async def test_evidence_that_somebody_changed_counts_as_none(tmp_path: Path, how: str) -> None:
    """Its hash is in the intent, and that in the chain: who can write the file cannot make evidence up."""
    async with granting(tmp_path) as (first, lives):
        connection = apsw.Connection(str(tmp_path / "ledger.db"))
        (body,) = connection.execute("SELECT facts FROM evidence WHERE seq = ?", (lives[1].seq,)).fetchone()
        changed = TAMPERED[how](body)
        if changed is None:
            connection.execute("DELETE FROM evidence WHERE seq = ?", (lives[1].seq,))
        else:
            connection.execute("UPDATE evidence SET facts = ? WHERE seq = ?", (changed, lives[1].seq))
        connection.close()
        async with again(tmp_path, first, nobody_presents()) as second:
            await second.settled()
            assert [second.says(one) for one in lives] == ["", "provenance_missing", ""]


def _changed(body: bytes, **values: object) -> bytes:
    kept = msgspec.json.decode(body, type=Evidence)
    return msgspec.json.encode(msgspec.structs.replace(kept, values=kept.values | values))
