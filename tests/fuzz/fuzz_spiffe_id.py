"""Fuzz target: SPIFFE IDs. Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_spiffe_id -max_total_time=60`."""

import sys

from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId, TrustDomain

DOMAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.-_")
PATH = DOMAIN | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def one_input(data: bytes) -> None:
    """Refused as malformed, or one spelling of one ID that holds nothing else."""
    text = data.decode(errors="surrogateescape")
    for candidate in (text, f"spiffe://{text}", f"spiffe://acme.test{text}"):
        try:
            found = SpiffeId.parse(candidate)
        except Invalid:
            continue
        assert str(found) == candidate
        assert SpiffeId.parse(str(found)) == found
        assert TrustDomain.parse(str(found.trust_domain)) == found.trust_domain
        assert set(found.trust_domain.name) <= DOMAIN
        assert len(candidate.encode()) <= 2048
        for segment in found.path.split("/")[1:]:
            assert segment not in {"", ".", ".."}
            assert set(segment) <= PATH


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
