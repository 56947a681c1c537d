"""The credentials that have not expired, each with what it rests on, found by any of that. No I/O, no clock.

What a credential rests on is named by fact keys (attestors/contract.py): those of its facts, and these of ours:

    action:<name>          the policies of its action
    bundle:<trust domain>  the authorities that vouch for its caller
    parent:<jti>           the credential that it came from
    standing:<id>          the break-glass permit that gave it
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from sys import intern
from typing import Any, Final

import msgspec

from attestors.contract import FactKey, Facts, Process
from broker.action import Action
from broker.ledger.records import Intent


class _Kept(msgspec.Struct, frozen=True):
    """As in `Action.canonical`."""

    action: str
    audience: str
    parameters: dict[str, Any]
    resource: str


_decode = msgspec.json.Decoder(_Kept).decode
_APPROVING: Final = FactKey("action:broker.approve")  # whether an approval counts is those policies' to say


@dataclass(slots=True, eq=False, kw_only=True)
class Live:
    """One credential.

    seq: of its intent; 0 until that is durable. facts: what the last decision rested on, none where it was read back
    from the store and not decided since. keys: see above. changed: whether any of them changed since it was decided;
    before it is durable, that ends it. Others: as in its intent.
    """

    jti: str
    credential: str
    principal: str
    audience: str
    action: str
    canonical: bytes
    expires_at: float
    method: str
    policy_revision: str
    process: Process | None = None
    authority_sha256: str = ""
    request_id: str = ""
    approval: str = ""
    ticket: str = ""
    session: str = ""
    confirmation: str = ""
    parent: str = ""
    permit: str = ""
    seq: int = 0
    facts: Mapping[str, Facts] = field(default_factory=dict)
    keys: tuple[FactKey, ...] = ()
    changed: bool = False

    @property
    def trust_domain(self) -> str:
        """Of its caller."""
        return self.principal.removeprefix("spiffe://").partition("/")[0]

    def is_current(self) -> bool:
        """Whether nothing that it was decided on has changed. Read by the ledger's thread as well."""
        return not self.changed

    def to_action(self) -> Action:
        """What it is for."""
        kept = _decode(self.canonical)
        return Action.restored(kept.action, kept.resource, kept.audience, kept.parameters, self.canonical)

    @property
    def ends(self) -> datetime:
        """When it expires."""
        return datetime.fromtimestamp(self.expires_at, UTC)


def live_of(intent: Intent, facts: Mapping[str, Facts], *, permit: str = "", seq: int = 0) -> Live:
    """A credential by its intent. facts: of the decision. permit: the id of the break-glass permit that gave it."""
    action = intent.to_action()
    process = intent.process
    live = Live(
        jti=intent.jti,
        credential=intern(intent.credential),  # what many share is kept once
        principal=intern(intent.principal),
        audience=intern(action.audience),
        action=intern(action.name),
        canonical=bytes(intent.action),
        expires_at=intent.expires_at.timestamp(),
        method=intern(intent.method),
        policy_revision=intern(intent.policy_revision),
        process=None if process is None else Process(**{name: getattr(process, name) for name in Process.__slots__}),
        authority_sha256=intern(intent.authority_sha256),
        request_id=intent.request_id,
        approval=intent.approval,
        ticket=intent.ticket,
        session=intent.session,
        confirmation=intent.cnf.get("jkt") or intent.cnf.get("x5t#S256") or "",
        parent=intent.parent,
        permit=permit,
        seq=seq,
        facts=facts,
    )
    live.keys = keys_of(live)
    return live


def keys_of(live: Live) -> tuple[FactKey, ...]:
    """What it rests on."""
    keys = {facts.key for facts in live.facts.values()}
    if live.process is not None:  # whether or not policy asks for them: it is who the credential was given to
        mark = f"{live.process.pid}:{live.process.start_time}"
        keys |= {FactKey(f"process:{mark}"), FactKey(f"spire:{mark}")}
    keys |= {FactKey(f"action:{live.action}"), FactKey(f"bundle:{live.trust_domain}")}
    if live.approval:
        keys |= {FactKey(f"approval:{live.approval}"), _APPROVING}
    if live.ticket:
        keys.add(FactKey(f"ticket:{live.ticket}"))
    if live.session:
        keys.add(FactKey(f"session:{live.session}"))
    if live.parent:
        keys.add(FactKey(f"parent:{live.parent}"))
    if live.permit:
        keys.add(FactKey(f"standing:{live.permit}"))
    return tuple(sorted(keys))


