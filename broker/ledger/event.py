"""What all records have in common; apart from records.py so that kinds of records can stand in several files."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct, structs

MAX_DETAIL = 500
"""Characters of a free text. Details quote what callers send; a ledger is not theirs to fill."""

Time = Annotated[datetime, Meta(tz=True)]
Method = Literal["mtls", "unix", "jwt-svid", "id-token"]
"""How somebody was identified: by an X.509-SVID, by SPIRE from the PID, by a JWT-SVID, by a person's ID token."""


class Event(Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True, gc=False):
    """What every record has.

    at: aware UTC. correlation_id: the caller got the same one; empty for what the broker did by itself.
    """

    at: Time
    correlation_id: str = ""


class Bounded(Event, frozen=True, kw_only=True, gc=False):
    """With a free text that is cut at `MAX_DETAIL` characters."""

    detail: str = ""

    def __post_init__(self) -> None:
        cut(self, "detail")


def cut(record: Event, name: str) -> None:
    """Cuts a free text of a record that is being made."""
    text = getattr(record, name)
    if len(text) > MAX_DETAIL:
        structs.force_setattr(record, name, text[: MAX_DETAIL - 1] + "…")
