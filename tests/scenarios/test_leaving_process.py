"""The process that got a credential ends, or becomes another program: the credential is dead, whoever holds it."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from support.postgres import Postgres, postgres
from support.processes import PATIENCE_S, Child, until
from support.receiving import claims_of
from support.scenario import Service, member, policies_of, refusals, service
from support.shop import say
from support.whole_broker import OPERATOR, Whole, eventually, whole_broker

from broker.action import Action
from broker.errors import Reason
from broker.ledger.records import Intent

EXAMPLE, JOB = "leaving-process", "spiffe://acme.test/batch/payroll"
PAYROLL, BASE, MONTH = "spiffe://acme.test/service/payroll", "https://payroll.acme.test", "/exports/2026-11"
EMPLOYEES = 200_000  # far more than a connection holds before its client reads on
DATABASE = (
    "CREATE TABLE payroll (month text, employee text, amount int)",
    f"INSERT INTO payroll SELECT '2026-11', repeat('name ', 12) || n, 3000 FROM generate_series(1, {EMPLOYEES}) n",  # noqa: S608
    "CREATE ROLE payroll LOGIN",
    "GRANT SELECT ON payroll TO payroll",
)


@dataclass
class Job:
    """A process that got a token, and whoever has the requests that it prepared."""

    process: Child
    made: list[dict[str, str]] = field(default_factory=list)
    jti: str = ""

    async def ask(self) -> None:
        self.process.tell("ask")
        self.made = json.loads(await self.process.line())
        self.jti = claims_of(self.made[0]["authorization"].removeprefix("DPoP ")).jti

    async def send(self, payroll: Service) -> str:
        """What becomes of the next prepared request: "" where it is answered, of which no more is read, or why not."""
        async with payroll.open(MONTH, self.made.pop()) as response:
            return "" if response.status == 200 else (await response.json(content_type=None))["reason"]

    async def send_as_replaced(self, payroll: Service) -> str:
        """The same, sent by the program that took the process's place."""
        self.process.tell(json.dumps([payroll.origin + MONTH, self.made.pop()]))
        return await self.process.line()


@contextmanager
def job(whole: Whole) -> Iterator[Job]:
    command = [sys.executable, "-m", "support.handing_on", whole.broker.socket, "payroll.export", BASE + MONTH, PAYROLL]
    with member(whole, "batch/payroll", *command) as child:
        yield Job(child)


async def test_a_process_leaves_and_what_it_was_given_is_dead() -> None:
    with whole_broker(policies_of(EXAMPLE)) as whole, postgres(*DATABASE) as database:
        program = (f"{EXAMPLE}/payroll.py", "--database", database.url("payroll"))
        async with service(whole, "service/payroll", BASE, *program) as payroll:
            with job(whole) as first, job(whole) as second, job(whole) as third:
                for one in (first, second, third):
                    assert await one.process.line() == "ready"
                    await one.ask()
                say("Three payroll jobs, each a process of its own, have a token each. What they hand on to others is")
                say("the worst that they could: the token, and requests with proofs of its key made beforehand.")
                await _ends(first, payroll, database)
                await _becomes_another_program(whole, second, payroll)
                assert await third.send(payroll) == ""
                say("The third job lives, and what it handed on works: nobody else's token died.")
                _check_the_ledger(whole, first, second, third)


async def _ends(leaving: Job, payroll: Service, database: Postgres) -> None:
    assert await leaving.send(payroll) == ""
    say("Whoever has what the first one handed on reads the payroll with it, as long as the first one lives.")
    async with payroll.open(MONTH, leaving.made.pop()) as export:
        rows = len([await export.content.readline() for _ in range(3)])
        await until(lambda: _queries(database) == 1, "the one export that is being read still runs")
        say(f"An export is running: {rows} of {EMPLOYEES} rows have been read.")
        leaving.process.tell("leave")
        assert await asyncio.to_thread(leaving.process.process.wait, PATIENCE_S) == 0
        took = await _until_refused(lambda: leaving.send(payroll))
        say(f"The first job ends. {took * 1000:.0f} ms later the payroll service refuses its token: not_attested.")
        rest = await _rest(export)
    assert rows + rest < EMPLOYEES
    await until(lambda: _queries(database) == 0, "the query ended, too")
    say(f"The export broke off after {rows + rest} rows, so that nobody takes it for the whole, and so did its query.")


async def _becomes_another_program(whole: Whole, replaced: Job, payroll: Service) -> None:
    assert await replaced.send(payroll) == ""
    pid, program = replaced.process.pid, _program(replaced)
    replaced.process.tell("replace")
    assert await replaced.process.line() == "replaced"
    took = await _until_refused(lambda: replaced.send_as_replaced(payroll))
    assert replaced.process.pid == pid
    assert replaced.process.process.poll() is None
    assert _program(replaced) != program
    say("The second job is replaced by a shell, in the same process. The shell sends what the job prepared.")
    say(f"{took:.1f} s later that is refused: not_attested (which program runs there is looked at each second).")
    async with whole.client(OPERATOR) as operator:
        found = await operator.explain(JOB, Action("payroll.export", BASE + MONTH, PAYROLL), pid=pid)
    assert found.allowed
    say("To SPIRE that process is the payroll job as before: it could ask anew. What another program got is dead.")


async def _rest(export: aiohttp.ClientResponse) -> int:
    """How many rows still come before the connection breaks off."""
    rows = 0
    try:
        while await export.content.readline():
            rows += 1
    except (aiohttp.ClientPayloadError, ConnectionError):
        return rows
    raise AssertionError(f"the export came to its end after {rows} more rows")


def _program(job: Job) -> str:
    return str(Path(f"/proc/{job.process.pid}/exe").readlink())


def _queries(database: Postgres) -> int:
    """How many run for the payroll service."""
    active = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'payroll' AND state <> 'idle'"
    return int(database.ask(active))


async def _until_refused(send: Callable[[], Awaitable[str]]) -> float:
    """Seconds until a request is refused that was not."""
    began = time.monotonic()
    await eventually(send, Reason.NOT_ATTESTED)
    return time.monotonic() - began


def _check_the_ledger(whole: Whole, first: Job, second: Job, third: Job) -> None:
    given = [one for one in whole.records() if isinstance(one, Intent)]
    assert {one.jti for one in given} == {first.jti, second.jti, third.jti}
    died = refusals(whole)
    assert [(one.jtis, one.reason) for one in died] == [((one.jti,), Reason.NOT_ATTESTED) for one in (first, second)]
    for record, one in zip(died, (first, second), strict=True):
        assert record.cause.startswith(f"process:{one.process.pid}:")
    say("The ledger has three tokens, and which two of them died, when, and of what:")
    for record in died:
        say(f"    {record.at:%H:%M:%S} {record.reason} {record.cause}")
