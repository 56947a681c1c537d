"""What bad provenance gets at a running broker: a reason, a record, and no signature."""

import base64
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.signing import CONTENT, Builder, SigningBroker, digests, signing_broker, statement
from support.signing_calls import (
    NIGHTLY,
    UNLIMITED,
    ask_grant,
    ask_sign,
    claims_of,
    get_grant,
    nothing_signed,
    refused,
    spent,
)
from support.whole_broker import Wire

from broker.errors import BrokerError, Invalid, Reason
from broker.ledger.records import CountedRefusals

OTHER = b"another artifact\n"
MEBIBYTE = 1024 * 1024


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    """Left as it was found."""
    with signing_broker(NIGHTLY, limits=UNLIMITED) as found:
        yield found


@pytest.fixture
async def wire(broker: SigningBroker) -> AsyncIterator[Wire]:
    """A connection that gets a signature before the test and, the positive control, after it."""
    async with broker.whole.wire() as found:
        await signed(broker, found)
        yield found
        await signed(broker, found)


async def signed(broker: SigningBroker, wire: Wire) -> None:
    envelope = broker.builder.envelope()
    grant = (await get_grant(wire, broker.nightly(), [envelope])).grant
    said = await ask_sign(wire, grant, [envelope])
    assert said.code is grpc.StatusCode.OK, said.reason


def ago(**time: float) -> str:
    return (datetime.now(UTC) - timedelta(**time)).strftime("%Y-%m-%dT%H:%M:%SZ")


def finished(when: str) -> dict[str, Any]:
    """A predicate of a build that ended then."""
    predicate = statement()["predicate"]
    predicate["runDetails"]["metadata"] |= {"startedOn": when, "finishedOn": when}
    return {"predicate": predicate}


def of_builder(builder_id: str) -> dict[str, Any]:
    predicate = statement()["predicate"]
    predicate["runDetails"]["builder"]["id"] = builder_id
    return {"predicate": predicate}


def subject(**digest: str) -> dict[str, Any]:
    return {"subject": [{"name": "app", "digest": digest}]}


def sealed(builder: Builder, **changes: Any) -> bytes:
    """An envelope that was changed after it was signed."""
    return json.dumps(builder.sealed(json.dumps(statement()).encode()) | changes).encode()


def with_payload(change: Callable[[str], str]) -> Callable[[Builder], bytes]:
    """The payload's base64, spelled otherwise."""

    def make(builder: Builder) -> bytes:
        return sealed(builder, payload=change(builder.sealed(json.dumps(statement()).encode())["payload"]))

    return make


def twice(name: str) -> Callable[[Builder], bytes]:
    """A name that stands twice in the envelope."""

    def make(builder: Builder) -> bytes:
        text = sealed(builder).decode()
        value = json.dumps(json.loads(text)[name])
        return text.replace("{", f'{{"{name}": {value}, ', 1).encode()

    return make


def in_both_alphabets(builder: Builder) -> bytes:
    payload = json.dumps(statement(name="\u00ff\u00bf\u00be" * 9), ensure_ascii=False).encode()
    found = base64.b64encode(payload).decode()
    mixed = found.replace("/", "_", 1)
    assert "_" in mixed
    assert {"+", "/"} & set(mixed)
    return json.dumps(builder.sealed(payload) | {"payload": mixed}).encode()


def stranger(builder: Builder) -> Builder:
    return replace(builder, key=ec.generate_private_key(ec.SECP256R1()))


