"""Approving as a person: over HTTPS, with an ID token (login.py), at a broker that is known by its SPIFFE ID.

A person's machine needs no SVID and no agent, only the trust bundle of the broker's trust domain. The token is sent
after the broker has been proved to be the broker, never before. What is shown is computed again here: the broker's
digests count for nothing unless they are those of the fields beside them.
"""

import asyncio
import re
import ssl
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import aiohttp
import grpc
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestors.approval import request_digest
from broker.action import Action, parse_json
from broker.client.approvals import Approval, PendingRequest
from broker.client.faults import RefusedByBroker, Unreachable, late, refusal, unintelligible
from broker.errors import BrokerError, Invalid, Reason, Refused
from broker.identity.hop import CLOSE_S, CONNECT_S, End, Hop
from broker.identity.spiffe_id import SpiffeId
from broker.identity.tls_context import peer_chain
from broker.identity.trust import TrustBundle, TrustSnapshot
from broker.identity.x509_svid import verify_x509_svid

DEADLINE_S: Final = 10.0
MAX_ANSWER: Final = 256 * 1024  # bytes: a request with its parameters and text, and many approvals
PATH: Final = "/approvals/v1"

# For people; the client's others speak of SVIDs.
_ADVICE: Final[Mapping[Reason, str]] = {
    Reason.UNAUTHENTICATED: "the broker does not take this login: is it about this request, of an issuer known there?",
    Reason.WRONG_AUDIENCE: "the login is for another client id than the `audience` that the broker has configured",
    Reason.EXPIRED: "the login is too old, or the request has ended: log in again",
}
_NEAREST: Final[Mapping[int, grpc.StatusCode]] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_SECONDS: Final = re.compile(r"[0-9]{1,9}")
_T = TypeVar("_T")


