"""Invariants 2, 3, 6 and 10 for grants, signatures and certificates, each shown on a running broker.

1 and 7 are in test_signing_crash.py and test_signing_once.py, 13 in test_signing_spending.py.
"""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AttributeOID
from support.oidc import CLIENT_ID, oidc_server
from support.signing import (
    AGENT,
    OPERATOR,
    OWN_KEY_AGENT,
    SigningBroker,
    example_policies,
    signing_broker,
    statement,
)
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    acts,
    ask_certificate,
    ask_grant,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
)
from support.signing_parts import token_keys
from support.softhsm import SoftHsm
from support.whole_broker import BROKER, Wire, utc_now

from attestors.approval import request_digest
from broker.client.person import PersonClient
from broker.errors import ApprovalRequired, Reason
from broker.identity.spiffe_id import SpiffeId
from broker.ledger.records import Approved, Intent, Outcome

PEM = serialization.Encoding.PEM
PKCS8 = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(example_policies() | NIGHTLY, limits=UNLIMITED) as found:
        yield found


@pytest.fixture
async def wire(broker: SigningBroker) -> AsyncIterator[Wire]:
    async with broker.whole.wire() as found:
        yield found


def csr(nonce: str) -> bytes:
    made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    made = made.add_attribute(AttributeOID.CHALLENGE_PASSWORD, nonce.encode())
    return made.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def built(seconds_ago: float, **changes: Any) -> dict[str, Any]:
    """A predicate of a build that ended so long ago. changes: of its times."""
    when = (utc_now() - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    predicate = statement()["predicate"]
    predicate["runDetails"]["metadata"] |= {"startedOn": when, "finishedOn": when} | changes
    return {"predicate": predicate}


async def test_every_credential_names_the_key_that_may_use_it(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 2: the grant its caller's, a certificate its agent's, and the ledger says which of each."""
    envelope = [broker.builder.envelope()]
    grant = (await get_grant(wire, broker.nightly(), envelope)).grant
    assert claims_of(grant).cnf.jkt == wire.key.jkt
    own = await get_grant(wire, broker.nightly(signer="agent-key"), envelope, spiffe_id=OWN_KEY_AGENT)
    signed = await ask_sign(wire, grant, envelope)
    certified = await ask_certificate(wire, own.grant, csr(own.csr_nonce), envelope, spiffe_id=OWN_KEY_AGENT)
    leaves = [x509.load_der_x509_certificate(said.message.certificate_chain[0]) for said in (signed, certified)]
    made = {one.parent: one for one in acts(broker.whole)}
    for parent, leaf in zip((grant, own.grant), leaves, strict=True):
        form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = hashes.Hash(hashes.SHA256())
        digest.update(leaf.public_key().public_bytes(*form))
        assert made[claims_of(parent).jti].cnf == {"spki_sha256": digest.finalize().hex()}
    assert {one.cnf["jkt"] for one in broker.whole.intents().values() if one.credential == "signing_grant"}


async def test_a_grant_lives_two_minutes_at_most_whatever_policy_says(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 3: the policy of this test says 300 s; a token of it would get them, a grant does not."""
    claims = claims_of((await get_grant(wire, broker.nightly(), [broker.builder.envelope()])).grant)
    assert claims.exp - claims.iat == 120


async def test_a_grant_and_what_comes_of_it_outlive_nothing_they_rest_on(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 3: neither the provenance under it nor the caller's SVID, nor a certificate its grant."""
    envelope = [broker.builder.envelope(**built(3600 - 40))]  # believed for an hour
    claims = claims_of(grant := (await get_grant(wire, broker.nightly(), envelope)).grant)
    ends = utc_now() + timedelta(seconds=40)
    assert claims.expires_at <= ends
    said = await ask_sign(wire, grant, envelope)
    leaf = x509.load_der_x509_certificate(said.message.certificate_chain[0])
    assert leaf.not_valid_after_utc <= claims.expires_at
    intents = [one for one in acts(broker.whole) if one.parent == claims.jti]
    assert [one.expires_at <= claims.expires_at for one in intents] == [True]

    brief, lasting = [broker.whole.domain.svid("build/agent", seconds) for seconds in (30, 3600)]
    envelope = [broker.builder.envelope()]
    async with broker.whole.mtls(brief) as soon, broker.whole.mtls(lasting) as late:
        found = (await get_grant(soon, broker.nightly(), envelope)).grant
        assert claims_of(found).expires_at <= brief.own.not_after
        said = await ask_sign(soon, found, envelope)
        leaf = x509.load_der_x509_certificate(said.message.certificate_chain[0])
        assert leaf.not_valid_after_utc <= brief.own.not_after
        control = claims_of((await get_grant(late, broker.nightly(), envelope)).grant)
        assert control.exp - control.iat == 120


async def test_a_certificate_lives_as_long_as_configured_and_no_longer(wire: Wire) -> None:
    """Invariant 3: `certificate_ttl_s`, and never more than is left of the grant."""
    with signing_broker(NIGHTLY, signing={"certificate_ttl_s": 10}) as brief:
        async with brief.whole.wire() as caller:
            envelope = [brief.builder.envelope()]
            said = await ask_sign(caller, (await get_grant(caller, brief.nightly(), envelope)).grant, envelope)
        leaf = x509.load_der_x509_certificate(said.message.certificate_chain[0])
        assert leaf.not_valid_after_utc <= utc_now() + timedelta(seconds=10)
        assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(seconds=20)  # ten of them are past


async def test_where_nobodys_provenance_is_trusted_nothing_is_signed() -> None:
    """Invariant 6: a trust file that names nobody refuses it; without one nobody can look, which is a no as well."""
    with signing_broker(NIGHTLY, provenance={"trust_file": ""}) as blind:
        async with blind.whole.wire() as wire:
            with nothing_signed(blind.whole):
                said = await ask_grant(wire, blind.nightly(), [blind.builder.envelope()])
                await refused(blind, said, Reason.ATTESTATION_UNAVAILABLE)


async def test_a_trust_file_that_changes_counts_at_once_and_one_that_cannot_be_read_changes_nothing(
    broker: SigningBroker, wire: Wire
) -> None:
    """Invariant 6: empty trust refuses; what is broken is told, and neither widens nor empties what was trusted."""
    envelope, file = [broker.builder.envelope()], broker.builder.trust_file
    before = file.read_text()
    try:
        broker.builder.distrusted()
        await broker.reloaded()
        with nothing_signed(broker.whole):
            await refused(broker, await ask_grant(wire, broker.nightly(), envelope), Reason.PROVENANCE_REJECTED)
            file.write_text(before.replace("[builders", "[builders.", 1))
            await broker.reloaded()
            await refused(broker, await ask_grant(wire, broker.nightly(), envelope), Reason.PROVENANCE_REJECTED)
        file.write_text(before)
        await broker.reloaded()
        assert (await get_grant(wire, broker.nightly(), envelope)).grant
        file.write_text("max_age_s = 3600\n[builders")
        await broker.reloaded()
        assert (await get_grant(wire, broker.nightly(), envelope)).grant
        assert len(broker.whole.broker.events("files_refused")) >= 2
    finally:
        file.write_text(before)
        await broker.reloaded()


async def test_what_is_not_permitted_or_cannot_be_seen_is_not_signed(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 6: deny by default: nobody's permit, no facts of SPIRE over mutual TLS, a CA that is not there."""
    envelope = [broker.builder.envelope()]
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, broker.nightly(), envelope, spiffe_id=OPERATOR)
        await refused(broker, said, Reason.DENIED)
        async with broker.whole.mtls(broker.whole.domain.svid("build/agent")) as mtls:
            said = await ask_grant(mtls, broker.action(), envelope, request_id="r" * 20)
            await refused(broker, said, Reason.DENIED)
    assert (await get_grant(wire, broker.nightly(), envelope)).grant
    with signing_broker({name: text for name, text in NIGHTLY.items() if name.endswith("schema")}) as without_policy:
        async with without_policy.whole.wire() as caller:
            said = await ask_grant(caller, without_policy.nightly(), [without_policy.builder.envelope()])
            await refused(without_policy, said, Reason.DENIED)
    with signing_broker(NIGHTLY, signing={"ca_folder": ""}) as without_ca:
        async with without_ca.whole.wire() as caller:
            with nothing_signed(without_ca.whole):
                said = await ask_grant(caller, without_ca.nightly(), [without_ca.builder.envelope()])
                await refused(without_ca, said, Reason.SIGNER_UNAVAILABLE)


POLICY_FOR_PEOPLE = """
@id("people") permit (principal is Person in Issuer::"{issuer}", action == Action::"broker.approve", resource);
"""


@asynccontextmanager
async def with_people(folder: Path) -> AsyncIterator[tuple[SigningBroker, Any, Path]]:
    """A broker that also takes approvals of people, who log in somewhere; and a named key in a file."""
    key_file = folder / "release.pem"
    key_file.touch(mode=0o600)
    key_file.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, *PKCS8))
    async with oidc_server(folder / "login") as login:
        people = {f'approval.issuers."{login.issuer}"': {"audience": CLIENT_ID, "ca_file": str(login.ca_file)}}
        keys = {"signing.keys.p256": {"file": str(key_file)}}
        policies = example_policies() | NIGHTLY | {"people.cedar": POLICY_FOR_PEOPLE.format(issuer=login.issuer)}
        with signing_broker(policies, limits=UNLIMITED, **people, **keys) as broker:
            yield broker, login, key_file


async def test_no_secret_of_signing_is_in_the_ledger_the_log_or_the_metrics(tmp_path: Path) -> None:
    """Invariant 10: no grant, nonce, ID token, envelope or private key; hashes only, but those."""
    async with with_people(tmp_path) as (broker, login, key_file):
        whole, envelope = broker.whole, broker.builder.envelope()
        spied: list[str] = ["idempotency-id-of-mine", "another-idempotency-id"]
        async with whole.wire() as wire:
            for signer, spiffe_id in (("keyless", AGENT), ("key:p256", AGENT), ("agent-key", OWN_KEY_AGENT)):
                found = await get_grant(wire, broker.nightly(signer=signer), [envelope], spiffe_id=spiffe_id)
                spied += [found.grant, found.csr_nonce]
                for idempotency_id in spied[:2]:
                    if signer == "agent-key":
                        asked = csr(found.csr_nonce)
                        await ask_certificate(
                            wire, found.grant, asked, [envelope], idempotency_id=idempotency_id, spiffe_id=spiffe_id
                        )
                    else:
                        await ask_sign(wire, found.grant, [envelope], idempotency_id=idempotency_id)
            for bad in (envelope[:-9], envelope.replace(b"sig", b"gis")):
                await ask_grant(wire, broker.nightly(), [bad])
            await ask_sign(wire, f"{spied[2]}x", [envelope])
            await ask_sign(wire, f"malformed.{spied[2]}", [envelope])

        async with broker.client() as agent:
            digest = request_digest(broker.action().digest.hex(), AGENT, "request-of-this-test")
            id_token = login.id_token(digest)
            grant = await approved_by_a_person(broker, agent, digest, id_token)
            assert (await agent.signing.sign(grant)).signature
            spied += [id_token, grant.grant, grant.csr_nonce]

        metrics = whole.get("/metrics")[1]
        assert whole.broker.stop() == 0
        written = [file.read_bytes() for file in sorted((whole.broker.folder / "state").iterdir()) if file.is_file()]
        everything = b"\n".join([*written, metrics.encode(), json.dumps(whole.broker.log).encode()])
        for secret in spied:
            for part in secret.split("."):  # of a JWS: its header says nothing, its payload and its signature all
                assert part.startswith("eyJhbGciOiJFUzI1NiIs") or part.encode() not in everything, secret
        sealed = json.loads(envelope)
        for part in (sealed["payload"], sealed["signatures"][0]["sig"]):
            assert part.encode() not in everything
        for file in (key_file, *broker.ca_folder.glob("*.key.pem")):
            for line in file.read_bytes().splitlines()[1:-1]:
                assert line not in everything
        records = whole.records()
        granted = [one.jti for one in records if isinstance(one, Intent) and one.credential == "signing_grant"]
        assert {claims_of(one).jti for one in spied if one.count(".") == 2 and one != id_token} <= set(granted)
        digests = {one.credential_sha256 for one in records if isinstance(one, Outcome)}
        assert sha256(spied[2].encode()) in digests, "hashes only, but those"
        assert [one.evidence_sha256 for one in records if isinstance(one, Approved)] == [
            sha256(id_token.rpartition(".")[0].encode())
        ]


def sha256(data: bytes) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(data)
    return digest.finalize().hex()


async def approved_by_a_person(broker: SigningBroker, agent: Any, digest: str, id_token: str) -> Any:
    """A grant that somebody who logged in said yes to."""
    action, provenance = broker.action(), (broker.builder.envelope(),)
    with pytest.raises(ApprovalRequired) as error:
        await agent.signing.grant(action, provenance, request_id="request-of-this-test")
    assert error.value.request_digest == digest
    seen = broker.whole.domain.svid("anybody")
    url = f"https://127.0.0.1:{broker.whole.broker.http_port}"
    person = PersonClient(url, broker_id=SpiffeId.parse(BROKER), snapshot=lambda: seen)
    shown = await person.show(digest, id_token)
    await person.approve(shown, id_token, reason="looks good")
    return await agent.signing.grant(action, provenance, request_id="request-of-this-test")


@pytest.mark.softhsm
async def test_the_pin_of_a_token_is_nowhere_but_in_its_file(tmp_path: Path) -> None:
    """Invariant 10: not in ledger, log or metrics, nor in what the caller gets."""
    with SoftHsm(tmp_path) as hsm:
        hsm.make_key("p256", "release")
        with signing_broker(NIGHTLY, limits=UNLIMITED, **token_keys(hsm, p256="release")) as broker:
            whole, action, envelope = broker.whole, broker.nightly(signer="key:p256"), [broker.builder.envelope()]
            async with whole.wire() as wire:
                said = await ask_sign(wire, (await get_grant(wire, action, envelope)).grant, envelope)
                assert said.code is grpc.StatusCode.OK, said.reason
            metrics = whole.get("/metrics")[1]
            assert whole.broker.stop() == 0
            written = [file.read_bytes() for file in (whole.broker.folder / "state").iterdir() if file.is_file()]
            told = (metrics + json.dumps(whole.broker.log) + repr(said)).encode()
            assert hsm.pin.encode() not in b"\n".join([*written, told])
            assert b"key:p256" in b"\n".join(written), "the name of the key is there"
