"""What the front socket says of connections that it does not take: enough to see it, and not enough to fill a disk."""

import asyncio
from pathlib import Path

from structlog.testing import capture_logs
from support.virtual_time import in_virtual_time

from broker.errors import BrokerError, Reason, Refused
from broker.identity.unix_front import UnixFront


@in_virtual_time
async def test_a_reason_is_logged_once_a_minute_and_each_refusal_is_told(tmp_path: Path) -> None:
    """Strangers must not fill the disk."""
    told: list[BrokerError] = []
    front = UnixFront(tmp_path / "front", tmp_path / "private" / "b", on_refused=told.append)
    with capture_logs() as logs:
        for _ in range(10):
            front._refused(Refused(Reason.QUOTA, "too many"))
            front._refused(Refused(Reason.NOT_ATTESTED, "gone"))
            await asyncio.sleep(13)
    assert [(one["reason"], one["event"]) for one in logs] == [
        (Reason.QUOTA, "connection refused"),
        (Reason.NOT_ATTESTED, "connection refused"),
    ] * 2
    assert len(told) == 20
