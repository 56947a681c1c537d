"""An action token in its holder's hands, with the key that it is bound to."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import urlsplit, urlunsplit

import msgspec

from broker._proto.actionbroker.v1 import broker_pb2
from broker.action import Action
from broker.client.faults import unintelligible
from broker.credentials import action_token, jose, mcp_call
from broker.credentials.action_token import Confirmation, Use
from broker.credentials.dpop import ProofKey
from broker.errors import Invalid
from broker.identity.trust import OwnSvid

TokenType = Literal["DPoP", "Bearer"]
_METHOD: Final = re.compile(r"/[A-Za-z0-9_.]+/[A-Za-z0-9_]+")
_AUTHORITY: Final = re.compile(r"(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_DEFAULT_PORT: Final = {"https": 443, "http": 80}
_USES: Final[Mapping[str, Use]] = {"once": "once", "single": "single", "ttl": "ttl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionToken:
    """A token for one action, and the means to use it. Use it soon: it lives a minute unless policy says otherwise.

    token_type: "DPoP" is bound to `key`, and each use carries a proof of it; "Bearer" is bound to the certificate of
    `svid` (RFC 8705): call the service over mutual TLS with that one, also if a newer one has come meanwhile.
    use: "once" (in each process of the service), "single" (in the world) or "ttl" (until it expires).
    correlation_id: finds the decision in the broker's ledger.
    """

    access_token: str = field(repr=False)
    token_type: TokenType
    expires_at: datetime
    use: Use
    action: Action
    correlation_id: str
    key: ProofKey | None = field(default=None, repr=False, compare=False)
    svid: OwnSvid | None = field(default=None, repr=False, compare=False)

    def is_usable(self, now: datetime | None = None) -> bool:
        """Whether it is in time, and the certificate that it is bound to is. now: aware; the clock's without.

        Not checked: whether it was used, or no longer counts. The service and the broker know that.
        """
        now = now or datetime.now(UTC)
        return now < self.expires_at and (self.svid is None or now < self.svid.not_after)

    def grpc_metadata(
        self, method: str, *, authority: str, nonce: str | None = None, now: datetime | None = None
    ) -> tuple[tuple[str, str], ...]:
        """Metadata for one call, to be used once: `authorization`, and `dpop` where the token is bound to a key.

        method: "/package.Service/Method". authority: the service's host as it knows itself, with its port unless that
        is 443. nonce: the one that the service asked for.

        Raises: Invalid when no such call can exist.
        """
        if not _METHOD.fullmatch(method):
            raise Invalid('method is not written "/package.Service/Method"')
        if not _AUTHORITY.fullmatch(authority):
            raise Invalid('authority is not a host in lower case with at most a port, such as "orders.acme.test"')
        return tuple(self._credentials("POST", _htu(f"https://{authority}{method}"), nonce, now).items())

    def http_headers(
        self, method: str, url: str, *, nonce: str | None = None, now: datetime | None = None
    ) -> dict[str, str]:
        """Headers for one request, to be used once: `authorization`, and `dpop` where the token is bound to a key.

        url: as requested; its query is not part of the proof (RFC 9449 section 4.2). nonce: as the service asked for.

        Raises: Invalid when `url` is no http or https URL.
        """
        return self._credentials(method.upper(), _htu(url), nonce, now)

    def mcp_meta(self, tool: str, *, now: datetime | None = None) -> dict[str, str]:
        """The `_meta` of one call of an MCP tool over stdio, to be used once; over HTTP there are `http_headers`.

        Raises: Invalid where no tool has such a name, or the token is bound to a certificate: stdio has none.
        """
        if self.key is None:
            raise Invalid("a token bound to a certificate needs TLS: ask for one bound to a key")
        found = self._credentials("POST", mcp_call.proof_url(self.action.audience, tool), None, now)
        return {mcp_call.AUTHORIZATION: found["authorization"], mcp_call.DPOP: found["dpop"]}

    def _credentials(self, method: str, htu: str, nonce: str | None, now: datetime | None) -> dict[str, str]:
        found = {"authorization": f"{self.token_type} {self.access_token}"}
        if self.key is not None:
            now = now or datetime.now(UTC)
            found["dpop"] = self.key.prove(method, htu, now, nonce=nonce, token=self.access_token)
        return found


def _htu(url: str) -> str:
    """`url` as a proof names it: without query and fragment, in the normal form of RFC 3986 section 6.2.2 and 6.2.3."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Invalid("url cannot be read") from error
    if parts.scheme not in _DEFAULT_PORT or not parts.hostname or parts.username is not None:
        raise Invalid("url is not an http or https URL with a host and without userinfo")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    netloc = host if port in {None, _DEFAULT_PORT[parts.scheme]} else f"{host}:{port}"
    return urlunsplit((parts.scheme, netloc, parts.path or "/", "", ""))


class Holder:
    """What this client can prove to hold: one key of its own, or the certificates that it showed to the broker."""

    def __init__(self, key: ProofKey | None = None) -> None:
        self.key = key
        self._svids: dict[str, OwnSvid] = {}

    def remember(self, svid: OwnSvid) -> None:
        """Keeps an SVID under the name that tokens give it (RFC 8705 section 3.1), as long as it is valid.

        A token may be bound to an older one than today's: a connection keeps the one that it was made with.
        """
        now = datetime.now(UTC)
        kept = {name: old for name, old in self._svids.items() if now < old.not_after}
        self._svids = {**kept, _thumbprint(svid): svid}

    def take(self, message: broker_pb2.ActionToken, action: Action, correlation_id: str) -> ActionToken:
        """The token in an answer, if it is for `action` and bound to what we hold.

        It is read and not verified: whoever sent it has been, and the service verifies. To most clients a token is
        opaque (RFC 9068 section 6); this one must know which of its certificates to use, and looks at no more.

        Raises: Unreachable when the answer cannot be used.
        """
        bound = _read(message.access_token)
        if bound.action_digest != action.digest.hex():
            raise unintelligible("the token is for another action")
        key = self.key if self.key is not None and self.key.jkt == bound.cnf.jkt else None
        svid = self._svids.get(bound.cnf.x5t_s256 or "")
        if key is None and svid is None:
            raise unintelligible("the token is bound to a key that is not ours")
        token_type: TokenType = "DPoP" if key else "Bearer"
        use = _USES.get(message.use)
        if message.token_type != token_type or use is None:
            raise unintelligible(f"a token of type {message.token_type!r} for use {message.use!r}")
        return ActionToken(
            access_token=message.access_token,
            token_type=token_type,
            expires_at=message.expires_at.ToDatetime(tzinfo=UTC),
            use=use,
            action=action,
            correlation_id=correlation_id,
            key=key,
            svid=svid,
        )


class _Bound(msgspec.Struct, frozen=True, kw_only=True):
    cnf: Confirmation
    action_digest: str


_bound = msgspec.json.Decoder(_Bound)


def _read(token: str) -> _Bound:
    try:
        return jose.decode_unique(jose.parse(token, typ=action_token.TYPE).payload, _bound, "the token")
    except Invalid as error:
        raise unintelligible(error.detail) from error


def _thumbprint(svid: OwnSvid) -> str:
    return jose.b64url(hashlib.sha256(svid.chain[0]).digest())
