"""What operators want of scope, as values: each is valid, because it is refused where it is made otherwise."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from broker.action import Action, check_name, check_random_id, check_uri
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.ledger.records import MAX_APPROVAL, MAX_DETAIL

BREAK_GLASS: Final = "broker.breakglass"
MAX_REASON: Final = MAX_DETAIL
LONGEST_PERMIT: Final = MAX_APPROVAL
"""An emergency is over after a day, or it is no emergency: as long as what approved it could have counted."""
_OPERATING: Final = "broker."
_NO_OFFSET: Final = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which credentials: all parts that are set have to fit, and one has to be set.

    principal: a SPIFFE ID, or with a slash at its end all below a path. Raises: Invalid. Not checked: that any fits.
    """

    jti: str = ""
    principal: str = ""
    action: str = ""
    trust_domain: str = ""

    def __post_init__(self) -> None:
        if not (self.jti or self.principal or self.action or self.trust_domain):
            raise Invalid("nothing is selected: name a credential, a workload, an action or a trust domain")
        if self.jti:
            check_random_id(self.jti, "a credential's jti")
        if self.action:
            check_name(self.action)
        if self.trust_domain:
            TrustDomain(name=self.trust_domain)
        if self.principal:
            domain = _workload(self.principal.removesuffix("/")).trust_domain.name
            if self.trust_domain not in {"", domain}:
                raise Invalid(f"nothing fits: no SPIFFE ID of {domain} is in the trust domain {self.trust_domain}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an operator wants refused.

    dry_run: only say what it would hit. standing: new ones as well, until then or until it is lifted. reason: in the
    operator's own words, for the ledger. Raises: Invalid. Not checked: that `until` is to come.
    """

    selection: Selection
    dry_run: bool = False
    standing: bool = False
    until: datetime | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        check_reason(self.reason)
        if self.standing and self.selection.jti:
            raise Invalid("a credential is never minted again: its jti needs no standing denial")
        if self.until is not None:
            _check_time(self.until)
            if not self.standing:
                raise Invalid("only a standing denial ends: a credential that is refused stays so")

    def require(self, now: datetime) -> None:
        """Raises: Invalid where it is over already."""
        if self.until is not None and self.until <= now:
            raise Invalid("a denial that has ended denies nothing: name a time to come")


@dataclass(frozen=True, slots=True, kw_only=True)
class Emergency:
    """What an operator wants permitted although no policy does: this to this workload, on exactly this resource.

    until: whole seconds, UTC. reason: in the operator's own words, for who approves it and for the ledger.

    Raises: Invalid. Not checked: that `until` is to come, and soon; that a policy knows the action.
    """

    principal: str
    action: str
    resource: str
    until: datetime
    reason: str

    def __post_init__(self) -> None:
        _workload(self.principal)
        check_name(self.action)
        check_uri(self.resource, "resource")
        if self.action.startswith(_OPERATING):
            raise Invalid("what operators and approvers do is permitted by policy alone")
        _check_time(self.until)
        if self.until.microsecond:
            raise Invalid("a permit ends at a whole second")
        check_reason(self.reason)
        if not self.reason:
            raise Invalid("a permit that is beside policy has a reason")

    def require(self, now: datetime) -> None:
        """Raises: Invalid where it is over already, or would last too long."""
        if not now < self.until <= now + LONGEST_PERMIT:
            hours = LONGEST_PERMIT.total_seconds() / 3600
            raise Invalid(f"a permit lasts {hours:g} hours at most, and ends at a time to come")

    def to_action(self, issuer: str) -> Action:
        """What is decided, and approved. Raises: Invalid."""
        parameters = {
            "action": self.action,
            "principal": self.principal,
            "reason": self.reason,
            "until": int(self.until.timestamp()),
            "until_utc": f"{self.until:%Y-%m-%dT%H:%M:%SZ}",
        }
        return Action(BREAK_GLASS, self.resource, issuer, parameters)


def check_reason(reason: str) -> None:
    """Raises: Invalid for what the ledger would cut, or a terminal would act on."""
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Invalid(f"a reason is at most {MAX_REASON} printable characters, on one line")


def _workload(text: str) -> SpiffeId:
    found = SpiffeId.parse(text)
    if not found.path:
        raise Invalid("a SPIFFE ID of a workload, or a path of them, is needed: a trust domain is named as such")
    return found


def _check_time(until: datetime) -> None:
    if until.utcoffset() != _NO_OFFSET:
        raise Invalid("a time is in UTC")