class _Action(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    resource: str
    audience: str
    parameters: dict[str, Any]


class _Shown(msgspec.Struct, frozen=True, kw_only=True):
    action: _Action
    action_digest: str
    principal: str
    request_id: str
    text: str
    asked_at: datetime
    expires_at: datetime
    approvals: tuple[Approval, ...]
    state: str


class _Approved(msgspec.Struct, frozen=True, kw_only=True):
    approval: Approval


class _Withdrawn(msgspec.Struct, frozen=True, kw_only=True):
    correlation_id: str


class _Problem(msgspec.Struct, frozen=True, kw_only=True):
    """RFC 9457, with members of the broker's."""

    reason: str = ""
    correlation_id: str | None = None


def trust_of_file(path: Path, broker_id: SpiffeId) -> TrustSnapshot:
    """The trust bundle of the broker's trust domain in a PEM file, as `spire-server bundle show` writes it.

    Raises: Invalid when it has no certificate; OSError.
    """
    try:
        authorities = tuple(x509.load_pem_x509_certificates(path.read_bytes()))
    except ValueError as error:
        raise Invalid(f"{path} is no trust bundle in PEM: write it with `spire-server bundle show`") from error
    bundle = TrustBundle(trust_domain=broker_id.trust_domain, x509_authorities=authorities)
    return TrustSnapshot(own=None, bundles={broker_id.trust_domain: bundle}, revision=1)


class PersonClient:
    """Calls one broker as a person.

    Each call makes a connection of its own, ends within `deadline_s`, and raises one of

    - `Refused`: the broker looked, and the answer is no. `Invalid`: it could not read what was sent.
    - `Unavailable`: the broker, or what it needs to see, is out of reach, or its answer cannot be believed.

    url: where the broker serves HTTPS ("https://HOST:PORT"); its DNS name means nothing. broker_id: the SPIFFE ID that
    it must have. snapshot: whom we trust now: `trust_of_file`, or `snapshot` of a WorkloadApi. Nothing of our own is
    presented.

    Raises: Invalid when `url` is none.
    """

    def __init__(
        self,
        url: str,
        *,
        broker_id: SpiffeId,
        snapshot: Callable[[], TrustSnapshot],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname or parts.username is not None or parts.query or parts.fragment:
            raise Invalid("the broker is at an https URL without user name, query and fragment")
        self._url, self._base = url, parts._replace(scheme="http", path=parts.path.rstrip("/") + PATH).geturl()
        self._address = parts.hostname, parts.port or 443
        self._broker_id, self._snapshot, self._deadline_s = broker_id, snapshot, deadline_s

    async def show(self, digest: str, id_token: str) -> PendingRequest:
        """One request, as it stands, with its digests computed here from its fields."""
        found = await self._call("show", {"request_digest": digest, "id_token": id_token}, _Shown)
        try:
            action = Action(found.action.name, found.action.resource, found.action.audience, found.action.parameters)
        except Invalid as error:
            raise unintelligible(f"a request for an action that cannot be: {error.detail}") from error
        _require_digest(action, found.principal, found.request_id, digest, action_digest=found.action_digest)
        return PendingRequest(
            request_digest=digest,
            action=action,
            principal=found.principal,
            request_id=found.request_id,
            text=found.text,
            asked_at=found.asked_at,
            expires_at=found.expires_at,
            approvals=found.approvals,
            is_used=found.state == "used",
        )

    async def approve(
        self, request: PendingRequest, id_token: str, *, reason: str = "", valid_for_s: int = 0
    ) -> Approval:
        """Says yes to a request that was looked at. valid_for_s: 0 for the broker's default."""
        _require_digest(request.action, request.principal, request.request_id, request.request_digest)
        asked = {
            "request_digest": request.request_digest,
            "id_token": id_token,
            "reason": reason,
            "valid_for_s": valid_for_s,
        }
        return (await self._call("approve", asked, _Approved)).approval

    async def withdraw(self, digest: str, id_token: str, *, reason: str = "") -> None:
        """Takes our yes back."""
        asked = {"request_digest": digest, "id_token": id_token, "reason": reason}
        await self._call("withdraw", asked, _Withdrawn)

    async def _call(self, name: str, asked: Mapping[str, Any], kind: type[_T]) -> _T:
        hop = Hop(self._dial, rejected=lambda: "the broker ended the connection")
        try:
            async with asyncio.timeout(self._deadline_s):
                path = (await hop.start()).removeprefix("unix:")
                # Plain text as far as the hop in this process, which does the TLS.
                async with (
                    aiohttp.ClientSession(
                        connector=aiohttp.UnixConnector(path),
                        cookie_jar=aiohttp.DummyCookieJar(),
                        auto_decompress=False,
                    ) as session,
                    session.post(
                        f"{self._base}/{name}",
                        data=msgspec.json.encode(asked),
                        headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                        allow_redirects=False,
                    ) as response,
                ):
                    return _answer(response.status, response.headers, await _body(response), kind)
        except TimeoutError:
            raise late(self._url, self._deadline_s, hop.last_error) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"no broker at {self._url}: {hop.last_error or error}") from error
        finally:
            await hop.close()

    async def _dial(self) -> End:
        """A connection to the broker, and to nobody else. Raises: OSError, BrokerError."""
        snapshot = self._snapshot()
        _, end = await asyncio.get_running_loop().create_connection(
            End,
            *self._address,
            ssl=_anonymous_context(snapshot.bundle_for(self._broker_id.trust_domain)),
            server_hostname="",  # no name to send: the server is known by its SPIFFE ID
            ssl_handshake_timeout=CONNECT_S,
            ssl_shutdown_timeout=CLOSE_S,
        )
        try:
            self._check(peer_chain(end.transport.get_extra_info("ssl_object")), snapshot)
        except BaseException:
            end.transport.abort()
            raise
        return end

    def _check(self, chain: Sequence[bytes], snapshot: TrustSnapshot) -> None:
        svid = verify_x509_svid(chain, snapshot, datetime.now(UTC), peer="server")
        if svid.spiffe_id != self._broker_id:
            raise Refused(Reason.UNAUTHENTICATED, f"the server is {svid.spiffe_id}, expected {self._broker_id}")


def _anonymous_context(bundle: TrustBundle) -> ssl.SSLContext:
    """For dialling a server of one trust domain without an SVID of our own. Not checked: the server's SPIFFE ID."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # What stands in a SPIFFE bundle is trusted as it is, whether it signed itself or not.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    roots = b"".join(authority.public_bytes(Encoding.DER) for authority in bundle.x509_authorities)
    if roots:  # OpenSSL takes no empty list; without any it trusts nobody, as it should
        context.load_verify_locations(cadata=roots)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _require_digest(
    action: Action, principal: str, request_id: str, digest: str, *, action_digest: str | None = None
) -> None:
    """Raises: Unreachable unless the digests are those of the fields."""
    computed = action.digest.hex()
    if action_digest not in {None, computed} or request_digest(computed, principal, request_id) != digest:
        raise unintelligible("a request whose digest is not that of its fields: approve nothing of this broker")


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER:
            raise unintelligible(f"more than {MAX_ANSWER} bytes")
    return body


def _answer(status: int, headers: Mapping[str, str], body: bytes, kind: type[_T]) -> _T:
    """Raises: BrokerError where it is none that was asked for."""
    try:
        found = parse_json(body, "the answer")
        if status == 200:
            return msgspec.convert(found, kind)
        problem = msgspec.convert(found, _Problem)
    except (Invalid, msgspec.ValidationError) as error:
        raise unintelligible(f"status {status}, and a body that is not the broker's") from error
    raise _refusal(status, problem, headers.get("Retry-After", ""))


def _refusal(status: int, problem: _Problem, retry_after: str) -> BrokerError:
    wait_ms = int(retry_after) * 1000 if _SECONDS.fullmatch(retry_after) else None
    nearest = _NEAREST.get(status, grpc.StatusCode.PERMISSION_DENIED)
    error = refusal(problem.reason, problem.correlation_id, retry_after_ms=wait_ms, status=nearest)
    advice = _ADVICE.get(error.reason)
    if advice is None:
        return error
    told = RefusedByBroker(error.reason, f"{advice} (correlation id {problem.correlation_id})")
    told.code, told.correlation_id = error.code, error.correlation_id
    return told
