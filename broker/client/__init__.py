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

    signing = signing_action("release.sign", resource, issuer=issuer, artifacts=[digests_of(file)], purpose="release")
    grant = await broker.signing.grant(signing, [envelope])
    bundle = (await broker.signing.sign(grant)).bundle

client (calls) → routes (how the broker is reached, and who it must be) → link (one channel: proofs, nonces, repeats)
→ faults (what a no means). token: what the caller holds. stream: the same request, thousands a second.
signing, approvals: the calls under `Client.signing` and `Client.approvals`. person, login: for
people, who have no SVID.
"""

from broker.action import Action
from broker.client.approvals import Approval, PendingRequest
from broker.client.client import Client
from broker.client.signing import Signature, SigningGrant, digests_of, signing_action
from broker.client.stream import TokenStream
from broker.client.token import ActionToken
from broker.client.wire import Explanation, PolicyExplanation, Redeemed
from broker.errors import ApprovalRequired, Invalid, Reason, Refused, Unavailable

__all__ = [
    "Action",
    "ActionToken",
    "Approval",
    "ApprovalRequired",
    "Client",
    "Explanation",
    "Invalid",
    "PendingRequest",
    "PolicyExplanation",
    "Reason",
    "Redeemed",
    "Refused",
    "Signature",
    "SigningGrant",
    "TokenStream",
    "Unavailable",
    "digests_of",
    "signing_action",
]
