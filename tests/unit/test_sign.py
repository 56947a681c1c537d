"""What is signed was built, all of it, and can be read in one way; and a grant promises nothing that we cannot keep."""

import asyncio
import functools
import json
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from support.exchanging import CORRELATION
from support.signing import BUILDER, CONTENT, digests, statement
from support.signing_exchange import SigningExchange, signing_exchange

from attestors.contract import AttestationRequest, FactKey, Facts
from attestors.dsse import STATEMENT_TYPE, pae
from attestors.in_threads import InThreads
from broker.acts import MAX_STATEMENT, Signed
from broker.decision.attest import Attestation
from broker.decision.store import PolicyStore
from broker.errors import BrokerError, Invalid, Reason, Refused, Unavailable
from broker.ledger.records import Intent, Redemption, Refusal
from broker.presented import NOTHING
from broker.sign import Signing
from broker.signing import extensions
from broker.signing.authority import Authority
from broker.signing.ca_make import ROOT_LIFETIME, make_issuing, make_root
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey, Signs
from broker.signing.profile import Issuing
from broker.spending import Spending

P384 = ec.generate_private_key(ec.SECP384R1())
P256 = ec.generate_private_key(ec.SECP256R1())
KEYS = {
    "p384": NamedKey.of(FileSigner.from_key(P384, "p384")),
    "p256": NamedKey(signer=FileSigner.from_key(P256, "p256"), signs=Signs.STATEMENTS),
}
GOOD, EVIL = digests(CONTENT), digests(b"what nobody built")
SAID = json.dumps(statement()).encode()


@pytest.fixture
async def found(tmp_path: Path) -> AsyncIterator[SigningExchange]:
    async with signing_exchange(tmp_path, keys=KEYS) as made:
        yield made


async def ask(found: SigningExchange, *envelopes: bytes, **asked: Any) -> str:
    """A grant on this provenance."""
    action = found.action(**asked)
    issued = await found.signing.grant(found.caller, lambda: action, envelopes, NOTHING, found.parts.now(), CORRELATION)
    found.envelopes[issued.token] = envelopes[-1]
    return issued.token


async def no_grant(found: SigningExchange, *envelopes: bytes, **asked: Any) -> BrokerError:
    """Why not."""
    with pytest.raises(BrokerError) as error:
        await ask(found, *envelopes, **asked)
    return error.value


def about(*subjects: dict[str, str]) -> dict[str, Any]:
    return {"subject": [{"digest": one} for one in subjects]}


SHA256 = {"sha256": GOOD["sha256"]}
RIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "a P-384 key would sign it": ("key:p384", SHA256 | {"sha384": EVIL["sha384"], "sha512": EVIL["sha512"]}),
    "a statement could name it": ("key:p256", SHA256 | {"sha512": EVIL["sha512"]}),
    "a certificate would say it": ("keyless", SHA256 | {"sha384": EVIL["sha384"]}),
    "and it is true": ("keyless", SHA256 | {"sha384": GOOD["sha384"]}),
}


@pytest.mark.parametrize(("signer", "artifact"), RIDERS.values(), ids=RIDERS)
async def test_no_digest_that_the_builder_did_not_give_is_granted(
    found: SigningExchange, signer: str, artifact: dict[str, str]
) -> None:
    """Invariant 13: or the sha256 of what was built would carry the sha384 of something else to the key."""
    asked = {"artifacts": [artifact], "signer": signer}
    built = found.builder.envelope(**about(SHA256))
    elsewhere = found.builder.envelope(**about(SHA256, {name: artifact[name] for name in artifact.keys() - SHA256}))
    for envelope in (built, elsewhere):
        refused = await no_grant(found, envelope, **asked)
        assert refused.reason is Reason.PROVENANCE_REJECTED
        lacks = rf"gives the sha(256|384|512) of sha256:{GOOD['sha256']} as well"
        assert re.search(lacks, refused.detail)
    whole = found.builder.envelope(**about(artifact | {"sha1": "0" * 40}))
    assert await ask(found, built, whole, **asked), "one of them gives all"


async def test_a_p384_key_signs_the_sha384_that_the_builder_gave(found: SigningExchange) -> None:
    signed = await found.sign(await found.grant(signer="key:p384"))
    P384.public_key().verify(signed.signature, CONTENT, ec.ECDSA(hashes.SHA384()))
    with pytest.raises(InvalidSignature):
        P384.public_key().verify(signed.signature, b"what nobody built", ec.ECDSA(hashes.SHA384()))


