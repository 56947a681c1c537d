"""Two steps from a grant to a token: a grant is spent on one draft, and only a draft is signed."""

import dataclasses
import hashlib
import threading
from collections.abc import Mapping
from datetime import datetime, timedelta

import pytest
from support.issuer import CALLER, ISSUER, NOW, REFUND

from attestors.contract import FactKey, Facts
from broker.credentials import action_token, mint
from broker.credentials.action_token import Confirmation
from broker.credentials.keys import SigningKey
from broker.decision.decide import Grant, decide
from broker.decision.policy import compile_policy
from broker.errors import Reason, Refused
from broker.identity.spiffe_id import SpiffeId

SCHEMA = """action "orders.refund" appliesTo { principal: [Workload], resource: [Resource],
  context: { process: Process, parameters: { amount: Long, currency: String } } };"""
POLICY = """@id("refunds") permit (principal, action == Action::"orders.refund", resource)
  when { context.process.uid == 7 };"""
COMPILED = compile_policy({"p.cedar": POLICY}, {"a.cedarschema": SCHEMA})
PROCESS: Mapping[str, object] = {"uid": 7, "gid": 7, "exe": "/agent", "exe_sha256": "ab" * 32, "cgroup": "/"}
KEY = SigningKey.generate(NOW)
BOUND = Confirmation(jkt="the-callers-key")


def grant(*, not_after: datetime = NOW + timedelta(hours=1), now: datetime = NOW) -> Grant:
    facts = Facts(attestor="process", key=FactKey("process:7:1"), values=dict(PROCESS), attested_at=now)
    return decide(COMPILED, SpiffeId.parse(CALLER), REFUND, {"process": facts}, now, not_after=not_after)


def draft(given: Grant, *, now: datetime = NOW) -> mint.Draft:
    return mint.draft(given, BOUND, issuer=ISSUER, kid=KEY.kid, now=now)


def test_a_grant_becomes_a_token_that_says_what_was_granted() -> None:
    given = grant()
    token = mint.sign(draft(given), KEY)
    claims = action_token.verify(token, issuer=ISSUER, key_for=lambda _: KEY.private.public_key(), now=NOW)
    assert claims.action() == given.action == REFUND
    assert claims.action_digest == REFUND.digest.hex()
    assert (claims.sub, claims.client_id, claims.cnf, claims.use) == (CALLER, CALLER, BOUND, given.use)
    assert claims.attestation.environment == f"sha256:{given.environment_digest.hex()}"
    assert claims.attestation.policy == COMPILED.revision
    assert claims.expires_at == NOW + timedelta(seconds=60)


def test_a_spent_grant_mints_nothing() -> None:
    given = grant()
    assert draft(given)
    with pytest.raises(Refused) as caught:
        draft(given)
    assert caught.value.reason is Reason.ALREADY_USED
    assert draft(grant())


def test_of_many_threads_one_spends_a_grant() -> None:
    given, made, start = grant(), [], threading.Barrier(8)

    def attempt() -> None:
        start.wait()
        try:
            made.append(draft(given))
        except Refused:
            return

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_invariant_3_a_token_ends_with_what_it_hangs_on_never_later() -> None:
    """Invariant 3: fractions of a second are dropped, so `exp` never lies beyond the grant."""
    ends = NOW + timedelta(seconds=20, milliseconds=900)
    assert draft(grant(not_after=ends)).claims.exp == int(ends.timestamp()) <= ends.timestamp()
    late = grant(not_after=NOW + timedelta(milliseconds=999))
    with pytest.raises(Refused) as caught:
        draft(late)
    assert caught.value.reason is Reason.EXPIRED


def test_a_draft_is_signed_by_the_key_it_names() -> None:
    made = draft(grant())
    with pytest.raises(ValueError, match="another key"):
        mint.sign(made, SigningKey.generate(NOW))
    assert mint.sign(made, KEY)


def test_every_token_has_an_id_of_its_own() -> None:
    assert len({draft(grant()).claims.jti for _ in range(50)}) == 50


def test_a_draft_cannot_be_changed_after_it_was_made() -> None:
    made = draft(grant())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.kid = "another"
    with pytest.raises(AttributeError):
        made.claims.exp = 0
    assert made.payload == action_token.encode(made.claims)


def test_the_ledger_gets_a_hash_and_not_the_token() -> None:
    token = mint.sign(draft(grant()), KEY)
    assert mint.fingerprint(token) == hashlib.sha256(token.encode()).hexdigest()
    assert KEY.kid in repr(KEY)
    assert "private" not in repr(KEY)
