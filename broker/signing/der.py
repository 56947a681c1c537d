"""The few DER values (ITU-T X.690) that certificates need and `cryptography` does not make: written, and read strictly.

Read means: the shortest length, the whole input, the expected tag. What differs in a bit is refused, so that each
value has one encoding.
"""

from collections.abc import Iterable
from typing import Final

BIT_STRING: Final = 0x03
OBJECT_IDENTIFIER: Final = 0x06
UTF8_STRING: Final = 0x0C
SEQUENCE: Final = 0x30
SET: Final = 0x31


def tlv(tag: int, content: bytes) -> bytes:
    """One value. tag: a single byte."""
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(octets))) + octets + content


def sequence(*values: bytes) -> bytes:
    """A SEQUENCE of values that are DER already."""
    return tlv(SEQUENCE, b"".join(values))


def set_of(values: Iterable[bytes]) -> bytes:
    """A SET OF values that are DER already; DER puts them in order (X.690 section 11.6)."""
    return tlv(SET, b"".join(sorted(values)))


def utf8(text: str) -> bytes:
    """A UTF8String. Raises: UnicodeEncodeError for a lone surrogate."""
    return tlv(UTF8_STRING, text.encode())


def bit_string(content: bytes) -> bytes:
    """A BIT STRING of whole bytes."""
    return tlv(BIT_STRING, b"\0" + content)


def object_identifier(dotted: str) -> bytes:
    """An OBJECT IDENTIFIER with arcs of any size; `cryptography` has those only within its own structures."""
    first, second, *arcs = map(int, dotted.split("."))
    return tlv(OBJECT_IDENTIFIER, b"".join(_base128(arc) for arc in (first * 40 + second, *arcs)))


def _base128(number: int) -> bytes:
    octets = [number & 0x7F]
    while number := number >> 7:
        octets.append(0x80 | number & 0x7F)
    return bytes(reversed(octets))


def take(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The content of the first value, which has this tag, and what follows it. Raises: ValueError."""
    if len(data) < 2 or data[0] != tag:
        raise ValueError("a DER value of another type than expected, or none")
    length, start = data[1], 2
    if length >= 0x80:
        start += length & 0x7F
        octets = data[2:start]
        length = int.from_bytes(octets)
        if len(octets) != start - 2 or not octets or octets[0] == 0 or length < 0x80:
            raise ValueError("a DER length that is not the shortest, or cut off")
    if len(data) < start + length:
        raise ValueError("a DER value that is cut off")
    return data[start : start + length], data[start + length :]


def take_all(tag: int, data: bytes) -> bytes:
    """The content of the only value. Raises: ValueError, also for bytes behind it."""
    content, rest = take(tag, data)
    if rest:
        raise ValueError("bytes behind a DER value")
    return content


def read_utf8(data: bytes) -> str:
    """The text of a UTF8String. Raises: ValueError."""
    return take_all(UTF8_STRING, data).decode()