async def test_a_certificate_names_the_digests_that_the_builder_gave_and_no_others(found: SigningExchange) -> None:
    signed = await found.sign(await ask(found, found.builder.envelope(**about(GOOD)), artifacts=[SHA256]))
    leaf = x509.load_der_x509_certificate(signed.certificate_chain[0])
    assert extensions.read(leaf).artifacts == (f"sha256:{GOOD['sha256']}",)


# -- artifacts or statements -----------------------------------------------------------------------------------------


async def test_a_signature_over_an_artifact_is_none_over_a_statement(found: SigningExchange) -> None:
    """An artifact may be the encoding of a statement that nobody looked at: a key signs one kind alone."""
    encoded = digests(pae(STATEMENT_TYPE, b'{"_type": "https://in-toto.io/Statement/v1", "subject": []}'))
    envelope = found.builder.envelope(**about(encoded))
    refused = await no_grant(found, envelope, artifacts=[SHA256], signer="key:p256")
    assert refused.reason is Reason.PROVENANCE_REJECTED
    for signer, good, wrong in (("key:p256", SAID, b""), ("key:p384", b"", SAID)):
        grant = await found.grant(signer=signer)
        with pytest.raises(Invalid, match="alone"):
            await found.sign(grant, statement=wrong)
        assert (await found.sign(grant, statement=good)).signature, "and that spent nothing"
    of_statements = await ask(found, envelope, artifacts=[encoded], signer="key:p256")
    with pytest.raises(Invalid, match="signs statements alone"):
        await found.sign(of_statements)


async def test_no_grant_is_given_for_what_the_key_cannot_sign(found: SigningExchange) -> None:
    """Whoever approved it would have approved in vain."""
    built = found.builder.envelope(**about(GOOD, EVIL))
    for asked in ([SHA256], [GOOD, EVIL]):
        assert (await no_grant(found, built, artifacts=asked, signer="key:p384")).reason is Reason.MALFORMED
        assert await ask(found, built, artifacts=asked, signer="key:p256")
    assert await ask(found, built, artifacts=[GOOD], signer="key:p384")


# -- statements ------------------------------------------------------------------------------------------------------


def said(**changes: Any) -> bytes:
    return json.dumps(statement(**changes)).encode()


AMBIGUOUS = {
    "two spellings": said(Subject=[{"digest": EVIL}]),
    "a long s": json.dumps(statement() | {"\u017fubject": [{"digest": EVIL}]}).encode(),
    "protobuf's name": said(predicate_type="https://acme.test/other/v1"),
    "two spellings in a subject": said(subject=[{"digest": GOOD, "DIGEST": EVIL}]),
    "a name that we do not know": said(more={}),
    "a name that we do not know in a subject": said(subject=[{"digest": GOOD, "digests": [EVIL]}]),
    "a number of 400 digits": said(predicate={"n": 10**400}),
}


@pytest.mark.parametrize("wrong", AMBIGUOUS.values(), ids=AMBIGUOUS)
async def test_a_statement_that_can_be_read_in_two_ways_is_not_signed(found: SigningExchange, wrong: bytes) -> None:
    grant = await found.grant()
    with pytest.raises(Invalid):
        await found.sign(grant, statement=wrong)
    assert (await found.sign(grant, statement=SAID)).signature


async def test_a_statement_over_the_limit_is_not_even_read(found: SigningExchange) -> None:
    grant = await found.grant()
    with pytest.raises(Invalid, match="larger than 131072 bytes"):
        await found.sign(grant, statement=SAID.ljust(MAX_STATEMENT + 1))
    assert (await found.sign(grant, statement=SAID.ljust(MAX_STATEMENT))).signature


async def test_a_statement_that_takes_long_holds_no_other_request_up(found: SigningExchange) -> None:
    """It is read in a thread, as often as it likes to be refused."""
    grant = await found.grant()
    names = {f"n{number}": number for number in range(7000)}
    signing = asyncio.ensure_future(found.sign(grant, statement=said(predicate=names, more=1)))
    longest, before = 0.0, asyncio.get_running_loop().time()
    while not signing.done():
        await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        longest, before = max(longest, now - before), now
    assert isinstance(signing.exception(), Invalid)

    begun = asyncio.get_running_loop().time()
    await found.sign(grant, statement=said(predicate=names))
    assert longest < max(0.5 * (asyncio.get_running_loop().time() - begun), 0.03)


