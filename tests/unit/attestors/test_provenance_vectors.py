"""Every file in tests/vectors/provenance: the defect is refused for its own reason, and its control, sound, is not."""

import base64
import json
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from support.pki import snapshot
from support.provenance import ARTIFACT, MAX_AGE, NOW, checks, encoded, envelope, statement, trust
from vectors.make_provenance_vectors import FOLDER, build

from attestors.contract import AttestationFailed, Facts
from attestors.dsse import MAX_ENVELOPE
from attestors.provenance import appraise
from attestors.provenance_signers import SignerChecks
from attestors.provenance_trust import BuilderTrust, ProvenanceTrust
from attestors.signature_keys import read_key
from broker.errors import Reason
from broker.identity.spiffe_id import TrustDomain
from broker.identity.svid_check import SvidCheck
from broker.identity.trust import TrustBundle

FILES = {str(file.relative_to(FOLDER).with_suffix("")): json.loads(file.read_text()) for file in FOLDER.rglob("*.json")}
SETUP = FILES["setup"]
ACCEPTED = sorted(path for path in FILES if path.startswith("accepted/"))
REFUSED = sorted(path for path in FILES if path.startswith("refused/"))


def configured() -> ProvenanceTrust:
    builders = {
        name: BuilderTrust(
            keys={key: read_key(pem.encode()) for key, pem in one["keys"].items()},
            spiffe_ids=frozenset(one["spiffe_ids"]),
            threshold=one["threshold"],
        )
        for name, one in SETUP["builders"].items()
    }
    return ProvenanceTrust(builders=builders, max_age=timedelta(seconds=SETUP["max_age_s"]))


def bundles() -> SignerChecks:
    found = [
        TrustBundle(
            trust_domain=TrustDomain.parse(domain),
            x509_authorities=(x509.load_der_x509_certificate(base64.b64decode(der)),),
        )
        for domain, der in SETUP["authorities"].items()
    ]
    return SignerChecks(x509_svid=SvidCheck(lambda: snapshot(*found)))


def run(path: str) -> Facts:
    now = datetime.fromisoformat(SETUP["now"])
    return appraise(FILES[path]["evidence"].encode(), SETUP["artifacts"], configured(), bundles(), now)


@pytest.mark.parametrize("path", ACCEPTED)
def test_sound_provenance_is_accepted(path: str) -> None:
    facts = run(path)
    assert facts.values["builder"] in SETUP["builders"]
    assert facts.expires_at is not None
    assert facts.expires_at > facts.attested_at


@pytest.mark.parametrize("path", REFUSED)
def test_a_defect_is_refused_for_its_own_reason_and_its_control_is_not(path: str) -> None:
    vector = FILES[path]
    assert run(f"accepted/{vector['control']}")
    assert vector["expect"] == Reason.PROVENANCE_REJECTED
    with pytest.raises(AttestationFailed) as refused:
        run(path)
    assert vector["says"] in str(refused.value)


@pytest.mark.parametrize("size", [MAX_ENVELOPE + 1, 100 * 1024 * 1024], ids=["one byte over", "100 MiB"])
def test_what_is_over_the_limit_is_not_read(size: int) -> None:
    """It would verify, and is said to be too large before anything is known of it."""
    big = statement(predicate=statement()["predicate"] | {"padding": ""})
    room = size - len(encoded(envelope(big)))
    text = encoded(envelope(big))[:-1] + b"," + b'"a":"' + b"x" * (room - 7) + b'"}'
    assert len(text) == size
    with pytest.raises(AttestationFailed, match="larger than 524288 bytes"):
        appraise(text, [ARTIFACT], trust(), checks(), NOW)


def test_what_is_just_within_the_limit_is_read() -> None:
    text = encoded(envelope())
    padded = text[:-1] + b',"a":"' + b"x" * (MAX_ENVELOPE - len(text) - 7) + b'"}'
    assert len(padded) == MAX_ENVELOPE
    assert appraise(padded, [ARTIFACT], trust(), checks(), NOW).expires_at == NOW - timedelta(seconds=600) + MAX_AGE


def test_the_committed_files_are_those_that_the_script_makes() -> None:
    made = json.loads(json.dumps(build()))
    assert made.keys() == FILES.keys()
    for path, vector in made.items():
        assert vector == FILES[path], path


def test_no_two_negatives_are_the_same_and_no_private_key_is_in_any_file() -> None:
    assert len({FILES[path]["evidence"] for path in REFUSED}) == len(REFUSED) >= 50
    assert not any("PRIVATE" in file.read_text() for file in FOLDER.rglob("*.json"))
