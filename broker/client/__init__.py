"""What callers import: a token for each act, from the broker, bound to a key that only this process has.

    from broker.client import Client, Refused, Unavailable

    async with Client.unix(issuer="https://broker.acme.test") as broker:
        token = await broker.request(
            "orders.refund",
            "https://orders.acme.test/v1/orders/17",
            "spiffe://acme.test/service/orders",
            {"amount": 30},
        )
        metadata = token.grpc_metadata("/acme.Orders/Refund", authority="orders.acme.test")

client (calls) → routes (how the broker is reached, and who it must be) → link (one channel: proofs, nonces, repeats)
→ faults (what a no means). token: what the caller holds. stream: the same request, thousands a second.
"""

from broker.action import Action
from broker.client.client import Client
from broker.client.stream import TokenStream
from broker.client.token import ActionToken
from broker.client.wire import Explanation, PolicyExplanation, Redeemed
from broker.errors import Invalid, Reason, Refused, Unavailable

__all__ = [
    "Action",
    "ActionToken",
    "Client",
    "Explanation",
    "Invalid",
    "PolicyExplanation",
    "Reason",
    "Redeemed",
    "Refused",
    "TokenStream",
    "Unavailable",
]