async def test_statements_wait_to_be_read_and_no_more_of_them_than_may_wait(found: SigningExchange) -> None:
    go_on = threading.Event()
    means = replace(found.signing._means, reading=InThreads(at_once=1, waiting=1))
    found.signing = Signing(found.parts.exchange, means)
    grants = [await found.grant() for _ in range(3)]
    busy = asyncio.ensure_future(means.reading.run(functools.partial(go_on.wait, 20)))
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(found.sign(grants[0], statement=SAID))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as error:
        await found.sign(grants[1], statement=SAID)
    assert (error.value.reason, "ask again" in error.value.detail) == (Reason.SIGNER_UNAVAILABLE, True)
    assert (await found.sign(grants[2])).signature, "an artifact's digest needs no reading"
    go_on.set()
    assert await busy
    assert (await waiting).signature
    assert (await found.sign(grants[1], statement=SAID)).signature, "its grant was not spent"


@pytest.mark.parametrize("signer", ["keyless", "key:p256"])
async def test_a_statement_is_signed_and_not_kept(found: SigningExchange, tmp_path: Path, signer: str) -> None:
    """It may be a megabyte in ten bundles, and the broker's to forget. Who asks again shows it again."""
    grant, marked = await found.grant(signer=signer), said(predicate={"marked": "who-keeps-this"})
    first = await found.sign(grant, statement=marked)
    assert await found.sign(grant, statement=marked) == first
    assert json.loads(first.bundle)["dsseEnvelope"]["payload"]
    with pytest.raises(Refused) as error:
        await found.sign(grant, statement=SAID)
    assert error.value.reason is Reason.ALREADY_USED
    kept = b"".join((tmp_path / name).read_bytes() for name in ("ledger.db", "ledger.db-wal"))
    assert first.signature in kept
    for text in (marked, b"who-keeps-this", first.bundle.encode(), first.bundle.encode()[-200:]):
        assert text not in kept


@pytest.mark.parametrize("signer", ["keyless", "key:p384"])
async def test_the_bundle_of_an_artifact_is_the_same_when_it_is_fetched_again(
    found: SigningExchange, signer: str
) -> None:
    grant = await found.grant(signer=signer)
    first, again = [await found.sign(grant) for _ in range(2)]
    assert isinstance(again, Signed)
    assert again == first
    assert json.loads(first.bundle)["messageSignature"]


# -- what a certificate cannot say -----------------------------------------------------------------------------------


def run_by(invocation: str) -> dict[str, Any]:
    predicate = statement()["predicate"]
    predicate["runDetails"]["metadata"]["invocationId"] = invocation
    return {"predicate": predicate}


@pytest.mark.parametrize("invocation", ["a\nb", "\u202e", "https://ci.acme.test/" + "a" * 2048])
async def test_provenance_that_no_certificate_can_hold_gives_no_grant_and_uses_no_approval_up(
    found: SigningExchange, invocation: str
) -> None:
    hostile = found.builder.envelope(**run_by(invocation))
    refused = await no_grant(found, hostile)
    assert (refused.reason, "invocation" in refused.detail) == (Reason.PROVENANCE_REJECTED, True)
    assert await ask(found, hostile, signer="key:p384"), "a named key certifies nothing"
    assert await found.sign(await ask(found, hostile, found.builder.envelope())), "the next envelope can be certified"
    records = await found.parts.records()
    assert [one.reason for one in records if isinstance(one, Refusal)] == [Reason.PROVENANCE_REJECTED]
    assert len([one for one in records if isinstance(one, Intent) and one.credential == "signing_grant"]) == 2


# -- the end of a CA -------------------------------------------------------------------------------------------------


async def ca(found: SigningExchange, *, begins: timedelta = timedelta(), ends: timedelta) -> Authority:
    """Another CA, that lives from an hour before `begins` to `ends`, both from now."""
    now = found.parts.now()
    root_key, key = (FileSigner.from_key(ec.generate_private_key(ec.SECP256R1()), name) for name in ("root-2", "ca-2"))
    root = await make_root(root_key, "root-2", "acme.test", now, ROOT_LIFETIME)
    issuing = await make_issuing(key, "ca-2", "acme.test", root, root_key, now + begins, ends - begins)
    chain = tuple(one.public_bytes(Encoding.DER) for one in (issuing, root))
    return Authority("ca-2", chain, Issuing.of(issuing), key)


def signs_by(found: SigningExchange, authority: Authority) -> None:
    found.signing = Signing(found.parts.exchange, replace(found.signing._means, authority=lambda: authority))


@pytest.mark.parametrize("signer", ["keyless", "key:p384"])
async def test_no_grant_outlives_the_ca_that_it_needs(found: SigningExchange, signer: str) -> None:
    """Invariant 3."""
    signs_by(found, await ca(found, ends=timedelta(seconds=150)))
    assert await found.grant(signer=signer)
    signs_by(found, await ca(found, ends=timedelta(seconds=118)))
    if signer == "keyless":
        refused = await no_grant(found, found.builder.envelope())
        assert (refused.reason, "ca rotate" in refused.detail) == (Reason.SIGNER_UNAVAILABLE, True)
    else:
        assert await found.grant(signer=signer), "a key that stays needs none"


