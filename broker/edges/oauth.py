"""What a client says at the token endpoint, and what it is told: RFC 6749, 8693, 9396, 8707, no I/O.

A request is read in two steps. `parse_token_request` takes what is needed to know who asks; what fails there comes from
a stranger and is only counted. `TokenRequest.action` reads the rest, once the caller is known, inside the exchange: so
what a known caller gets wrong is in the ledger.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

import msgspec

from broker.action import Action
from broker.credentials import jose
from broker.credentials.action_token import Claims
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.exchange import Issued
from broker.status import STATUS

MAX_BODY: Final = 64 * 1024  # an assertion, 16 KiB of parameters, and both in percent-encoding
MAX_ASSERTION: Final = 16 * 1024  # WIRE.md: longer ones are refused unread
MAX_FIELDS: Final = 32
FORM: Final = "application/x-www-form-urlencoded"
JWT_SPIFFE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
ACCESS_TOKEN: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 -- a name, not a token
JWT: Final = "urn:ietf:params:oauth:token-type:jwt"

# Visible ASCII where "%" begins an escape. Left as they are by parse_qsl, half escapes would be read two ways.
_FORM = re.compile(r"(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")
_DESCRIPTION_LEAVES_OUT = re.compile(r"[^\x20-\x21\x23-\x5B\x5D-\x7E]")  # RFC 6749 section 5.2
# These say that the client is not who it claims, or cannot show it, when they come up while it authenticates.
_NOT_THE_CLIENT: Final = {
    Reason.MALFORMED,
    Reason.UNAUTHENTICATED,
    Reason.KEY_MISMATCH,
    Reason.WRONG_AUDIENCE,
    Reason.EXPIRED,
}


class GrantType(StrEnum):
    """What may stand in `grant_type`."""

    CLIENT_CREDENTIALS = "client_credentials"
    TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 -- a name, not a token


class TokenRequestRefused(Refused):
    """A refusal for which OAuth has a more exact code than the table in status.py.

    error: of RFC 6749 section 5.2 and its extensions. http: the HTTP status. description: what the client should do
    about its request, to be shown to it; it speaks of the request's form alone, never of policy or facts.
    """

    def __init__(
        self,
        error: str,
        description: str = "",
        *,
        reason: Reason = Reason.MALFORMED,
        http: int = 400,
        detail: str = "",
    ) -> None:
        super().__init__(reason, detail or description)
        self.error, self.http, self.description = error, http, description


def _refuse(description: str, error: str = "invalid_request") -> TokenRequestRefused:
    return TokenRequestRefused(error, description)


def not_a_client(description: str, *, reason: Reason = Reason.UNAUTHENTICATED) -> TokenRequestRefused:
    """`invalid_client`: RFC 6749 section 5.2 allows 401, and there is no other way to say that nobody is known."""
    return TokenRequestRefused("invalid_client", description, reason=reason, http=401)


class _Detail(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One authorization detail as a client may write it: RFC 9396 section 5 wants unknown members refused."""

    type: Literal["action"]
    actions: tuple[str]
    identifier: str
    locations: tuple[str]
    parameters: msgspec.Raw = msgspec.Raw(b"{}")  # read by Action.parse, as over gRPC


_details = msgspec.json.Decoder(tuple[_Detail])


