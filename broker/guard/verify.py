"""The guard itself: whether what was presented is good for this act, here and now.

What is checked, in this order; each check has its number at the place where it is made.

    1. the token says what it should: shape, issuer's signature, times, no contradiction (credentials/action_token.py)
    2. it is for us: `aud` is this guard's audience
    3. who presents it holds the key it is bound to (`cnf`): the certificate of this very TLS connection (RFC 8705), or
       a DPoP proof for this very request and token (RFC 9449), seen for the first time
    4. the act that the request means, rebuilt here by a declared mapping, is the act that was approved: all four parts
       and the digest are equal
    5. with a feed: it is in current scope, which the broker tells as it changes (guard/feed.py); before and after 6
    6. where the rule says so, the broker would grant it again now (Check)
    7. it may still be used: `once` not yet in this process, `single` redeemed at the broker, `ttl` until it expires

A stranger is refused before the mapping runs, and nothing is used up by a request that is refused on 1 to 6, except the
proof, which was for that request. There is no switch for any of it. Without a feed a credential that the broker refuses
meanwhile is believed until it expires, or until the rule asks. Not checked: that the TLS stack verified the
client's chain to a trust bundle; the token names one certificate, and TLS proves that the peer has its key.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol

from broker.action import Action, check_uri
from broker.credentials import action_token, dpop, jose
from broker.credentials.action_token import VerifiedClaims
from broker.errors import BrokerError, Reason, Refused, Unavailable
from broker.guard.feed import ScopeFeed
from broker.guard.keys import KeyCache, StaleKeys, UnknownKey
from broker.guard.metrics import GuardMetrics
from broker.guard.once import PROCESS, Memory

BROKER_TIMEOUT: Final = 5.0  # seconds for Check and for Redeem
_LEEWAY: Final = action_token.LEEWAY.total_seconds()
_PROOF_WINDOW: Final = (dpop.MAX_AGE + dpop.SKEW).total_seconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """A token and how its presenter proves the key: by certificate or by proof, never both, and neither is refused.

    certificate_sha256: of the DER of the peer's leaf, from the TLS handshake of this connection. Never from a header:
    whoever can reach us could write it.
    proof: the DPoP proof. method, urls: what it must be for; our own names, not what the client calls us.
    """

    token: str = field(repr=False)
    certificate_sha256: bytes | None = None
    proof: str | None = field(default=None, repr=False)
    method: str = ""
    urls: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.proof is not None and (self.certificate_sha256 is not None or not self.urls):
            raise ValueError("a proof stands alone, with the method and the URLs it may be for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """The answer yes, for one request. Only a Guard makes one.

    principal: who acts, as the token's `sub`. action: what was asked and approved.
    """

    principal: str
    action: Action
    claims: VerifiedClaims


class BrokerCalls(Protocol):
    """The two questions a guard may have for the broker. Each raises Refused or Unavailable; returning means yes."""

    async def check(self, token: str, action: Action) -> None:
        """Asks whether the token would be minted again now."""

    async def redeem(self, token: str, action: Action, idempotency_id: str) -> object:
        """Uses a single-use token up, once in the world. What it returns is not looked at."""


Rebuild = Callable[[], Awaitable[Action]]


class Guard:
    """Decides on each request to one audience. One for a process is enough, whatever the edges.

    issuer: the broker's `iss`. audience: who we are, as callers name us when they ask for a token.
    scope: the broker's feed, which has the issuer's keys as well. keys: the issuer's, where they come another way.
    broker: for rules with `check` and for tokens that are single-use; without it those are refused. metrics: counts.
    memory: leave it out; guards of one process share theirs, so that "once" is once.
    clock: aware UTC.
    """

    def __init__(  # noqa: PLR0913 -- its parts; two of them are needed
        self,
        *,
        issuer: str,
        audience: str,
        keys: KeyCache | None = None,
        scope: ScopeFeed | None = None,
        broker: BrokerCalls | None = None,
        memory: Memory = PROCESS,
        metrics: GuardMetrics | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.issuer: Final = check_uri(issuer, "the guard's issuer")
        self.audience: Final = check_uri(audience, "the guard's audience")
        found: KeyCache | ScopeFeed | None = keys or scope
        if found is None:
            raise TypeError("a guard needs the issuer's keys: give it a scope feed, or keys")
        if scope is not None and audience not in scope.audiences:
            raise ValueError("the scope feed is not about this guard's audience: name it there")
        self._keys: Final = found
        self._scope, self._broker, self._memory, self._clock = scope, broker, memory, clock
        self._metrics = metrics
        if metrics is not None and scope is not None:
            metrics.watch(scope)

    def now(self) -> datetime:
        """The guard's clock."""
        return self._clock()

    def verify(self, presented: Presented, action: Action, now: datetime) -> Allowed:
        """Obligations 1 to 5 and 7, without a round trip. A yes uses the token up where it counts once.

        Raises: Refused, Unavailable; a `single` token is refused: it takes `admit`. Not done: fetching the key set, so
        without a feed call `keys.refetch()` more often than every 300 s.
        """
        if self._metrics is None:
            return self._verify(presented, action, now)
        with self._metrics.counted():
            return self._verify(presented, action, now)

    def _verify(self, presented: Presented, action: Action, now: datetime) -> Allowed:
        allowed = self._cover(self._identify(presented, now), action)
        if allowed.claims.use == "single":
            raise Unavailable(Reason.SCOPE_STALE, "a single-use token is redeemed at the broker: use admit()")
        self._require_scope(allowed.claims, now)
        self._use_here(allowed.claims, now)
        return allowed

    async def admit(self, presented: Presented, action: Action | Rebuild, *, check: bool = False) -> Allowed:
        """All obligations. A yes uses the token up where it counts once or is single-use.

        action: what the request means, or how to find out once it is known who asks.
        check: ask the broker even if the token would do.

        Raises: Refused, Unavailable.
        """
        with self._metrics.counted() if self._metrics is not None else nullcontext():
            return await self._admit(presented, action, check=check)

    async def _admit(self, presented: Presented, action: Action | Rebuild, *, check: bool) -> Allowed:
        now = self._clock()
        claims = await self._identify_fetching(presented, now)
        allowed = self._cover(claims, action if isinstance(action, Action) else await action())
        self.still_good(allowed)  # the request may have taken long to come
        if check or claims.use == "single":
            await self._ask(allowed, presented.token, check=check)
            self.still_good(allowed)  # and the answer
        self._use_here(claims, now)
        return allowed

    def still_good(self, allowed: Allowed) -> None:
        """For requests that go on: that the credential has not died meanwhile.

        Raises: Refused, with EXPIRED or the broker's reason; Unavailable with SUSPENDED or SCOPE_STALE.
        """
        now = self._clock()
        if now.timestamp() >= allowed.claims.exp + _LEEWAY:
            raise Refused(Reason.EXPIRED, "the token expired while the request went on")
        self._require_scope(allowed.claims, now)

    async def until_dead(self, allowed: Allowed) -> BrokerError:
        """Returns why, as soon as `still_good` would raise. For requests that go on; cancel it when they end."""
        with self._scope.changes() if self._scope is not None else nullcontext(asyncio.Event()) as changed:
            while True:
                changed.clear()
                try:
                    self.still_good(allowed)
                except BrokerError as error:
                    if self._metrics is not None:
                        self._metrics.ended(error)
                    return error
                left = allowed.claims.exp + _LEEWAY - self._clock().timestamp()
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(left, 0)):
                        await changed.wait()

    def _require_scope(self, claims: VerifiedClaims, now: datetime) -> None:
        if self._scope is not None:  # 5
            self._scope.require(claims, now)

    async def _identify_fetching(self, presented: Presented, now: datetime) -> VerifiedClaims:
        self._keys.refresh_if_due()
        try:
            return self._identify(presented, now)
        except (UnknownKey, StaleKeys):  # raised within obligation 1: nothing was remembered yet
            if not await self._keys.refetch():
                raise
        return self._identify(presented, now)

    def _identify(self, presented: Presented, now: datetime) -> VerifiedClaims:
        claims = action_token.verify(presented.token, issuer=self.issuer, key_for=self._keys.key, now=now)  # 1
        if claims.aud != self.audience:  # 2
            raise Refused(Reason.WRONG_AUDIENCE, "a token for another audience")
        if claims.cnf.x5t_s256 is not None:  # 3
            leaf = presented.certificate_sha256
            if leaf is None or jose.b64url(leaf) != claims.cnf.x5t_s256:
                raise Refused(Reason.KEY_MISMATCH, "the token is bound to another certificate than this connection's")
        else:
            self._check_proof(presented, claims, now)
        return claims

    def _check_proof(self, presented: Presented, claims: VerifiedClaims, now: datetime) -> None:
        if presented.proof is None:
            raise Refused(Reason.KEY_MISMATCH, "the token is bound to a key, and no DPoP proof came with it")
        proof = dpop.verify_proof(
            presented.proof, method=presented.method, url=presented.urls, now=now, token=presented.token
        )
        if proof.jkt != claims.cnf.jkt:
            raise Refused(Reason.KEY_MISMATCH, "the token is bound to another key than the proof's")
        self._memory.proofs.take(
            f"{proof.jkt}{proof.jti}",
            until=proof.issued_at.timestamp() + _PROOF_WINDOW,
            principal=claims.sub,
            now=now.timestamp(),
            again=Reason.PROOF_REPLAYED,
        )

    def _cover(self, claims: VerifiedClaims, action: Action) -> Allowed:
        detail = claims.authorization_details[0]
        if (  # 4
            action.digest.hex() != claims.action_digest
            or action.name != claims.scope
            or action.resource != detail.identifier
            or action.audience != claims.aud
            or (action.parameters != detail.parameters and claims.action().digest != action.digest)
        ):
            raise Refused(Reason.OUT_OF_SCOPE, f"not the approved act: the request means {action.name}")
        return Allowed(principal=claims.sub, action=action, claims=claims)

    async def _ask(self, allowed: Allowed, token: str, *, check: bool) -> None:
        broker = self._broker
        if broker is None:
            raise Unavailable(Reason.SCOPE_STALE, "give the guard a broker: it has to ask it for this request")
        try:
            async with asyncio.timeout(BROKER_TIMEOUT):
                if check:  # 6
                    await broker.check(token, allowed.action)
                if allowed.claims.use == "single":  # 7
                    await broker.redeem(token, allowed.action, secrets.token_urlsafe(24))
        except BrokerError:
            raise
        except Exception as error:  # deny by default: whatever a client raises, there was no yes
            raise Unavailable(Reason.SCOPE_STALE, f"asking the broker: {type(error).__name__}") from error

    def _use_here(self, claims: VerifiedClaims, now: datetime) -> None:
        if claims.use == "once":  # 7
            self._memory.tokens.take(
                claims.jti,
                until=claims.exp + _LEEWAY,
                principal=claims.sub,
                now=now.timestamp(),
                again=Reason.ALREADY_USED,
            )
