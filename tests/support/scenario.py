"""The cast of a scenario: processes with SPIFFE IDs of their own, and the services of examples/, run as they stand."""

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from support.broker import ISSUER
from support.cli import COMMAND, LIMIT_S, Ran, clean_environment
from support.processes import PATIENCE_S, Child, running
from support.trust_domain import TESTS
from support.whole_broker import Whole

from broker.client import ActionToken
from broker.errors import Reason
from broker.ledger.scope_records import ScopeRefused

EXAMPLES = TESTS.parent / "examples"


def policies_of(example: str) -> dict[str, str]:
    """The files of its policy folder, without its tests."""
    return {path.name: path.read_text() for path in (EXAMPLES / example / "policy").glob("*.cedar*")}


def joins(whole: Whole, path: str) -> str:
    """Gives this process one more SPIFFE ID, which it returns."""
    spiffe_id = whole.domain.id(path)
    whole.entries[spiffe_id] = whole.domain.entry(path, os.getpid())
    return spiffe_id


@contextmanager
def member(whole: Whole, path: str, *command: str, **options: Any) -> Iterator[Child]:
    """A process of its own, with this SPIFFE ID alone, while the block lasts."""
    with running(*command, env=clean_environment(PYTHONPATH=f"{TESTS}:{TESTS.parent}"), **options) as child:
        whole.entries[f"{path} of {child.pid}"] = whole.domain.entry(path, child.pid)
        yield child


def command(whole: Whole, path: str, *arguments: str) -> Ran:
    """`action-broker ARGUMENTS` as somebody with this SPIFFE ID, which a shell has before it becomes the command."""
    where = ("--socket", whole.broker.socket, "--issuer", ISSUER)
    as_it = ("sh", "-c", 'read -r _; exec "$@"', "sh", *COMMAND, *arguments, *where)
    with member(whole, path, *as_it, stderr=subprocess.PIPE) as child:
        out, err = child.process.communicate("\n", LIMIT_S)
        return Ran(child.process.returncode, out, err)


def write_policy(whole: Whole, file: str, text: str) -> None:
    """Replaces one file of the policy folder that is in force, in one step."""
    folder = whole.broker.folder / "policy"
    new = folder / "new"
    new.write_text(text)
    new.replace(folder / file)


def refusals(whole: Whole) -> list[ScopeRefused]:
    """What the ledger has of credentials that were refused before they expired."""
    return [one for one in whole.records() if isinstance(one, ScopeRefused)]


@dataclass(frozen=True)
class Answer:
    """What a service said. reason: why it refused; "" where it did not."""

    status: int
    body: Any

    @property
    def reason(self) -> str:
        return self.body.get("reason", "") if isinstance(self.body, Mapping) else ""


@dataclass(frozen=True)
class Service:
    """A guarded HTTP service.

    base: its URL as it knows itself. origin: where it is. served: how often it answered with 200, by path.
    """

    base: str
    origin: str
    http: aiohttp.ClientSession
    served: Counter[str] = field(default_factory=Counter)

    async def get(self, path: str, token: ActionToken | None = None, **headers: str) -> Answer:
        """One request, with a fresh proof where there is a token. While that is being decided again, it asks again."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                shown = token.http_headers("GET", self.base + path) if token else {}
                async with self.open(path, shown | headers) as response:
                    answer = Answer(response.status, await response.json(content_type=None))
                if answer.reason != Reason.SUSPENDED:
                    return answer
                await asyncio.sleep(0.02)

    @asynccontextmanager
    async def open(self, path: str, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request with just these headers, and its answer as it comes."""
        async with self.http.get(self.origin + path, headers=headers) as response:
            self.served[path] += response.status == 200
            yield response

    async def why(self, path: str, token: ActionToken | None = None) -> str:
        """Why such a request is refused; "" where it is not."""
        return (await self.get(path, token)).reason


@asynccontextmanager
async def service(whole: Whole, path: str, base: str, program: str, *arguments: str) -> AsyncIterator[Service]:
    """One of examples/ with this SPIFFE ID, once it serves."""
    command = [sys.executable, str(EXAMPLES / program), "--broker", whole.broker.socket, "--issuer", ISSUER, *arguments]
    with member(whole, path, *command) as child:
        word, port = (await child.line()).split()
        assert word == "serving"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as http:
            yield Service(base, f"http://127.0.0.1:{port}", http)
