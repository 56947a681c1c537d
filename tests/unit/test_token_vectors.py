"""Each token vector, shown to a new guard: refused for the reason in its file, while its sound control is accepted."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from vectors import make_token_vectors

from broker.action import Action
from broker.errors import BrokerError, Reason
from broker.guard import Guard, KeyCache, Memory, Presented

VECTORS = Path(__file__).parents[1] / "vectors"
FOLDER = VECTORS / "token"
SETUP = json.loads((FOLDER / "setup.json").read_text())
NOW = datetime.fromtimestamp(SETUP["now"], UTC)
ACCEPTED = sorted(path.stem for path in FOLDER.glob("accepted/*.json"))
REFUSED = sorted(path.stem for path in FOLDER.glob("refused/*.json"))


async def answer(name: str) -> str:
    """What a new guard answers to the last of what the vector shows."""

    async def fetch() -> bytes:
        return json.dumps({"keys": SETUP["keys"]}).encode()

    keys = KeyCache(fetch)
    assert await keys.refetch()
    guard = Guard(issuer=SETUP["issuer"], audience=SETUP["audience"], keys=keys, memory=Memory())
    vector = load(name)
    action = Action(**vector["action"])
    *before, last = [presented(item) for item in vector["shown"]]
    for earlier in before:
        assert guard.verify(earlier, action, NOW)
    try:
        assert guard.verify(last, action, NOW)
    except BrokerError as error:
        return str(error.reason)
    return "accepted"


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def presented(shown: dict[str, Any]) -> Presented:
    leaf = shown.get("certificate_sha256")
    return Presented(
        token=shown["token"],
        certificate_sha256=None if leaf is None else bytes.fromhex(leaf),
        proof=shown.get("proof"),
        method=shown.get("method", ""),
        urls=tuple(shown.get("urls", ())),
    )


@pytest.mark.parametrize("name", ACCEPTED)
async def test_a_sound_vector_is_accepted(name: str) -> None:
    assert await answer(f"accepted/{name}") == load(f"accepted/{name}")["expect"] == "accepted"


@pytest.mark.parametrize("name", REFUSED)
async def test_a_vector_with_a_defect_is_refused_for_it_and_its_control_is_not(name: str) -> None:
    vector = load(f"refused/{name}")
    assert await answer(f"refused/{name}") == vector["expect"]
    assert await answer(f"accepted/{vector['control']}") == "accepted"


def test_the_vectors_are_many_and_each_reason_a_guard_gives_by_itself_has_one() -> None:
    assert len(REFUSED) >= 80
    expected = {load(f"refused/{name}")["expect"] for name in REFUSED}
    assert expected == {
        Reason.MALFORMED,
        Reason.UNAUTHENTICATED,
        Reason.EXPIRED,
        Reason.WRONG_AUDIENCE,
        Reason.KEY_MISMATCH,
        Reason.INVALID_PROOF,
        Reason.PROOF_REPLAYED,
        Reason.OUT_OF_SCOPE,
        Reason.ALREADY_USED,
        Reason.SCOPE_STALE,
    }


def test_the_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    make_token_vectors.write(tmp_path / "token")

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}

    assert files(tmp_path / "token") == files(FOLDER)
