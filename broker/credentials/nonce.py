"""Nonces for DPoP proofs (RFC 9449 section 8): ours, bound to where we handed them out, good once, for 30 seconds.

A nonce costs nothing to hand out: it is a time and a MAC. Only those that came back in a valid proof are remembered,
so a stranger who asks for many fills nothing. When the clock goes back to where used ones were forgotten already, all
that were handed out before are nothing any more.
"""

import hashlib
import hmac
import secrets
from collections import deque
from datetime import datetime
from typing import Final

from broker.credentials.jose import b64url, b64url_decode
from broker.errors import Invalid, Reason, Refused

LIFETIME_MS: Final = 30_000
MAX_REMEMBERED: Final = 200_000
_MAC: Final = 16


def _milliseconds(now: datetime) -> int:
    return int(now.timestamp() * 1000)


class Nonces:
    """Hands out and takes back nonces. One for each broker process: its key is born here and dies with it."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)
        self._used: set[bytes] = set()
        self._order: deque[tuple[int, bytes]] = deque()
        self._forgotten_ms = -1  # of the used nonces that are no longer remembered, when the youngest was handed out

    def _mac(self, stem: bytes, binding: str) -> bytes:
        return hmac.digest(self._key, stem + binding.encode(), hashlib.sha256)[:_MAC]

    def issue(self, binding: str, now: datetime) -> str:
        """A fresh nonce for the connection (or other context) that `binding` names."""
        now_ms = _milliseconds(now)
        if now_ms <= self._forgotten_ms:  # the clock went back, and a used nonce would be good again
            self._key = secrets.token_bytes(32)
            self._used.clear()
            self._order.clear()
            self._forgotten_ms = -1
        stem = now_ms.to_bytes(8) + secrets.token_bytes(8)
        return b64url(stem + self._mac(stem, binding))

    def consume(self, nonce: str | None, binding: str, now: datetime) -> None:
        """Takes `nonce` back, once.

        Raises: Refused(NONCE_REQUIRED) when it is missing, foreign or too old (the answer carries a fresh one);
        Refused(PROOF_REPLAYED) when it was used before; Refused(QUOTA) when too many are remembered.
        """
        if nonce is None:
            raise Refused(Reason.NONCE_REQUIRED, "the proof has no nonce")
        try:
            raw = b64url_decode(nonce.encode())
        except Invalid as error:
            raise Refused(Reason.NONCE_REQUIRED, "not a nonce of ours") from error
        stem, mac = raw[:16], raw[16:]
        issued_ms = int.from_bytes(stem[:8])
        age = _milliseconds(now) - issued_ms
        if not hmac.compare_digest(mac, self._mac(stem, binding)) or not 0 <= age <= LIFETIME_MS:
            raise Refused(Reason.NONCE_REQUIRED, "the nonce is of another connection, or too old")
        self._forget(_milliseconds(now))
        if issued_ms <= self._forgotten_ms:
            raise Refused(Reason.NONCE_REQUIRED, "the nonce is from before the clock was set back")
        if stem in self._used:
            raise Refused(Reason.PROOF_REPLAYED, "the nonce was used before")
        if len(self._used) >= MAX_REMEMBERED:
            raise Refused(Reason.QUOTA, "too many proofs at once", retry_after_ms=1000)
        self._used.add(stem)
        self._order.append((issued_ms, stem))

    def _forget(self, now_ms: int) -> None:
        # In order of use, not of issue: a younger nonce may wait behind an older one, for at most one lifetime.
        while self._order and self._order[0][0] + LIFETIME_MS < now_ms:
            issued_ms, stem = self._order.popleft()
            self._used.discard(stem)
            self._forgotten_ms = max(self._forgotten_ms, issued_ms)
