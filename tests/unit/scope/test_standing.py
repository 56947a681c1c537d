"""What stands beside policy: each denial against exactly what it names, each permit for exactly that, for its time.

What operators may say, and how it is kept: test_operator_revocation.py and test_break_glass.py.
"""

from datetime import timedelta

import pytest
from support.lives import NOW
from support.whole_broker import AGENT, OPERATOR, RESOURCE

from broker.decision.decide import Permit
from broker.errors import Reason, Refused
from broker.ledger.records import BreakGlass, StandingDenial
from broker.scope.standing import Standing

LATER = NOW + timedelta(minutes=10)
FOREIGN = "spiffe://other.test/build/agent"
BY = {"by": OPERATOR, "policies": ("operators",), "policy_revision": "sha256:1"}


def denial(entry_id: str = "denial", **changes: object) -> StandingDenial:
    return StandingDenial(**({"at": NOW, "id": entry_id} | BY | changes))


def permit(entry_id: str = "permit", **changes: object) -> BreakGlass:
    usual = {"principal": AGENT, "action": "orders.closed", "resource": RESOURCE, "until": LATER}
    approval = {"approval": "ab" * 32, "approvers": ("ann", "bob")}
    return BreakGlass(**({"at": NOW, "id": entry_id} | usual | approval | BY | changes))


def denied(standing: Standing, principal: str = AGENT, action: str = "orders.read", after_s: float = 0) -> bool:
    try:
        standing.require(principal, action, NOW + timedelta(seconds=after_s))
    except Refused as error:
        return error.reason is Reason.REVOKED
    return False


@pytest.mark.parametrize(
    ("chosen", "hit"),
    [
        ({"principal": AGENT}, {(AGENT, "orders.read"), (AGENT, "orders.once")}),
        ({"principal": "spiffe://acme.test/build/"}, {(AGENT, "orders.read"), (AGENT, "orders.once")}),
        ({"action": "orders.read"}, {(AGENT, "orders.read"), (OPERATOR, "orders.read"), (FOREIGN, "orders.read")}),
        ({"trust_domain": "other.test"}, {(FOREIGN, "orders.read"), (FOREIGN, "orders.once")}),
        ({"trust_domain": "acme.test", "principal": FOREIGN}, set()),
        ({"principal": AGENT, "action": "orders.once"}, {(AGENT, "orders.once")}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_denial_is_against_what_fits_all_that_it_names(chosen: dict[str, str], hit: set[tuple[str, str]]) -> None:
    standing = Standing([denial(**chosen)])
    asked = {(who, what) for who in (AGENT, OPERATOR, FOREIGN) for what in ("orders.read", "orders.once")}
    assert {one for one in asked if denied(standing, *one)} == hit


def test_a_denial_stands_until_its_time_or_until_it_is_lifted_and_one_of_two_is_enough() -> None:
    standing = Standing([denial("brief", until=LATER), denial("endless", action="orders.once")])
    assert denied(standing)
    assert denied(standing, after_s=599)
    assert not denied(standing, after_s=600)
    assert denied(standing, action="orders.once", after_s=10**6)
    standing.remove("endless")
    standing.remove("never-there")
    assert denied(standing, action="orders.once")
    standing.remove("brief")
    assert not denied(standing, action="orders.once")


def test_a_permit_is_for_exactly_one_workload_action_and_resource_and_for_its_time() -> None:
    standing = Standing([permit(), permit("longer", until=LATER + timedelta(minutes=1))])
    asked = (AGENT, "orders.closed", RESOURCE)
    assert standing.permit(*asked, NOW) == Permit(id="longer", until=LATER + timedelta(minutes=1))
    assert standing.permit(*asked, LATER + timedelta(minutes=1)) is None
    for other in ((OPERATOR, *asked[1:]), (AGENT, "orders.read", RESOURCE), (*asked[:2], f"{RESOURCE}/x")):
        assert standing.permit(*other, NOW) is None
    assert not denied(standing, *asked[:2]), "and it denies nothing"


def test_what_is_over_is_dropped_and_named_once() -> None:
    standing = Standing([permit(), denial("endless"), denial("brief", until=LATER)])
    assert standing.forget(NOW) == []
    assert {one.id for one in standing.forget(LATER)} == {"permit", "brief"}
    assert standing.forget(LATER) == []
    assert [one.id for one in standing.entries(LATER)] == ["endless"]
    assert len(standing) == 1


def test_a_permit_is_found_by_each_approval_that_gave_it() -> None:
    standing = Standing([permit(), permit("other", approval="cd" * 32), denial()])
    assert [one.id for one in standing.given_by("ab" * 32, "bob")] == ["permit"]
    assert standing.given_by("ab" * 32, "carol") == []
    assert standing.permits() == 2
