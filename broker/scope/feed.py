"""What guards are told: changes by number, in the order in which they were committed, and all of it for who comes anew.

Each watcher hears of its own audiences alone. Nothing is kept for a watcher: it has a number, and the last changes are
here for all; who falls behind them starts anew, and who does not take what it is sent is cut off (edges/grpc_scope.py).
The numbers count in one process: another process's feed has another name, and is told whole. No I/O.
"""

import itertools
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from broker._proto.actionbroker.v1 import scope_pb2
from broker.errors import Reason
from broker.scope.live import Live
from broker.scope.scope import GRACE_S
from broker.scope.suspension import Suspension

KEPT: Final = 4096
"""Changes kept for those who come back."""
IN_ONE: Final = 2000
"""Credentials in one message: 80 bytes each."""
_FRESH: Final = timedelta(milliseconds=50)
"""A message that was made for one watcher is good for another one for so long: it says when it was sent."""

_Refusal = tuple[str, Reason, int]  # jti, reason, until


@dataclass(slots=True, kw_only=True)
class _Suspended:
    """A suspension as it is told. common: without `jtis`. members: by audience; named one by one where `each`."""

    common: scope_pb2.Suspension
    members: Mapping[str, Sequence[str]]
    each: bool

    def write(self, message: scope_pb2.WatchResponse, audiences: tuple[str, ...]) -> int:
        """Adds it for who watches these, if it concerns them; how much that was."""
        if self.members.keys().isdisjoint(audiences):
            return 0
        told = message.suspended.add()
        told.CopyFrom(self.common)
        if self.each:
            for audience in audiences:
                told.jtis.extend(self.members.get(audience, ()))
        return 1 + len(told.jtis)


@dataclass(slots=True, kw_only=True)
class _Change:
    """One change, by audience."""

    number: int
    refused: Mapping[str, Sequence[_Refusal]] = field(default_factory=dict)
    suspended: _Suspended | None = None
    released: tuple[int, Mapping[str, Sequence[str]], bool] | None = None
    keys: bytes = b""

    @property
    def audiences(self) -> frozenset[str] | None:
        """Whom it concerns; None for all."""
        if self.keys:
            return None
        suspended = self.suspended.members if self.suspended is not None else {}
        released = self.released[1] if self.released is not None else {}
        return frozenset((*self.refused, *suspended, *released))


