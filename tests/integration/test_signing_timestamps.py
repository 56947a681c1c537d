"""Timestamps of a real authority in a whole broker: what comes of bad ones, and what provenance proves by good ones."""

import asyncio
import base64
import hashlib
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from asn1crypto import tsp
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from securesystemslib.dsse import Envelope
from securesystemslib.signer import CryptoSigner, SSlibKey
from support.processes import until
from support.provenance import b64, bundle, spki_pem
from support.signing import BUILDER, CONTENT, SigningBroker, signing_broker, statement
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    ask_grant,
    ask_sign,
    get_grant,
    nothing_signed,
    refused,
    results,
    spent,
)
from support.signing_parts import merged, timestamps
from support.sigstore_tools import TimestampServer, sigstore_tools, timestamp_authority
from support.timestamp_front import Answer, Front, Handler, front_of
from support.timestamps import Tsa
from support.whole_broker import Said, Wire

from attestors.dsse import STATEMENT_TYPE, pae
from attestors.rfc3161 import verify_timestamp
from broker.errors import Reason
from broker.ledger.records import Refusal
from broker.signing.timestamp import TimestampAuthority
from broker.status import STATUS

pytestmark = pytest.mark.cosign

TIMEOUT_MS = 1000
STATEMENT = json.dumps(statement()).encode()


@dataclass
class Stamping:
    """A broker whose timestamps come from a real authority through a front. provenance: what grants are given on."""

    broker: SigningBroker
    front: Front
    tsa: TimestampServer
    provenance: tuple[bytes, ...]


@pytest.fixture(scope="module")
def stamping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stamping]:
    folder = tmp_path_factory.mktemp("tsa")
    key = folder / "p256.pem"
    key.touch(mode=0o600)
    made = ec.generate_private_key(ec.SECP256R1())
    key.write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with timestamp_authority() as tsa, front_of(tsa.url) as front:
        tables = merged(
            timestamps(folder, front.url, tsa.pem, timeout_ms=TIMEOUT_MS),
            {"signing.keys.p256": {"file": str(key)}, "limits": UNLIMITED},
        )
        with signing_broker(NIGHTLY, **tables) as broker:
            yield Stamping(broker, front, tsa, (broker.builder.envelope(),))


@pytest.fixture
async def wire(stamping: Stamping) -> AsyncIterator[Wire]:
    async with stamping.broker.whole.wire() as found:
        yield found


async def granted(stamping: Stamping, wire: Wire, signer: str) -> str:
    return (await get_grant(wire, stamping.broker.nightly(signer=signer), stamping.provenance)).grant


async def sign(stamping: Stamping, wire: Wire, grant: str, **options: Any) -> Said:
    return await ask_sign(wire, grant, stamping.provenance, **options)


async def accepted(stamping: Stamping, wire: Wire, signer: str) -> bytes:
    """The positive control. Its timestamp, which the authority itself verifies."""
    said = await sign(stamping, wire, await granted(stamping, wire, signer))
    assert said.code is grpc.StatusCode.OK, (said.reason, said.details)
    time = verify_timestamp(said.message.timestamp, said.message.signature, [stamping.tsa.root])
    assert abs((datetime.now(UTC) - time).total_seconds()) < 10
    return said.message.timestamp


async def fails(stamping: Stamping, wire: Wire, signer: str, statement: bytes = b"") -> None:
    """No signature leaves; intent, failure and refusal are recorded; the grant is gone, also when all is well again."""
    whole, grant = stamping.broker.whole, await granted(stamping, wire, signer)
    said = await sign(stamping, wire, grant, idempotency_id="the-first-and-only", statement=statement)
    reason = Reason.TIMESTAMP_UNAVAILABLE
    assert (said.message, said.reason, said.code) == (None, reason, STATUS[reason].grpc)
    assert (await whole.recorded(said.correlation_id, Refusal)).reason == reason
    await until(lambda: results(whole, said.correlation_id) == ["failed"], "the failure is recorded")
    assert spent(whole, grant) == "used"
    stamping.front.answer = stamping.front.hand_on
    late = await sign(stamping, wire, grant, idempotency_id="the-first-and-only", statement=statement)
    assert (late.message, late.reason) == (None, Reason.ALREADY_USED)
    await accepted(stamping, wire, signer)


def _changed(change: Callable[[tsp.TimeStampReq], None]) -> Answer:
    """The real authority stamps, but something else than it was asked to."""

    def answer(handler: Handler, query: bytes) -> None:
        asked = tsp.TimeStampReq.load(query)
        change(asked)
        handler.reply(handler.server.front.stamped(asked.dump(force=True)))

    return answer


def _another_message(asked: tsp.TimeStampReq) -> None:
    asked["message_imprint"]["hashed_message"] = hashlib.sha256(b"something else").digest()


