"""An OIDC issuer on loopback, over TLS with a CA of its own: discovery, authorization, token, keys. It can misbehave.

It is a real server, and strict about what it is asked: PKCE, redirect URI, client id and code are checked. Whoever
comes to its authorization endpoint is logged in as `person`, at once.
"""

import asyncio
import base64
import hashlib
import ipaddress
import json
import secrets
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from support.pki import CA, JwtAuthority, base64url, jws

CLIENT_ID = "action-broker"
DISCOVERY = "/.well-known/openid-configuration"
JWKS = "/jwks"
AUTHORIZE = "/authorize"
TOKEN = "/token"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Signer:
    """A key of the issuer, for one algorithm."""

    alg: str = "ES256"
    kid: str = field(default_factory=lambda: secrets.token_hex(4))
    key: Any = None

    def __post_init__(self) -> None:
        if self.key is None:
            made = ed25519.Ed25519PrivateKey.generate() if self.alg == "EdDSA" else JwtAuthority(alg=self.alg).key
            object.__setattr__(self, "key", made)

    def sign(self, data: bytes) -> bytes:
        if self.alg == "EdDSA":
            return bytes(self.key.sign(data))
        return JwtAuthority(alg=self.alg, key=self.key).raw_signature(data)

    def jwk(self, **changes: Any) -> dict[str, Any]:
        if self.alg == "EdDSA":
            x = base64url(self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))
            found = {"kty": "OKP", "crv": "Ed25519", "x": x, "kid": self.kid}
        else:
            found = JwtAuthority(alg=self.alg, kid=self.kid, key=self.key).jwk()
        found = found | {"use": "sig", "alg": self.alg} | changes
        return {name: value for name, value in found.items() if value is not None}

    def token(self, claims: Mapping[str, Any], **header: Any) -> str:
        head = {"alg": self.alg, "kid": self.kid, "typ": "JWT"} | header
        return jws({name: value for name, value in head.items() if value is not None}, claims, self.sign)


