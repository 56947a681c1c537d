"""Every file in tests/vectors/svid: the defect is refused for its own reason, and its control, sound, is not."""

import base64
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from vectors.make_svid_vectors import FOLDER, build

from broker.errors import Reason, Refused
from broker.identity.jwt_svid import verify_jwt_svid
from broker.identity.spiffe_id import SpiffeId, TrustDomain
from broker.identity.trust import TrustBundle, TrustSnapshot, parse_jwt_authorities
from broker.identity.x509_svid import verify_x509_svid

VECTORS = {
    str(file.relative_to(FOLDER).with_suffix("")): json.loads(file.read_text()) for file in FOLDER.rglob("*.json")
}
CONTROLS = {path for path, vector in VECTORS.items() if vector["expect"] == "accepted"}
NEGATIVES = sorted(VECTORS.keys() - CONTROLS)


def snapshot(bundles: list[TrustBundle]) -> TrustSnapshot:
    return TrustSnapshot(own=None, bundles={item.trust_domain: item for item in bundles}, revision=1)


def run_x509(vector: dict[str, Any]) -> SpiffeId:
    bundles = [
        TrustBundle(
            trust_domain=TrustDomain.parse(domain),
            x509_authorities=tuple(x509.load_der_x509_certificate(base64.b64decode(item)) for item in items),
        )
        for domain, items in vector["bundles"].items()
    ]
    chain = [base64.b64decode(item) for item in vector["chain"]]
    now = datetime.fromisoformat(vector["now"])
    return verify_x509_svid(chain, snapshot(bundles), now, peer=vector["peer"]).spiffe_id


def run_jwt(vector: dict[str, Any]) -> SpiffeId:
    bundles = [
        TrustBundle(
            trust_domain=TrustDomain.parse(domain),
            jwt_authorities=parse_jwt_authorities(json.dumps(document).encode()),
        )
        for domain, document in vector["bundles"].items()
    ]
    now = datetime.fromisoformat(vector["now"])
    return verify_jwt_svid(vector["token"], snapshot(bundles), now, audience=vector["audience"]).spiffe_id


def run_id(vector: dict[str, Any]) -> SpiffeId:
    return SpiffeId.parse(vector["id"])


RUNNERS = {"x509": run_x509, "jwt": run_jwt, "spiffe-id": run_id}


def run(path: str) -> SpiffeId:
    return RUNNERS[Path(path).parts[0]](VECTORS[path])


@pytest.mark.parametrize("path", sorted(CONTROLS))
def test_a_sound_svid_is_accepted(path: str) -> None:
    vector = VECTORS[path]
    assert str(run(path)) == vector.get("spiffe_id", vector.get("id"))


@pytest.mark.parametrize("path", NEGATIVES)
def test_a_defect_is_refused_for_its_own_reason_and_its_control_is_not(path: str) -> None:
    vector = VECTORS[path]
    control = f"{Path(path).parts[0]}/{vector['control']}"
    assert run(control)
    with pytest.raises(Refused) as error:
        run(path)
    assert error.value.reason == Reason(vector["expect"])


def test_each_negative_has_a_sound_control_and_says_why() -> None:
    for path in NEGATIVES:
        vector = VECTORS[path]
        assert f"{Path(path).parts[0]}/{vector['control']}" in CONTROLS, path
        assert vector["why"], path
        assert vector["expect"] in set(Reason), path


def test_there_are_at_least_fifty_negatives_and_some_of_each_kind() -> None:
    assert len(NEGATIVES) >= 50
    assert {path.split("/")[0] for path in NEGATIVES} == set(RUNNERS) == {path.split("/")[0] for path in CONTROLS}


def test_no_two_negatives_are_the_same_input() -> None:
    inputs = [
        json.dumps({key: value for key, value in VECTORS[path].items() if key not in {"why", "expect", "control"}})
        for path in VECTORS
    ]
    assert len(set(inputs)) == len(inputs)


def test_the_committed_files_are_those_that_the_script_makes() -> None:
    made = json.loads(json.dumps(build()))
    assert made.keys() == VECTORS.keys()
    for path, vector in made.items():
        assert vector == VECTORS[path], path


def test_no_private_key_is_in_any_file() -> None:
    for file in FOLDER.rglob("*.json"):
        text = file.read_text()
        assert "PRIVATE" not in text
        assert '"d":' not in text