def _another_hash(asked: tsp.TimeStampReq) -> None:
    asked["message_imprint"]["hash_algorithm"] = {"algorithm": "sha512"}
    asked["message_imprint"]["hashed_message"] = hashlib.sha512(b"something else").digest()


def _another_nonce(asked: tsp.TimeStampReq) -> None:
    asked["nonce"] = asked["nonce"].native ^ 1


def _stranger(handler: Handler, query: bytes) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    handler.reply(Tsa.made(now).answer(query, now))


def _never(handler: Handler, query: bytes) -> None:
    handler.server.front.ended.wait()


def _drop_by_drop(handler: Handler, query: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    while not handler.server.front.ended.wait(0.1):
        handler.wfile.write(b"\x30")


def _elsewhere(handler: Handler, query: bytes) -> None:
    handler.reply(b"", 307, Location=handler.server.front.behind)


def _cut_off(handler: Handler, query: bytes) -> None:
    handler.reply(handler.server.front.stamped(query)[:-20])


BAD: dict[str, Answer] = {
    "stamps another message": _changed(_another_message),
    "stamps by another hash": _changed(_another_hash),
    "answers to another nonce": _changed(_another_nonce),
    "is a stranger": _stranger,
    "says no": lambda handler, query: handler.reply(Tsa.made().answer(query, status=2)),
    "never answers": _never,
    "answers drop by drop": _drop_by_drop,
    "sends us elsewhere": _elsewhere,
    "fails": lambda handler, _: handler.reply(b"oops", 500),
    "talks of something else": lambda handler, _: handler.reply(b"<html>"),
    "answers in part": _cut_off,
    "answers without end": lambda handler, _: handler.reply(bytes(1 << 20)),
}


@pytest.mark.parametrize("signer", ["keyless", "key:p256"])
@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
async def test_without_a_good_timestamp_no_signature_leaves_the_broker(stamping, wire, answer, signer):
    begun = asyncio.get_running_loop().time()
    with stamping.front.doing(answer):
        await fails(stamping, wire, signer)
    assert asyncio.get_running_loop().time() - begun < 8 * TIMEOUT_MS / 1000


async def test_a_statement_without_a_good_timestamp_does_not_leave_either(stamping, wire):
    with stamping.front.doing(_changed(_another_message)):
        await fails(stamping, wire, "keyless", STATEMENT)


async def test_an_earlier_timestamp_is_not_taken_for_this_signature(stamping, wire):
    earlier = await accepted(stamping, wire, "key:p256")
    with stamping.front.doing(lambda handler, _: handler.reply(earlier)):
        await fails(stamping, wire, "key:p256")


@pytest.mark.parametrize("signer", ["keyless", "key:p256"])
async def test_an_authority_that_is_down_is_used_again_when_it_is_up(stamping, wire, signer):
    whole, grant = stamping.broker.whole, await granted(stamping, wire, signer)
    stamping.front.down()
    try:
        said = await sign(stamping, wire, grant)
    finally:
        stamping.front.up()
    assert (said.message, said.reason) == (None, Reason.TIMESTAMP_UNAVAILABLE)
    await until(lambda: results(whole, said.correlation_id) == ["failed"], "the failure is recorded")
    assert spent(whole, grant) == "used"
    await accepted(stamping, wire, signer)


@dataclass
class Trusting:
    """A broker that believes the builders that a test names, and timestamps of a real authority."""

    broker: SigningBroker
    tsa: TimestampServer
    folder: Path

    async def believe(self, builder: str) -> None:
        """The broker has taken this line of the trust file about `BUILDER`."""
        chain = self.folder / "tsa.pem"
        chain.write_bytes(self.tsa.pem)
        self.broker.builder.trust_file.write_text(
            f'max_age_s = 3600\ntimestamp_chains = ["{chain}"]\n[builders."{BUILDER}"]\n{builder}\n'
        )
        await self.broker.reloaded()

    async def believe_key(self, name: str, pem: bytes) -> None:
        """A key of this name."""
        file = self.folder / f"{name}.pub"
        file.write_bytes(pem)
        await self.believe(f'keys = {{ {name} = "{file}" }}')

    async def signs_on(self, wire: Wire, evidence: bytes) -> None:
        """It is good for a grant, and shown again for a signature."""
        grant = await get_grant(wire, self.broker.nightly(), [evidence])
        said = await ask_sign(wire, grant.grant, [evidence])
        assert said.code is grpc.StatusCode.OK, (said.reason, said.details)

    async def rejects(self, wire: Wire, evidence: bytes, why: str) -> None:
        """Reason, record and detail; nothing is signed."""
        with nothing_signed(self.broker.whole):
            said = await ask_grant(wire, self.broker.nightly(), [evidence])
            record = await refused(self.broker, said, Reason.PROVENANCE_REJECTED)
        assert why in record.detail


@pytest.fixture(scope="module")
def trusting(tmp_path_factory: pytest.TempPathFactory, stamping: Stamping) -> Iterator[Trusting]:
    with signing_broker(NIGHTLY, limits=UNLIMITED) as broker:
        yield Trusting(broker, stamping.tsa, tmp_path_factory.mktemp("trusting"))


@pytest.fixture
async def caller(trusting: Trusting) -> AsyncIterator[Wire]:
    async with trusting.broker.whole.wire() as found:
        yield found


def edited(evidence: bytes) -> bytes:
    """The same with another source in the statement, which the signature is not over."""
    document = json.loads(evidence)
    envelope = document.get("dsseEnvelope", document)
    payload = base64.b64decode(envelope["payload"]).replace(b"git.acme.test/acme/app", b"git.evil.test/acme/app")
    envelope["payload"] = b64(payload)
    return json.dumps(document).encode()


def attested_by_cosign(folder: Path) -> bytes:
    """A statement, signed with a new key: `cosign.pub`."""
    (folder / "statement.json").write_bytes(STATEMENT)
    (folder / "blob").write_bytes(CONTENT)
    offline = ("--use-signing-config=false", "--tlog-upload=false", "--yes")
    what = ("--key", "cosign.key", "--bundle", "out.json", "--statement", "statement.json", *offline, "blob")
    for arguments in (("generate-key-pair",), ("attest-blob", *what)):
        subprocess.run(
            [sigstore_tools() / "cosign", *arguments],
            cwd=folder,
            env={"HOME": str(folder), "COSIGN_PASSWORD": "throwaway"},
            stdin=subprocess.DEVNULL,
            check=True,
            capture_output=True,
            timeout=60,
        )
    return (folder / "out.json").read_bytes()


async def test_provenance_that_cosign_attested_is_good_for_a_signature_and_an_edited_one_is_not(
    trusting, caller, tmp_path
):
    evidence = await asyncio.to_thread(attested_by_cosign, tmp_path)
    await trusting.rejects(caller, evidence, "no signature of anybody trusted")
    await trusting.believe_key("cosign", (tmp_path / "cosign.pub").read_bytes())
    await trusting.signs_on(caller, evidence)
    await trusting.rejects(caller, edited(evidence), "no signature of anybody trusted")


KEYS = {
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
}


@pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)
async def test_provenance_that_securesystemslib_signed_is_good_for_a_signature_and_an_edited_one_is_not(
    trusting, caller, make
):
    key = make()
    envelope = Envelope(STATEMENT, STATEMENT_TYPE, {})
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())))
    evidence = json.dumps(envelope.to_dict()).encode()
    await trusting.rejects(caller, evidence, "no signature of anybody trusted")
    await trusting.believe_key("builder", spki_pem(key).encode())
    await trusting.signs_on(caller, evidence)
    await trusting.rejects(caller, edited(evidence), "no signature of anybody trusted")


