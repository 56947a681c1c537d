"""Fuzz target: X.509-SVIDs and the bundles they are verified by.

Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_x509_svid -max_total_time=60`.
"""

import sys
from collections.abc import Sequence

from cryptography import x509
from support.pki import CA, NOW, WORKLOAD, snapshot

from broker.errors import Invalid, Refused
from broker.identity.trust import parse_x509_authorities, split_der
from broker.identity.x509_svid import verify_x509_svid

ROOT = CA(seed="fuzz")
TRUST = snapshot(ROOT.bundle())
LIMITS = (x509.NameConstraints([x509.DNSName("acme.test")], None), True)
OTHER_NAMES = (x509.IssuerAlternativeName([x509.DNSName("acme.test")]), False)
CHAINS = (
    ROOT.svid().chain,
    CA(parent=ROOT).svid(dns=["acme.test"]).chain,
    CA(parent=ROOT, extra=[LIMITS, OTHER_NAMES]).svid(extra=[OTHER_NAMES]).chain,
)


def one_input(data: bytes) -> None:
    """Bytes as a chain and as a bundle, and as changes to sound chains: nobody else may come out of that."""
    verified([data])
    try:
        verified(split_der(data))
        parse_x509_authorities(data)
    except Invalid:
        pass
    if data:
        verified(changed(CHAINS[data[0] % len(CHAINS)], data[1:]))


def changed(chain: Sequence[bytes], edits: bytes) -> list[bytes]:
    """Each three bytes set one byte of the chain: two say where, the third what."""
    found = bytearray(b"".join(chain))
    for at in range(0, len(edits) - 2, 3):
        found[int.from_bytes(edits[at : at + 2]) % len(found)] = edits[at + 2]
    sizes = [len(item) for item in chain]
    return [bytes(found[sum(sizes[:n]) : sum(sizes[: n + 1])]) for n in range(len(sizes))]


def verified(chain: Sequence[bytes]) -> None:
    try:
        svid = verify_x509_svid(chain, TRUST, NOW, peer="client")
    except Refused:
        return
    assert str(svid.spiffe_id) == WORKLOAD, "accepted an ID that was never issued"


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
