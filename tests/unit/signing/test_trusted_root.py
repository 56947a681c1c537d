"""The trusted root names every CA that may have signed what verifies today, and timestamp authorities as they are."""

import asyncio
import itertools
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sigstore_models.trustroot.v1 import TrustedRoot as Sigstores
from support.certificates import ISSUER, NOW, make_folder

from broker.signing.ca_extend import Plan, extend
from broker.signing.ca_folder import CaError, CaFolder
from broker.signing.ca_key import signer_at
from broker.signing.read_trusted_root import read_trusted_root
from broker.signing.trusted_root import read_tsa_chain, to_json, trusted_root

PURPOSE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING, ExtendedKeyUsageOID.CODE_SIGNING])


def certificate(name: str, key: Any, issuer: str, signer: Any, *more: tuple[x509.ExtensionType, bool]) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=9))
    )
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


ROOT_KEY, OWN_KEY = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
IS_CA = (x509.BasicConstraints(ca=True, path_length=None), True)
ROOT = certificate("root", ROOT_KEY, "root", ROOT_KEY, IS_CA)
OWN = certificate("tsa", OWN_KEY, "root", ROOT_KEY, (PURPOSE, True))


@pytest.fixture
def folder(tmp_path: Path) -> CaFolder:
    """Three issuing CAs under two roots: the first ends after 10 days, the second has yet to sign."""
    folder = make_folder(tmp_path / "ca", issuing_lifetime=timedelta(days=10))
    for root in (False, True):
        plan = Plan(organization="acme", use_from=NOW + timedelta(days=1), root=root)
        folder = asyncio.run(extend(folder, plan, signer_at, NOW))
    return folder


def count(folder: CaFolder, at: datetime, **more: Any) -> int:
    return len(trusted_root(folder, [], at, **more)["certificateAuthorities"])


def test_old_and_new_cas_are_in_it_until_they_end(folder: CaFolder) -> None:
    assert [count(folder, NOW + timedelta(days=days)) for days in (0, 9, 11, 364, 366)] == [3, 3, 2, 2, 0]
    assert count(folder, NOW + timedelta(days=366), with_ended=True) == 3


def test_sigstores_own_types_and_ours_read_the_same_from_it(folder: CaFolder) -> None:
    chain = read_tsa_chain(OWN + ROOT)
    text = to_json(trusted_root(folder, [chain], NOW))
    theirs = Sigstores.from_json(text)
    assert theirs.media_type == "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
    assert [one.uri for one in theirs.certificate_authorities] == [ISSUER] * 3
    assert [len(one.cert_chain.certificates) for one in theirs.certificate_authorities] == [2, 2, 2]
    assert [len(one.cert_chain.certificates) for one in theirs.timestamp_authorities] == [2]
    ours = read_trusted_root(text.encode())
    assert [one.chain for one in ours.certificate_authorities] == [folder.chain(entry) for entry in folder.issuing]
    assert ours.timestamp_authorities[0].chain == chain
    issuing, root = folder.chain(folder.issuing[0])
    first = ours.certificate_authorities[0]
    assert (first.valid_from, first.valid_until) == (issuing.not_valid_before_utc, issuing.not_valid_after_utc)
    assert root.not_valid_after_utc > issuing.not_valid_after_utc


def test_no_private_key_is_in_it(folder: CaFolder) -> None:
    text = to_json(trusted_root(folder, [], NOW))
    keys = [file.read_text().splitlines()[1] for file in folder.path.glob("*.key.pem")]
    assert len(keys) == 5
    assert not any(line in text for line in keys)
    assert "PRIVATE" not in text
    assert set(json.loads(text)) == {
        "mediaType", "tlogs", "certificateAuthorities", "ctlogs", "timestampAuthorities",
    }  # fmt: skip


STRANGER = certificate("root", OWN_KEY, "root", OWN_KEY, IS_CA)
NO_CHAINS = {
    "empty": b"",
    "no-pem": b"hello",
    "the-wrong-order": ROOT + OWN,
    "no-root": OWN,
    "another-root": OWN + STRANGER,
    "its-own-alone-self-signed": certificate("tsa", OWN_KEY, "tsa", OWN_KEY, (PURPOSE, True)),
    "too-many": OWN + ROOT * 6,
    "no-purpose": certificate("tsa", OWN_KEY, "root", ROOT_KEY) + ROOT,
    "purpose-not-critical": certificate("tsa", OWN_KEY, "root", ROOT_KEY, (PURPOSE, False)) + ROOT,
    "one-more-purpose": certificate("tsa", OWN_KEY, "root", ROOT_KEY, (BOTH, True)) + ROOT,
    "under-one-that-is-no-ca": certificate("a", OWN_KEY, "tsa", OWN_KEY, (PURPOSE, True)) + OWN + ROOT,
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_a_chain_that_proves_no_time_is_not_handed_out(name: str) -> None:
    assert read_tsa_chain(OWN + ROOT)
    assert read_tsa_chain(ROOT)
    with pytest.raises(CaError, match="timestamp authority's chain"):
        read_tsa_chain(NO_CHAINS[name])


def test_names_in_it_are_those_of_the_roots(folder: CaFolder) -> None:
    subjects = [one["subject"] for one in trusted_root(folder, [], NOW)["certificateAuthorities"]]
    assert {one["organization"] for one in subjects} == {"acme"}
    assert [name for name, _ in itertools.groupby(one["commonName"] for one in subjects)] == [
        "Action Broker signing root-1",
        "Action Broker signing root-2",
    ]
