"""People: who an OIDC issuer says is there, as one name.

Source: OpenID Connect Core 1.0 section 2 (`iss`, `sub`) and section 5.7: only the two together name a person, an e-mail
address does not. A value of this type is well-formed, because there is no other way to make one.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Final, Self

from broker.action import check_uri
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId

MAX_SUBJECT: Final = 255  # OIDC Core section 2: "It MUST NOT exceed 255 ASCII characters in length"
_SUBJECT: Final = re.compile(rf"[\x20-\x7e]{{1,{MAX_SUBJECT}}}")
_ENCODED: Final = re.compile(r"[A-Za-z0-9_-]+")
_BETWEEN: Final = "/subject/"  # WIRE.md, "Action token"; base64url has no slash, so the last one of these is ours


def check_issuer(text: str) -> str:
    """Returns `text` if it can be the name of an issuer (OIDC Discovery section 3).

    That is https, a host, perhaps a port and a path. A slash at its end is part of the name: some issuers have one, and
    names are compared letter by letter.

    Raises: Invalid. Not checked: that anybody answers there.
    """
    check_uri(text.removesuffix("/"), "issuer")
    if not text.startswith("https://") or "?" in text or text.endswith("//"):
        raise Invalid("issuer is not an https URL without query")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonId:
    """The identity of a person: an issuer and the subject that it never gives to another.

    str() gives `<issuer>/subject/<base64url of sub>`; parsing that gives the same value again.

    Raises: Invalid when one of the two cannot be. Not checked: that the issuer is one that we ask.
    """

    issuer: str
    subject: str

    def __post_init__(self) -> None:
        check_issuer(self.issuer)
        if not _SUBJECT.fullmatch(self.subject):
            raise Invalid(f"subject of a person is not 1 to {MAX_SUBJECT} printable ASCII characters")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its one spelling. Raises: Invalid, which does not repeat the text: it may be a stranger's."""
        issuer, between, encoded = text.rpartition(_BETWEEN)
        if not between or not _ENCODED.fullmatch(encoded):
            raise Invalid("a person is named <issuer>/subject/<base64url of sub>")
        try:
            subject = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode("ascii")
        except (binascii.Error, ValueError) as error:
            raise Invalid("subject of a person is not base64url of ASCII characters") from error
        found = cls(issuer=issuer, subject=subject)
        if str(found) != text:
            raise Invalid("subject of a person is base64url with stray bits")
        return found

    def __str__(self) -> str:
        encoded = base64.urlsafe_b64encode(self.subject.encode()).rstrip(b"=").decode()
        return f"{self.issuer}{_BETWEEN}{encoded}"


Principal = SpiffeId | PersonId
"""Who can be decided about: a workload, or a person."""


def parse_principal(text: str) -> Principal:
    """Either of the two, by how it begins. Raises: Invalid."""
    return PersonId.parse(text) if text.startswith("https://") else SpiffeId.parse(text)
