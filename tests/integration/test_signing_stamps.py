"""A timestamp authority that is down, slow or answers something else: no signature leaves the broker.

By one in memory, so that it runs everywhere; test_signing_timestamps.py has a real one.
"""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from support.signing import AGENT, CONTENT, SigningBroker, digests, signing_broker
from support.signing_calls import NIGHTLY, UNLIMITED, acts, ask_sign, get_grant, refused, results, spent
from support.signing_parts import timestamps
from support.stamping import Stamping, stamping
from support.whole_broker import Said, Wire

from attestors.rfc3161 import verify_timestamp
from broker.errors import Reason


@dataclass
class Setting:
    """A broker that waits half a second for a timestamp."""

    broker: SigningBroker
    authority: Stamping


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Left as it was found."""
    with stamping() as authority:
        tables = timestamps(tmp_path_factory.mktemp("tsa"), authority.url, authority.tsa.pem, timeout_ms=500)
        with signing_broker(NIGHTLY, limits=UNLIMITED, **tables) as broker:
            yield Setting(broker, authority)


Bad = Callable[[Stamping], AbstractContextManager[None]]


def at_another_time(**ahead: float) -> Bad:
    return lambda one: one.answering(at=datetime.now(UTC) + timedelta(**ahead))


BAD: dict[str, Bad] = {
    "it answers nothing": lambda one: one.holding(),
    "it says that it failed": lambda one: one.answering(http_status=500),
    "it sends us elsewhere": lambda one: one.answering(http_status=307),
    "it refuses": lambda one: one.answering(status=2),
    "it stamps another hash": lambda one: one.answering(imprint=b"\0" * 32),
    "it stamps by another algorithm": lambda one: one.answering(hash_name="sha512", imprint=b"\0" * 64),
    "it answers another question": lambda one: one.answering(nonce=7),
    "it leaves the nonce out": lambda one: one.answering(nonce=None),
    "it is another authority": lambda one: one.answering(by=one.stranger),
    "it is before the certificate's time": at_another_time(minutes=-5),
    "it is after the certificate's time": at_another_time(minutes=5),
}


async def sign(setting: Setting, wire: Wire) -> tuple[Said, str, list[bytes]]:
    """The answer, the grant and its provenance."""
    envelope = [setting.broker.builder.envelope()]
    grant = (await get_grant(wire, setting.broker.nightly(), envelope)).grant
    return await ask_sign(wire, grant, envelope, idempotency_id="i" * 20), grant, envelope


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_without_a_timestamp_that_is_believed_no_signature_leaves(setting: Setting, bad: Bad) -> None:
    """And the grant is spent: the signature was made, and somebody may have seen it on its way to be stamped."""
    whole = setting.broker.whole
    async with whole.wire() as wire:
        with bad(setting.authority):
            said, grant, envelope = await sign(setting, wire)
        record = await refused(setting.broker, said, Reason.TIMESTAMP_UNAVAILABLE)
        assert (record.principal, record.stage) == (AGENT, "sign")
        assert results(whole, said.correlation_id) == ["failed"]
        assert spent(whole, grant) == "used"
        before = len(acts(whole))
        for idempotency_id in ("i" * 20, "j" * 20):
            again = await ask_sign(wire, grant, envelope, idempotency_id=idempotency_id)
            await refused(setting.broker, again, Reason.ALREADY_USED)
        assert len(acts(whole)) == before

        control, _, _ = await sign(setting, wire)
        assert control.code is grpc.StatusCode.OK, control.reason


async def test_the_timestamp_in_a_bundle_is_over_its_signature_within_its_certificates_time(setting: Setting) -> None:
    async with setting.broker.whole.wire() as wire:
        said, _, _ = await sign(setting, wire)
    message = said.message
    at = verify_timestamp(message.timestamp, message.signature, [setting.authority.tsa.root])
    leaf = x509.load_der_x509_certificate(message.certificate_chain[0])
    assert leaf.not_valid_before_utc <= at <= leaf.not_valid_after_utc
    bundle = json.loads(message.bundle)
    (stamped,) = bundle["verificationMaterial"]["timestampVerificationData"]["rfc3161Timestamps"]
    assert base64.b64decode(stamped["signedTimestamp"]) == message.timestamp
    assert base64.b64decode(bundle["messageSignature"]["signature"]) == message.signature


async def test_an_authority_that_is_not_there_refuses_and_one_that_is_not_configured_is_not_missed(
    tmp_path: Path,
) -> None:
    """Its port is closed; without one in the configuration there is a signature, and no timestamp in it."""
    with stamping() as authority:
        tables = timestamps(tmp_path, authority.url, authority.tsa.pem)
    with signing_broker(NIGHTLY, **tables) as broker:
        async with broker.whole.wire() as wire:
            said, _, _ = await sign(Setting(broker, authority), wire)
            await refused(broker, said, Reason.TIMESTAMP_UNAVAILABLE)
    with signing_broker(NIGHTLY) as broker:
        async with broker.whole.wire() as wire:
            said, _, _ = await sign(Setting(broker, authority), wire)
        assert said.code is grpc.StatusCode.OK
        assert said.message.timestamp == b""
        bundle = json.loads(said.message.bundle)
        assert "timestampVerificationData" not in bundle["verificationMaterial"]
        digest = base64.b64decode(bundle["messageSignature"]["messageDigest"]["digest"])
        assert digest.hex() == digests(CONTENT)["sha256"]
