"""An exchange with real policy, ledger and keys; who calls, what SPIRE says and what time it is are the test's."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from support.ledger_records import checkpointer
from support.pki import CA, JwtAuthority, snapshot
from support.whole_broker import AGENT, BROKER, ISSUER, ORDERS, POLICIES, RESOURCE

from attestors.contract import Attestor, FactKey, Facts, Process
from broker.action import Action
from broker.credentials.action_token import Confirmation
from broker.credentials.keyring import KeyRing
from broker.decision.attest import Attestation
from broker.decision.quota import Quota
from broker.decision.store import PolicyStore
from broker.errors import BrokerError
from broker.exchange import Caller, Exchange, Issued
from broker.identity.identify import Identified
from broker.identity.peer import read_process
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import TrustSnapshot
from broker.identity.x509_svid import authority_digest
from broker.ledger.reading import read
from broker.ledger.records import Record
from broker.ledger.store import Ledger

CORRELATION = "0123456789abcdef0123456789abcdef"
CNF = Confirmation(jkt="0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I")


def act(name: str = "orders.read", audience: str = ORDERS, **parameters: object) -> Action:
    return Action(name, RESOURCE, audience, parameters)


@dataclass
class Exchanging:
    """The parts, for tests to turn. ahead: of the real clock. ids: what SPIRE says of any process; an error is raised.

    asked: what happens while SPIRE is asked.
    """

    folder: Path
    authority: CA
    signer: JwtAuthority
    trust: TrustSnapshot
    exchange: Exchange = field(init=False)
    ahead: timedelta = timedelta()
    ids: list[str] | BrokerError = field(default_factory=lambda: [AGENT])
    asked: list[object] = field(default_factory=list)

    def now(self) -> datetime:
        return datetime.now(UTC) + self.ahead

    async def entitlements(self, process: Process, now: datetime) -> Facts:
        """SPIRE's word."""
        for one in self.asked:
            one()
        if isinstance(self.ids, BrokerError):
            raise self.ids
        return Facts(
            attestor="spire",
            key=FactKey(f"spire:{process.pid}"),
            values={"ids": list(self.ids)},
            attested_at=now,
            expires_at=now + timedelta(seconds=300),
        )

    def caller(self, spiffe_id: str = AGENT, *, pid: int | None = None, transport: str = "mtls") -> Caller:
        """Somebody who was identified, as a process where `pid` is given."""
        identity = Identified(
            principal=SpiffeId.parse(spiffe_id),
            transport="unix" if pid else transport,
            expires_at=self.now() + timedelta(hours=1),
            process=read_process(pid) if pid else None,
            authority_sha256=None if pid else self.vouching(spiffe_id),
        )
        return Caller(identity=identity, confirmation=CNF)

    def vouching(self, spiffe_id: str) -> bytes:
        """The authority that would have signed an SVID of it."""
        bundle = self.trust.bundle_for(SpiffeId.parse(spiffe_id).trust_domain)
        return authority_digest(bundle.x509_authorities[0])

    async def token(self, action: Action, caller: Caller | None = None) -> Issued:
        return await self.exchange.request(caller or self.caller(), lambda: action, self.now(), CORRELATION)

    def write_policy(self, text: str) -> None:
        (self.folder / "policy" / "orders.cedar").write_text(text)

    async def records(self) -> list[Record]:
        """All of the ledger, which is closed for it."""
        await self.exchange.ledger.close()
        return [row.record() for row in read(self.folder / "ledger.db")]


@asynccontextmanager
async def exchanging(
    folder: Path,
    *,
    policies: Mapping[str, str] = POLICIES,
    attestors: Mapping[str, Attestor] | None = None,
    burst: int = 1000,
    before: Exchanging | None = None,
) -> AsyncIterator[Exchanging]:
    """One in `folder`, which may have a ledger already. before: whose trust domain it is in, else one of its own."""
    authority, signer = CA(now=datetime.now(UTC)), JwtAuthority()
    trust = snapshot(authority.bundle(signer), own=authority.svid(BROKER).own())
    if before is not None:
        authority, signer, trust = before.authority, before.signer, before.trust
    found = Exchanging(folder, authority, signer, trust)
    (folder / "policy").mkdir(exist_ok=True)
    for name, text in policies.items():
        (folder / "policy" / name).write_text(text)
    ledger = await Ledger.open(folder / "ledger.db", checkpoint=checkpointer(folder), clock=found.now)
    async with ledger:
        keyring = KeyRing(ledger, lambda: found.trust, issuer=ISSUER)
        await keyring.start(found.now())
        found.exchange = Exchange(
            issuer=ISSUER,
            snapshot=lambda: found.trust,
            entitlements=found.entitlements,
            policies=PolicyStore(folder / "policy"),
            attestation=Attestation(attestors or {}, 2.0),
            ledger=ledger,
            keyring=keyring,
            quota=Quota(0.001, burst, 100),
        )
        yield found


async def steps(count: int) -> None:
    """Lets the event loop turn so often."""
    for _ in range(count):
        await asyncio.sleep(0)


OWN_PID = os.getpid()
