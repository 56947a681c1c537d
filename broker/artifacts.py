"""What is asked for when a signature is: which artifacts, for what, by which key. It stands in an action's parameters.

    "signing": {"artifacts": [{"sha256": "<hex>", …}], "purpose": "release", "signer": "keyless"}

There it is part of the action's digest, so that approvals, grants and certificates are all about these very artifacts.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from broker.action import Action
from broker.errors import Invalid

PARAMETER: Final = "signing"
MAX_ARTIFACTS: Final = 32
KEYLESS: Final = "keyless"
AGENT_KEY: Final = "agent-key"
NAMED_KEY: Final = "key:"
HEX_DIGITS: Final = MappingProxyType({"sha256": 64, "sha384": 96, "sha512": 128})
"""Algorithms by which an artifact is named, and the hexadecimal digits of each."""

_PURPOSE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_SIGNER = re.compile(r"keyless|agent-key|key:[a-z0-9][a-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningRequest:
    """One signature that is asked for.

    artifacts: each algorithm → lower-case hex, sha256 always among them, none twice. purpose: a word of the operator's.
    signer: "keyless", "agent-key" or "key:<name>".
    """

    artifacts: tuple[Mapping[str, str], ...]
    purpose: str
    signer: str

    @property
    def key_name(self) -> str | None:
        """Which named key is to sign; None for the other ways."""
        return self.signer.removeprefix(NAMED_KEY) if self.signer.startswith(NAMED_KEY) else None

    def to_json(self) -> dict[str, Any]:
        """The value of the parameter."""
        artifacts = [dict(artifact) for artifact in self.artifacts]
        return {"artifacts": artifacts, "purpose": self.purpose, "signer": self.signer}


def signing_request(action: Action, *, issuer: str) -> SigningRequest:
    """What a signing action asks for.

    Raises: Invalid where it asks for no signature, or for one that nobody could give; or where its audience is not us:
    who signs is who is asked to act.
    """
    if action.audience != issuer:
        raise Invalid("the audience of a signing action is the broker's issuer")
    found = action.parameters.get(PARAMETER)
    if not isinstance(found, dict) or found.keys() != {"artifacts", "purpose", "signer"}:
        raise Invalid(f'a signing action has the parameter "{PARAMETER}" with artifacts, purpose and signer alone')
    return parse_signing_request(found)


def parse_signing_request(found: Mapping[str, Any]) -> SigningRequest:
    """From its three members. Raises: Invalid."""
    artifacts, purpose, signer = found["artifacts"], found["purpose"], found["signer"]
    if not isinstance(artifacts, list | tuple) or not 1 <= len(artifacts) <= MAX_ARTIFACTS:
        raise Invalid(f"1 to {MAX_ARTIFACTS} artifacts are signed with one grant")
    if not isinstance(purpose, str) or not _PURPOSE.fullmatch(purpose):
        raise Invalid("the purpose of a signature is a word of lower-case letters, digits and -")
    if not isinstance(signer, str) or not _SIGNER.fullmatch(signer):
        raise Invalid('the signer is "keyless", "agent-key" or "key:<name>"')
    named = tuple(_artifact(artifact) for artifact in artifacts)
    if len({artifact["sha256"] for artifact in named}) != len(named):
        raise Invalid("an artifact is named twice")
    return SigningRequest(artifacts=named, purpose=purpose, signer=signer)


def _artifact(found: Any) -> Mapping[str, str]:
    if not isinstance(found, dict) or "sha256" not in found or not found.keys() <= HEX_DIGITS.keys():
        raise Invalid(f"an artifact is named by its sha256, and by {' and '.join(sorted(HEX_DIGITS))} alone")
    for algorithm, digest in found.items():
        if not isinstance(digest, str) or len(digest) != HEX_DIGITS[algorithm] or not _HEX.fullmatch(digest):
            raise Invalid(f"an artifact's {algorithm} is not {HEX_DIGITS[algorithm]} lower-case hexadecimal digits")
    return MappingProxyType(dict(found))