@dataclass
class OidcServer:
    """The issuer as the test wants it.

    instead: what answers at a path in place of what should. fetched: how often each path was asked for. asked: the
    parameters of the last login. person: the claims about whoever logs in. consents: whether they want to.
    """

    port: int
    ca_file: Path
    signer: Signer = field(default_factory=Signer)
    published: list[dict[str, Any]] = field(default_factory=list)
    instead: dict[str, Handler] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    fetched: Counter[str] = field(default_factory=Counter)
    asked: dict[str, str] = field(default_factory=dict)
    person: dict[str, Any] = field(default_factory=lambda: {"sub": "u-17", "groups": ["release-managers"]})
    consents: bool = True
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    closing: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.published = [self.signer.jwk()]

    @property
    def issuer(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def rotate(self, alg: str = "ES256", *, publish: bool = True) -> Signer:
        """A new key signs from now on; the old one is withdrawn."""
        self.signer = Signer(alg)
        if publish:
            self.published = [self.signer.jwk()]
        return self.signer

    def claims(self, nonce: str, now: datetime | None = None, /, **changes: Any) -> dict[str, Any]:
        """Of an ID token for the person, who just logged in. None leaves one out."""
        at = int((now or datetime.now(UTC)).timestamp())
        usual = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "nonce": nonce,
            "iat": at,
            "exp": at + 600,
            "auth_time": at,
            **self.person,
        }
        return {name: value for name, value in (usual | changes).items() if value is not None}

    def id_token(self, nonce: str, now: datetime | None = None, /, **changes: Any) -> str:
        return self.signer.token(self.claims(nonce, now, **changes))

    # -- misbehaviour ----------------------------------------------------------------------------------------------

    def redirects(self, path: str) -> None:
        """It sends those who ask there somewhere else, where the right answer is."""
        right = self._handlers[path]
        self.instead[f"/moved{path}"] = right

        async def moved(_: web.Request) -> web.Response:
            return web.Response(status=302, headers={"Location": f"/moved{path}"})

        self.instead[path] = moved

    def hangs(self, path: str) -> None:
        """It accepts the question and never answers."""

        async def hang(_: web.Request) -> web.Response:
            await self.closing.wait()
            return web.Response(status=503)

        self.instead[path] = hang

    def floods(self, path: str) -> None:
        """It answers without end."""

        async def flood(request: web.Request) -> web.StreamResponse:
            answer = web.StreamResponse()
            await answer.prepare(request)
            while not self.closing.is_set() and request.transport is not None:
                await answer.write(b" " * 65536)
                await asyncio.sleep(0)  # a write into a socket that takes all gives nobody else a turn
            return answer

        self.instead[path] = flood

    def says(self, path: str, body: bytes, status: int = 200, **headers: str) -> None:
        """It answers this."""

        async def say(_: web.Request) -> web.Response:
            return web.Response(body=body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

        self.instead[path] = say

    def behaves(self) -> None:
        """As it should, again."""
        self.instead.clear()
        self.metadata.clear()

    # -- what it serves --------------------------------------------------------------------------------------------

    @property
    def _handlers(self) -> dict[str, Handler]:
        return {DISCOVERY: self._discovery, JWKS: self._jwks, AUTHORIZE: self._authorize, TOKEN: self._token}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.fetched[request.path] += 1
        handler = self.instead.get(request.path) or self._handlers.get(request.path)
        if handler is None:
            raise web.HTTPNotFound
        return await handler(request)

    async def _discovery(self, _: web.Request) -> web.Response:
        found = {
            "issuer": self.issuer,
            "jwks_uri": self.issuer + JWKS,
            "authorization_endpoint": self.issuer + AUTHORIZE,
            "token_endpoint": self.issuer + TOKEN,
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": [self.signer.alg],
        }
        return web.json_response(found | self.metadata)

    async def _jwks(self, _: web.Request) -> web.Response:
        return web.json_response({"keys": self.published})

    async def _authorize(self, request: web.Request) -> web.Response:
        asked = self.asked = dict(request.query)
        wanted = {"response_type": "code", "client_id": CLIENT_ID, "code_challenge_method": "S256"}
        if not wanted.items() <= asked.items() or "openid" not in asked["scope"].split():
            raise web.HTTPBadRequest
        # RFC 8252 section 7.3: any port of the loopback address, nothing else.
        if not asked["redirect_uri"].startswith("http://127.0.0.1:"):
            raise web.HTTPBadRequest
        answer = {"state": asked["state"], "iss": self.issuer}
        if self.consents:
            code = secrets.token_urlsafe(16)
            self.codes[code] = asked
            answer["code"] = code
        else:
            answer["error"] = "access_denied"
        return web.Response(status=302, headers={"Location": f"{asked['redirect_uri']}?{urlencode(answer)}"})

    async def _token(self, request: web.Request) -> web.Response:
        form = dict(await request.post())
        asked = self.codes.pop(str(form.get("code")), None)
        verifier = str(form.get("code_verifier", ""))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        if (
            asked is None
            or form.get("grant_type") != "authorization_code"
            or form.get("client_id") != asked["client_id"]
            or form.get("redirect_uri") != asked["redirect_uri"]
            or not 43 <= len(verifier) <= 128
            or challenge != asked["code_challenge"]
        ):
            return web.json_response({"error": "invalid_grant"}, status=400)
        answer = {"access_token": "not-for-us", "token_type": "Bearer", "id_token": self.id_token(asked["nonce"])}
        return web.json_response(answer, headers={"Cache-Control": "no-store"})


def _tls(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A CA and a server certificate for 127.0.0.1 under it."""
    folder.mkdir(exist_ok=True)
    now = datetime.now(UTC)
    ca = CA("login.test", now=now, uri=None)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = ca.sign(
        subject=x509.Name([]),
        public_key=key.public_key(),
        extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), True),
        ],
        not_before=now - timedelta(minutes=1),
        not_after=now + timedelta(hours=1),
    )
    ca_file, served = folder / "issuer-ca.pem", folder / "issuer.pem"
    ca_file.write_bytes(ca.certificate.public_bytes(Encoding.PEM))
    served.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate.public_bytes(Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(served)
    return context, ca_file


@asynccontextmanager
async def oidc_server(folder: Path) -> AsyncIterator[OidcServer]:
    """Running, on a port of its own. Its files are in `folder`."""
    context, ca_file = _tls(folder)
    made: list[OidcServer] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        return await made[0].answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    server = OidcServer(runner.addresses[0][1], ca_file)
    made.append(server)
    try:
        yield server
    finally:
        server.closing.set()
        await runner.cleanup()


def secret_jwk(signer: Signer) -> dict[str, Any]:
    """The key as no issuer may publish it."""
    number = signer.key.private_numbers().private_value
    return signer.jwk(d=base64url(number.to_bytes(32)))


def unsigned(claims: Mapping[str, Any], alg: str = "none") -> str:
    """A token that nobody signed."""
    head, body = (base64url(json.dumps(part).encode()) for part in ({"alg": alg, "typ": "JWT"}, claims))
    return f"{head}.{body}."