SHA256, SHA384, SHA512 = digests(CONTENT).values()
BAD: dict[str, Callable[[Builder], bytes]] = {
    "another artifact's": lambda one: one.envelope(OTHER),
    "signed by another builder": lambda one: stranger(one).envelope(),
    "of another builder by name": lambda one: one.envelope(**of_builder("https://ci.evil.test/builders/release")),
    "of another predicate type": lambda one: one.envelope(predicateType="https://slsa.dev/verification_summary/v1"),
    "of another statement type": lambda one: one.envelope(_type="https://in-toto.io/Statement/v0.1"),
    "of another payload type": lambda one: json.dumps(
        one.sealed(json.dumps(statement()).encode(), "application/vnd.evil+json")
    ).encode(),
    "too old": lambda one: one.envelope(**finished(ago(seconds=3601))),
    "of the future": lambda one: one.envelope(**finished(ago(seconds=-120))),
    "a payload twice": twice("payload"),
    "the signatures twice": twice("signatures"),
    "a key of the statement twice": lambda one: json.dumps(
        one.sealed(json.dumps(statement()).replace('{"_type"', '{"subject": [], "_type"', 1).encode())
    ).encode(),
    "base64 of both alphabets": in_both_alphabets,
    "base64 with a line end": with_payload(lambda text: f"{text[:76]}\n{text[76:]}"),
    "base64 with surplus padding": with_payload(lambda text: f"{text.rstrip('=')}===="),
    "base32": with_payload(lambda text: base64.b32encode(base64.b64decode(text)).decode()),
    "no subjects": lambda one: one.envelope(subject=[]),
    "a conflicting digest": lambda one: one.envelope(**subject(sha256=SHA256, sha512=digests(OTHER)["sha512"])),
    "a conflict in a weak digest only": lambda one: one.envelope(
        subject=[
            {"name": "app", "digest": {"sha256": SHA256}},
            {"name": "app", "digest": {"sha512": SHA512, "sha256": digests(OTHER)["sha256"]}},
        ]
    ),
    "silent on one of the artifact's digests": lambda one: one.envelope(**subject(sha256=SHA256, sha384=SHA384)),
    "no digest as strong as sha256": lambda one: one.envelope(**subject(sha1="8" * 40)),
    "no signature": lambda one: sealed(one, signatures=[]),
    "no envelope": lambda _: b"not an envelope",
    "an empty one": lambda _: b"",
    "over the limit by a byte": lambda one: one.envelope().ljust(512 * 1024 + 1),
    "a predicate of 700 kB": lambda one: one.envelope(padding="x" * 510_000),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
async def test_bad_provenance_is_refused_and_nothing_is_signed(
    broker: SigningBroker, wire: Wire, make: Callable[[Builder], bytes]
) -> None:
    """Invariant 6: what cannot be taken for true is no provenance."""
    bad = make(broker.builder)
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, broker.nightly(), [bad])
        record = await refused(broker, said, Reason.PROVENANCE_REJECTED)
    assert (record.action, record.stage, record.edge) == ("nightly.sign", "sign", "unix")


async def test_what_is_just_good_enough_is_taken(broker: SigningBroker, wire: Wire) -> None:
    """The controls of those above: each differs from one of them in the defect alone."""
    for envelope in (
        broker.builder.envelope().ljust(512 * 1024),
        broker.builder.envelope(**finished(ago(seconds=3540))),
        broker.builder.envelope(**subject(**digests(CONTENT), sha1="8" * 40)),
        with_payload(lambda text: text.replace("+", "-").replace("/", "_"))(broker.builder),
    ):
        assert (await get_grant(wire, broker.nightly(), [envelope])).grant
    for named in ({"sha256": SHA256}, {"sha256": SHA256, "sha512": SHA512}):
        envelope = broker.builder.envelope(**subject(**named))
        assert (await get_grant(wire, broker.nightly(artifacts=[named]), [envelope])).grant


async def test_a_predicate_of_100_mebibytes_is_cut_off_unread(broker: SigningBroker, wire: Wire) -> None:
    """Already a message of more than a mebibyte is none: the transport stops reading there, before anybody is known."""
    for size in (MEBIBYTE, 100 * MEBIBYTE):
        with nothing_signed(broker.whole):
            said = await ask_grant(wire, broker.nightly(), [broker.builder.envelope().ljust(size)])
        assert (said.code, said.reason, said.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "", None)
    with signing_broker() as other:  # counted, as what strangers send is: nobody was known yet
        async with other.whole.wire() as there:
            await ask_grant(there, other.nightly(), [other.builder.envelope().ljust(MEBIBYTE)])
        other.whole.broker.stop()
        counted = [one.counts for one in other.whole.records() if isinstance(one, CountedRefusals)]
        assert sum(one.get(Reason.MALFORMED, 0) for one in counted) == 1
    async with broker.client() as client:
        with pytest.raises(Invalid, match="larger than"):
            await client.signing.grant(broker.nightly(), [broker.builder.envelope().ljust(MEBIBYTE)])


