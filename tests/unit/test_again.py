"""Deciding again asks what minting asked, with what the credential consumed itself counted as available."""

from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path

import pytest
from support.racing import racing

from broker.errors import Reason, Refused


async def test_what_a_credential_used_up_counts_for_it_and_for_what_came_from_it_and_for_nobody_else(
    tmp_path: Path,
) -> None:
    """DESIGN section 2: an approval that gave a grant is there for the certificate that the grant gave, too."""
    async with racing(tmp_path) as race:
        issued = await race.asked(process=False)
        own, again, now = race.live(issued), race.found.scope.again, race.found.parts.now()
        child = replace(own, jti="child", parent=own.jti)
        stranger = replace(own, jti="stranger")
        for one, count in ((own, 1), (child, 1), (stranger, 0)):
            assert (await again.look("approval", one, now)).values["count"] == count
        for one in (own, child):
            assert await again.decide(one, {}, now)
        with pytest.raises(Refused) as refused:
            await again.decide(stranger, {}, now)
        assert refused.value.reason is Reason.APPROVAL_REQUIRED


async def test_a_process_that_was_replaced_or_is_gone_is_not_taken_for_the_one_that_got_it(tmp_path: Path) -> None:
    """PIDs are reused: start time, user and executable tell."""
    async with racing(tmp_path) as race:
        issued = await race.asked(process=True)
        own, again, now = race.live(issued), race.found.scope.again, race.found.parts.now()
        assert await again.decide(own, own.facts, now)
        assert await again.look("process", own, now) is None, "no policy asks for its facts, and it is there"
        assert await again.decide(own, {}, now)
        changes = ({"start_time": 1}, {"exe_inode": 1}, {"uid": 4711})
        others = [replace(own, process=replace(own.process, **change)) for change in changes]
        for other in others:
            assert await _why(again.decide(other, {}, now)) is Reason.NOT_ATTESTED
            assert await _why(again.look("process", other, now)) is Reason.NOT_ATTESTED
        await race.process()
        assert await _why(again.decide(own, {}, now)) is Reason.NOT_ATTESTED
        assert await _why(again.look("process", own, now)) is Reason.NOT_ATTESTED


async def _why(call: Awaitable[object]) -> Reason | None:
    try:
        await call
    except Refused as error:
        return error.reason
    return None


async def test_facts_that_are_known_are_not_looked_at_again_and_others_are(tmp_path: Path) -> None:
    async with racing(tmp_path) as race:
        issued = await race.asked(process=False)
        own, again, now = race.live(issued), race.found.scope.again, race.found.parts.now()
        looks = race.desk.looks["T-1"]
        assert await again.decide(own, own.facts, now)
        assert race.desk.looks["T-1"] == looks
        assert again.is_at_hand(own, own.facts)
        without = {name: one for name, one in own.facts.items() if name != "ticket"}
        assert not again.is_at_hand(own, without)
        found = await again.decide(own, without, now)
        assert race.desk.looks["T-1"] == looks + 1
        assert found.facts.keys() == own.facts.keys()
