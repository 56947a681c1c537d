"""One real SPIRE for all tests of this folder; those that break or reconfigure it start their own."""

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator

import pytest
from support.spire import Spire, broker_api_of

from broker.identity.spire_broker_api import SpireBrokerApi

NewEntry = Callable[..., str]
NewSpire = Callable[..., Spire]


@pytest.fixture(scope="session")
def spire() -> Iterator[Spire]:
    """Trust domain acme.test, where this process is the broker. Leave it as you found it."""
    with Spire() as found:
        found.create_entry("action-broker", uid=os.geteuid())
        yield found


@pytest.fixture
def new_spire() -> Iterator[NewSpire]:
    """`new_spire(name="other.test")` starts one more, for this test alone; this process is its broker too."""
    started = []

    def start(*, broker: bool = True, **options: int | str) -> Spire:
        found = Spire(**options)
        found.start()
        started.append(found)
        if broker:
            found.create_entry("action-broker", uid=os.geteuid())
        return found

    start.started = started
    yield start
    for found in started:
        found.stop()


@pytest.fixture
def new_entry(spire: Spire) -> Iterator[NewEntry]:
    """`new_entry("build/agent", uid=1600)` → the entry's id. What the test does not delete is deleted after it."""
    made = set()

    def create(path: str, **options: int) -> str:
        entry_id = spire.create_entry(path, **options)
        made.add(entry_id)
        return entry_id

    yield create
    for entry_id in made & spire.entries().keys():
        spire.delete_entry(entry_id)


@pytest.fixture
async def broker_api(spire: Spire) -> AsyncIterator[SpireBrokerApi]:
    async with broker_api_of(spire) as found:
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: object) -> Generator[None, object, object]:
    """A failed test shows what SPIRE had to say."""
    report = yield
    spires = [found for found in item.funcargs.values() if isinstance(found, Spire)]
    spires += getattr(item.funcargs.get("new_spire"), "started", [])
    if report.failed:
        report.sections += [(f"SPIRE of {found.name}", found.logs()) for found in spires]
    return report