async def test_a_certificate_ends_with_its_ca(found: SigningExchange) -> None:
    """Invariant 3: a CA that was exchanged under a grant gives what it can."""
    grant, short = await found.grant(), await ca(found, ends=timedelta(seconds=60))
    signs_by(found, short)
    leaf = x509.load_der_x509_certificate((await found.sign(grant)).certificate_chain[0])
    assert leaf.not_valid_after_utc == short.issuing.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("begins", "ends"),
    [(timedelta(), timedelta(seconds=-1)), (timedelta(hours=2), timedelta(days=1))],
    ids=["has ended", "has not begun"],
)
async def test_a_ca_that_cannot_certify_now_is_told_recorded_and_spends_nothing(
    found: SigningExchange, begins: timedelta, ends: timedelta
) -> None:
    """Never an answer without a reason."""
    grant, before = await found.grant(), found.signing
    signs_by(found, await ca(found, begins=begins, ends=ends))
    with pytest.raises(Unavailable) as error:
        await found.sign(grant)
    assert error.value.reason is Reason.SIGNER_UNAVAILABLE
    found.signing = before
    assert (await found.sign(grant)).signature
    records = await found.parts.records()
    assert [one.reason for one in records if isinstance(one, Refusal)] == [Reason.SIGNER_UNAVAILABLE]
    assert [one.result for one in records if isinstance(one, Redemption)] == ["used"]


# -- where the agent runs --------------------------------------------------------------------------------------------


class Pod:
    """What an attestor says of a caller in a pod."""

    name = "kubernetes"

    async def attest(self, request: AttestationRequest, now: datetime) -> Facts | None:
        """The same of everybody."""
        if request.process is not None:
            return None
        values = {"node": "worker-3", "pod_uid": "7b1f3c1e-9d0a-4e55-8a55-0d6a8f0d2c11"}
        expires_at = now + timedelta(minutes=5)
        return Facts(attestor=self.name, key=FactKey(self.name), values=values, attested_at=now, expires_at=expires_at)

    async def watch(self) -> AsyncIterator[FactKey]:
        """Nothing changes."""
        return
        yield


async def test_a_certificate_says_in_which_pod_the_agent_was_where_that_was_attested(
    found: SigningExchange, tmp_path: Path
) -> None:
    bare = x509.load_der_x509_certificate((await found.sign(await found.grant())).certificate_chain[0])
    assert (extensions.read(bare).node, extensions.read(bare).pod_uid) == ("", "")
    schema = tmp_path / "policy" / "nightly.cedarschema"
    kubernetes = "kubernetes: { node: String, pod_uid: String }"
    schema.write_text(schema.read_text().replace("provenance: Provenance,", f"provenance: Provenance, {kubernetes},"))
    policy = schema.with_suffix(".cedar")
    named = '@id("pods") forbid (principal, action == Action::"nightly.sign", resource) '
    named += 'when { context.kubernetes.node == "" };'
    policy.write_text(policy.read_text() + named)
    attestors = found.parts.exchange.attestation._attestors
    found.parts.exchange.attestation = Attestation(attestors | {"kubernetes": Pod()}, 2.0)
    found.parts.exchange.policies = PolicyStore(tmp_path / "policy")
    leaf = x509.load_der_x509_certificate((await found.sign(await found.grant())).certificate_chain[0])
    certified = extensions.read(leaf)
    assert (certified.node, certified.pod_uid) == ("worker-3", "7b1f3c1e-9d0a-4e55-8a55-0d6a8f0d2c11")
    assert certified.build["build_signer_uri"] == BUILDER


# -- a caller that asks for what was spent ---------------------------------------------------------------------------


async def test_a_grant_is_presented_with_the_same_statement_or_not_at_all(found: SigningExchange) -> None:
    """The answer is put together from the question, which is why that may not change."""
    grant = await found.grant()
    first = await found.sign(grant, statement=SAID)
    for other in (b"", SAID + b" "):
        with pytest.raises(Refused) as error:
            await found.sign(grant, statement=other)
        assert error.value.reason is Reason.ALREADY_USED
    spending = Spending(grant=grant, idempotency_id="i" * 20, provenance=[])
    assert await found.signing.sign(found.caller, spending, SAID, found.parts.now(), CORRELATION) == first
