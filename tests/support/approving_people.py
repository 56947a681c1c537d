"""A broker with its HTTPS edge, the OIDC issuer of the people who approve there, and one request that waits."""

import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from support.approving import Approving, approving
from support.http_broker import Ready
from support.oidc import CLIENT_ID, OidcServer, oidc_server
from support.pki import der, snapshot
from support.whole_broker import BROKER

from broker.client.person import PersonClient
from broker.edges.http_app import build_app
from broker.edges.http_approvals import ApprovalEndpoints
from broker.edges.http_server import HttpServer
from broker.edges.metrics import Metrics
from broker.errors import ApprovalRequired
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer
from broker.identity.server_tls import ServerTls
from broker.identity.spiffe_id import SpiffeId
from broker.identity.trust import TrustSnapshot

BROKER_ID = SpiffeId.parse(BROKER)


@dataclass
class Place:
    """The parts, for tests to turn."""

    desk: Approving
    oidc: OidcServer
    server: HttpServer
    folder: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.port}"

    @property
    def trust(self) -> TrustSnapshot:
        return snapshot(self.desk.parts.authority.bundle())

    def tls(self) -> ssl.SSLContext:
        """Of a client that knows our authority and has no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # an SVID names no host
        context.load_verify_locations(cadata=der(self.desk.parts.authority.root.certificate))
        return context

    def token(self, digest: str = "", /, **changes: Any) -> str:
        return self.oidc.id_token(digest or self.desk.digest, self.desk.now(), **changes)

    def client(self, **changes: Any) -> PersonClient:
        usual = {"broker_id": BROKER_ID, "snapshot": lambda: self.trust, "deadline_s": 5.0}
        return PersonClient(self.url, **(usual | changes))

    async def post(
        self, path: str, body: bytes | dict[str, Any], *, method: str = "POST", **headers: str
    ) -> tuple[int, Mapping[str, str], dict[str, Any]]:
        """As any HTTP client does it. Names of headers with _ for -."""
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls())) as session,
            session.request(method, f"{self.url}{path}", data=data, headers=sent) as response,
        ):
            return response.status, response.headers, json.loads(await response.read())


@asynccontextmanager
async def approving_people(folder: Path) -> AsyncIterator[Place]:
    """Running; its files are in `folder`."""
    async with oidc_server(folder / "issuer") as oidc:
        settings = IssuerSettings(issuer=oidc.issuer, audience=CLIENT_ID, ca_file=str(oidc.ca_file))
        people = IdTokens({oidc.issuer: OidcIssuer(settings)})
        policy = f"""
@id("people") permit (principal in Issuer::"{oidc.issuer}", action == Action::"broker.approve", resource)
when {{ context has person && context.person.groups.contains("release-managers") }};
"""
        async with approving(folder, people=people, more_policy=policy) as desk:
            exchange = desk.parts.exchange
            metrics = Metrics()
            app = build_app(exchange, metrics, Ready(), desk.now)
            ApprovalEndpoints(desk.desk, exchange, metrics, desk.now).add_to(app)
            server = HttpServer(app, ("127.0.0.1", 0), ServerTls(desk.parts.trust).http_context())
            await server.start()
            try:
                with suppress(ApprovalRequired):
                    await desk.ask()
                yield Place(desk, oidc, server, folder)
            finally:
                await server.close()
