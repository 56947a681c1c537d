"""What Envoy tells of a request: one reading of it, or none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self
from urllib.parse import unquote

from broker._proto.envoy.service.auth.v3 import external_auth_pb2
from broker.errors import Invalid, Reason, Unavailable
from broker.guard.http_edge import Headers, Incoming, values
from broker.guard.http_request import MAX_BODY, Request

OURS: Final = "x-action-broker-"
"""Headers that begin so tell the service who was admitted; from a client they tell nothing."""
_CREDENTIALS: Final = frozenset({"authorization", "dpop"})
_PARTIAL: Final = "x-envoy-auth-partial-body"  # Envoy's own note beside a body: "true" where it cut it off


class MisconfiguredEnvoy(Unavailable):
    """Envoy does not tell what has to be known. Its configuration has to change; until then nobody is admitted."""

    def __init__(self, what: str) -> None:
        super().__init__(Reason.SCOPE_STALE, f"the ext_authz filter is not configured as in deploy/envoy: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, as the service would get it from Envoy.

    target: path and query, nothing decoded. headers: each one, with names in lower case and values in Latin-1.
    body: as far as Envoy tells it; never for gRPC. certificate: the client's, on its TLS connection to Envoy; PEM,
    percent-encoded. mistake: what keeps Envoy from telling it rightly.
    """

    method: str
    target: str
    host: str
    headers: Headers
    body: bytes = field(repr=False)
    certificate: str = field(repr=False)
    mistake: str | None

    @classmethod
    def of(cls, request: external_auth_pb2.CheckRequest) -> Self:
        """As Envoy tells it. Not checked: anything, `check` does."""
        http = request.attributes.request.http
        mistake = None
        if not http.HasField("header_map"):
            mistake = "set encode_raw_headers, or of two headers with one name only one may be seen"
        elif http.body:
            mistake = "with_request_body needs pack_as_bytes"
        headers = [(one.key.lower(), one.raw_value.decode("latin-1")) for one in http.header_map.headers]
        return cls(
            method=http.method,
            target=http.path,
            host=http.host.lower(),
            headers=tuple(_apart(headers)),
            body=http.raw_body,
            certificate=request.attributes.source.certificate,
            mistake=mistake,
        )

    @property
    def path(self) -> str:
        """Without the query, nothing decoded."""
        return self.target.partition("?")[0]

    @property
    def is_grpc(self) -> bool:
        """Whether Envoy and the service take it for gRPC, by its content type."""
        return any(value.startswith("application/grpc") for value in values(self.headers, "content-type"))

    @property
    def forged(self) -> list[str]:
        """Names of headers that would tell the service who was admitted, also in the spelling of CGI and WSGI."""
        return sorted({name for name, _ in self.headers if name.replace("_", "-").startswith(OURS)})

    def check(self) -> None:
        """Raises: MisconfiguredEnvoy; Invalid for a path or query that no URI has."""
        if self.mistake is not None:
            raise MisconfiguredEnvoy(self.mistake)
        if not self.target.isascii() or not self.target.isprintable() or set(self.target) & set('#\\ "<>^`{|}'):
            raise Invalid("the path or the query is not one of a URI")  # RFC 3986 sections 3.3 and 3.4

    def incoming(self) -> Incoming:
        """For the decision on HTTP."""
        return Incoming(
            method=self.method,
            path=unquote(self.path),
            raw_path=self.path.encode("ascii"),
            query_string=self.target.partition("?")[2],
            headers=self.headers,
            leaf_pem=self.leaf_pem,
            read=self._whole_body,
        )

    def call(self) -> Request:
        """What the mapping of a gRPC method sees: no message, Envoy does not tell it."""
        return Request(method=self.method, path=self.path, params={}, query_string="", headers=self.headers)

    def leaf_pem(self) -> str | None:
        """The client's certificate. Never from a header: whoever can reach Envoy could write one."""
        return unquote(self.certificate, errors="strict") or None

    async def _whole_body(self) -> bytes:
        """Raises: Invalid where it is too large, or Envoy does not tell all of it."""
        if self.is_grpc or any(value != "false" for value in values(self.headers, _PARTIAL)):
            raise Invalid("a body that Envoy does not tell, or only a part of")
        if len(self.body) > MAX_BODY:
            raise Invalid(f"a body of more than {MAX_BODY} bytes")
        announced = {*values(self.headers, "content-length"), *values(self.headers, "transfer-encoding")} - {"0"}
        if announced and not self.body:
            raise Invalid("a body that Envoy does not tell")
        return self.body


def _apart(headers: Sequence[tuple[str, str]]) -> Headers:
    """Without HTTP/2's own (RFC 9113 section 8.3). Envoy may join two credentials by a comma, which none has inside."""
    found = []
    for name, value in headers:
        if name in _CREDENTIALS:
            found += [(name, part.strip()) for part in value.split(",")]
        elif not name.startswith(":"):
            found.append((name, value))
    return found
