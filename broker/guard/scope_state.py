"""What a guard knows of scope: which credentials are refused although they have not expired. No I/O.

It is all that the broker's feed said, in order and without a gap (proto/actionbroker/v1/scope.proto), and how old that
is. What is too old, or not whole, is worth nothing: then everything is refused.
"""

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.actionbroker.v1 import scope_pb2
from broker.credentials.action_token import LEEWAY, VerifiedClaims
from broker.errors import Reason, Refused, Unavailable
from broker.guard.keys import StaleKeys, UnknownKey, parse_key_set
from broker.status import known_reason

MAX_SILENCE: Final = timedelta(seconds=5)
SKEW: Final = timedelta(seconds=5)
"""How far the broker's clock and ours may be apart; where they are further, one of them is wrong."""
_SKEW_S: Final = SKEW.total_seconds()
_LEEWAY_S: Final = LEEWAY.total_seconds()
MAX_REFUSED: Final = 1_000_000
"""Refusals that are kept, some 150 MB; where there were more, everything is refused."""


class FeedBroken(Exception):
    """The feed has a gap, or says what it cannot: everything has to be told anew."""


class _Suspended:
    """One suspension. jtis: None where credentials are named by what they have in common."""

    def __init__(self, message: scope_pb2.Suspension) -> None:
        self._jtis = set(message.jtis) or None
        self._policy, self._actions = message.policy_other_than, frozenset(message.actions)
        self._principal, self._domain = message.principal, message.trust_domain
        self._below = message.principal.endswith("/")
        self.released: set[str] = set()

    def hits(self, claims: VerifiedClaims) -> bool:
        """Whether the credential is one of them."""
        if claims.jti in self.released:
            return False
        if self._jtis is not None:
            return claims.jti in self._jtis
        return (
            (not self._policy or claims.attestation.policy != self._policy)
            and (not self._actions or claims.scope in self._actions)
            and (claims.sub.startswith(self._principal) if self._below else self._principal in ("", claims.sub))
            and self._domain in ("", claims.sub.removeprefix("spiffe://").partition("/")[0])
        )

    def release(self, message: scope_pb2.Release) -> None:
        """These count again."""
        self.released.update(message.jtis)


class _Known:
    """All that was told up to one number."""

    def __init__(self) -> None:
        self.refused: dict[str, tuple[Reason, int]] = {}
        self.suspended: dict[int, _Suspended] = {}
        self.keys: Mapping[str, ec.EllipticCurvePublicKey] = {}

    def take(self, message: scope_pb2.WatchResponse) -> None:
        """Raises: Invalid where a key set cannot be read; FeedBroken."""
        for one in message.refused:
            self.refused[one.jti] = known_reason(one.reason), one.until
        if len(self.refused) > MAX_REFUSED:
            raise FeedBroken(f"more than {MAX_REFUSED} credentials are refused")
        for suspension in message.suspended:
            self.suspended[suspension.id] = _Suspended(suspension)
        for release in message.released:
            if release.all:
                self.suspended.pop(release.suspension, None)
            elif release.suspension in self.suspended:
                self.suspended[release.suspension].release(release)
        if message.key_set:
            self.keys = parse_key_set(message.key_set)


