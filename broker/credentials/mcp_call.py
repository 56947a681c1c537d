"""How a credential rides in a call of an MCP tool that has no HTTP request around it: in `_meta`, as over stdio.

    "_meta": {"action-broker/authorization": "DPoP <token>", "action-broker/dpop": "<proof>"}

The values are those of the HTTP headers of the same names. The proof is for POST to `<audience>/<tool>`. Key names as
MCP has them (specification of 2026-07-28, Base Protocol, `_meta`): a prefix of labels, a slash, a name; no prefix that
MCP reserves for itself.
"""

import re
from typing import Final

from broker.errors import Invalid

AUTHORIZATION: Final = "action-broker/authorization"
DPOP: Final = "action-broker/dpop"
# MCP specification of 2025-11-25 and newer, Tools, "Tool Names".
_TOOL: Final = re.compile(r"[A-Za-z0-9_.-]{1,128}")


def proof_url(audience: str, tool: str) -> str:
    """What a proof for one call of `tool` at `audience` is for. Raises: Invalid where no tool has such a name."""
    if not _TOOL.fullmatch(tool):
        raise Invalid("a tool's name has 1 to 128 characters of A-Z a-z 0-9 _ - .")
    return f"{audience}/{tool}"
