"""The embedded trust domain in a process of its own, told what to do line by line: it can be taken away and put back.

usage: python -m support.trust_domain FOLDER NAME X509_SECONDS JWT_SECONDS. Commands and answers are JSON, one a line.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from broker.cli.log import configure_log
from broker.dev.domain import Lifetimes
from broker.dev.server import DevTrustDomain
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import OwnSvid, TrustBundle, TrustSnapshot, parse_x509_authorities

TESTS = Path(__file__).parents[1]


def utc_now() -> datetime:
    """The clock."""
    return datetime.now(UTC)


def this_process(pid: int) -> str:
    """The selector of one process, whatever it executes."""
    process = read_process(pid)
    return f"dev:process:{process.pid}:{process.start_time}"


class TrustDomainProcess:
    """Talks to the process. `down` takes its sockets away and keeps its keys and entries, as a SPIRE that is away."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], name: str) -> None:
        self._process, self._folder, self.name = process, folder, name
        self.workload_api = f"unix:{folder}/workload.sock"
        self.broker_api = f"unix:{folder}/broker.sock"

    @property
    def pid(self) -> int:
        return self._process.pid

    def _ask(self, do: str, **arguments: Any) -> Any:
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self.heard()

    def heard(self) -> Any:
        """The next answer."""
        line = self._process.stdout.readline()
        assert line, "the trust domain ended"
        return json.loads(line)

    def id(self, path: str) -> str:
        return f"spiffe://{self.name}/{path}"

    def entry(self, path: str, pid: int) -> str:
        """Gives one process an ID; the entry's own id."""
        return self._ask("entry", id=self.id(path), selectors=[this_process(pid)])

    def delete(self, entry: str) -> bool:
        """Whether there was one: those of processes that are gone are dropped at times."""
        return self._ask("delete", entry=entry)

    def down(self) -> None:
        self._ask("down")

    def up(self) -> None:
        self._ask("up")

    def rotate(self) -> None:
        self._ask("rotate")

    def federate(self, name: str, x509: bytes, jwks: bytes) -> None:
        self._ask("federate", name=name, x509=base64.b64encode(x509).decode(), jwks=jwks.decode())

    def unfederate(self, name: str) -> None:
        self._ask("unfederate", name=name)

    def svid(self, path: str, seconds: int = 3600, *, of: str = "") -> TrustSnapshot:
        """What a workload with this ID would have from the Workload API. seconds: 0 for the one that it does have.

        of: another domain's name, whose ID this one's authority then signs.
        """
        spiffe_id = f"spiffe://{of or self.name}/{path}"
        found = self._ask("svid", id=spiffe_id, seconds=seconds)
        chain = tuple(map(base64.b64decode, found["chain"]))
        own = OwnSvid(
            spiffe_id=SpiffeId.parse(spiffe_id),
            chain=chain,
            private_key_pkcs8=base64.b64decode(found["key"]),
            not_after=datetime.fromisoformat(found["not_after"]),
        )
        domain = TrustDomain.parse(self.name)
        authorities = parse_x509_authorities(base64.b64decode(found["bundle"]))
        bundle = TrustBundle(trust_domain=domain, x509_authorities=authorities, jwt_authorities={})
        return TrustSnapshot(own=own, bundles={domain: bundle}, revision=1)

    def jwt_svid(self, path: str, audience: str) -> str:
        return self._ask("jwt", id=self.id(path), audience=audience)


@contextmanager
def trust_domain(
    folder: Path, name: str = "acme.test", *, x509_seconds: float = 3600, jwt_seconds: float = 300
) -> Iterator[TrustDomainProcess]:
    """Runs one while the block lasts."""
    with subprocess.Popen(
        [sys.executable, "-m", "support.trust_domain", folder, name, str(x509_seconds), str(jwt_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
    ) as process:
        try:
            found = TrustDomainProcess(folder, process, name)
            assert found.heard() == "ready"
            yield found
        finally:
            process.kill()


async def _do(domain: DevTrustDomain, command: dict[str, Any]) -> Any:
    match command:
        case {"do": "entry", "id": spiffe_id, "selectors": selectors}:
            return domain.create_entry(spiffe_id, selectors)
        case {"do": "delete", "entry": entry}:
            return domain.delete_entry(entry)
        case {"do": "down"}:
            await domain.close()
        case {"do": "up"}:
            await domain.start()
        case {"do": "rotate"}:
            domain.domain.rotate()
        case {"do": "federate", "name": name, "x509": x509, "jwks": jwks}:
            domain.set_federated_bundle(name, base64.b64decode(x509), jwks.encode())
        case {"do": "unfederate", "name": name}:
            domain.domain.unfederate(TrustDomain.parse(name))
        case {"do": "svid", "id": spiffe_id, "seconds": seconds}:
            return _svid(domain, SpiffeId.parse(spiffe_id), seconds)
        case {"do": "jwt", "id": spiffe_id, "audience": audience}:
            return domain.domain.authority.jwt_svid(
                SpiffeId.parse(spiffe_id), [audience], utc_now(), timedelta(minutes=5)
            )
        case _:
            raise ValueError(command)
    return True


def _svid(domain: DevTrustDomain, spiffe_id: SpiffeId, seconds: int) -> dict[str, Any]:
    if seconds:
        made = domain.domain.authority.x509_svid(spiffe_id, utc_now(), timedelta(seconds=seconds))
    else:
        made = domain.domain.x509_svid(spiffe_id)
    return {
        "chain": [base64.b64encode(one).decode() for one in made.chain],
        "key": base64.b64encode(made.private_key_pkcs8).decode(),
        "not_after": made.not_after.isoformat(),
        "bundle": base64.b64encode(domain.domain.authority.x509_bundle).decode(),
    }


def _tell(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def main(folder: Path, name: str, x509_seconds: float, jwt_seconds: float) -> None:
    """Follows commands until its standard input ends."""
    configure_log("error", as_json=True)  # standard output is for answers
    lifetimes = Lifetimes(x509_svid=timedelta(seconds=x509_seconds), jwt_svid=timedelta(seconds=jwt_seconds))
    domain = DevTrustDomain(folder, utc_now, trust_domain=name, lifetimes=lifetimes)
    await domain.start()
    try:
        _tell("ready")
        while line := await asyncio.to_thread(sys.stdin.readline):
            _tell(await _do(domain, json.loads(line)))
    finally:
        await domain.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])))