class LiveSet:
    """All of them. Costs nothing while nothing changes: an index, and buckets of one second to forget them by."""

    def __init__(self) -> None:
        self._all: dict[str, Live] = {}
        self._by_key: dict[FactKey, dict[str, Live]] = {}
        self._ending: dict[int, list[str]] = {}
        self._facts: dict[FactKey, Facts] = {}
        self._audiences: Counter[str] = Counter()
        self._forgotten = 0  # seconds since 1970: what ended before it is gone

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Live]:
        return iter(tuple(self._all.values()))

    def get(self, jti: str) -> Live | None:
        """The one with this id."""
        return self._all.get(jti)

    def add(self, live: Live) -> None:
        """Takes it in. Facts that others rest on, too, are kept once."""
        live.facts = {name: self._shared(facts) for name, facts in live.facts.items()}
        self._all[live.jti] = live
        self._audiences[live.audience] += 1
        for key in live.keys:
            self._by_key.setdefault(key, {})[live.jti] = live
        self._ending.setdefault(int(live.expires_at) + 1, []).append(live.jti)

    def _shared(self, facts: Facts) -> Facts:
        known = self._facts.get(facts.key)
        if known is not None and (known.values, known.expires_at) == (facts.values, facts.expires_at):
            return known
        self._facts[facts.key] = facts
        return facts

    def put(self, live: Live, facts: Mapping[str, Facts], permit: str) -> None:
        """It was decided again, on these. One that was forgotten meanwhile stays forgotten."""
        if self._all.get(live.jti) is not live:
            return
        same = permit == live.permit and facts.keys() == live.facts.keys()
        same = same and all(one.key == live.facts[name].key for name, one in facts.items())
        live.facts = {name: self._shared(one) for name, one in facts.items()}
        live.permit = permit
        keys = live.keys if same else keys_of(live)
        if keys == live.keys:
            return
        self._unlink(live)
        live.keys = keys
        for key in keys:
            self._by_key.setdefault(key, {})[live.jti] = live

    def remove(self, jti: str) -> None:
        """Forgets it."""
        live = self._all.pop(jti, None)
        if live is not None:
            self._unlink(live)
            self._audiences[live.audience] -= 1
            if not self._audiences[live.audience]:
                del self._audiences[live.audience]

    def _unlink(self, live: Live) -> None:
        for key in live.keys:
            dependents = self._by_key.get(key)
            if dependents is not None:
                dependents.pop(live.jti, None)
                if not dependents:
                    del self._by_key[key]
                    self._facts.pop(key, None)

    def has_audience(self, audiences: Iterable[str]) -> bool:
        """Whether one of them is for one of these."""
        return any(one in self._audiences for one in audiences)

    def dependents(self, key: FactKey) -> list[Live]:
        """What rests on it, the oldest first."""
        return list(self._by_key.get(key, {}).values())

    def keys(self, prefix: str) -> list[FactKey]:
        """The keys that something rests on, of those that begin so."""
        return [key for key in self._by_key if key.startswith(prefix)]

    def forget(self, now: datetime) -> int:
        """Forgets what has expired; how many. A clock that goes back brings none of them back."""
        second = int(now.timestamp())
        if second <= self._forgotten:
            return 0
        self._forgotten, before = second, len(self._all)
        for bucket in [one for one in self._ending if one <= second]:
            for jti in self._ending.pop(bucket):
                self.remove(jti)
        return before - len(self._all)

    def select(self, *, jti: str = "", principal: str = "", action: str = "", trust_domain: str = "") -> list[Live]:
        """Those that fit all that is given. principal: a SPIFFE ID, or with a slash at its end all below a path."""
        found: Iterable[Live] = self if not jti else filter(None, [self._all.get(jti)])
        return [
            one
            for one in found
            if (not action or one.action == action)
            and (not trust_domain or one.trust_domain == trust_domain)
            and is_principal(one.principal, principal)
        ]


def is_principal(principal: str, selected: str) -> bool:
    """Whether it is the one that was selected, or below the path that was; all are where none was."""
    if selected.endswith("/"):
        return principal.startswith(selected)
    return selected in ("", principal)
