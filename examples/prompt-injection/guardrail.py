"""A guardrail: is told all that an agent reads, and says how risky the agent's session is.

    python guardrail.py --broker /run/action-broker/broker.sock --issuer https://broker.acme.test \
        --agent spiffe://acme.test/agent/support --session task-17

It makes the session, with LOW. Then each line of its input is something that the agent read, JSON: {"from": …, "text":
…}; each line of its output is what it thinks of that. It is a process with an identity of its own, since nobody scores
a session of their own. Put a classifier in place of the pattern; what matters here is what follows from its word.
"""

import argparse
import asyncio
import json
import re
import sys

from broker.client import Client

ORDERS_TO_AN_AGENT = re.compile(
    r"ignore (all|any|your|previous) .*instructions|call the tool|do not tell", re.IGNORECASE
)


def opinion(text: str) -> str:
    """LOW, or HIGH for what talks to the agent rather than about something."""
    return "HIGH" if ORDERS_TO_AN_AGENT.search(text) else "LOW"


async def main() -> None:
    """Works until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--broker", required=True, help="the broker's socket")
    parser.add_argument("--issuer", required=True, help="the broker's issuer")
    parser.add_argument("--agent", required=True, help="whose session it is: a SPIFFE ID")
    parser.add_argument("--session", required=True)
    options = parser.parse_args()
    async with Client.unix(options.broker, issuer=options.issuer) as broker:

        async def score(level: str, reason: str) -> None:
            await broker.sessions.score(options.session, principal=options.agent, level=level, reason=reason)

        await score("LOW", "a new task")
        say("watching")
        while line := await asyncio.to_thread(sys.stdin.readline):
            read = json.loads(line)
            level = opinion(read["text"])
            if level == "HIGH":  # it is never scored down here: that is for people
                await score(level, f"instructions to the agent in {read['from']}")
            say(level)


def say(text: str) -> None:
    """One line of output."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main())
