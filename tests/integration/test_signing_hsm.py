"""Keys that never leave a token, in a whole broker: they sign, and while the token is gone nothing does."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.cli import cli
from support.pki import CA
from support.processes import PATIENCE_S, until
from support.signing import CONTENT, SigningBroker, signing_broker, statement
from support.signing_calls import NIGHTLY, UNLIMITED, ask_sign, get_grant, results, spent
from support.signing_parts import ca_in, merged, public_key, token_keys
from support.softhsm import SoftHsm
from support.whole_broker import Said, Wire

from broker.client.signing import Signature
from broker.errors import Reason, Unavailable
from broker.ledger.records import Refusal
from broker.signing.pkcs11 import Token
from broker.status import STATUS

pytestmark = pytest.mark.softhsm

KINDS = {
    "p256": "p256",
    "p384": "p384",
    "rsa": "rsa2048",
    "ed25519": "ed25519",
    "p256-statements": "p256",
    "p384-statements": "p384",
    "rsa-statements": "rsa2048",
}
STATEMENT = json.dumps(statement()).encode()


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoftHsm]:
    with SoftHsm(tmp_path_factory.mktemp("hsm")) as found:
        for name, kind in KINDS.items():
            found.make_key(kind, f"{name}-2026")
        yield found


@pytest.fixture(scope="module")
def ca_folder(hsm: SoftHsm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ca_in(hsm, tmp_path_factory.mktemp("ca") / "ca")


@pytest.fixture(scope="module")
def broker(hsm: SoftHsm, ca_folder: Path) -> Iterator[SigningBroker]:
    """Its named keys and its CA are in one token."""
    tables = merged(
        token_keys(hsm, **{name: f"{name}-2026" for name in KINDS}),
        {"signing": {"ca_folder": str(ca_folder)}, "limits": UNLIMITED},
    )
    with signing_broker(NIGHTLY, **tables) as found:
        yield found


@dataclass
class Calls:
    """One caller. provenance: what its grants are given on, and shown again."""

    broker: SigningBroker
    wire: Wire
    provenance: tuple[bytes, ...]

    async def grant(self, signer: str) -> str:
        asked = self.broker.nightly(signer=signer)
        found: str = (await get_grant(self.wire, asked, self.provenance)).grant
        return found

    async def sign(self, grant: str, **options: Any) -> Said:
        return await ask_sign(self.wire, grant, self.provenance, **options)

    async def accepted(self, signer: str, **options: Any) -> Any:
        """The answer to the next grant: of positive controls, too."""
        said = await self.sign(await self.grant(signer), **options)
        assert said.code is grpc.StatusCode.OK, (said.reason, said.details)
        return said.message

    async def failed(self, said: Said, grant: str) -> None:
        """No signature left; intent, failure and refusal are recorded; and the grant is gone."""
        reason, whole = Reason.SIGNER_UNAVAILABLE, self.broker.whole
        assert (said.message, said.reason, said.code) == (None, reason, STATUS[reason].grpc)
        assert (await whole.recorded(said.correlation_id, Refusal)).reason == reason
        await until(lambda: results(whole, said.correlation_id) == ["failed"], "the failure is recorded")
        assert spent(whole, grant) == "used"


@pytest.fixture
async def calls(broker: SigningBroker) -> AsyncIterator[Calls]:
    async with broker.whole.wire() as wire:
        yield Calls(broker, wire, (broker.builder.envelope(),))


@pytest.mark.parametrize("name", ["p256-statements", "p384-statements", "rsa-statements", "ed25519"])
async def test_a_key_in_the_token_signs_a_statement_for_whoever_has_its_public_key(calls, hsm, tmp_path, name):
    answer = await calls.accepted(f"key:{name}", statement=STATEMENT)
    assert list(answer.certificate_chain) == []
    _verifies(hsm, tmp_path, name, answer.bundle)


@pytest.mark.parametrize("name", ["p256", "p384", "rsa"])
async def test_a_key_in_the_token_signs_the_digest(calls, hsm, tmp_path, name):
    _verifies(hsm, tmp_path, name, (await calls.accepted(f"key:{name}")).bundle)


def _verifies(hsm: SoftHsm, folder: Path, name: str, bundle: str) -> None:
    """With this key, this content; and not with others."""
    (folder / "bundle.json").write_text(bundle)
    (folder / "content").write_bytes(CONTENT)
    (folder / "other").write_bytes(b"something else")
    verdicts = []
    for file, label in (("content", name), ("other", name), ("content", "p256" if name != "p256" else "p384")):
        key = public_key(hsm, f"{label}-2026")
        (folder / "key.pem").write_bytes(_pem(key))
        command = ("verify", folder / file, "--bundle", folder / "bundle.json", "--key", folder / "key.pem")
        verdicts.append(cli(*command).code)
    assert verdicts == [0, 3, 3]


def _pem(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


async def test_a_ca_whose_key_is_in_the_token_certifies_one_time_keys(calls, hsm, ca_folder, tmp_path):
    answer = await calls.accepted("keyless")
    leaf, issuing, root = map(x509.load_der_x509_certificate, answer.certificate_chain)
    assert issuing.public_key() == public_key(hsm, "ca-issuing")
    assert root.public_key() == public_key(hsm, "ca-root")
    leaf.verify_directly_issued_by(issuing)
    assert leaf.public_key() not in [public_key(hsm, label) for label in ("p256-2026", "ca-issuing")]
    (tmp_path / "root.json").write_text(cli("ca", "trusted-root", ca_folder).out)
    (tmp_path / "bundle.json").write_text(answer.bundle)
    (tmp_path / "content").write_bytes(CONTENT)
    command = ("verify", tmp_path / "content", "--bundle", tmp_path / "bundle.json")
    assert cli(*command, "--trusted-root", tmp_path / "root.json").code == 0
    (tmp_path / "other.json").write_text(cli("ca", "trusted-root", calls.broker.ca_folder).out)
    assert cli(*command, "--trusted-root", tmp_path / "other.json").code == 3, "that CA does not sign here"


@pytest.mark.parametrize("signer", ["key:p256", "key:rsa", "keyless"])
async def test_a_token_that_is_taken_away_after_the_grant_signs_nothing_and_works_when_it_is_back(calls, hsm, signer):
    await calls.accepted(signer)
    grant, process = await calls.grant(signer), calls.broker.whole.broker.process
    hsm.take_away()
    try:
        said = await calls.sign(grant, idempotency_id="the-first-and-only")
    finally:
        hsm.put_back()
    await calls.failed(said, grant)
    for again in ("the-first-and-only", "another-idempotency-id"):
        late = await calls.sign(grant, idempotency_id=again)
        assert (late.message, late.reason) == (None, Reason.ALREADY_USED), "also when the token is back"
    await calls.accepted(signer)
    assert process.poll() is None


def _waits_for_a_lock(pid: int) -> bool:
    """By proc_locks(5): "1: -> POSIX ADVISORY WRITE PID …"."""
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return any(line[1] == "->" and int(line[5]) == pid for line in lines)


async def test_a_token_that_goes_in_mid_call_gives_no_signature(calls, hsm):
    """The call hangs in the module when the token goes; what comes of it then leaves nobody's hands."""
    grant, whole = await calls.grant("key:p256"), calls.broker.whole
    with hsm.hanging():
        asked = asyncio.create_task(calls.sign(grant))
        await until(lambda: _waits_for_a_lock(whole.broker.process.pid), "the call is in the module")
        hsm.take_away()
        try:
            said = await asked
        finally:
            hsm.put_back()
    await calls.failed(said, grant)
    async with asyncio.timeout(PATIENCE_S):  # a call that hung may still be on its way back
        while (said := await calls.sign(await calls.grant("key:p256"))).message is None:
            assert said.reason == Reason.SIGNER_UNAVAILABLE


