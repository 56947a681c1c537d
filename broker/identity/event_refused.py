"""Why a security event token is not taken, in the words of its delivery (RFC 8935 section 2.4)."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from broker.errors import Reason, Refused


class Err(StrEnum):
    """The registered codes (https://www.iana.org/assignments/secevent), and that of SSF 1.0 section 8.1.4.1."""

    INVALID_REQUEST = "invalid_request"
    INVALID_KEY = "invalid_key"
    INVALID_ISSUER = "invalid_issuer"
    INVALID_AUDIENCE = "invalid_audience"
    AUTHENTICATION_FAILED = "authentication_failed"
    ACCESS_DENIED = "access_denied"
    INVALID_STATE = "invalid_state"


_REASONS: Final[Mapping[Err, Reason]] = MappingProxyType(
    {
        Err.INVALID_REQUEST: Reason.MALFORMED,
        Err.INVALID_KEY: Reason.UNAUTHENTICATED,
        Err.INVALID_ISSUER: Reason.UNAUTHENTICATED,
        Err.INVALID_AUDIENCE: Reason.WRONG_AUDIENCE,
        Err.AUTHENTICATION_FAILED: Reason.UNAUTHENTICATED,
        Err.ACCESS_DENIED: Reason.DENIED,
        Err.INVALID_STATE: Reason.MALFORMED,
    }
)


class EventRefused(Refused):
    """A security event token that is not taken. reason: what is counted; that of `err` where none is given."""

    def __init__(self, err: Err, detail: str, reason: Reason | None = None) -> None:
        super().__init__(reason or _REASONS[err], detail)
        self.err = err
