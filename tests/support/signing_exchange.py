"""Signing without a broker process: real policy, ledger, CA and provenance; keys and authorities are the test's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import make_authority
from support.exchanging import CORRELATION, Exchanging, exchanging
from support.signing import AGENT, BUILDER, CONTENT, RESOURCE, Builder, digests
from support.signing_calls import NIGHTLY
from support.whole_broker import ISSUER

from attestors.provenance import ProvenanceAttestor
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.signature_keys import SigningKey
from broker.action import Action
from broker.acts import Means, Signed
from broker.client.signing import signing_action
from broker.decision.attest import Attestation
from broker.exchange import Caller
from broker.presented import NOTHING
from broker.sign import Signing
from broker.spending import Spending


@dataclass
class SigningExchange:
    """The parts, for tests to turn."""

    parts: Exchanging
    signing: Signing
    builder: Builder
    caller: Caller
    envelopes: dict[str, bytes] = field(default_factory=dict)

    def action(self, **changes: Any) -> Action:
        asked = {"artifacts": [digests(CONTENT)], "purpose": "release"} | changes
        return signing_action("nightly.sign", RESOURCE, issuer=ISSUER, **asked)

    async def grant(self, **changes: Any) -> str:
        """A grant of the caller's."""
        envelope, action = self.builder.envelope(), self.action(**changes)
        issued = await self.signing.grant(
            self.caller, lambda: action, [envelope], NOTHING, self.parts.now(), CORRELATION
        )
        self.envelopes[issued.token] = envelope
        return issued.token

    async def sign(self, grant: str, idempotency_id: str = "i" * 20, **options: Any) -> Signed:
        """The signature, or why not."""
        spending = Spending(
            grant=grant, idempotency_id=idempotency_id, provenance=options.pop("provenance", [self.envelopes[grant]])
        )
        statement = options.pop("statement", b"")
        return await self.signing.sign(self.caller, spending, statement, self.parts.now(), CORRELATION)


@asynccontextmanager
async def signing_exchange(folder: Path, **means: Any) -> AsyncIterator[SigningExchange]:
    """One in `folder`. means: beside the CA that is made there."""
    async with exchanging(folder, policies=NIGHTLY) as parts:
        builder = Builder(ec.generate_private_key(ec.SECP256R1()), folder / "trust.toml")
        keys = {"release": SigningKey(builder.key.public_key())}
        trust = ProvenanceTrust(builders={BUILDER: BuilderTrust(keys=keys)}, max_age=timedelta(hours=1))
        parts.exchange.attestation = Attestation({"provenance": ProvenanceAttestor(lambda: trust)}, 2.0)
        authority = await asyncio.to_thread(make_authority, folder / "ca", parts.now())
        signing = Signing(parts.exchange, Means(issuer=ISSUER, **{"authority": lambda: authority} | means))
        try:
            yield SigningExchange(parts, signing, builder, parts.caller(AGENT))
        finally:
            await signing.close()