async def test_a_token_that_goes_under_load_gives_good_signatures_and_refusals_and_nothing_else(calls, hsm):
    key, broker = public_key(hsm, "p256-2026"), calls.broker
    async with broker.client() as agent:
        asked_for = broker.nightly(signer="key:p256")
        grants = [await agent.signing.grant(asked_for, calls.provenance) for _ in range(32)]
        asked = [asyncio.create_task(agent.signing.sign(one)) for one in grants[:-1]]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        hsm.take_away()
        try:
            last = asyncio.create_task(agent.signing.sign(grants[-1]))
            answers = await asyncio.gather(*asked, last, return_exceptions=True)
        finally:
            hsm.put_back()
    for grant, answer in zip(grants, answers, strict=True):
        assert spent(broker.whole, grant) == "used"
        if isinstance(answer, Signature):
            key.verify(answer.signature, CONTENT, ec.ECDSA(SHA256()))
        else:
            assert isinstance(answer, Unavailable)
            assert answer.reason is Reason.SIGNER_UNAVAILABLE
    assert any(isinstance(one, Signature) for one in answers), "it waited for one"
    assert isinstance(answers[-1], Unavailable), "which it asked for when the token was gone"
    await calls.accepted("key:p256")


def test_a_module_leaves_no_errors_of_openssl_to_whoever_opened_it(hsm):
    """SoftHSM uses the OpenSSL of the process: the broker's first TLS context failed on what it had left behind."""
    authority = CA().certificate.public_bytes(Encoding.DER)
    with Token(hsm.module, hsm.label, hsm.pin_file, 1):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authority)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=authority)
