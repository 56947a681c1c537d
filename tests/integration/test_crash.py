"""A whole broker killed at random moments under load: no credential without its intent, no second use of any."""

import asyncio
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.broker import folder_for, write_config
from support.processes import Child, running, until
from support.trust_domain import TESTS, TrustDomainProcess, trust_domain
from support.whole_broker import POLICIES

from broker.cli.config import load
from broker.ledger import records
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.reading import read
from broker.ledger.verify import verify

CALLERS = 3
LONGEST_LIFE_S = 0.5
LIMITS = {"requests_per_second": 100_000, "burst": 100_000}


@dataclass
class Acknowledged:
    """What the callers have in their hands."""

    issued: set[str] = field(default_factory=set)
    redeemed: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    def in_files(cls, files: list[Path]) -> "Acknowledged":
        found = cls()
        for file in files:
            for line in file.read_text().splitlines():
                match line.split():
                    case ["issued", jti]:
                        found.issued.add(jti)
                    case ["redeemed", jti, _, at]:
                        found.redeemed.setdefault(jti, set()).add(at)
                    case _:
                        pytest.fail(f"{file.name}: {line}")
        return found


@dataclass
class Setting:
    """Callers that never stop, and a broker that is killed again and again."""

    folder: Path
    domain: TrustDomainProcess
    starter: Child
    files: list[Path]

    @property
    def ledger(self) -> Path:
        return self.folder / "state" / "ledger.sqlite"

    async def start(self) -> None:
        """Returns as soon as there is a process; it serves a moment later."""
        self.starter.tell("start")
        self.domain.entry("action-broker", int(await self.starter.line()))

    async def end(self, how: str) -> int:
        self.starter.tell(how)
        return int(await self.starter.line())

    def lines(self) -> int:
        return sum(file.stat().st_size for file in self.files if file.exists())

    async def served(self) -> None:
        """Waits until callers get answers again."""
        before = self.lines()
        await until(lambda: self.lines() > before, f"callers are answered: {self.log()}")

    def log(self) -> str:
        file = self.folder / "broker.log"
        return file.read_text()[-2000:] if file.exists() else ""

    def require_good(self) -> None:
        config = load(self.folder / "broker.toml")
        key = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name).verifier_key
        report = verify(self.ledger, config.checkpoint_file, str(key))
        assert report.good, report.finding
        assert report.epoch == 1, "a crash is no restore"


@contextmanager
def setting() -> Iterator[Setting]:
    """A trust domain, something to start brokers, and callers in processes of their own."""
    with ExitStack() as stack:
        folder = stack.enter_context(folder_for(POLICIES))
        domain = stack.enter_context(trust_domain(folder / "td"))
        config = write_config(folder, domain.workload_api, domain.broker_api, limits=LIMITS)
        (folder / "tmp").mkdir()
        environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}", "TMPDIR": str(folder / "tmp")}
        command = (sys.executable, "-m", "support.crash_broker", str(config))
        starter = stack.enter_context(running(*command, env=environment))
        files = [folder / f"caller-{number}" for number in range(CALLERS)]
        for file in files:
            command = (sys.executable, "-m", "support.crash_callers", str(folder / "broker.sock"), str(file))
            child = stack.enter_context(running(*command, env=environment))
            domain.entry("build/agent", child.pid)
            domain.entry("service/orders", child.pid)
        yield Setting(folder, domain, starter, files)


async def crash(times: int, seed: int) -> None:
    """Kills a broker so often, then holds its ledger to all that anybody got."""
    moment = random.Random(seed)  # noqa: S311 - moments, not secrets
    with setting() as found:
        await found.start()
        await found.served()
        for number in range(times):
            # Not a wait for anything: the moment itself is to be random, of starting up and of serving.
            await asyncio.sleep(moment.random() * LONGEST_LIFE_S)
            assert await found.end("kill") == -9, f"it ended by itself: {found.log()}"
            if number % 10 == 9:
                found.require_good()
            await found.start()
            if number % 2:  # every second life is long enough for work
                await found.served()
        await found.served()
        assert await found.end("kill") == -9
        found.require_good()
        await found.start()
        await found.served()
        assert await found.end("stop") == 0
        found.require_good()
        check_history(found, Acknowledged.in_files(found.files), times)


def check_history(found: Setting, told: Acknowledged, times: int) -> None:
    """Every token somebody got has its intent, every intent one outcome, no token was used twice."""
    intents: dict[str, int] = {}
    outcomes: Counter[int] = Counter()
    results: Counter[str] = Counter()
    redemptions: Counter[str] = Counter()
    for row in read(found.ledger):
        match row.record():
            case records.Intent(jti=jti):
                intents[jti] = row.seq
            case records.Outcome(intent=intent, result=result):
                outcomes[intent] += 1
                results[result] += 1
            case records.Redemption(jti=jti):
                redemptions[jti] += 1
    assert len(told.issued) > times
    assert len(told.redeemed) > times / 2, "callers did work"
    assert told.issued <= intents.keys(), "no credential without intent"
    assert outcomes == Counter(intents.values()), "one outcome for each intent, and none for anything else"
    assert results["unknown"] > 0, "some were open when it was killed"
    assert told.redeemed.keys() <= redemptions.keys()
    assert set(redemptions.values()) <= {1}, "no double redemption"
    assert redemptions.keys() <= intents.keys()
    assert all(len(answers) == 1 for answers in told.redeemed.values()), "asked again, the answer was the same"


async def test_kill_9_under_load_leaves_no_credential_without_intent_and_no_double_redemption() -> None:
    """Invariants 1 and 7, ten crashes of a whole broker."""
    await crash(10, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
async def test_kill_9_many_times_under_load(seed: int) -> None:
    """Invariants 1 and 7, two hundred crashes of a whole broker."""
    await crash(50, seed=1000 + seed)
