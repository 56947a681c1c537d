"""kill -9 at random moments under load: what was acknowledged is there, what was used up stays used up."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.crash_ledger import CALLER, CONTENT, answer_to, utc_now
from support.ledger_records import checkpointer, intent, open_ledger, signature

from broker.errors import Reason, Refused
from broker.ledger import records
from broker.ledger.reading import read
from broker.ledger.spending import Spent
from broker.ledger.store import Ledger
from broker.ledger.transaction import microseconds
from broker.ledger.verify import verify

TESTS = Path(__file__).parents[1]
IN_A_ROW = 10
"""Crashes of one and the same ledger, each found by the start after it."""


@dataclass
class Acknowledged:
    """What the killed children had told before they died."""

    intents: dict[str, int] = field(default_factory=dict)
    redeemed: dict[str, tuple[str, int]] = field(default_factory=dict)
    spent: dict[str, tuple[str, int]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    used: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)

    def hear(self, line: str) -> None:
        match line.split():
            case ["intent", jti, seq]:
                self.intents[jti] = int(seq)
            case ["redeemed", jti, idempotency_id, at]:
                self.redeemed[jti] = (idempotency_id, int(at))
            case ["spent", grant, idempotency_id, seq]:
                self.spent[grant] = (idempotency_id, int(seq))
            case ["answered", grant]:
                self.answered.add(grant)
            case ["used", digest, jti]:
                self.used[digest] = jti
            case ["twice", what]:
                self.twice.append(what)
            case ["ready"]:
                pass
            case _:
                pytest.fail(f"the child said {line!r}")


def crash_once(folder: Path, told: Acknowledged, moment: random.Random) -> None:
    """Starts a child, kills it somewhere between its first breath and its thousandth record, hears what it had told."""
    lines = moment.choice([0, 1, 1 + moment.randrange(50), 1 + moment.randrange(1000)])
    with subprocess.Popen(
        [sys.executable, "-m", "support.crash_ledger", folder],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    ) as child:
        assert child.stdout is not None
        try:
            for _ in range(lines):
                told.hear(child.stdout.readline())
            # Not a wait for anything: the moment itself is to be random, between two acknowledgements as well.
            time.sleep(moment.random() * (0.004 if lines else 0.8))
            assert child.poll() is None, "it ended by itself"
        finally:
            child.kill()
        for line in child.stdout:
            told.hear(line)


async def crash_in_a_row(folder: Path, seed: int) -> None:
    """Crashes one ledger `IN_A_ROW` times, then holds it to all that was acknowledged."""
    told, moment = Acknowledged(), random.Random(seed)  # noqa: S311 - moments, not secrets
    checkpoint = checkpointer(folder)
    async with await open_ledger(folder, utc_now):
        pass
    for _ in range(IN_A_ROW):
        crash_once(folder, told, moment)
        report = verify(folder / "ledger.db", folder / "checkpoint", str(checkpoint.verifier_key))
        assert report.good, report.finding
    assert len(told.intents) > IN_A_ROW, "the children did work"

    async with await open_ledger(folder, utc_now) as ledger:
        assert ledger.epoch == 1, "a crash is no restore"
        assert not told.twice
        for jti, (idempotency_id, at) in told.redeemed.items():
            again = await ledger.redeem(jti, idempotency_id, CALLER, CONTENT, now=utc_now(), correlation_id="")
            assert (again.repeated, microseconds(again.redeemed_at)) == (True, at)
            with pytest.raises(Refused) as caught:
                await ledger.redeem(jti, "by-somebody-else", CALLER, CONTENT, now=utc_now(), correlation_id="")
            assert caught.value.reason is Reason.ALREADY_USED
        await check_spends(ledger, told)
        await check_approvals(ledger, told)
    check_history(folder, told)


async def check_spends(ledger: Ledger, told: Acknowledged) -> None:
    """What was answered is answered again; what was spent and not answered is used; nothing is spent again."""
    found: dict[str, bytes | None] = {}
    for grant, (idempotency_id, _) in told.spent.items():
        found[grant] = await answer_again(ledger, grant, idempotency_id)
        assert found[grant] in ({answer_to(grant)} if grant in told.answered else {answer_to(grant), None})
        made = signature(grant, epoch=ledger.epoch, now=utc_now())
        again = await ledger.spend(
            grant, idempotency_id, CALLER, CONTENT, intent=made, now=utc_now(), correlation_id=""
        )
        assert again == Spent(intent_seq=None, repeated=True, answer=found[grant])
        with pytest.raises(Refused) as caught:
            await ledger.spend(grant, "somebody-else", CALLER, CONTENT, intent=made, now=utc_now(), correlation_id="")
        assert caught.value.reason is Reason.ALREADY_USED
    assert told.answered <= found.keys()
    assert None in found.values()


async def answer_again(ledger: Ledger, grant: str, idempotency_id: str) -> bytes | None:
    """The stored answer; None where the ledger says that the grant was used and has none."""
    try:
        answer = await ledger.find_answer(grant, idempotency_id, CALLER, CONTENT, utc_now())
    except Refused as refused:
        if refused.reason is Reason.ALREADY_USED:
            return None
        raise
    assert answer is not None, "it was spent"
    return answer


async def check_approvals(ledger: Ledger, told: Acknowledged) -> None:
    """Approvals that gave a credential count for it, and for no other."""
    assert told.used
    for digest, jti in told.used.items():
        assert len(await ledger.approvals(digest, utc_now(), jti)) == 1
        assert not await ledger.approvals(digest, utc_now(), "")
        with pytest.raises(Refused) as caught:
            await ledger.record_intent(intent(approval=digest, epoch=ledger.epoch, now=utc_now()))
        assert caught.value.reason is Reason.APPROVAL_REQUIRED


def check_history(folder: Path, told: Acknowledged) -> None:
    """Every acknowledged intent is there; every intent has one outcome; no credential was redeemed twice."""
    intents: dict[str, int] = {}
    outcomes: Counter[int] = Counter()
    unknown = 0
    redemptions: Counter[str] = Counter()
    children: dict[int, str] = {}
    consumers: Counter[str] = Counter()
    for row in read(folder / "ledger.db"):
        match row.record():
            case records.Intent(jti=jti, parent=parent, approval=approval):
                intents[jti] = row.seq
                children.update({row.seq: parent} if parent else {})
                consumers.update([approval] if approval else [])
            case records.Outcome(intent=intent, result=result):
                outcomes[intent] += 1
                unknown += result == "unknown"
            case records.Redemption(jti=jti):
                redemptions[jti] += 1
    assert told.intents.items() <= intents.items()
    assert outcomes == Counter(intents.values()), "one outcome for each intent, and none for anything else"
    assert unknown > 0, "some were open when a child died"
    assert told.redeemed.keys() | told.spent.keys() <= redemptions.keys()
    assert {(seq, grant) for grant, (_, seq) in told.spent.items()} <= children.items()
    assert set(Counter(children.values()).values()) == {1}, "one signature for each grant"
    assert set(children.values()) <= redemptions.keys(), "none without its grant's being spent"
    assert told.used.keys() <= consumers.keys()
    assert set(consumers.values()) == {1}
    assert set(redemptions.values()) <= {1}
    assert redemptions.keys() <= intents.keys()


async def test_kill_9_under_load_leaves_no_credential_without_intent_and_nothing_used_twice(tmp_path: Path) -> None:
    """Invariants 1 and 7, the ledger's part, ten crashes."""
    await crash_in_a_row(tmp_path, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("ACTION_BROKER_CRASHES", "200")) // IN_A_ROW))
async def test_kill_9_many_times_under_load(tmp_path: Path, seed: int) -> None:
    """Invariants 1 and 7, the ledger's part, two hundred crashes."""
    await crash_in_a_row(tmp_path, seed=1000 + seed)
