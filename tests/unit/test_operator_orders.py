"""What operators want is a value that makes sense, or none."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from support.operating import operating, why
from support.whole_broker import AGENT, OPERATOR

from broker.errors import Invalid, Reason
from broker.ledger.records import Refusal
from broker.operator_orders import Emergency, Order, Selection

DOMAIN = "acme.test"
LATER = datetime.now(UTC) + timedelta(hours=1)


@pytest.mark.parametrize(
    "make",
    [
        Selection,
        lambda: Selection(jti="short"),
        lambda: Selection(jti="x" * 65),
        lambda: Selection(jti="a-jti-with-a-\x00-in-it"),
        lambda: Selection(principal="build/agent"),
        lambda: Selection(principal="spiffe://acme.test"),
        lambda: Selection(principal="spiffe://acme.test/"),
        lambda: Selection(principal="spiffe://acme.test//"),
        lambda: Selection(principal="spiffe://acme.test/build//"),
        lambda: Selection(principal="spiffe://acme.test/build/*"),
        lambda: Selection(principal="spiffe://ACME.test/build"),
        lambda: Selection(principal="spiffe://acme.test/build/../x"),
        lambda: Selection(principal="spiffe://acme.test/build\n"),
        lambda: Selection(action="orders read"),
        lambda: Selection(action=".read"),
        lambda: Selection(action="a" * 129),
        lambda: Selection(action="orders.read\n"),
        lambda: Selection(trust_domain="spiffe://acme.test"),
        lambda: Selection(trust_domain="ACME.test"),
        lambda: Selection(trust_domain="acme.test/"),
        lambda: Selection(principal=AGENT, trust_domain="other.test"),
        lambda: Order(selection=Selection(jti="0" * 32), standing=True),
        lambda: Order(selection=Selection(principal=AGENT), until=LATER),
        lambda: Order(selection=Selection(principal=AGENT), standing=True, until=LATER.replace(tzinfo=None)),
        lambda: Order(
            selection=Selection(principal=AGENT), standing=True, until=LATER.astimezone(timezone(timedelta(hours=2)))
        ),
        lambda: Order(selection=Selection(principal=AGENT), reason="x" * 501),
        lambda: Order(selection=Selection(principal=AGENT), reason="two\nlines"),
        lambda: Order(selection=Selection(principal=AGENT), reason="\x1b[2J"),
    ],
)
def test_an_order_that_makes_no_sense_is_none(make: object) -> None:
    with pytest.raises(Invalid):
        make()  # type: ignore[operator]


def test_an_order_that_makes_sense_is_one() -> None:
    for principal in (AGENT, "spiffe://acme.test/build/", f"spiffe://acme.test/{'x' * 2000}"):
        assert Selection(principal=principal, trust_domain=DOMAIN, action="orders.read")
    assert Order(selection=Selection(jti="0" * 32), reason="ein Grund, auch mit Umlauten: ä")
    assert Order(selection=Selection(principal=AGENT), standing=True, until=LATER)


@pytest.mark.parametrize(
    "change",
    [
        {"principal": ""},
        {"principal": "build/agent"},
        {"principal": "spiffe://acme.test/build/"},
        {"principal": "spiffe://acme.test"},
        {"action": ""},
        {"action": "orders closed"},
        {"action": "broker.operate"},
        {"action": "broker.approve"},
        {"action": "broker.breakglass"},
        {"action": "broker.score"},
        {"resource": ""},
        {"resource": "https://orders.acme.test/orders/../17"},
        {"resource": "https://orders.acme.test/orders/"},
        {"reason": ""},
        {"reason": "x" * 501},
        {"reason": "two\nlines"},
    ],
    ids=str,
)
async def test_an_emergency_that_makes_no_sense_is_none_and_that_is_recorded(
    tmp_path: Path, change: dict[str, str]
) -> None:
    async with operating(tmp_path) as found:
        with pytest.raises(Invalid):
            found.emergency(**change)()
        assert await why(found.ask(found.emergency(**change))) == Reason.MALFORMED
        assert isinstance(found.emergency()(), Emergency), "the control"
        (refusal,) = [one for one in await found.parts.records() if isinstance(one, Refusal)]
    assert (refusal.stage, refusal.principal, refusal.reason) == ("break_glass", OPERATOR, Reason.MALFORMED)
