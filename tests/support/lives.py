"""Credentials as scope holds them, facts that they rest on, and a guard that reads the feed without a network."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from support.whole_broker import AGENT, ORDERS, RESOURCE

from attestors.contract import FactKey, Facts, Process
from broker._proto.actionbroker.v1 import scope_pb2
from broker.action import Action
from broker.credentials import action_token
from broker.credentials.action_token import Attestation, Confirmation, VerifiedClaims
from broker.errors import BrokerError
from broker.guard.scope_state import ScopeState
from broker.scope.feed import Feed
from broker.scope.live import Live, keys_of

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
OTHERS = "spiffe://acme.test/service/billing"
POLICY = "sha256:0123456789ab"
PROCESS = Process(pid=4711, start_time=99, uid=1600, gid=1600, exe_device=1, exe_inode=2)


def facts(key: str, *, ends_s: float | None = None, **values: Any) -> Facts:
    """Of the attestor that the key begins with."""
    return Facts(
        attestor=key.partition(":")[0],
        key=FactKey(key),
        values=values,
        attested_at=NOW,
        expires_at=None if ends_s is None else NOW + timedelta(seconds=ends_s),
    )


def live(jti: str, *found: Facts, ends_s: float = 60, **changes: Any) -> Live:
    """A durable one of AGENT's for ORDERS. changes: of its fields."""
    action, audience = changes.pop("action", "orders.read"), changes.pop("audience", ORDERS)
    usual: dict[str, Any] = {
        "credential": "action_token",
        "principal": AGENT,
        "canonical": Action(action, RESOURCE, audience).canonical,
        "method": "mtls",
        "policy_revision": POLICY,
        "seq": 1,
    }
    made = Live(
        jti=jti,
        action=action,
        audience=audience,
        expires_at=(NOW + timedelta(seconds=ends_s)).timestamp(),
        facts={one.attestor: one for one in found},
        **(usual | changes),
    )
    made.keys = keys_of(made)
    return made


def claims_of(one: Live) -> VerifiedClaims:
    """What its token says."""
    action = one.to_action()
    return VerifiedClaims(
        iss="https://broker.acme.test",
        sub=one.principal,
        aud=one.audience,
        exp=int(one.expires_at),
        iat=int(one.expires_at) - 60,
        jti=one.jti,
        client_id=one.principal,
        scope=one.action,
        authorization_details=(action_token.detail_of(action),),
        cnf=Confirmation(jkt="0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"),
        action_digest=action.digest.hex(),
        use="ttl",
        attestation=Attestation(environment=f"sha256:{'0' * 64}", policy=one.policy_revision),
    )


class Reader:
    """What a guard of these audiences knows of a feed, message by message."""

    def __init__(self, feed: Feed, *audiences: str, now: datetime = NOW) -> None:
        self.feed, self.audiences, self.now = feed, tuple(sorted(audiences or (ORDERS,))), now
        self.ticks = 0.0
        self.state = ScopeState(lambda: self.ticks)
        self._coming: list[bytes] = []
        self._position: int | None = None

    def read(self) -> scope_pb2.WatchResponse:
        """Takes one message, the next part of a snapshot where there is one to come."""
        if self._position is None:
            self._position = self.feed.position
            self._coming = self.feed.snapshot(self.audiences, self.now)
        if self._coming:
            message = self._coming.pop(0)
        else:
            self._position, message = self.feed.since(self.audiences, self._position, self.now)
        return self._take(message)

    def _take(self, message: bytes) -> scope_pb2.WatchResponse:
        read = scope_pb2.WatchResponse.FromString(message)
        self.state.take(read)
        return read

    @property
    def knows_all(self) -> bool:
        return self._position == self.feed.position and not self._coming

    def kids(self) -> set[str]:
        """The keys that it knows."""
        known = self.state._known
        return set() if known is None else set(known.keys)

    def catch_up(self) -> "Reader":
        """Reads until nothing is left."""
        self.read()
        while not self.knows_all:
            self.read()
        return self

    def come_back(self) -> None:
        """A new stream, as a guard asks for it: from where it is, where that is still known."""
        resumed = self.feed.can_resume(self.state.feed, self.state.position)
        self._position = self.state.position if resumed else None
        self._coming = []

    def says(self, one: Live, now: datetime | None = None) -> str:
        """Why a guard refuses it; "" where it does not."""
        try:
            self.state.require(claims_of(one), now or self.now)
        except BrokerError as error:
            return error.reason
        return ""

    def say(self, lives: Sequence[Live]) -> dict[str, str]:
        return {one.jti: self.says(one) for one in lives}
