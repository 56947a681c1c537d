"""The table `[ticket]`: the ticket systems whose tickets may be named, and where things stand in their answers."""

import re
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from attestors.json_pointer import Pointer
from attestors.ticket_url import check_headers, check_template
from broker.cli.config_signing import Name
from broker.cli.config_types import AbsolutePath, Table

HMAC: Final = "hmac"
BEARER: Final = "bearer"
SIGNATURE_HEADER: Final = "X-Hub-Signature-256"
AUTHORIZATION: Final = "Authorization"


def _pointer(text: str) -> str:
    Pointer.parse(text)
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return text


def _header_name(text: str) -> str:
    check_headers({text: "-"}) if text.lower() != AUTHORIZATION.lower() else None
    return text


PointerText = Annotated[str, AfterValidator(_pointer)]
HeaderName = Annotated[str, AfterValidator(_header_name)]


class Webhook(Table):
    """Says which ticket may have changed; nothing in it is believed. POST <issuer>/hooks/tickets/<system>.

    secret_file: one secret a line, the second for while it changes. scheme: the secret is the key of an HMAC-SHA256
    over the body, in hexadecimal digits, or is sent itself. header: where that stands; X-Hub-Signature-256 or
    Authorization. id: pointer to the ticket's id in the body. delivery_header, timestamp_header: name the delivery, and
    say when (seconds since 1970); each stands before the body, with a `.` after it, in what is signed.
    """

    secret_file: AbsolutePath
    id: PointerText
    scheme: Literal["hmac", "bearer"] = HMAC
    header: HeaderName | None = None
    delivery_header: HeaderName | None = None
    timestamp_header: HeaderName | None = None

    @model_validator(mode="after")
    def _what_counts_is_signed(self) -> Self:
        if self.scheme != HMAC and (self.timestamp_header or self.delivery_header) is not None:
            raise ValueError("what is not signed proves nothing: delivery and timestamp go with scheme hmac")
        if self.header is not None and self.scheme == HMAC and self.header.lower() == AUTHORIZATION.lower():
            raise ValueError("an HMAC has a header of its own")
        return self


class System(Table):
    """A ticket system. url: with `{id}` for the ticket's id. id_pattern: a regular expression for whole ids there.

    credentials_file: `user:password` for basic, the token for bearer; read again when it changes. state, authorises,
    authorised_by, id: JSON Pointers (RFC 6901) into the answer. authorises_each: into each thing in that list.
    """

    url: Annotated[str, AfterValidator(check_template)]
    id_pattern: Annotated[str | None, AfterValidator(lambda text: text if text is None else _pattern(text))] = None
    credentials: Literal["basic", "bearer"] | None = None
    credentials_file: AbsolutePath | None = None
    headers: Annotated[dict[str, str], AfterValidator(lambda found: dict(check_headers(found)))] = Field(
        default_factory=dict
    )
    state: PointerText
    open_states: tuple[str, ...] = Field(min_length=1, max_length=64)
    authorises: PointerText
    authorises_each: PointerText | None = None
    authorised_by: PointerText | None = None
    id: PointerText | None = None
    ca_file: AbsolutePath | None = None
    timeout_ms: int = Field(default=1500, ge=100, le=5000)
    poll_ms: int = Field(default=1000, ge=200, le=300_000)
    webhook: Webhook | None = None

    @model_validator(mode="after")
    def _credentials_are_whole(self) -> Self:
        if (self.credentials is None) != (self.credentials_file is None):
            raise ValueError("credentials (basic or bearer) and credentials_file go together")
        return self


class Ticket(Table):
    """systems: by the name that callers say before the colon."""

    systems: dict[Name, System] = Field(default_factory=dict)
