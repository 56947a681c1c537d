"""What a grant is not good for: another's hand, another time, another thing. A reason, a record, and no signature."""

import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.processes import until
from support.receiving import guard_of, shown
from support.signing import (
    AGENT,
    CONTENT,
    OPERATOR,
    OWN_KEY_AGENT,
    SigningBroker,
    digests,
    signing_broker,
    statement,
)
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    ask_certificate,
    ask_sign,
    build_agent,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
    spent,
    told,
    wire_action,
)
from support.whole_broker import ISSUER, POLICY, SCHEMA, Wire, utc_now

from broker._proto.actionbroker.v1 import broker_pb2
from broker.credentials import jose
from broker.credentials.dpop import ProofKey
from broker.errors import Reason, Refused

OTHER = b"another artifact\n"
POLICIES = NIGHTLY | {"orders.cedarschema": SCHEMA, "orders.cedar": POLICY}


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(POLICIES, limits=UNLIMITED) as found:
        found.whole.domain.entry("service/orders", os.getpid())
        yield found


@pytest.fixture
async def wire(broker: SigningBroker) -> AsyncIterator[Wire]:
    async with broker.whole.wire() as found:
        yield found


class Granted:
    """A grant that must be good for its signature after all that a test tries with it: the positive control."""

    def __init__(self, broker: SigningBroker, wire: Wire, grant: Any, envelope: bytes) -> None:
        self.broker, self.wire, self.text, self.envelope = broker, wire, grant.grant, [envelope]

    async def refuses(self, said: Any, reason: Reason) -> None:
        await refused(self.broker, said, reason)

    async def sign(self, wire: Wire | None = None, **options: Any) -> Any:
        return await ask_sign(wire or self.wire, options.pop("grant", self.text), self.envelope, **options)


@pytest.fixture
async def granted(broker: SigningBroker, wire: Wire) -> AsyncIterator[Granted]:
    """Nothing that is tried with it signs anything or spends it: then it still gives its one signature."""
    envelope = broker.builder.envelope()
    found = Granted(broker, wire, await get_grant(wire, broker.nightly(), [envelope]), envelope)
    with nothing_signed(broker.whole):
        yield found
    assert not spent(broker.whole, found.text)
    said = await found.sign()
    assert said.code is grpc.StatusCode.OK, said.reason
    assert spent(broker.whole, found.text) == "used"


async def test_a_grant_is_worth_nothing_without_the_key_it_names(broker: SigningBroker, granted: Granted) -> None:
    """Invariant 2: no bearer credential: a stolen grant is of no use with another key, whoever has it."""
    async with broker.whole.wire() as stranger:
        await granted.refuses(await granted.sign(stranger), Reason.KEY_MISMATCH)
    async with broker.whole.mtls(broker.whole.domain.svid("build/agent")) as mtls:
        await granted.refuses(await granted.sign(mtls), Reason.KEY_MISMATCH)
    async with broker.whole.wire() as again:
        again.key = granted.wire.key
        again_said = await granted.sign(again, grant="x" + granted.text)
        await granted.refuses(again_said, Reason.MALFORMED)


