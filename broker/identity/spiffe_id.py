"""SPIFFE IDs and trust domains: the names that everything else here is about.

Source: https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md ("ID" below). A value of these types is valid,
because there is no other way to make one.
"""

import re
from dataclasses import dataclass
from typing import Self

from broker.errors import Invalid

SCHEME = "spiffe://"
MAX_ID = 2048  # bytes; ID section 2.3: longer ones SHOULD NOT exist, and all up to it MUST be supported
MAX_TRUST_DOMAIN = 255  # bytes; ID section 2.3, from the longest host of RFC 3986

# ID section 2.1: a host of these only, so no userinfo, port, percent-encoding or IPv6. IP addresses and DNS names are
# treated like any other name.
#
# ID section 2.4 calls scheme and trust domain case-insensitive, while section 2.1 says the host MUST be lower case. We
# accept the lower-case spelling of both alone, as go-spiffe and SPIRE do: with one spelling an ID cannot differ from
# itself by case in a policy, a log or a map, and nothing is repaired on the way in.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
# ID section 2.2: segments of these only, none empty, no trailing slash.
_PATH = re.compile(r"(?:/[A-Za-z0-9._-]+)+")
_RELATIVE = frozenset({".", ".."})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustDomain:
    """The name of a trust domain, such as `acme.test`. Raises: Invalid when it is not one."""

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > MAX_TRUST_DOMAIN:
            raise Invalid(f"trust domain is longer than {MAX_TRUST_DOMAIN} bytes")
        if not _TRUST_DOMAIN.fullmatch(self.name):
            raise Invalid("trust domain is not made of one or more of a-z 0-9 . _ - (lower case, no port, no userinfo)")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its name or its own SPIFFE ID: `acme.test` or `spiffe://acme.test`, without a path. Raises: Invalid."""
        return cls(name=text.removeprefix(SCHEME))

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpiffeId:
    """The identity of a workload, or of a trust domain where `path` is empty.

    path: begins with a slash ("/build/agent") or is "". str() gives the URI; parsing that gives the same value again.

    Raises: Invalid when the two are not an ID by the standard. Not checked: that the domain or the workload exists.
    """

    trust_domain: TrustDomain
    path: str = ""

    def __post_init__(self) -> None:
        if len(SCHEME) + len(self.trust_domain.name) + len(self.path) > MAX_ID:
            raise Invalid(f"SPIFFE ID is longer than {MAX_ID} bytes")
        if not self.path:
            return
        if not _PATH.fullmatch(self.path):
            raise Invalid("SPIFFE ID path is not segments of A-Z a-z 0-9 . _ - each after one slash, none at the end")
        if not _RELATIVE.isdisjoint(self.path.split("/")):
            raise Invalid("SPIFFE ID path has a dot segment")

    @classmethod
    def parse(cls, text: str) -> Self:
        """From its URI. Raises: Invalid, which does not repeat the text: it may be a stranger's."""
        if not text.startswith(SCHEME):
            raise Invalid(f"SPIFFE ID does not start with {SCHEME} in lower case")
        domain, slash, path = text.removeprefix(SCHEME).partition("/")
        return cls(trust_domain=TrustDomain(name=domain), path=slash + path)

    def __str__(self) -> str:
        return f"{self.trust_domain}{self.path}"