class Feed:
    """One for each broker process.

    wake: is called after each change; whoever watches then asks for `since`. kept: changes for those who come back.
    in_one: credentials in one message.
    """

    def __init__(self, *, kept: int = KEPT, in_one: int = IN_ONE) -> None:
        self._in_one = in_one
        self.name: Final = secrets.token_hex(8)
        self.position = 0
        self.as_of: datetime | None = None
        self.wake: Callable[[frozenset[str] | None], None] = lambda _: None
        self._log: deque[_Change] = deque(maxlen=kept)
        self._refused: dict[str, dict[str, _Refusal]] = {}
        self._open: dict[int, _Suspended] = {}
        self._released: dict[int, dict[str, set[str]]] = {}
        self._keys = b""
        self._made: dict[tuple[tuple[str, ...], int, int], tuple[datetime, bytes]] = {}

    # -- what happens ------------------------------------------------------------------------------------------------

    def refuse(self, lives: Iterable[Live], reason: Reason) -> None:
        """These are refused for good."""
        by_audience: dict[str, list[_Refusal]] = {}
        for live in lives:
            entry = (live.jti, reason, int(live.expires_at + GRACE_S) + 1)
            by_audience.setdefault(live.audience, []).append(entry)
            self._refused.setdefault(live.audience, {})[live.jti] = entry
        self._add(_Change(number=self.position + 1, refused=by_audience))

    def suspend(self, suspension: Suspension) -> None:
        """These are refused until they are released or refused."""
        members: dict[str, list[str]] = {}
        for live in suspension.waiting.values():
            members.setdefault(live.audience, []).append(live.jti)
        common = suspension.common
        message = scope_pb2.Suspension(id=suspension.id)
        if common is not None:
            message.policy_other_than = common.policy_other_than
            message.actions.extend(sorted(common.actions))
            message.principal = common.principal
            message.trust_domain = common.trust_domain
        told = self._open[suspension.id] = _Suspended(common=message, members=members, each=common is None)
        self._released[suspension.id] = {}
        self._add(_Change(number=self.position + 1, suspended=told))

    def release(self, suspension: int, lives: Iterable[Live], *, all_left: bool = False) -> None:
        """These count again, or, with `all_left`, whatever of the suspension was not refused."""
        found = self._open.get(suspension)
        if found is None:
            return
        by_audience: dict[str, list[str]] = {}
        for live in lives:
            by_audience.setdefault(live.audience, []).append(live.jti)
            self._released[suspension].setdefault(live.audience, set()).add(live.jti)
        if all_left:
            del self._open[suspension], self._released[suspension]
            by_audience = {audience: [] for audience in found.members} | by_audience
        self._add(_Change(number=self.position + 1, released=(suspension, by_audience, all_left)))

    def offer_keys(self, key_set: bytes) -> None:
        """The public keys as they are served; told where they changed."""
        if key_set != self._keys:
            self._keys = key_set
            self._add(_Change(number=self.position + 1, keys=key_set))

    def proven(self, as_of: datetime) -> None:
        """The store was read at `as_of`, and everything committed before it has been told."""
        self.as_of = as_of
        self.wake(None)

    def forget(self, is_refused: Callable[[str], bool]) -> None:
        """Drops refusals that the broker has forgotten: nobody can believe those credentials any more."""
        for audience, refused in list(self._refused.items()):
            for jti in itertools.takewhile(lambda jti: not is_refused(jti), list(refused)):  # the oldest first
                del refused[jti]
            if not refused:
                del self._refused[audience]

    def _add(self, change: _Change) -> None:
        self.position = change.number
        self._log.append(change)
        self._made.clear()
        self.wake(change.audiences)

    # -- what is told ------------------------------------------------------------------------------------------------

    def can_resume(self, name: str, after: int) -> bool:
        """Whether everything after this number is still here."""
        oldest = self._log[0].number if self._log else self.position + 1
        return name == self.name and oldest - 1 <= after <= self.position

    def since(self, audiences: tuple[str, ...], after: int, now: datetime) -> tuple[int, bytes]:
        """The next message for who watches these and knows all up to `after`, as bytes; and up to where it tells.

        Also where nothing is new: then it is a heartbeat. Raises: LookupError unless it can be resumed there.
        """
        if not self.can_resume(self.name, after):
            raise LookupError(f"what came after {after} is not all here any more")
        which = (audiences, after, self.position)
        made = self._made.get(which)
        if made is None or now - made[0] > _FRESH or now < made[0]:
            message, reached = self._message(audiences, after, now)
            made = (now, message.SerializeToString())
            if reached != self.position:
                return reached, made[1]
            self._made[which] = made
        return self.position, made[1]

    def _message(self, audiences: tuple[str, ...], after: int, now: datetime) -> tuple[scope_pb2.WatchResponse, int]:
        message = self._blank(now)
        setattr(message, "from", after)
        reached, size = after, 0
        for change in self._after(after):
            if size >= self._in_one:
                break
            size += self._write(message, change, audiences)
            reached = change.number
        message.to = reached
        if reached != self.position:
            message.ClearField("as_of")  # what was proven by then is not all told yet
        return message, reached

    def _after(self, after: int) -> Iterator[_Change]:
        if after < self.position:
            yield from list(self._log)[len(self._log) - (self.position - after) :]

    def _write(self, message: scope_pb2.WatchResponse, change: _Change, audiences: tuple[str, ...]) -> int:
        size = 1
        for audience in audiences:
            entries = change.refused.get(audience, ())
            _add_refused(message, entries)
            size += len(entries)
        if change.suspended is not None:
            size += change.suspended.write(message, audiences)
        if change.released is not None:
            number, by_audience, all_left = change.released
            if not by_audience.keys().isdisjoint(audiences):
                jtis = [jti for audience in audiences for jti in by_audience.get(audience, ())]
                message.released.add(suspension=number, jtis=jtis, all=all_left)
                size += len(jtis)
        if change.keys:
            message.key_set = change.keys
        return size

    def snapshot(self, audiences: tuple[str, ...], now: datetime) -> list[bytes]:
        """All that who watches these has to know now, in as many messages as it takes."""
        refused = [entry for audience in audiences for entry in self._refused.get(audience, {}).values()]
        parts = [refused[start : start + self._in_one] for start in range(0, len(refused), self._in_one)] or [[]]
        messages = []
        for number, part in enumerate(parts):
            message = self._blank(now)
            message.snapshot.first, message.snapshot.last = number == 0, number == len(parts) - 1
            message.to = self.position
            _add_refused(message, part)
            if number == 0:
                message.key_set = self._keys
                self._write_open(message, audiences)
            messages.append(message.SerializeToString())
        return messages

    def _write_open(self, message: scope_pb2.WatchResponse, audiences: tuple[str, ...]) -> None:
        for number, suspended in self._open.items():
            if suspended.write(message, audiences):
                jtis = [jti for audience in audiences for jti in self._released[number].get(audience, ())]
                if jtis:
                    message.released.add(suspension=number, jtis=jtis)

    def _blank(self, now: datetime) -> scope_pb2.WatchResponse:
        message = scope_pb2.WatchResponse(feed=self.name)
        message.sent_at.CopyFrom(_timestamp(now))
        if self.as_of is not None:
            message.as_of.CopyFrom(_timestamp(self.as_of))
        return message


def _add_refused(message: scope_pb2.WatchResponse, entries: Iterable[_Refusal]) -> None:
    for jti, reason, until in entries:
        message.refused.add(jti=jti, reason=reason, until=until)


def _timestamp(moment: datetime) -> Timestamp:
    found = Timestamp()
    found.FromDatetime(moment)
    return found
