"""Writes tests/vectors/token/**: what a guard is shown, with one defect each, and the sound ones they differ from.

Run it from the root: `PYTHONPATH=.:tests python -m vectors.make_token_vectors`. Keys come from a seed and signatures
are deterministic, so it writes the same bytes each time; a test holds the committed files to that.

setup.json: the guard (issuer, audience, its key set) and `now`. A vector: `shown` to a new guard in this order, each
for `action`; `expect` is the answer to the last one, and all before it are accepted. `control`: the sound vector that
differs in nothing but the defect.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from support.issuer import AUDIENCE, ISSUER
from vectors.token_bytes import jose_defects, untrusted
from vectors.token_parts import ISSUED, SIGNER, SOUND_KEY, Vector, certificate, proved, vector
from vectors.token_proofs import proof_defects
from vectors.token_shown import accepted, wrong_here

FOLDER = Path(__file__).parent / "token"


def vectors() -> dict[str, Vector]:
    """Every vector by its path below the folder."""
    found = {f"accepted/{name}": item for name, item in accepted().items()}
    for expect, tokens in (("malformed", jose_defects()), ("unauthenticated", untrusted())):
        for name, defect in tokens.items():
            found[f"refused/token-{name}"] = vector(expect, certificate(defect), control="bound-to-certificate")
    for name, defect in proof_defects().items():
        found[f"refused/proof-{name}"] = vector("invalid_dpop_proof", proved(SOUND_KEY, defect), control="bound-to-key")
    return found | {f"refused/{name}": item for name, item in wrong_here().items()}


def setup() -> dict[str, Any]:
    return {"now": ISSUED, "issuer": ISSUER, "audience": AUDIENCE, "keys": json.loads(SIGNER.jwks())["keys"]}


def write(folder: Path) -> None:
    """Writes all of it anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, item in {"setup": setup(), **vectors()}.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(item, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER)
