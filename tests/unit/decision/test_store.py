"""The policy in force: taken as a whole or not at all, and kept when what follows is wrong."""

import asyncio
import contextlib
import shutil

import pytest
from structlog.testing import capture_logs
from support.virtual_time import in_virtual_time

from broker.decision.findings import Defect, PolicyError
from broker.decision.store import PolicyStore

INTERVAL_S = 0.01


@pytest.fixture
def folder(tmp_path, world):
    path = tmp_path / "policy"
    path.mkdir()
    (path / "p.cedarschema").write_text(world.schema)
    (path / "p.cedar").write_text(world.allow)
    return path


@contextlib.asynccontextmanager
async def watching(store):
    task = asyncio.create_task(store.watch(INTERVAL_S))
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 -- what is awaited is a file system that was looked at
            await asyncio.sleep(INTERVAL_S)


class Counting(PolicyStore):
    """A store that tells how often its watch has looked."""

    rounds = 0

    def _fingerprint(self):
        self.rounds += 1
        return super()._fingerprint()


def count(store):
    return len(store.current.rules)


async def test_a_store_starts_with_what_the_folder_holds(folder):
    assert count(PolicyStore(folder)) == 1


async def test_a_store_does_not_start_on_a_wrong_folder(folder):
    (folder / "p.cedar").write_text("permit (")
    with pytest.raises(PolicyError):
        PolicyStore(folder)


async def test_reload_puts_the_new_documents_in_force(folder, world):
    store, heard = PolicyStore(folder), []
    store.subscribe(heard.append)
    (folder / "q.cedar").write_text(world.allow.replace('"allow"', '"more"'))
    policy = await store.reload()
    assert store.current is policy
    assert heard == [policy]
    assert count(store) == 2


async def test_one_bad_document_keeps_all_of_the_old_policy(folder, world):
    store, heard = PolicyStore(folder), []
    store.subscribe(heard.append)
    before = store.current
    (folder / "p.cedar").write_text(f'{world.allow} forbid (principal, action in Action::"money", resource);')
    (folder / "q.cedar").write_text("permit (")
    with pytest.raises(PolicyError):
        await store.reload()
    assert store.current is before
    assert heard == []
    assert [finding.file for finding in store.last_error.findings] == ["q.cedar"]
    (folder / "q.cedar").unlink()
    await store.reload()
    assert count(store) == 2
    assert store.last_error is None


async def test_a_schema_change_that_breaks_a_policy_changes_nothing(folder, world):
    store = PolicyStore(folder)
    before = store.current
    (folder / "p.cedarschema").write_text(world.schema.replace("orders.refund", "orders.repay"))
    with pytest.raises(PolicyError):
        await store.reload()
    assert store.current is before


async def test_the_same_texts_are_the_same_policy(folder, world):
    store, heard = PolicyStore(folder), []
    store.subscribe(heard.append)
    before = store.current
    (folder / "p.cedar").write_text(world.allow)
    assert await store.reload() is before
    assert heard == []


async def test_concurrent_reloads_end_with_the_newest_documents(folder, world):
    store = PolicyStore(folder)
    (folder / "q.cedar").write_text(world.allow.replace('"allow"', '"second"'))
    first = asyncio.create_task(store.reload())
    await asyncio.sleep(0)
    (folder / "r.cedar").write_text(world.allow.replace('"allow"', '"third"'))
    await asyncio.gather(first, store.reload(), store.reload())
    assert count(store) == 3


async def test_requests_are_decided_while_a_reload_compiles(folder, world):
    store = PolicyStore(folder)
    text = "".join(world.allow.replace('"allow"', f'"p{n}"') + "\n" for n in range(500))
    (folder / "many.cedar").write_text(text)
    ticks, task = 0, asyncio.create_task(store.reload())
    while not task.done():
        assert store.current.slice("orders.refund")
        ticks += 1
        await asyncio.sleep(0)
    assert count(store) == 501
    assert ticks > 10


async def test_watch_sees_an_edit(folder, world):
    store = PolicyStore(folder)
    async with watching(store):
        (folder / "p.cedar").write_text("")
        await until(lambda: count(store) == 0)
        (folder / "p.cedar").write_text(world.allow)
        await until(lambda: count(store) == 1)


async def test_watch_sees_a_swapped_link_as_kubernetes_swaps_a_config_map(tmp_path, world):
    folder = tmp_path / "mounted"
    folder.mkdir()
    for version, text in (("..v1", world.allow), ("..v2", "")):
        (folder / version).mkdir()
        (folder / version / "p.cedar").write_text(text)
        (folder / version / "p.cedarschema").write_text(world.schema)
    (folder / "..data").symlink_to("..v1")
    for name in ("p.cedar", "p.cedarschema"):
        (folder / name).symlink_to(f"..data/{name}")
    store = PolicyStore(folder)
    assert count(store) == 1
    async with watching(store):
        (folder / "..data_tmp").symlink_to("..v2")
        (folder / "..data_tmp").replace(folder / "..data")
        await until(lambda: count(store) == 0)


async def test_watch_keeps_the_old_policy_when_the_folder_is_deleted_and_says_so_once(folder, tmp_path):
    store = Counting(folder)
    before = store.current
    with capture_logs() as logs:
        async with watching(store):
            folder.rename(tmp_path / "elsewhere")
            await until(lambda: store.last_error is not None)
            assert store.last_error.findings[0].defect is Defect.FOLDER
            looked = store.rounds
            await until(lambda: store.rounds > looked + 3)  # the complaint is not repeated
            assert store.current is before
            shutil.copytree(tmp_path / "elsewhere", folder)
            await until(lambda: store.last_error is None)
    assert [entry["event"] for entry in logs].count("policy_refused") == 1
    assert store.current is before


async def test_watch_keeps_the_old_policy_on_a_wrong_document_and_recovers(folder, world):
    store = PolicyStore(folder)
    before = store.current
    with capture_logs() as logs:
        async with watching(store):
            (folder / "p.cedar").write_text("permit (")
            await until(lambda: store.last_error is not None)
            assert store.current is before
            (folder / "p.cedar").write_text("")
            await until(lambda: count(store) == 0)
    assert store.last_error is None
    assert any("p.cedar" in entry["findings"][0] for entry in logs if entry["event"] == "policy_refused")


async def test_watch_that_is_cancelled_ends(folder):
    async with watching(PolicyStore(folder)) as task:
        await asyncio.sleep(0)
    assert task.cancelled()


class Rereading(PolicyStore):
    """A store that tells when it read its folder again."""

    async def reload(self):
        self.__dict__.setdefault("read_at", []).append(round(asyncio.get_running_loop().time(), 3))
        return await super().reload()


@in_virtual_time
async def test_a_changed_folder_counts_within_a_second_and_is_read_again_a_second_later(folder):
    """Two writes within a tick of the file system's clock may look like one: hence the second look."""
    store = Rereading(folder)
    task = asyncio.create_task(store.watch())
    await asyncio.sleep(3.2)
    assert store.read_at == [1.0], "what was written just before it started"
    (folder / "p.cedar").write_text("")
    await asyncio.sleep(0.9)
    assert count(store) == 0
    await asyncio.sleep(5)
    assert store.read_at == [1.0, 4.0, 5.0]
    task.cancel()
