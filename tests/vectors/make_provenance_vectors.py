"""Writes tests/vectors/provenance/**: provenance with one defect each, and the sound one it differs from.

Run it from the root: `PYTHONPATH=.:tests python -m vectors.make_provenance_vectors`. Keys come from a seed and
signatures are deterministic, so it writes the same bytes each time; a test holds the committed files to that.

setup.json: `now`, whom the broker trusts, and the artifact that is to be signed. A vector: `evidence` as text;
`expect`, the reason; `says`, a piece of what the ledger is told; `control`, the sound one. What is over the size limit
is made by the test.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from support import provenance as made
from support.pki import NOW, der
from vectors import provenance_defects as defects

FOLDER = Path(__file__).parent / "provenance"


def build() -> dict[str, dict[str, Any]]:
    """Every file by its path below the folder, without suffix."""
    found: dict[str, dict[str, Any]] = {"setup": setup()}
    for name, evidence in defects.sound().items():
        found[f"accepted/{name}"] = {"expect": "accepted", "evidence": _text(evidence)}
    for kind, control in defects.CONTROLS.items():
        for name, (evidence, says) in getattr(defects, kind)().items():
            found[f"refused/{name}"] = {
                "expect": "provenance_rejected",
                "says": says,
                "control": defects.OWN_CONTROLS.get(name, control),
                "evidence": _text(evidence),
            }
    return found


def setup() -> dict[str, Any]:
    keys = {"release": made.KEY, "other": made.OTHER_KEY, "first": made.KEY, "second": made.SECOND_KEY}
    return {
        "now": NOW.isoformat(),
        "max_age_s": int(made.MAX_AGE.total_seconds()),
        "artifacts": [made.ARTIFACT],
        "builders": {
            name: {
                "keys": {key: made.spki_pem(keys[key]) for key in one.keys},
                "spiffe_ids": sorted(one.spiffe_ids),
                "threshold": one.threshold,
            }
            for name, one in made.builders().items()
        },
        "authorities": {"acme.test": made.b64(der(made.authority().certificate))},
    }


def _text(evidence: Any) -> str:
    return evidence if isinstance(evidence, str) else json.dumps(evidence)


def write(folder: Path) -> None:
    """Writes all of it anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, item in build().items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(item, indent=1) + "\n")


if __name__ == "__main__":
    write(FOLDER)
