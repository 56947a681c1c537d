"""What a guard's whole check costs, in bare P-256 verifications of the same bytes (budget: 2, DESIGN section 8).

The act is rebuilt, the token verified, its key checked, digests compared, scope looked at and the use remembered, for a
new token each time; beside each check the bare verification of the same signature (of both signatures with DPoP) is
timed. Scope is what the broker's own feed told: 1,000 credentials refused, and one suspension of some hundred others.
"""

import asyncio
import hashlib
import secrets
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from broker._proto.actionbroker.v1 import scope_pb2
from broker.action import Action
from broker.credentials import action_token, jose, keys
from broker.credentials.action_token import Attestation, Claims, Confirmation
from broker.credentials.dpop import ProofKey
from broker.errors import Reason
from broker.guard import Guard, Memory, Presented, ScopeFeed
from broker.scope.feed import Feed
from broker.scope.live import Live
from broker.scope.suspension import Suspension

NOW = datetime(2026, 11, 22, tzinfo=UTC)
ISSUER, AUDIENCE = "https://broker.acme.test", "spiffe://acme.test/service/orders"
CALLER, URL = "spiffe://acme.test/build/agent", "https://orders.acme.test/acme.Orders/Refund"
LEAF = hashlib.sha256(b"the caller's leaf").digest()
Check = Callable[[], object]


def _act() -> Action:
    """As a mapping would: anew for each request."""
    return Action("orders.refund", "https://orders.acme.test/v1/orders/17", AUDIENCE, {"amount": 30, "currency": "EUR"})


class _Issuer:
    def __init__(self) -> None:
        self.key = keys.SigningKey.generate(NOW)
        self.header = f'{{"alg":"ES256","typ":"at+jwt","kid":"{self.key.kid}"}}'.encode()
        self.public = self.key.private.public_key()

    def token(self, cnf: Confirmation) -> str:
        action, issued = _act(), int(NOW.timestamp())
        claims = Claims(
            iss=ISSUER,
            sub=CALLER,
            aud=AUDIENCE,
            exp=issued + 60,
            iat=issued,
            jti=secrets.token_hex(16),
            client_id=CALLER,
            scope=action.name,
            authorization_details=(action_token.detail_of(action),),
            cnf=cnf,
            action_digest=action.digest.hex(),
            use="once",
            attestation=Attestation(environment=f"sha256:{secrets.token_hex(32)}", policy="sha256:0123456789ab"),
        )
        return jose.sign(self.header, action_token.encode(claims), self.key.private)

    def guard(self) -> Guard:
        jwk = jose.to_jwk(self.public)
        published = keys.key_set([keys.VerifiedKey(kid=self.key.kid, jwk=jwk, serve_until=self.key.use_until)])
        scope = asyncio.run(_told(published))
        return Guard(issuer=ISSUER, audience=AUDIENCE, scope=scope, memory=Memory())


class _Once:
    """A source that tells what a feed has to say, and then nothing."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def watch_scope(
        self,
        audiences: Sequence[str],
        *,
        feed: str = "",  # noqa: ARG002 - it is told everything
        after: int = 0,  # noqa: ARG002
    ) -> AsyncIterator[scope_pb2.WatchResponse]:
        for message in self._feed.snapshot(tuple(audiences), NOW):
            yield scope_pb2.WatchResponse.FromString(message)
        await asyncio.Event().wait()


async def _told(published: bytes) -> ScopeFeed:
    """What a guard knows that listens, kept fresh for the whole of this measurement."""
    feed = Feed()
    feed.offer_keys(published)
    feed.refuse([_live(f"refused-{n:040}") for n in range(1000)], Reason.DENIED)
    feed.suspend(Suspension.of(1, "policy", [_live(f"suspended-{n:038}") for n in range(300)], None))
    feed.proven(NOW)
    scope = ScopeFeed(
        _Once(feed),
        audiences=[AUDIENCE],
        max_silence=timedelta(seconds=60),
        clock=lambda: NOW,
        seconds=lambda: time.monotonic() / 1e3,  # a minute lasts 17 hours; asking costs what it always does
    )
    await scope.__aenter__()
    await scope.ready()
    for task in scope._tasks:
        task.cancel()
    await asyncio.wait(scope._tasks)
    return scope


def _live(jti: str) -> Live:
    return Live(
        jti=jti,
        credential="action_token",
        principal=CALLER,
        audience=AUDIENCE,
        action="orders.refund",
        canonical=b"{}",
        expires_at=NOW.timestamp() + 60,
        method="mtls",
        policy_revision="sha256:0123456789ab",
    )


def _bare(token: str, typ: str, public: ec.EllipticCurvePublicKey) -> Check:
    jws = jose.parse(token, typ=typ)
    signature = encode_dss_signature(int.from_bytes(jws.signature[:32]), int.from_bytes(jws.signature[32:]))
    return lambda: public.verify(signature, jws.signing_input, jose.ES256)


def _timed(check: Check) -> float:
    started = time.perf_counter()
    check()
    return (time.perf_counter() - started) * 1e6


def _pairs(cases: list[tuple[Check, list[Check]]]) -> tuple[float, float, float]:
    """Median of the ratios, of the guard's microseconds and of the bare ones."""
    ratios, guarded, bare = [], [], []
    for number, (check, verifications) in enumerate(cases):
        # Whichever goes second finds the caches warmer, so they take turns.
        if number % 2:
            first = _timed(check)
            second = sum(_timed(verification) for verification in verifications)
        else:
            second = sum(_timed(verification) for verification in verifications)
            first = _timed(check)
        ratios.append(first / second)
        guarded.append(first)
        bare.append(second)
    return statistics.median(ratios), statistics.median(guarded), statistics.median(bare)


def _by_certificate(issuer: _Issuer, guard: Guard) -> tuple[Check, list[Check]]:
    token = issuer.token(Confirmation(x5t_s256=jose.b64url(LEAF)))
    return (
        lambda: guard.verify(Presented(token=token, certificate_sha256=LEAF), _act(), NOW),
        [_bare(token, action_token.TYPE, issuer.public)],
    )


def _by_proof(issuer: _Issuer, guard: Guard, caller: ProofKey) -> tuple[Check, list[Check]]:
    token = issuer.token(Confirmation(jkt=caller.jkt))
    proof = caller.prove("POST", URL, NOW, token=token)
    presented = Presented(token=token, proof=proof, method="POST", urls=(URL,))
    public = jose.load_jwk(caller.jwk)
    return (
        lambda: guard.verify(presented, _act(), NOW),
        [_bare(token, action_token.TYPE, issuer.public), _bare(proof, "dpop+jwt", public)],
    )


def measure(size: str) -> list[dict[str, Any]]:
    """size: "small" or "full". Rows of {name, value, unit, bound, holds}."""
    rounds = 200 if size == "small" else 4000
    issuer, caller = _Issuer(), ProofKey()
    guard = issuer.guard()
    _pairs([_by_certificate(issuer, guard) for _ in range(50)] + [_by_proof(issuer, guard, caller) for _ in range(50)])
    mtls, check, bare = _pairs([_by_certificate(issuer, guard) for _ in range(rounds)])
    dpop, _, _ = _pairs([_by_proof(issuer, guard, caller) for _ in range(rounds)])
    return [
        _row("guard_per_signature_check", mtls, "ratio", 2.0),
        _row("guard_per_two_signature_checks_dpop", dpop, "ratio", 2.0),
        _row("guard_check", check, "us"),
        _row("bare_p256_verification", bare, "us"),
    ]


def _row(name: str, value: float, unit: str, bound: float | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "bound": bound, "holds": bound is None or value <= bound}