class ScopeState:
    """One for each feed.

    seconds: a clock that never goes back, and that counts time in which the machine slept.
    """

    def __init__(self, seconds: Callable[[], float], max_silence: timedelta = MAX_SILENCE) -> None:
        if not timedelta(seconds=1) <= max_silence <= timedelta(seconds=60):
            raise ValueError("max_silence is 1 to 60 seconds: the broker speaks each half second")
        self.feed, self.position = "", 0
        self._seconds, self._silence_s = seconds, max_silence.total_seconds()
        self._known: _Known | None = None
        self._coming: _Known | None = None
        self._as_of = 0.0  # seconds since 1970, by the broker's clock
        self._good_until = float("-inf")
        self._latest: float = 0.0  # the latest time that our own clock ever told: what was forgotten then stays so

    def take(self, message: scope_pb2.WatchResponse) -> bool:
        """Takes the next message. Whether it changes what is refused.

        Raises: FeedBroken, and Invalid for keys that cannot be read; then nothing that was told counts any more.
        """
        try:
            return self._take(message)
        except BaseException:
            self.forget_all()
            raise

    def _take(self, message: scope_pb2.WatchResponse) -> bool:
        if message.HasField("snapshot"):
            self._take_snapshot(message)
        else:
            start: int = getattr(message, "from")
            if self._known is None or message.feed != self.feed or start != self.position or message.to < start:
                raise FeedBroken(f"expected what follows {self.position} of {self.feed!r}, got {start}")
            self._known.take(message)
            self.position = message.to
        self._heard(message)
        return bool(message.refused or message.suspended or message.HasField("snapshot"))

    def _take_snapshot(self, message: scope_pb2.WatchResponse) -> None:
        if message.snapshot.first:
            self._known, self._coming = None, _Known()
            self.feed, self.position = message.feed, message.to
        coming = self._coming
        if coming is None or (message.feed, message.to) != (self.feed, self.position):
            raise FeedBroken("a snapshot that does not begin with its first part")
        coming.take(message)
        if message.snapshot.last:
            self._known, self._coming = coming, None

    def _heard(self, message: scope_pb2.WatchResponse) -> None:
        if not message.HasField("as_of") or not message.HasField("sent_at"):
            return
        # By the broker's clock alone, so that ours may differ: how old this was when it was sent.
        age = (message.sent_at.ToNanoseconds() - message.as_of.ToNanoseconds()) / 1e9
        if age < 0:
            return  # its clock was set back between the two: the next one will do
        self._as_of = message.as_of.ToNanoseconds() / 1e9
        self._good_until = self._seconds() - age + self._silence_s

    def forget_all(self) -> None:
        """Nothing that was told counts any more."""
        self.feed, self.position, self._known, self._coming = "", 0, None, None

    @property
    def is_whole(self) -> bool:
        """Whether there was a whole snapshot, and no gap since."""
        return self._known is not None

    def stale_at(self) -> float:
        """When this is too old if nothing more is heard, by `seconds`."""
        return self._good_until

    def require_fresh(self, now: datetime) -> None:
        """Raises: Unavailable(SCOPE_STALE)."""
        self._believed(now.timestamp())

    def _believed(self, moment: float | None) -> _Known:
        """What is known, if it is whole and fresh. moment: by our clock, seconds since 1970; None to leave that out."""
        known = self._known
        if known is None or not self._as_of:
            raise Unavailable(Reason.SCOPE_STALE, "the broker's feed has not been heard yet")
        if self._seconds() >= self._good_until:
            raise Unavailable(Reason.SCOPE_STALE, "nothing proven was heard from the broker for too long")
        if moment is not None and not -_SKEW_S <= moment - self._as_of <= self._silence_s + _SKEW_S:
            apart = f"{moment - self._as_of:.1f} s old by our clock"
            raise Unavailable(Reason.SCOPE_STALE, f"what was heard is {apart}: compare the clocks")
        return known

    def require(self, claims: VerifiedClaims, now: datetime) -> None:
        """Raises: Refused where the credential is refused; Unavailable with SUSPENDED, or SCOPE_STALE."""
        moment = now.timestamp()
        known = self._believed(moment)
        if moment >= self._latest:
            self._latest = moment
        elif claims.exp + _LEEWAY_S <= self._latest:
            raise Refused(Reason.EXPIRED, "our clock was set back to before it expired")
        found = known.refused.get(claims.jti)
        if found is not None:
            raise Refused(found[0], "the broker refuses it since")
        for one in known.suspended.values():
            if one.hits(claims):
                raise Unavailable(Reason.SUSPENDED, "the broker is deciding about it again")

    def key(self, kid: str) -> ec.EllipticCurvePublicKey:
        """Raises: StaleKeys, UnknownKey. Not checked: that our own clock agrees with the broker's; `require` does."""
        try:
            known = self._believed(None)
        except Unavailable as error:
            raise StaleKeys(error.reason, error.detail) from error
        found = known.keys.get(kid)
        if found is None:
            raise UnknownKey(Reason.UNAUTHENTICATED, "no key of that kid")
        return found

    def forget(self, now: datetime) -> None:
        """Drops refusals of what has expired, if our clock can be believed: it says about what the broker's does."""
        moment = now.timestamp()
        try:
            refused = self._believed(moment).refused
        except Unavailable:
            return
        self._latest = max(self._latest, moment)
        for jti in [jti for jti, (_, until) in refused.items() if until < self._latest]:
            del refused[jti]