def parse_form(body: bytes) -> dict[str, str]:
    """Names to values of a form, without those that have no value (RFC 6749 section 3.2: as if they were not sent).

    Raises: TokenRequestRefused, also where a name stands twice, known to us or not.
    """
    text = body.decode("ascii", "replace")
    if not text.isascii() or not _FORM.fullmatch(text):
        raise _refuse("the body is not form-encoded: encode it as RFC 6749 appendix B says")
    try:
        pairs = parse_qsl(text, True, True, errors="strict", max_num_fields=MAX_FIELDS) if text else []
    except ValueError as error:
        raise _refuse(f"the body is not a form of at most {MAX_FIELDS} name=value pairs in UTF-8") from error
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        # RFC 8693 section 2.1 and RFC 8707 section 2 allow several targets, but nobody has to issue for them.
        twice = {name for name in names if names.count(name) > 1}
        error_code = "invalid_target" if twice <= {"audience", "resource"} else "invalid_request"
        raise _refuse("a parameter was sent more than once: one action, one target, one value", error_code)
    return {name: value for name, value in pairs if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A request whose caller is not yet known.

    assertion: the JWT-SVID that is to identify the caller, from `client_assertion` or `subject_token`; None where the
    certificate of the connection has to. fields: all of the form; they may be secret.
    """

    grant_type: GrantType
    assertion: str | None
    fields: Mapping[str, str]

    def __repr__(self) -> str:
        return f"TokenRequest({self.grant_type!r})"

    def action(self, principal: str) -> Action:
        """What is asked for, by a caller that was authenticated as `principal`.

        Raises: TokenRequestRefused. Not checked: whether it is allowed.
        """
        check_client_id(self.fields, principal)
        if self.fields.get("requested_token_type", ACCESS_TOKEN) != ACCESS_TOKEN:
            raise _refuse(f"requested_token_type: only {ACCESS_TOKEN} is offered")
        asked = self._asked()
        self._check_target(asked)
        return asked

    def _asked(self) -> Action:
        text = self.fields.get("authorization_details")
        if text is None:
            raise _refuse("authorization_details is missing: one object of type action (RFC 9396)")
        try:
            detail = jose.decode_unique(text.encode(), _details, "authorization_details")[0]
        except (Invalid, UnicodeEncodeError) as error:
            raise TokenRequestRefused(
                "invalid_authorization_details",
                "authorization_details is a JSON array with one object: type action, actions with one name, "
                "identifier, locations with one URI, and parameters, an object; no other members, none twice",
                detail=str(error),
            ) from error
        try:
            return Action.parse(detail.actions[0], detail.identifier, detail.locations[0], bytes(detail.parameters))
        except Invalid as error:  # its sentences are about what the client sent
            raise TokenRequestRefused("invalid_authorization_details", error.detail) from error

    def _check_target(self, asked: Action) -> None:
        """What may be said a second time, outside authorization_details, must say the same."""
        if self.fields.get("audience", asked.audience) != asked.audience:
            raise _refuse("audience is not the location in authorization_details", "invalid_target")
        if self.fields.get("resource", asked.audience) not in {asked.audience, asked.resource}:
            raise _refuse(
                "resource is neither the location nor the identifier in authorization_details", "invalid_target"
            )
        if self.fields.get("scope", asked.name) != asked.name:
            raise _refuse("scope is not the action in authorization_details", "invalid_scope")


def parse_token_request(body: bytes) -> TokenRequest:
    """What has to be known of a request to find out who sent it. Raises: TokenRequestRefused."""
    fields = parse_form(body)
    if "grant_type" not in fields:
        raise _refuse("grant_type is missing")
    try:
        grant_type = GrantType(fields["grant_type"])
    except ValueError as error:
        raise _refuse(f"grant_type: {' and '.join(GrantType)} are offered", "unsupported_grant_type") from error
    if "actor_token" in fields or "actor_token_type" in fields:
        raise _refuse("actor_token: acting for others is not offered")
    assertion = client_assertion(fields)
    subject = _subject_token(fields, grant_type)
    if None not in {assertion, subject} and assertion != subject:
        raise _refuse("subject_token is not the client's own JWT-SVID: acting for others is not offered")
    return TokenRequest(grant_type=grant_type, assertion=assertion or subject, fields=fields)


def check_client_id(fields: Mapping[str, str], principal: str) -> None:
    """Raises: TokenRequestRefused where the form names another client than the one that was authenticated."""
    if fields.get("client_id", principal) != principal:
        raise not_a_client("client_id is not the SPIFFE ID of the SVID: leave it out, or send that")


def client_assertion(fields: Mapping[str, str]) -> str | None:
    """The JWT-SVID by which the client authenticates, if it does so: RFC 7521 section 4.2.

    Raises: TokenRequestRefused.
    """
    if "client_secret" in fields:
        raise not_a_client("there are no client secrets: authenticate by an X.509-SVID or a JWT-SVID")
    kind, assertion = fields.get("client_assertion_type"), fields.get("client_assertion")
    if kind is None and assertion is None:
        return None
    if kind is None or assertion is None:
        raise _refuse("client_assertion and client_assertion_type belong together")
    if kind != JWT_SPIFFE:
        raise not_a_client(f"client_assertion_type: only {JWT_SPIFFE} is offered")
    return _bounded(assertion, "client_assertion")


def _subject_token(fields: Mapping[str, str], grant_type: GrantType) -> str | None:
    """RFC 8693 section 2.1. Raises: TokenRequestRefused."""
    kind, token = fields.get("subject_token_type"), fields.get("subject_token")
    if grant_type is not GrantType.TOKEN_EXCHANGE:
        if kind is not None or token is not None:
            raise _refuse("subject_token belongs to token exchange: send that grant_type, or leave it out")
        return None
    if kind is None or token is None:
        raise _refuse("token exchange needs subject_token and subject_token_type: the client's own JWT-SVID")
    if kind != JWT:
        raise _refuse(f"subject_token_type: only {JWT}, a JWT-SVID, is offered")
    return _bounded(token, "subject_token")


def _bounded(assertion: str, what: str) -> str:
    if len(assertion) > MAX_ASSERTION:
        raise _refuse(f"{what} is larger than {MAX_ASSERTION} bytes")
    return assertion


def token_type(claims: Claims) -> str:
    """RFC 9449 section 5; a certificate-bound one is used as a Bearer token over that certificate (RFC 8705)."""
    return "DPoP" if claims.cnf.jkt else "Bearer"


def while_authenticating(error: BrokerError, grant_type: GrantType) -> BrokerError:
    """`error`, which came up while the caller was being identified, in the words that OAuth has for that.

    RFC 6749 section 5.2 and RFC 7521 section 4.2.1: a client assertion that does not hold is `invalid_client`. RFC 8693
    section 2.2.2: a subject token that does not hold is `invalid_request`.
    """
    if error.reason not in _NOT_THE_CLIENT or isinstance(error, TokenRequestRefused):
        return error
    code, http = ("invalid_request", 400) if grant_type is GrantType.TOKEN_EXCHANGE else ("invalid_client", 401)
    return TokenRequestRefused(code, reason=error.reason, http=http, detail=error.detail)


def error_answer(error: BrokerError, correlation_id: str) -> tuple[int, dict[str, str]]:
    """HTTP status and JSON members of a refusal (RFC 6749 section 5.2), with our reason and correlation id beside."""
    if isinstance(error, TokenRequestRefused):
        http, code, description = error.http, error.error, error.description
    else:
        status = STATUS[error.reason]
        http, code, description = status.token_http, status.oauth, ""
    answer = {"error": code, "reason": str(error.reason), "correlation_id": correlation_id}
    if description:
        answer["error_description"] = _DESCRIPTION_LEAVES_OUT.sub("'", description)
    return http, answer


def token_answer(issued: Issued) -> dict[str, Any]:
    """JSON members of what was granted: RFC 6749 section 5.1, RFC 8693 section 2.2.1, RFC 9396 section 7."""
    claims = issued.claims
    return {
        "access_token": issued.token,
        "issued_token_type": ACCESS_TOKEN,
        "token_type": token_type(claims),
        "expires_in": claims.exp - claims.iat,
        "scope": claims.scope,
        "authorization_details": msgspec.to_builtins(claims.authorization_details),
    }
