"""A credential carries the digest of the provenance that it was decided on, and none where there was none."""

import hashlib
from datetime import timedelta

import rfc8785
from support.issuer import ISSUER
from support.releases import NOW, PERMIT, PROVENANCE, facts, grant

from broker.action import Action
from broker.credentials import action_token, mint
from broker.credentials.action_token import Claims, Confirmation
from broker.credentials.keys import SigningKey
from broker.decision.decide import Grant, decide
from broker.decision.policy import compile_policy
from broker.identity.spiffe_id import SpiffeId

KEY = SigningKey.generate(NOW)


def claims_of(given: Grant) -> Claims:
    draft = mint.draft(given, Confirmation(jkt="the-callers-key"), issuer=ISSUER, kid=KEY.kid, now=NOW)
    token = mint.sign(draft, KEY)
    return action_token.verify(token, issuer=ISSUER, key_for=lambda _: KEY.private.public_key(), now=NOW)


def test_the_digest_of_the_provenance_is_in_the_token() -> None:
    digest = hashlib.sha256(rfc8785.dumps(PROVENANCE)).hexdigest()
    assert claims_of(grant(f"{PERMIT};")).attestation.provenance == f"sha256:{digest}"
    other = grant(f"{PERMIT};", seen=facts(provenance={**PROVENANCE, "builder": "https://ci.acme.test/other"}))
    assert claims_of(other).attestation.provenance not in {None, f"sha256:{digest}"}


def test_what_was_decided_without_provenance_says_nothing_of_it() -> None:
    schema = 'action "orders.read" appliesTo { principal: [Workload], resource: [Resource], context: {} };'
    policy = compile_policy(
        {"p.cedar": 'permit (principal, action == Action::"orders.read", resource);'}, {"p.cedarschema": schema}
    )
    read = Action("orders.read", "https://orders.acme.test/1", "spiffe://acme.test/orders")
    agent = SpiffeId.parse("spiffe://acme.test/agent")
    assert (
        claims_of(decide(policy, agent, read, {}, NOW, not_after=NOW + timedelta(hours=1))).attestation.provenance
        is None
    )
