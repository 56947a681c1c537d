"""What is asked about a credential that somebody holds or was shown, and what is told: RFC 7662, RFC 7009, no I/O."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from broker.credentials.credential import Credential
from broker.credentials.mint import ACTION_TOKEN
from broker.edges.oauth import TokenRequestRefused, check_client_id, client_assertion, parse_form, token_type

INACTIVE: Final = {"active": False}
"""All that is said of a credential that does not count, or is none of the asker's business: RFC 7662 section 2.2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AboutToken:
    """A request about one credential, from a client that is not yet known. assertion, fields: as in TokenRequest."""

    assertion: str | None
    fields: Mapping[str, str]

    def __repr__(self) -> str:
        return "AboutToken()"

    def token(self, principal: str) -> str:
        """The credential, for a client that was authenticated as `principal`.

        `token_type_hint` is not looked at: a credential says its type itself. Raises: TokenRequestRefused.
        """
        check_client_id(self.fields, principal)
        if "token" not in self.fields:
            raise TokenRequestRefused("invalid_request", "token is missing")
        return self.fields["token"]


def parse_about_token(body: bytes) -> AboutToken:
    """What has to be known of a request to find out who sent it. Raises: TokenRequestRefused."""
    fields = parse_form(body)
    return AboutToken(assertion=client_assertion(fields), fields=fields)


def introspection_answer(found: Credential) -> dict[str, Any]:
    """RFC 7662 section 2.2, with what RFC 9068, 9396, 9449 and 8705 add: all that the credential says itself."""
    # A signing grant is used here alone, and not as an access token: RFC 8693 section 2.2.1.
    kind = token_type(found.claims) if found.kind is ACTION_TOKEN else "N_A"
    return {"active": True, "token_type": kind, **msgspec.to_builtins(found.claims)}
