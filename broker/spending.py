"""A signing grant as it is shown, and what it is spent on: the values that redemption.py, acts.py and sign.py share."""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol, TypeVar

from attestors.contract import Process
from broker.artifacts import SigningRequest
from broker.callers import Caller
from broker.credentials.action_token import VerifiedClaims
from broker.credentials.jose import b64url
from broker.decision.decide import Grant
from broker.ledger.records import Intent
from broker.presented import Presented

_T_co = TypeVar("_T_co", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """A grant as it is presented to be spent. provenance: what it was given on, shown again."""

    grant: str = field(repr=False)
    idempotency_id: str
    provenance: Sequence[bytes] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What the second look found: leave for one act. presented: for the request that gave the grant."""

    grant: Grant
    claims: VerifiedClaims
    signing: SigningRequest
    caller: Caller
    now: datetime
    expires_at: datetime
    presented: Presented


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """An act that is fixed and not done.

    jti: its id. cnf: the key that will sign, or be certified. perform: does it; its answer is what the caller gets, and
    the hex SHA-256 by which the ledger knows what came of it.
    """

    jti: str
    credential: str
    cnf: Mapping[str, str]
    key_id: str
    perform: Callable[[], Awaitable[tuple[bytes, str]]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Presenter:
    """Who shows a grant, by kernel or handshake alone.

    named: the SPIFFE ID that it asks as, "" for none. process: behind the Unix socket. leaf: DER, of mutual TLS.
    """

    named: str = ""
    process: Process | None = None
    leaf: bytes | None = field(default=None, repr=False)

    def holds(self, claims: VerifiedClaims, intent: Intent) -> bool:
        """Whether it is the process, or has the certificate's key, that the grant was given to.

        A grant that is bound to a DPoP key (`jkt`) is nobody's here unless it was a process's: no proof was looked at.
        """
        if self.named not in {"", claims.sub}:  # it was refused under another name, which says nothing of this one
            return False
        if self.process is not None and intent.process is not None:
            then = intent.process
            return (self.process.pid, self.process.start_time) == (then.pid, then.start_time)
        return self.leaf is not None and claims.cnf.x5t_s256 == b64url(hashlib.sha256(self.leaf).digest())


class Act(Protocol[_T_co]):
    """One thing to do with a grant."""

    @property
    def content(self) -> bytes:
        """What is asked, beside the grant: the same idempotency id with other content is refused."""

    async def check(self, signing: SigningRequest) -> None:
        """Raises: BrokerError where it is not what was granted, or cannot be looked at; the grant stays as it is."""

    def prepare(self, decided: Decided) -> Prepared:
        """Fixes everything before the grant is spent. Uses no key. Raises: BrokerError."""

    def answer(self, made: bytes, signing: SigningRequest) -> _T_co:
        """What the caller gets. made: what `Prepared.perform` gave for this content and request, now or before."""
