"""`action-broker sign`: from files to bundles that verify, and what it says when there is none."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker import ISSUER
from support.cli import Ran, cli
from support.signing import CONTENT, RESOURCE
from support.signing_cli import AGENT, ALICE, BOB, SigningPlace, ended, signing_place

from broker.client import digests_of
from broker.ledger.records import Intent

CHANGED = b"release 1.0, and a backdoor\n"


@pytest.fixture(scope="module")
def place() -> Iterator[SigningPlace]:
    with signing_place() as found:
        yield found


def verified(place: SigningPlace, file: Path, bundle: Path) -> Ran:
    root = place.folder / "root.json"
    root.write_text(cli("ca", "trusted-root", place.broker.ca_folder).out)
    return cli("verify", file, "--bundle", bundle, "--trusted-root", root, "--issuer", ISSUER, "--json")


def signatures(place: SigningPlace) -> int:
    return sum(isinstance(one, Intent) and one.credential == "signature" for one in place.broker.whole.records())


def signed(place: SigningPlace, *arguments: object, approvers: tuple[str, ...] = (ALICE,)) -> Ran:
    """`sign` by the agent, approved by these: asked, refused, approved, and gone on with."""
    asked = place.cli(AGENT, "sign", *arguments, *place.socket, "--json")
    assert (asked.code, asked.value["reason"]) == (3, "approval_required"), asked.err
    for one in asked.value["waiting"]:
        place.approve(one["request_digest"], *approvers)
    return place.cli(AGENT, "sign", *arguments, *place.socket, "--json", "--request-id", asked.value["request_id"])


def test_what_lacks_an_approval_is_told_with_digest_and_text_and_gone_on_with_by_its_request_id(
    place: SigningPlace,
) -> None:
    file, bundle = place.file(), place.folder / "one.json"
    asked = place.cli(AGENT, "sign", file, *place.asking(), "--bundle", bundle, *place.socket, "--json")
    (waiting,) = asked.value["waiting"]
    assert (asked.code, asked.err, asked.value["signed"]) == (3, "", [])
    assert (waiting["files"], RESOURCE in waiting["text"]) == ([str(file)], True)
    assert not bundle.exists()
    place.approve(waiting["request_digest"], ALICE)
    again = ("--request-id", asked.value["request_id"])
    ran = place.cli(AGENT, "sign", file, *place.asking(), "--bundle", bundle, *place.socket, "--json", *again)
    (done,) = ran.value["signed"]
    assert (ran.code, ran.err, done["files"], done["bundle"]) == (0, "", [str(file)], str(bundle))
    found = verified(place, file, bundle)
    assert found.code == 0, found.out
    assert found.value["decision"]["grant_id"] == done["grant_id"]
    file.write_bytes(CHANGED)
    assert verified(place, file, bundle).code == 3
    # An approval is good for one signature.
    file.write_bytes(CONTENT)
    used = place.cli(AGENT, "sign", file, *place.asking(), "--bundle", bundle, *place.socket, "--json", *again)
    assert (used.code, used.value["reason"]) == (3, "already_used")


def test_people_are_told_what_to_do_next(place: SigningPlace) -> None:
    arguments = ("sign", place.file(), *place.asking(), "--bundle", place.folder / "people.json", *place.socket)
    asked = place.cli(AGENT, *arguments)
    assert asked.code == 3
    assert "refused: approval_required" in asked.err
    assert "asks to do release.sign" in asked.err
    digest = asked.err.partition("approve:  action-broker approve ")[2].split()[0]
    request_id = asked.err.partition("with --request-id ")[2].split()[0]
    place.approve(digest, ALICE)
    ran = place.cli(AGENT, *arguments, "--request-id", request_id)
    assert ran.code == 0
    assert "granted until" in ran.out
    assert "signed " in ran.out
    assert "without a timestamp this bundle stops verifying at" in ran.out


def test_it_waits_until_enough_have_approved(place: SigningPlace) -> None:
    file, bundle = place.file(), place.folder / "waited.json"
    asking = (*place.asking("production"), "--bundle", bundle, "--approval-wait", "1m")
    with place.running(AGENT, "sign", file, *asking, *place.socket, "--json") as process:
        digest = process.stderr.readline().split()[-1]
        place.approve(digest, ALICE)
        assert process.poll() is None  # production wants two
        assert not bundle.exists()
        place.approve(digest, BOB)
        ran = ended(process)
    assert (ran.code, ran.value["signed"][0]["files"]) == (0, [str(file)])
    assert verified(place, file, bundle).code == 0


def test_who_waits_sees_who_approved(place: SigningPlace) -> None:
    asking = (*place.asking(), "--bundle", place.folder / "seen.json", "--approval-wait", "1m")
    with place.running(AGENT, "sign", place.file(), *asking, *place.socket) as process:
        lines = iter(process.stdout.readline, "")
        digest = next(line for line in lines if "action-broker approve" in line).split()[-1]
        place.approve(digest, ALICE)
        ran = ended(process)
    assert (ran.code, ran.err) == (0, "")
    assert "approved by spiffe://acme.test/release-managers/alice" in ran.out


def test_who_waits_in_vain_is_refused_and_told_how_to_go_on(place: SigningPlace) -> None:
    asking = (*place.asking(), "--bundle", place.folder / "vain.json", "--approval-wait", "1s")
    ran = place.cli(AGENT, "sign", place.file(), *asking, *place.socket, "--json")
    assert (ran.code, ran.value["reason"], len(ran.value["waiting"])) == (3, "approval_required", 1)
    assert ran.value["request_id"] in ran.value["error"]


def test_ctrl_c_while_it_waits_leaves_a_request_that_can_be_gone_on_with(place: SigningPlace) -> None:
    file, bundle = place.file(), place.folder / "later.json"
    asking = (*place.asking(), "--bundle", bundle)
    with place.running(AGENT, "sign", file, *asking, "--approval-wait", "10m", *place.socket, "--json") as process:
        digest = process.stderr.readline().split()[-1]
        process.send_signal(signal.SIGINT)
        ran = ended(process)
    assert ran.code == 130
    assert "Traceback" not in ran.err
    assert [one["request_digest"] for one in ran.value["waiting"]] == [digest]
    assert not bundle.exists()
    place.approve(digest, ALICE)
    again = ("--request-id", ran.value["request_id"])
    assert place.cli(AGENT, "sign", file, *asking, *place.socket, *again).code == 0
    assert verified(place, file, bundle).code == 0


def test_several_files_are_asked_for_together_and_signed_each_by_a_grant_of_its_own(place: SigningPlace) -> None:
    statement = place.broker.builder
    files = [place.file(b"one\n", "one.bin"), place.file(b"two\n", "two.bin")]
    evidence = [place.file(statement.envelope(one.read_bytes()), f"{one.name}.provenance") for one in files]
    asking = (
        *("--resource", RESOURCE, "--parameters", '{"environment": "staging"}'),
        *[part for one in evidence for part in ("--provenance", one)],
    )
    before = signatures(place)
    ran = signed(place, *files, *asking, "--bundle", place.folder / "bundles")
    assert ran.code == 0, ran.out
    assert len({one["grant_id"] for one in ran.value["signed"]}) == 2
    assert signatures(place) == before + 2
    for file in files:
        assert verified(place, file, place.folder / "bundles" / f"{file.name}.sigstore.json").code == 0
    assert verified(place, files[0], place.folder / "bundles" / "two.bin.sigstore.json").code == 3


def test_what_was_signed_before_a_refusal_is_told(place: SigningPlace) -> None:
    good, bad = place.file(b"good\n", "good.bin"), place.file(b"bad\n", "bad.bin")
    asking = place.asking(content=b"good\n")
    asked = place.cli(AGENT, "sign", good, *asking, "--bundle", place.folder / "g.json", *place.socket, "--json")
    place.approve(asked.value["waiting"][0]["request_digest"], ALICE)
    again = ("--request-id", asked.value["request_id"])
    ran = place.cli(AGENT, "sign", good, bad, *asking, "--bundle", place.folder / "gs", *place.socket, "--json", *again)
    assert (ran.code, ran.value["reason"]) == (3, "provenance_rejected")
    assert [one["files"] for one in ran.value["signed"]] == [[str(good)]]
    assert (place.folder / "gs" / "good.bin.sigstore.json").exists()


def test_a_statement_is_signed_instead_of_its_subjects(place: SigningPlace) -> None:
    file = place.file()
    body = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "app", "digest": digests_of(file)}],
        "predicateType": "https://acme.test/released/v1",
        "predicate": {"version": "1.0"},
    }
    statement = place.file(json.dumps(body).encode(), "statement.json")
    bundle = place.folder / "statement-bundle.json"
    ran = signed(place, file, *place.asking(), "--statement", statement, "--bundle", bundle)
    assert ran.code == 0, ran.out
    assert "dsseEnvelope" in json.loads(bundle.read_text())
    assert verified(place, file, bundle).value["predicate_type"] == "https://acme.test/released/v1"


def test_without_provenance_or_with_anothers_nothing_is_signed(place: SigningPlace) -> None:
    file, before = place.file(), signatures(place)
    bare = ("--resource", RESOURCE, "--parameters", '{"environment": "staging"}', "--bundle", place.folder / "no.json")
    for given, reason in (
        ((), "provenance_missing"),
        (("--provenance", place.provenance(CHANGED, "of-another")), "provenance_rejected"),
        (("--provenance", place.file(b"{}", "empty.json")), "provenance_rejected"),
    ):
        ran = place.cli(AGENT, "sign", file, *bare, *given, *place.socket, "--json")
        assert (ran.code, ran.value["reason"], ran.value["signed"]) == (3, reason, [])
        assert ran.value["correlation_id"]
    other = place.cli("nobody", "sign", file, *place.asking(), "--bundle", place.folder / "no.json", *place.socket)
    assert (other.code, "refused: denied" in other.err) == (3, True)
    assert signatures(place) == before
    assert not (place.folder / "no.json").exists()


def test_a_key_that_policy_does_not_name_signs_nothing(place: SigningPlace) -> None:
    asking = (*place.asking(), "--key", "release", "--bundle", place.folder / "key.json")
    ran = place.cli(AGENT, "sign", place.file(), *asking, *place.socket, "--json")
    assert (ran.code, ran.value["reason"]) == (3, "denied")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("--bundle", "{folder}"), "is a folder: name a file in it"),
        (("--bundle", "{folder}/app/b.json"), "cannot be written"),
        (("--bundle", "/proc/b.json"), "cannot be written"),
        (("--provenance", "{folder}/none"), "does not exist"),
        (("--provenance", "{folder}/large"), "larger than 524288 bytes"),
        (tuple(["--provenance", "{folder}/app"] * 8), "may be given 8 times, not 9"),
        (("--statement", "{folder}/large"), "larger than 524288 bytes"),
        (("--resource", "https://a.test/../b"), "resource"),
        (("--parameters", "{"), "parameters"),
        (("--parameters", '{"signing": {}}'), 'the parameter "signing" is made from'),
        (("--purpose", "Release!"), "purpose"),
        (("--key", "No Such"), "signer"),
        (("--request-id", "short"), "16 to 64 characters"),
        (("--approval-wait", "10"), "such as 90s, 10m or 1h"),
        (("--approval-wait", "25h"), "at most 24h"),
        (("--server-uid", "root"), "'root' is not a valid integer"),
    ],
)
def test_a_mistake_is_told_before_anybody_is_asked(place: SigningPlace, change: tuple[str, ...], why: str) -> None:
    place.file(bytes(512 * 1024 + 1), "large")
    nowhere = ("--socket", place.folder / "nowhere.sock", "--issuer", ISSUER)
    arguments = ("sign", place.file(), *place.asking(), "--bundle", place.folder / "mistake.json", *nowhere)
    assert cli(*arguments).code == 4  # who asks finds nobody
    ran = cli(*arguments, *(part.format(folder=place.folder) if "{folder}" in part else part for part in change))
    assert (ran.code, why in ran.err) == (2, True), ran.err
    assert "Traceback" not in ran.err


def test_files_whose_bundles_would_be_one_are_not_signed(place: SigningPlace) -> None:
    files = [place.file(name="a/app"), place.file(name="b/app")]
    ran = cli("sign", *files, *place.asking(), "--bundle", place.folder / "same", *place.socket)
    assert (ran.code, "the same name" in ran.err) == (2, True)


def test_a_broker_of_another_user_is_asked_only_where_that_user_was_named(place: SigningPlace) -> None:
    asking = ("sign", place.file(), *place.asking(), "--bundle", place.folder / "uid.json", *place.socket, "--json")
    other = place.cli(AGENT, *asking, "--server-uid", "65534")
    assert (other.code, other.value["reason"]) == (4, "broker_unreachable")
    assert (
        place.cli(AGENT, *asking, "--server-uid", "65534", "--server-uid", "0").value["reason"] == "approval_required"
    )


def test_the_configuration_file_says_where_the_broker_is(place: SigningPlace) -> None:
    asking = ("sign", place.file(), *place.asking(), "--bundle", place.folder / "config.json", "--json")
    ran = place.cli(AGENT, *asking, "--config", place.folder / "broker.toml")
    assert ran.value["reason"] == "approval_required"


def test_over_mutual_tls_it_signs_as_well(place: SigningPlace) -> None:
    file, bundle = place.file(), place.folder / "mtls.json"
    arguments = ("sign", file, *place.asking_remotely(), "--bundle", bundle, "--json")
    asked = place.cli(AGENT, *arguments)
    place.approve(asked.value["waiting"][0]["request_digest"], ALICE)
    again = ("--request-id", asked.value["request_id"])
    other = place.cli(ALICE, *arguments, *again)  # approved was the agent's request
    assert (other.code, other.value["reason"]) == (3, "denied")
    ran = place.cli(AGENT, *arguments, *again)
    assert ran.code == 0, ran.out
    assert verified(place, file, bundle).code == 0
