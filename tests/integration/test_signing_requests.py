"""What may be asked for: which artifacts, for what, by which signer. All else gets a reason, a record and no grant."""

import base64
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from support.signing import (
    AGENT,
    CONTENT,
    OPERATOR,
    OWN_KEY_AGENT,
    RESOURCE,
    SigningBroker,
    digests,
    signing_broker,
)
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    ask_grant,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
    wire_action,
)
from support.whole_broker import ISSUER, Wire

from broker._proto.actionbroker.v1 import action_pb2
from broker.action import Action
from broker.errors import Reason
from broker.ledger.records import Intent

SHA256, SHA384, SHA512 = digests(CONTENT).values()
GOOD = {"artifacts": [{"sha256": SHA256}], "purpose": "release", "signer": "keyless"}


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(NIGHTLY, limits=UNLIMITED) as found:
        yield found


@pytest.fixture
async def wire(broker: SigningBroker) -> AsyncIterator[Wire]:
    """A connection that gets a grant before the test and, the positive control, after it."""
    async with broker.whole.wire() as found:
        assert await get_grant(found, asked(GOOD), [broker.builder.envelope()])
        yield found
        assert await get_grant(found, asked(GOOD), [broker.builder.envelope()])


def asked(signing: Any, **changes: Any) -> action_pb2.Action:
    """An action with this parameter, of whatever form."""
    fields = {"name": "nightly.sign", "resource": RESOURCE, "audience": ISSUER} | changes
    return action_pb2.Action(parameters=json.dumps({"signing": signing}), **fields)


def artifacts(*found: Any) -> dict[str, Any]:
    return GOOD | {"artifacts": list(found)}


MALFORMED: dict[str, Any] = {
    "no artifact": artifacts(),
    "33 artifacts": artifacts(*[{"sha256": f"{number:064x}"} for number in range(33)]),
    "artifacts that are no list": GOOD | {"artifacts": {"sha256": SHA256}},
    "an artifact twice": artifacts({"sha256": SHA256}, {"sha256": SHA256, "sha512": SHA512}),
    "an artifact without sha256": artifacts({"sha512": SHA512}),
    "an artifact without digests": artifacts({}),
    "an artifact by name": artifacts({"sha256": SHA256, "name": "app"}),
    "an artifact by its sha1": artifacts({"sha256": SHA256, "sha1": "8" * 40}),
    "an artifact that is a string": artifacts(SHA256),
    "a digest in upper case": artifacts({"sha256": SHA256.upper()}),
    "a digest that is too short": artifacts({"sha256": SHA256[:-1]}),
    "a digest that is too long": artifacts({"sha256": f"{SHA256}0"}),
    "a digest with a newline": artifacts({"sha256": f"{SHA256[:-1]}\n"}),
    "a digest that is no hexadecimal": artifacts({"sha256": f"g{SHA256[1:]}"}),
    "a digest that is a number": artifacts({"sha256": 7}),
    "a digest under another's name": artifacts({"sha256": SHA256, "sha384": SHA512}),
    "an empty purpose": GOOD | {"purpose": ""},
    "a purpose with a space": GOOD | {"purpose": "release now"},
    "a purpose with a newline": GOOD | {"purpose": "release\n"},
    "a purpose of 65 characters": GOOD | {"purpose": "r" * 65},
    "an empty signer": GOOD | {"signer": ""},
    "a signer that nobody knows": GOOD | {"signer": "the release key"},
    "a key without a name": GOOD | {"signer": "key:"},
    "a key above its folder": GOOD | {"signer": "key:../ca"},
    "two signers": GOOD | {"signer": ["keyless", "key:p256"]},
    "no signer": {"artifacts": GOOD["artifacts"], "purpose": "release"},
    "a member more": GOOD | {"bundle": True},
    "no object": [GOOD],
    "nothing": None,
}


@pytest.mark.parametrize("signing", MALFORMED.values(), ids=MALFORMED.keys())
async def test_what_nobody_could_sign_is_malformed(broker: SigningBroker, wire: Wire, signing: Any) -> None:
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, asked(signing), [broker.builder.envelope()])
        record = await refused(broker, said, Reason.MALFORMED)
    assert (record.principal, record.stage) == (AGENT, "sign")