SVID_S = 4
"""How long the builder's SVID lives."""


async def test_provenance_by_an_svid_that_has_ended_counts_by_the_timestamp_over_it_alone(trusting, caller):
    whole = trusting.broker.whole
    await trusting.believe(f'spiffe_ids = ["{whole.domain.id("ci/builder")}"]')
    svid = whole.domain.svid("ci/builder", SVID_S).own
    key = load_der_private_key(svid.private_key_pkcs8, None)
    signatures = [key.sign(pae(STATEMENT_TYPE, STATEMENT), ec.ECDSA(hashes.SHA256())) for _ in range(2)]
    signed = {"payload": b64(STATEMENT), "payloadType": STATEMENT_TYPE, "signatures": [{"sig": b64(signatures[0])}]}

    def with_stamps(*stamps: bytes) -> bytes:
        return json.dumps(bundle(signed, chain=svid.chain, timestamps=stamps)).encode()

    now = datetime.now(UTC).replace(microsecond=0)
    stranger = Tsa.made(now).stamp(signatures[0], now)
    async with TimestampAuthority(trusting.tsa.url, [trusting.tsa.root]) as authority:
        stamp, of_another = [await authority.stamp(one) for one in signatures]
        await trusting.signs_on(caller, with_stamps())
        await until(lambda: datetime.now(UTC) > svid.not_after + timedelta(seconds=1), "the SVID has ended")
        too_late = await authority.stamp(signatures[0])
    await trusting.signs_on(caller, with_stamps(stamp))
    await trusting.signs_on(caller, with_stamps(of_another, stamp))
    for stamps in ((), (of_another,), (stranger,), (too_late,)):
        await trusting.rejects(caller, with_stamps(*stamps), "no X.509-SVID of a trusted domain")
    await trusting.rejects(caller, edited(with_stamps(stamp)), "not the signer's")
    await trusting.believe(f'spiffe_ids = ["{whole.domain.id("ci/other")}"]')
    await trusting.rejects(caller, with_stamps(stamp), "the builder")