async def test_no_provenance_is_missing_provenance(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 6: where the action's schema wants it, going without it is no way around it."""
    with nothing_signed(broker.whole):
        await refused(broker, await ask_grant(wire, broker.nightly()), Reason.PROVENANCE_MISSING)


async def test_each_envelope_is_appraised_for_itself(broker: SigningBroker, wire: Wire) -> None:
    good, other = broker.builder.envelope(), broker.builder.envelope(OTHER)
    assert (await get_grant(wire, broker.nightly(), [other, b"none", good])).grant, "one that is good will do"
    both = broker.nightly(artifacts=[digests(CONTENT), digests(OTHER)])
    with nothing_signed(broker.whole):
        said = await ask_grant(wire, both, [good, other])
        await refused(broker, said, Reason.PROVENANCE_REJECTED)  # neither is about both
    together = broker.builder.envelope(subject=[{"digest": digests(one)} for one in (OTHER, CONTENT, b"and more")])
    assert (await get_grant(wire, both, [together])).grant


async def test_more_than_eight_envelopes_are_not_looked_at(broker: SigningBroker, wire: Wire) -> None:
    good = broker.builder.envelope()
    assert (await get_grant(wire, broker.nightly(), [b"none"] * 7 + [good])).grant
    with nothing_signed(broker.whole):
        await refused(broker, await ask_grant(wire, broker.nightly(), [good] * 9), Reason.MALFORMED)
    grant = (await get_grant(wire, broker.nightly(), [good])).grant
    with nothing_signed(broker.whole):
        await refused(broker, await ask_sign(wire, grant, [good] * 9), Reason.MALFORMED)
    assert not spent(broker.whole, grant), "what is malformed costs nothing"
    assert (await ask_sign(wire, grant, [good])).code is grpc.StatusCode.OK


async def test_a_grant_names_the_provenance_that_it_was_given_on(broker: SigningBroker, wire: Wire) -> None:
    """Invariant 10: by its digest alone."""
    envelope = broker.builder.envelope()
    first, again = [claims_of((await get_grant(wire, broker.nightly(), [envelope])).grant) for _ in range(2)]
    other = claims_of(
        (await get_grant(wire, broker.nightly(), [broker.builder.envelope(**finished(ago(hours=0.5)))])).grant
    )
    assert first.attestation.provenance == again.attestation.provenance != other.attestation.provenance
    assert first.attestation.provenance.startswith("sha256:")


@pytest.mark.parametrize("shown", ["other", "none", "bad"])
async def test_the_signature_needs_the_very_provenance_of_its_grant(
    broker: SigningBroker, wire: Wire, shown: str
) -> None:
    """Redemption decides again, on what is shown again; and what is refused then is spent."""
    good = broker.builder.envelope()
    other = broker.builder.envelope(**finished(ago(minutes=10)))
    evidence, reason = {
        "other": ([other], Reason.EVIDENCE_MISMATCH),
        "none": ([], Reason.PROVENANCE_MISSING),
        "bad": ([good.replace(b'"sig": "M', b'"sig": "N')], Reason.PROVENANCE_REJECTED),
    }[shown]
    assert (await get_grant(wire, broker.nightly(), [other])).grant, "it would do for a grant of its own"
    grant = (await get_grant(wire, broker.nightly(), [good])).grant
    with nothing_signed(broker.whole):
        await refused(broker, await ask_sign(wire, grant, evidence), reason)
        assert spent(broker.whole, grant) == "refused"
        await refused(broker, await ask_sign(wire, grant, [good]), Reason.ALREADY_USED)


async def test_the_very_provenance_may_stand_anywhere_among_others(broker: SigningBroker, wire: Wire) -> None:
    good, other = broker.builder.envelope(), broker.builder.envelope(**finished(ago(minutes=10)))
    grant = (await get_grant(wire, broker.nightly(), [good])).grant
    assert (await ask_sign(wire, grant, [b"none", other, good])).code is grpc.StatusCode.OK


async def test_our_own_client_says_what_provenance_has_to_be(broker: SigningBroker, wire: Wire) -> None:
    async with broker.client() as client:
        for provenance, reason, advice in (
            ([broker.builder.envelope(OTHER)], Reason.PROVENANCE_REJECTED, "not about this artifact"),
            ([], Reason.PROVENANCE_MISSING, "--provenance"),
        ):
            with pytest.raises(BrokerError) as error:
                await client.signing.grant(broker.nightly(), provenance)
            assert error.value.reason is reason
            assert advice in error.value.detail
