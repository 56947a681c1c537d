"""Writes tests/vectors/svid/**: SVIDs with one defect each, named for it, and the sound ones they differ from.

Run it from the root: `PYTHONPATH=.:tests python -m vectors.make_svid_vectors`. It writes the same bytes each time; a
test holds the committed files to that.
"""

import functools
import json
from pathlib import Path
from typing import Any

from vectors.svid_ids import id_vectors
from vectors.svid_jwt import jwt_vectors
from vectors.svid_x509 import x509_vectors

FOLDER = Path(__file__).parent / "svid"


@functools.cache
def build() -> dict[str, dict[str, Any]]:
    """Every vector by its path below svid/, without the ending."""
    kinds = {"x509": x509_vectors, "jwt": jwt_vectors, "spiffe-id": id_vectors}
    found = [(f"{kind}/{label}", vector) for kind, make in kinds.items() for label, vector in make()]
    if len(dict(found)) != len(found):
        raise ValueError("two vectors have one name")
    return dict(found)


def main() -> None:
    for path, vector in build().items():
        file = FOLDER / f"{path}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(vector, indent=1) + "\n")


if __name__ == "__main__":
    main()
