"""Two changes racing a mint: the mint loses, or its credential is refused at once, whatever the moment.

A credential is in scope exactly while minting it again would succeed (DESIGN section 2). Each kind of change comes at
each moment of a request at which the event loop, or the ledger's thread, could let it in; nothing else happens then.
"""

from pathlib import Path

import pytest
from support.processes import until
from support.racing import MOMENTS, racing

from broker.errors import BrokerError, Reason
from broker.ledger.records import Intent, Outcome

OF_PROCESSES = {"process", "entry"}
REASONS = {
    "ticket": {Reason.TICKET_CLOSED},
    "session": {Reason.SESSION_RISK},
    "policy": {Reason.DENIED},
    "bundle": {Reason.UNAUTHENTICATED},
    "process": {Reason.NOT_ATTESTED},
    "entry": {Reason.NOT_ATTESTED},
    "approval": {Reason.APPROVAL_REQUIRED, Reason.DENIED},
    "denial": {Reason.REVOKED},
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("change", REASONS)
async def test_a_change_that_races_a_mint_leaves_no_credential_that_counts(
    tmp_path: Path, moment: str, change: str
) -> None:
    async with racing(tmp_path) as race:
        race.at, race.change = moment, getattr(race, change)
        issued, reason = None, ""
        try:
            issued = await race.asked(process=change in OF_PROCESSES)
        except BrokerError as error:
            reason = error.reason
        assert issued is not None or reason in REASONS[change]
        assert race.came, "the request came by there"
        if issued is not None:
            scope = race.found.parts.exchange.scope
            await until(lambda: scope.is_refused(issued.claims.jti), "refused without any further event")
            live = race.live(issued)
            await until(lambda: race.found.says(live) in REASONS[change], "and every guard hears of it")
        records = await race.records()
    intents = [seq for seq, one in enumerate(records, 1) if isinstance(one, Intent)]
    outcomes = {one.intent: one.result for one in records if isinstance(one, Outcome)}
    assert sorted(outcomes) == intents, "what is in the ledger and was not given is said to have failed"
    assert list(outcomes.values()).count("issued") == (issued is not None)


@pytest.mark.parametrize("process", [False, True], ids=["by certificate", "as a process"])
@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_change_of_something_else_takes_nothing_away(tmp_path: Path, moment: str, *, process: bool) -> None:
    async with racing(tmp_path) as race:
        race.at, race.change = moment, race.another
        issued = await race.asked(process=process)
        assert race.came
        await race.found.settled()
        assert race.found.says(race.live(issued)) == ""
