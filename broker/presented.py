"""What a caller shows beside its identity."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from broker.action import check_random_id
from broker.decision.question import SESSION, TICKET
from broker.errors import Invalid

_REFERENCE: Final = re.compile(r"[A-Za-z0-9._~:-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Presented:
    """What a caller shows beside its identity, for one decision.

    request_id: its own id of this request, to which approvals are given; "" for none. ticket, session: names of those
    that it acts for and in, "" for none. evidence: not verified, by attestor. credential: the id of the credential that
    is decided again, "" where none is minted yet.
    """

    request_id: str = ""
    ticket: str = ""
    session: str = ""
    evidence: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    credential: str = ""

    def require_readable(self) -> None:
        """Raises: Invalid for a name that cannot be one."""
        if self.request_id:
            check_random_id(self.request_id, "a request id")
        for what, text in (("a ticket", self.ticket), ("a session", self.session)):
            if text and not _REFERENCE.fullmatch(text):
                raise Invalid(f"{what} is named by 1 to 128 characters of A-Z a-z 0-9 . _ ~ : -")

    @property
    def named(self) -> frozenset[str]:
        """The attestors that have to be asked about what is named, whether or not policy does."""
        return frozenset(name for name, text in ((TICKET, self.ticket), (SESSION, self.session)) if text)


NOTHING: Final = Presented()
