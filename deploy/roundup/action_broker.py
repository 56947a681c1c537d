"""A Roundup detector: tells Action Broker at once that an issue may have changed. It belongs in `detectors/`.

It says which issue, and signs that; the broker then asks the tracker what the issue says. It is told after the commit,
when the change can be read. When the broker cannot be told nothing fails here: it looks by itself, a little later.

In `detectors/config.ini`:

    [action_broker]
    url = https://broker.acme.test:8444/hooks/tickets/roundup
    secret_file = /etc/roundup/action-broker.secret
    ca_file = /etc/roundup/trust-bundle.pem

The broker's certificate is an X.509-SVID, which names no host: it is checked against the trust domain's bundle alone.
What is sent is no secret.
"""

import hmac
import json
import logging
import ssl
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

TIMEOUT_S = 2


def tell(url: str, secret_file: str, ca_file: str, issue: str) -> None:
    """One webhook. What is signed: the delivery's id, the time and the body, with a `.` between them."""
    body = json.dumps({"id": issue}).encode()
    delivery, timestamp = uuid.uuid4().hex, str(int(time.time()))
    try:
        secret = Path(secret_file).read_bytes().splitlines()[0]
        code = hmac.digest(secret, b".".join([delivery.encode(), timestamp.encode(), body]), "sha256").hex()
        headers = {
            "Content-Type": "application/json",
            "X-Hub-Signature-256": f"sha256={code}",
            "X-Delivery": delivery,
            "X-Timestamp": timestamp,
        }
        context = ssl.create_default_context(cafile=ca_file)
        context.check_hostname = False
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context):
            pass
    except (OSError, IndexError):
        logging.getLogger("roundup.action_broker").warning("not told of issue %s", issue, exc_info=True)


def changed(db: Any, _class: Any, issue: str, _before: Any) -> None:
    """Has it told once what changed is committed."""
    settings = db.config.detectors
    where = (settings["ACTION_BROKER_URL"], settings["ACTION_BROKER_SECRET_FILE"], settings["ACTION_BROKER_CA_FILE"])
    db.transactions.append((tell, (*where, issue)))


def init(db: Any) -> None:
    """Called by Roundup."""
    for event in ("set", "retire", "restore"):
        db.issue.react(event, changed)
