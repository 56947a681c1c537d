"""Fuzz target: the token request. Run: `PYTHONPATH=.:tests python -m fuzz.fuzz_token_request -max_total_time=60`."""

import json
import sys
from urllib.parse import urlencode

from broker.edges import oauth

CALLER = "spiffe://acme.test/build/agent"
CODES = {
    "invalid_request",
    "invalid_client",
    "invalid_target",
    "invalid_scope",
    "invalid_authorization_details",
    "unsupported_grant_type",
}


def try_one(body: bytes) -> None:
    """Refused with a code of OAuth's, or read as exactly one action, the same one when it is written anew."""
    try:
        asked = oauth.parse_token_request(body)
        action = asked.action(CALLER)
    except oauth.TokenRequestRefused as error:
        status, answer = oauth.error_answer(error, "c")
        assert answer["error"] in CODES
        assert status in {400, 401}
        return
    detail = {
        "type": "action",
        "actions": [action.name],
        "identifier": action.resource,
        "locations": [action.audience],
        "parameters": action.parameters,
    }
    again = {**asked.fields, "authorization_details": json.dumps([detail])}
    assert oauth.parse_token_request(urlencode(again).encode()).action(CALLER).digest == action.digest


def one_input(data: bytes) -> None:
    """The bytes as a body; then, so that the depths are reached too, as the details of an otherwise good one."""
    try_one(data)
    for name in ("authorization_details", "client_assertion", "scope"):
        good = {"grant_type": "client_credentials", name: data.decode("utf-8", "replace")}
        try_one(urlencode(good).encode())


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
