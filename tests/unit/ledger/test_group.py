"""A group waits for those who are on the way, no longer than its bound; one caller alone must not pay for it."""

import asyncio
from pathlib import Path

from support.ledger_records import NOW, intent, open_ledger

from broker.ledger import group, records
from broker.ledger.group import Limits
from broker.ledger.reading import read
from broker.ledger.store import Ledger

EVENT = records.Checkpointed(at=NOW, size=1)


def watch_groups(ledger: Ledger) -> list[int]:
    """The size of each group from now on."""
    sizes: list[int] = []
    commit = ledger._writer.commit

    def counting(operations: object) -> object:
        sizes.append(len(operations))  # type: ignore[arg-type]
        return commit(operations)  # type: ignore[arg-type]

    ledger._writer.commit = counting  # type: ignore[method-assign, assignment]
    return sizes


async def test_callers_of_one_turn_of_the_loop_share_one_commit(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600)) as ledger:
        sizes = watch_groups(ledger)
        await asyncio.gather(*[ledger.append(EVENT) for _ in range(32)])
        assert sizes == [32]


async def test_no_group_is_larger_than_its_bound(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600)) as ledger:
        sizes = watch_groups(ledger)
        for _ in range(500):
            ledger.append_later(EVENT)
        await asyncio.gather(*[ledger.append(EVENT) for _ in range(1_000)])
        assert max(sizes) == Limits().group
    assert sum(sizes) == 1_501  # and that it stopped


async def test_a_lone_caller_does_not_wait_for_company(tmp_path: Path) -> None:
    """Were it held until the bound, this test would not end."""
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600, wait_s=3600)) as ledger:
        sizes = watch_groups(ledger)
        for _ in range(20):
            await ledger.append(EVENT)
        assert sizes == [1] * 20


async def test_callers_who_trickle_in_share_a_commit(tmp_path: Path) -> None:
    """As in a busy broker: each request reaches the ledger in a turn of the loop of its own."""
    wait = Limits(maintain_s=3600, wait_s=3600)
    async with await open_ledger(tmp_path, limits=wait) as ledger:
        sizes = watch_groups(ledger)
        calls = []
        for number in range(wait.group):  # the last of them ends the wait
            calls.append(asyncio.ensure_future(ledger.record_intent(intent(f"{number}"))))
            await asyncio.sleep(0)
        await asyncio.gather(*calls)
        assert sizes == [wait.group]


async def test_a_busy_loop_holds_a_group_no_longer_than_its_bound(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600, wait_s=0.002)) as ledger:
        recorded = asyncio.ensure_future(ledger.append(EVENT))
        while not recorded.done():  # a loop that never has an idle turn
            busy_until = asyncio.get_running_loop().time() + 2 * group._IDLE_TURN_S
            while asyncio.get_running_loop().time() < busy_until:
                pass
            await asyncio.sleep(0)
        assert await recorded


async def test_a_change_of_policy_comes_before_what_is_decided_under_it(tmp_path: Path) -> None:
    """However much that nobody awaits is in front of it, and though a full disk kept all of it waiting."""
    limits = Limits(maintain_s=3600)
    async with await open_ledger(tmp_path, limits=limits) as ledger:
        for revision in ("first", "second"):
            for _ in range(3 * limits.group):
                ledger.append_later(EVENT)
            full = revision == "second"
            pages = ledger._writer._connection.pragma("page_count") if full else 2**32 - 2
            ledger._writer._connection.pragma("max_page_count", pages)
            ledger.append_later(records.PolicyChanged(at=NOW, revision=revision))
            decided = [intent(f"{revision}-{number}", policy_revision=revision) for number in range(2 * limits.group)]
            answers = await asyncio.gather(*map(ledger.record_intent, decided), return_exceptions=True)
            assert any(isinstance(answer, Exception) for answer in answers) is full
        ledger._writer._connection.pragma("max_page_count", 2**32 - 2)
        retried = [intent(f"retried-{number}", policy_revision="second") for number in range(2 * limits.group)]
        await asyncio.gather(*map(ledger.record_intent, retried))
    in_force = ""
    found = [row.record() for row in read(tmp_path / "ledger.db")]
    for record in found:
        if isinstance(record, records.PolicyChanged):
            in_force = record.revision
        if isinstance(record, records.Intent):
            assert record.policy_revision == in_force
    assert [one.revision for one in found if isinstance(one, records.PolicyChanged)] == ["first", "second"]


async def test_a_change_of_policy_is_written_though_nothing_follows(tmp_path: Path) -> None:
    async with await open_ledger(tmp_path, limits=Limits(maintain_s=3600)) as ledger:
        ledger.append_later(records.PolicyChanged(at=NOW, revision="alone"))
    found = [row.record() for row in read(tmp_path / "ledger.db")]
    assert "alone" in [one.revision for one in found if isinstance(one, records.PolicyChanged)]