async def test_a_parameter_that_stands_twice_is_malformed(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 13: who approves and who signs must not read it apart."""
    action = asked(GOOD)
    action.parameters = action.parameters.replace('{"signing"', '{"signing": null, "signing"', 1)
    await refused(broker, await ask_grant(wire, action, [broker.builder.envelope()]), Reason.MALFORMED)


async def test_what_is_just_well_formed_is_granted(broker: SigningBroker, wire: Wire) -> None:
    """The controls of those above."""
    many = [b"%d" % number for number in range(32)]
    about_all = broker.builder.envelope(subject=[{"digest": {"sha256": digests(one)["sha256"]}} for one in many])
    named = [{"sha256": digests(one)["sha256"]} for one in many]
    grant = await get_grant(wire, asked(artifacts(*named)), [about_all])
    intent = next(one for one in broker.whole.intents().values() if one.jti == grant.grant_id)
    assert intent.artifacts == tuple(f"sha256:{one['sha256']}" for one in named)
    everything = {"sha256": SHA256, "sha384": SHA384, "sha512": SHA512}
    purpose = {"purpose": "r" * 64}
    assert await get_grant(wire, asked(artifacts(everything) | purpose), [broker.builder.envelope()])


async def test_who_signs_is_who_is_asked_to_act(broker: SigningBroker, wire: Wire) -> None:
    """The audience of a signing action is the broker's issuer."""
    for audience in ("https://broker.evil.test", "spiffe://acme.test/service/orders", f"{ISSUER}/signing"):
        with nothing_signed(broker.whole):
            said = await ask_grant(wire, asked(GOOD, audience=audience), [broker.builder.envelope()])
            await refused(broker, said, Reason.MALFORMED)


async def test_an_action_without_a_signature_in_it_gets_no_grant(broker: SigningBroker, wire: Wire) -> None:
    operate = Action("broker.operate", RESOURCE, ISSUER, {})
    await refused(broker, await ask_grant(wire, wire_action(operate)), Reason.MALFORMED)
    unheard = asked(GOOD, name="nightly.unheard")
    await refused(broker, await ask_grant(wire, unheard, [broker.builder.envelope()]), Reason.UNKNOWN_ACTION)


async def test_a_request_id_is_random_or_none(broker: SigningBroker, wire: Wire) -> None:
    for request_id in ("short", "x" * 65, "with a space in it", "newline-at-the-end\n"):
        said = await ask_grant(wire, asked(GOOD), [broker.builder.envelope()], request_id=request_id)
        await refused(broker, said, Reason.MALFORMED)
    assert await get_grant(wire, asked(GOOD), [broker.builder.envelope()], request_id="x" * 64)


async def test_policy_says_which_keys_and_nobody_else(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 6: a key that no permit names is given to nobody, whoever asks; nor is one's own without @agent_key."""
    envelope = [broker.builder.envelope()]
    for spiffe_id, signer in (
        (AGENT, "key:release"),
        (AGENT, "key:p256x"),
        (AGENT, "key:p25"),
        (AGENT, "agent-key"),
        (OWN_KEY_AGENT, "key:p256"),
        (OPERATOR, "keyless"),
    ):
        with nothing_signed(broker.whole):
            said = await ask_grant(wire, asked(GOOD | {"signer": signer}), envelope, spiffe_id=spiffe_id)
            record = await refused(broker, said, Reason.DENIED)
        assert record.principal == spiffe_id
    own = await get_grant(wire, asked(GOOD | {"signer": "agent-key"}), envelope, spiffe_id=OWN_KEY_AGENT)
    assert claims_of(own.grant).sub == OWN_KEY_AGENT


async def test_a_key_that_policy_gives_and_nobody_configured_is_out_of_reach(broker: SigningBroker, wire: Wire) -> None:
    """No grant is given that could not be kept."""
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, asked(GOOD | {"signer": "key:p256"}), [broker.builder.envelope()])
        await refused(broker, said, Reason.SIGNER_UNAVAILABLE)
    assert not [
        one for one in broker.whole.records() if isinstance(one, Intent) and one.correlation_id == said.correlation_id
    ], "nothing was granted either"


async def test_the_grant_is_for_these_artifacts_purpose_and_signer_alone(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 13: what is signed is what was granted; all of it is in the digest that the grant carries."""
    envelope = [broker.builder.envelope()]
    grant = (await get_grant(wire, broker.nightly(), envelope)).grant
    claims = claims_of(grant)
    assert claims.action_digest == broker.nightly().digest.hex()
    others = [
        broker.nightly(b"another"),
        broker.nightly(purpose="test"),
        broker.nightly(signer="agent-key"),
        broker.nightly(resource=f"{RESOURCE}/2"),
        broker.nightly(artifacts=[{"sha256": SHA256}]),
    ]
    assert len({one.digest for one in (broker.nightly(), *others)}) == len(others) + 1
    assert (claims.aud, claims.use, claims.scope) == (ISSUER, "single", "nightly.sign")
    said = await ask_sign(wire, grant, envelope)
    assert said.code is grpc.StatusCode.OK
    assert json.loads(said.message.bundle)["messageSignature"]["messageDigest"] == {
        "algorithm": "SHA2_256",
        "digest": base64.b64encode(bytes.fromhex(SHA256)).decode(),
    }
