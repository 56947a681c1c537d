"""Policy vectors: each file holds one defect, and beside it the same without the defect.

load/: documents that are refused when they are loaded; `expect` is a Defect.
decide/: requests that a loaded policy refuses; `expect` is a Reason.
"""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attestors.contract import FactKey, Facts
from broker.action import Action
from broker.decision.decide import Grant, decide
from broker.decision.findings import Defect, PolicyError
from broker.decision.policy import compile_policy
from broker.errors import Reason, Refused
from broker.identity.person import PersonId
from broker.identity.spiffe_id import SCHEME, SpiffeId

VECTORS = Path(__file__).parents[1] / "vectors" / "policy"
NOW = datetime(2026, 11, 22, tzinfo=UTC)


def vectors(kind):
    return [pytest.param(tomllib.loads(path.read_text()), id=path.stem) for path in sorted((VECTORS / kind).iterdir())]


def ask(vector, request, policy_text) -> Grant:
    policy = compile_policy({"vector.cedar": policy_text}, {"vector.cedarschema": vector["schema"]})
    facts = {
        name: Facts(attestor=name, key=FactKey(f"{name}:vector"), values=values, attested_at=NOW)
        for name, values in json.loads(request["facts"]).items()
    }
    action = Action.parse(request["action"], request["resource"], request["audience"], request["parameters"])
    who = request["principal"]
    principal = SpiffeId.parse(who) if who.startswith(SCHEME) else PersonId.parse(who)
    return decide(policy, principal, action, facts, NOW, not_after=NOW + timedelta(hours=1))


@pytest.mark.parametrize("vector", vectors("load"))
def test_a_document_with_this_defect_is_refused(vector):
    with pytest.raises(PolicyError) as caught:
        compile_policy(
            {"vector.cedar": vector["bad"]}, {"vector.cedarschema": vector.get("bad_schema", vector["schema"])}
        )
    assert {finding.defect for finding in caught.value.findings} == {Defect(vector["expect"])}
    assert all(finding.problem and finding.fix for finding in caught.value.findings)


@pytest.mark.parametrize("vector", vectors("load"))
def test_the_same_document_without_the_defect_is_taken(vector):
    policy = compile_policy({"vector.cedar": vector["good"]}, {"vector.cedarschema": vector["schema"]})
    assert policy.rules


@pytest.mark.parametrize("vector", vectors("decide"))
def test_a_request_with_this_defect_is_refused(vector):
    with pytest.raises(Refused) as caught:
        ask(vector, vector["bad"], vector["policy"])
    assert caught.value.reason is Reason(vector["expect"])


@pytest.mark.parametrize("vector", vectors("decide"))
def test_the_same_request_without_the_defect_is_allowed(vector):
    assert ask(vector, vector["good"], vector.get("good_policy", vector["policy"])).policies


def test_there_are_enough_vectors_and_each_defect_has_one():
    expected = {vector.values[0]["expect"] for vector in vectors("load")}
    # These are about the folder itself, not about a text; tests/unit/decision/test_documents.py has them.
    assert expected | {Defect.FOLDER, Defect.TOO_LARGE, Defect.NOT_TEXT} == set(Defect)
    assert len(vectors("load")) + len(vectors("decide")) >= 20
