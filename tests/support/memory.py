"""Looks for private keys in another process's memory, as one who has stolen it would."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

LIMBS = 4  # of 64 bits: how OpenSSL holds a number of P-256, the least significant first
SIZE = 8 * LIMBS


def writable(pid: int) -> Iterator[bytes]:
    """All regions that the process may write to."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if rights.startswith("rw") and "[v" not in line:
                start, end = (int(one, 16) for one in span.split("-"))
                memory.seek(start)
                yield memory.read(end - start)


def random_numbers(region: bytes) -> Iterator[bytes]:
    """What may be a private key there: four words in a row of which none is a pointer, a count or text."""
    region = region[: len(region) // 8 * 8]
    found = 0
    for number, word in enumerate(memoryview(region).cast("Q"), 1):
        found = found + 1 if word >> 48 not in {0, 0xFFFF} else 0
        if found >= LIMBS:
            candidate = region[number * 8 - SIZE : number * 8]
            if len(set(candidate)) >= 20 and sum(0x20 <= byte < 0x7F for byte in candidate) < 24:
                yield candidate


def private_keys(pid: int, publics: AbstractSet[int]) -> set[int]:
    """Of these P-256 keys, by the x of their points, those whose private half is in the process's memory now."""
    candidates = {one for region in writable(pid) for one in random_numbers(region)}
    return publics & {x for one in candidates if (x := _x_of(int.from_bytes(one, "little")))}


def _x_of(secret: int) -> int:
    try:
        return ec.derive_private_key(secret, ec.SECP256R1()).public_key().public_numbers().x
    except ValueError:  # not below the curve's order
        return 0