async def test_a_grant_over_mutual_tls_is_bound_to_its_certificate(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 2: and to that very one, not to whoever else has the same SPIFFE ID."""
    envelope, seen = [broker.builder.envelope()], broker.whole.domain.svid("build/agent")
    async with broker.whole.mtls(seen) as mtls, broker.whole.mtls(broker.whole.domain.svid("build/agent")) as other:
        grant = (await get_grant(mtls, broker.nightly(), envelope)).grant
        assert claims_of(grant).cnf.x5t_s256
        with nothing_signed(broker.whole):
            await refused(broker, await ask_sign(other, grant, envelope), Reason.KEY_MISMATCH)
            await refused(broker, await ask_sign(wire, grant, envelope), Reason.KEY_MISMATCH)
        async with broker.whole.mtls(seen) as again:
            assert (await ask_sign(again, grant, envelope)).code is grpc.StatusCode.OK


async def test_a_grant_is_its_callers_alone(granted: Granted) -> None:
    """Invariant 2: not even the same process with the same key may spend it under another name."""
    for spiffe_id in (OWN_KEY_AGENT, OPERATOR):
        await granted.refuses(await granted.sign(spiffe_id=spiffe_id), Reason.KEY_MISMATCH)


def written(broker: SigningBroker) -> tuple[Path, Path]:
    """Files with the nightly action and with its provenance."""
    folder = broker.whole.broker.folder
    action, envelope = folder / "action.json", folder / "envelope.json"
    sent = wire_action(broker.nightly())
    fields = {name: getattr(sent, name) for name in ("name", "resource", "audience", "parameters")}
    action.write_text(json.dumps(fields))
    envelope.write_bytes(broker.builder.envelope())
    return action, envelope


async def test_another_process_with_the_same_name_and_key_cannot_spend_a_grant(
    broker: SigningBroker, wire: Wire
) -> None:
    """The process that asked is part of what was granted; and who tries has spent it."""
    action, envelope = written(broker)
    with build_agent(broker, wire.key, "build/agent") as child:
        assert await child.line() == "ready"
        grant = (await get_grant(wire, broker.nightly(), [envelope.read_bytes()])).grant
        with nothing_signed(broker.whole):
            assert await told(child, "sign", grant, envelope, "i" * 20) == Reason.NOT_ATTESTED
            assert spent(broker.whole, grant) == "refused"
            await refused(broker, await ask_sign(wire, grant, [envelope.read_bytes()]), Reason.ALREADY_USED)

        own = await told(child, "grant", action, envelope)
        assert await told(child, "sign", own, envelope, "i" * 20) == "signed", "its own grant is good"


def another_interpreter(folder: Path) -> Path:
    """The same one, as another file."""
    program, original = folder / "bin" / "python", Path(sys.executable).resolve()
    program.parent.mkdir()
    shutil.copy(original, program)
    (folder / "pyvenv.cfg").write_text(f"home = {original.parent}\n")
    return program


async def test_a_process_that_was_replaced_cannot_spend_its_grant(broker: SigningBroker, wire: Wire) -> None:
    """The same process number, start, name and key, and another program: decided again, and no more the one it was."""
    action, envelope = written(broker)
    program = another_interpreter(broker.whole.broker.folder)
    with build_agent(broker, wire.key, "build/agent") as child:
        assert await child.line() == "ready"
        grant, other = [await told(child, "grant", action, envelope) for _ in range(2)]
        assert await told(child, "sign", other, envelope, "i" * 20) == "signed", "before"
        with nothing_signed(broker.whole):
            assert await told(child, "exec", program) == "ready"
            assert await told(child, "sign", grant, envelope, "i" * 20) == Reason.NOT_ATTESTED
            assert spent(broker.whole, grant) == "refused"
            assert await told(child, "exec", sys.executable) == "ready"
            assert await told(child, "sign", grant, envelope, "i" * 20) == Reason.ALREADY_USED, "it does not come back"
        own = await told(child, "grant", action, envelope)
        assert await told(child, "sign", own, envelope, "i" * 20) == "signed"


async def test_a_grant_that_has_expired_signs_nothing(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 3: and it expires with the provenance under it, not a second later."""
    soon = (utc_now() - timedelta(seconds=3597)).strftime("%Y-%m-%dT%H:%M:%SZ")  # believed for an hour
    predicate = statement()["predicate"]
    predicate["runDetails"]["metadata"] |= {"startedOn": soon, "finishedOn": soon}
    envelope = [broker.builder.envelope(predicate=predicate)]
    grant, other = [(await get_grant(wire, broker.nightly(), envelope)).grant for _ in range(2)]
    assert (await ask_sign(wire, other, envelope)).code is grpc.StatusCode.OK, "while it lasts"
    ends = claims_of(grant).expires_at
    assert ends <= utc_now() + timedelta(seconds=3)
    await until(lambda: utc_now() > ends, "it has expired")
    with nothing_signed(broker.whole):
        await refused(broker, await ask_sign(wire, grant, envelope), Reason.EXPIRED)
        await refused(broker, await ask_sign(wire, other, envelope), Reason.EXPIRED)


async def test_a_grant_that_was_tampered_with_is_none(broker: SigningBroker, granted: Granted) -> None:
    header, payload, signature = granted.text.split(".")
    claims = json.loads(jose.b64url_decode(payload.encode()))
    forged = jose.b64url(json.dumps(claims | {"exp": claims["exp"] + 60}).encode())
    key_of_mine = ProofKey()._private
    mine = jose.sign(jose.b64url_decode(header.encode()), jose.b64url_decode(payload.encode()), key_of_mine)
    none = jose.b64url(json.dumps({"alg": "none", "typ": "signing-grant+jwt"}).encode())
    for text, reason in {
        f"{header}.{forged}.{signature}": Reason.UNAUTHENTICATED,
        mine: Reason.UNAUTHENTICATED,
        f"{none}.{payload}.": Reason.MALFORMED,
        f"{header}.{payload}": Reason.MALFORMED,
        "": Reason.MALFORMED,
        "x" * 20_000: Reason.MALFORMED,
    }.items():
        await granted.refuses(await granted.sign(grant=text), reason)


async def test_an_action_token_is_no_grant_and_a_grant_no_action_token(
    broker: SigningBroker, wire: Wire, granted: Granted
) -> None:
    """Each kind of credential counts for its own use alone: at Sign, at Check and Redeem, and at a guard."""
    token = await wire.token("orders.charge")
    assert await wire.check(token, "orders.charge") == ""
    await granted.refuses(await granted.sign(grant=token), Reason.MALFORMED)
    said = await ask_certificate(wire, token, b"", granted.envelope, spiffe_id=AGENT)
    await refused(broker, said, Reason.MALFORMED)

    action = wire_action(broker.nightly())
    assert await wire.check(granted.text, "orders.charge") == Reason.MALFORMED
    redeem = broker_pb2.RedeemRequest(token=granted.text, action=action, idempotency_id="i" * 20, spiffe_id=AGENT)
    await refused(broker, await wire.ask("Redeem", redeem), Reason.MALFORMED)
    async with guard_of(broker.whole, audience=ISSUER) as guard:
        with pytest.raises(Refused) as error:
            await guard.admit(shown(granted.text, wire.key), broker.nightly())
        assert error.value.reason is Reason.MALFORMED
    async with guard_of(broker.whole, audience="spiffe://acme.test/service/orders") as guard:
        with pytest.raises(Refused) as error:
            await guard.admit(shown(granted.text, wire.key), broker.nightly())
        assert error.value.reason is Reason.MALFORMED


IDS = {
    "none": "",
    "too short": "i" * 15,
    "too long": "i" * 65,
    "with a space": "i" * 16 + " ",
    "with a newline": "i" * 16 + "\n",
    "of other letters": "ä" * 16,
}


@pytest.mark.parametrize("idempotency_id", IDS.values(), ids=IDS.keys())
async def test_an_idempotency_id_is_random_or_refused(granted: Granted, idempotency_id: str) -> None:
    await granted.refuses(await granted.sign(idempotency_id=idempotency_id), Reason.MALFORMED)


def about(*subjects: dict[str, str], **changes: Any) -> bytes:
    """A statement with these subjects."""
    found = {"subject": [{"name": "app", "digest": one} for one in subjects], "predicateType": "https://acme.test/x"}
    return json.dumps({"_type": "https://in-toto.io/Statement/v1", **found, "predicate": {}, **changes}).encode()


ALL = digests(CONTENT)
SHA256 = {"sha256": ALL["sha256"]}
WRONG_STATEMENTS: dict[str, bytes] = {
    "about another artifact": about(digests(OTHER)),
    "about another artifact, too": about(ALL, digests(OTHER)),
    "about nothing": about(),
    "with a digest that was not granted": about(SHA256 | {"sha512_256": "8" * 64}),
    "with a weak digest that was not granted": about(SHA256 | {"sha1": "8" * 40}),
    "with a conflicting digest": about(SHA256 | {"sha512": digests(OTHER)["sha512"]}),
    "by a weak digest alone": about({"sha1": "8" * 40}),
    "with a subject twice, once in another's name": about(SHA256, {"sha512": digests(OTHER)["sha512"]}),
    "of another type": about(ALL, _type="https://in-toto.io/Statement/v0.1"),
    "without a type of its predicate": about(ALL, predicateType=""),
    "with a name twice": about(ALL).replace(b'{"_type"', b'{"subject": [], "_type"', 1),
    "that is no JSON": b"release 1.0",
    "that is an envelope": json.dumps({"payload": "", "payloadType": "x", "signatures": []}).encode(),
    "of 600 KiB": about(ALL, predicate={"padding": "x" * 600 * 1024}),
    "over the limit by a byte": about(ALL).ljust(128 * 1024 + 1),
}


@pytest.mark.parametrize("wrong", WRONG_STATEMENTS.values(), ids=WRONG_STATEMENTS.keys())
async def test_a_statement_that_is_not_about_what_was_granted_is_refused(granted: Granted, wrong: bytes) -> None:
    """Invariant 13: the subjects of what is signed are what was granted, no less and no more."""
    await granted.refuses(await granted.sign(statement=wrong), Reason.MALFORMED)


async def test_a_statement_about_just_what_was_granted_is_signed(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 13: the controls of those above."""
    envelope = [broker.builder.envelope()]
    for good in (about(ALL), about(SHA256), about({"sha512": ALL["sha512"]}), about(ALL).ljust(128 * 1024)):
        grant = (await get_grant(wire, broker.nightly(), envelope)).grant
        said = await ask_sign(wire, grant, envelope, statement=good)
        assert said.code is grpc.StatusCode.OK, said.reason


async def test_several_artifacts_are_signed_as_subjects_or_not_at_all(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 13: one signature over one digest cannot be about two artifacts."""
    both = [digests(CONTENT), digests(OTHER)]
    envelope = [broker.builder.envelope(subject=[{"digest": one} for one in both])]
    grant = (await get_grant(wire, broker.nightly(artifacts=both), envelope)).grant
    with nothing_signed(broker.whole):
        for wrong in (b"", about(both[0]), about(*both, digests(b"a third"))):
            await refused(broker, await ask_sign(wire, grant, envelope, statement=wrong), Reason.MALFORMED)
    said = await ask_sign(wire, grant, envelope, statement=about(*both))
    assert said.code is grpc.StatusCode.OK, said.reason


async def test_a_grant_for_a_signature_gives_no_certificate_and_the_other_way_round(
    broker: SigningBroker, wire: Wire, granted: Granted
) -> None:
    """Invariant 4: each way of signing is granted for itself."""
    said = await ask_certificate(wire, granted.text, b"", granted.envelope, spiffe_id=AGENT)
    await refused(broker, said, Reason.OUT_OF_SCOPE)
    action = broker.nightly(signer="agent-key")
    own = (await get_grant(wire, action, granted.envelope, spiffe_id=OWN_KEY_AGENT)).grant
    for statement_of_mine in (b"", about(ALL)):
        said = await ask_sign(wire, own, granted.envelope, statement=statement_of_mine, spiffe_id=OWN_KEY_AGENT)
        await refused(broker, said, Reason.OUT_OF_SCOPE)
    assert not spent(broker.whole, own)


async def test_the_same_id_with_other_content_is_refused(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 7: what is asked again is the same, or it is not answered."""
    envelope, name = [broker.builder.envelope()], "i" * 20
    grant = (await get_grant(wire, broker.nightly(), envelope)).grant
    first = await ask_sign(wire, grant, envelope, idempotency_id=name, statement=about(ALL))
    assert first.code is grpc.StatusCode.OK
    with nothing_signed(broker.whole):
        for other in (b"", about(SHA256)):
            said = await ask_sign(wire, grant, envelope, idempotency_id=name, statement=other)
            await refused(broker, said, Reason.ALREADY_USED)
        said = await ask_sign(wire, grant, envelope, idempotency_id=name, statement=about(ALL))
        assert said.message.bundle == first.message.bundle, "the same is answered again"
        other = (await get_grant(wire, broker.nightly(), envelope)).grant
    said = await ask_sign(wire, other, envelope, idempotency_id=name)
    assert said.code is grpc.StatusCode.OK, "an id is the caller's own affair for each grant"


async def test_refusals_of_many_at_once_leave_the_one_that_is_right_unharmed(
    broker: SigningBroker, granted: Granted
) -> None:
    async def wrong() -> str:
        async with broker.whole.wire() as stranger:
            return (await granted.sign(stranger)).reason

    assert set(await asyncio.gather(*[wrong() for _ in range(12)])) == {Reason.KEY_MISMATCH}
