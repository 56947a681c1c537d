"""One defect each: what is presented as provenance, why it is wrong and what it is told."""

import base64
import json
from typing import Any

from support import provenance as made
from support.pki import CA, NOW
from support.provenance import ARTIFACT, KEY, OTHER_KEY, SHA256, SHA512, STRANGER, envelope, predicate, statement

Defects = dict[str, tuple[Any, str]]
"""By name: the evidence (JSON, or text as it stands), and a piece of the reason that it is refused for."""


def about() -> Defects:
    """Sound envelopes of a trusted builder that are about something else, or say what we cannot take."""
    subjects: dict[str, tuple[Any, str]] = {
        "another-digest": ([{"digest": {"sha256": "0" * 64}}], "is not about"),
        "empty-subject-list": ([], "1 to 1024 subjects"),
        "conflicting-digest": ([{"digest": {"sha256": SHA256, "sha512": "0" * 128}}], "but another sha512"),
        "conflict-beside-a-match": (
            [{"digest": ARTIFACT}, {"digest": {"sha256": "0" * 64, "sha512": SHA512}}],
            "but another sha256",
        ),
        "one-digest-too-few": ([{"digest": {"sha256": SHA256}}], f"gives the sha512 of sha256:{SHA256} as well"),
        "without-the-sha256": ([{"digest": {"sha512": SHA512}}], f"gives the sha256 of sha256:{SHA256} as well"),
        "digests-in-two-subjects": (
            [{"digest": {"sha256": SHA256}}, {"digest": {"sha512": SHA512}}],
            f"of sha256:{SHA256} as well",
        ),
        "digests-that-another-subject-has": (
            [{"digest": {"sha256": SHA256}}, {"digest": {"sha256": "0" * 64, "sha512": "0" * 128}}],
            "gives the sha512",
        ),
        "digest-in-two-spellings": ([{"digest": ARTIFACT | {"SHA256": "0" * 64}}], "'sha256' in two spellings"),
        "subject-with-a-digest-in-two-spellings": (
            [{"digest": ARTIFACT, "Digest": {"sha256": "0" * 64}}],
            "'digest' in two spellings",
        ),
        "subject-with-a-name-of-protobuf's": (
            [{"digest": ARTIFACT, "download_location": "https://evil.test/"}],
            "'download_location'",
        ),
        "nothing-as-strong-as-sha256": ([{"digest": {"sha1": "0" * 40, "md5": "0" * 32}}], "no digest of sha256"),
        "weak-subject-beside-a-match": (
            [{"digest": ARTIFACT}, {"digest": {"gitCommit": "0" * 40}}],
            "no digest of sha256",
        ),
        "no-digest": ([{"name": "shop.tar"}], "no digest of sha256"),
        "upper-case-digest": ([{"digest": ARTIFACT | {"sha256": SHA256.upper()}}], "lower-case hexadecimal"),
        "short-digest": ([{"digest": ARTIFACT | {"sha256": SHA256[:-2]}}], "lower-case hexadecimal"),
        "digest-is-a-number": ([{"digest": ARTIFACT | {"sha256": 7}}], "the form of an in-toto Statement"),
        "subject-is-a-string": (["shop.tar"], "is not an object"),
    }
    found: Defects = {name: (envelope(statement(subject=one)), says) for name, (one, says) in subjects.items()}
    types = {
        "statement-v0.1": ({"_type": "https://in-toto.io/Statement/v0.1"}, "_type is not"),
        "statement-type-left-out": ({"_type": None}, "_type is not"),
        "another-predicate-type": ({"predicateType": "https://spdx.dev/Document"}, "not a https://slsa.dev"),
        "provenance-v0.2": ({"predicateType": "https://slsa.dev/provenance/v0.2"}, "not a https://slsa.dev"),
        "no-predicate-type": ({"predicateType": None}, "no predicateType"),
        "no-predicate": ({"predicate": None}, "does not name its builder"),
        "predicate-is-a-list": ({"predicate": []}, "the form of an in-toto Statement"),
    }
    elsewhere = [{"digest": {"sha256": "0" * 64}}]
    types |= {
        "subject-in-two-spellings": ({"Subject": elsewhere}, "'subject' in two spellings"),
        "subject-with-a-long-s": ({"\u017fubject": elsewhere}, "'subject' in two spellings"),
        "type-by-its-name-of-protobuf": ({"type": "https://in-toto.io/Statement/v1"}, "some read as '_type'"),
        "predicate-type-by-two-names": ({"predicate_type": "https://acme.test/x"}, "read as 'predicateType'"),
        "predicate-in-two-spellings": ({"PREDICATE": predicate(made.OTHER_BUILDER)}, "'predicate' in two spellings"),
    }
    found |= {name: (envelope(statement(**changes)), says) for name, (changes, says) in types.items()}
    alone = {("predicate_type" if name == "predicateType" else name): one for name, one in statement().items()}
    found["predicate-type-by-its-name-of-protobuf"] = (envelope(alone), "no predicateType")
    sound = json.dumps(statement()).encode()
    found["payload-of-another-type"] = (envelope(payload_type="application/json"), "no application/vnd.in-toto")
    found["duplicated-key-in-the-statement"] = (envelope(b'{"subject":[],' + sound[1:]), "'subject' twice")
    found["statement-is-no-object"] = (envelope(b"[]"), "not a JSON object")
    found["statement-is-no-json"] = (envelope(b"\xff"), "cannot be read as JSON")
    return found


def told() -> Defects:
    """Provenance of a trusted builder for this artifact that says what cannot be, or says too little."""
    metadata: dict[str, tuple[dict[str, Any], str]] = {
        "too-old": ({"startedOn": made.at(90_000), "finishedOn": made.at(86_400)}, "is older than 1 day"),
        "of-the-future": ({"finishedOn": made.at(-61)}, "is of the future"),
        "without-a-time": ({"startedOn": None, "finishedOn": None}, "its age cannot be bounded"),
        "finished-before-started": ({"finishedOn": made.at(900)}, "finished before it started"),
        "time-is-no-time": ({"finishedOn": "yesterday"}, "the form of SLSA Provenance"),
    }
    predicates = {name: (predicate(**one), says) for name, (one, says) in metadata.items()}
    for name, where, what, value, says in (
        ("no-build-type", "buildDefinition", "buildType", "", "does not name its builder"),
        ("no-external-parameters", "buildDefinition", "externalParameters", None, "does not name its builder"),
        ("parameters-beyond-json", "buildDefinition", "externalParameters", {"n": 2**53}, "what I-JSON does not have"),
        ("dependency-is-a-string", "buildDefinition", "resolvedDependencies", ["git+https://x.test/"], "names nothing"),
        ("no-builder-id", "runDetails", "builder", {}, "does not name its builder"),
        ("integer-of-400-digits", "buildDefinition", "externalParameters", {"n": 10**400}, "the form of an in-toto"),
        ("builder-in-two-spellings", "runDetails", "Builder", {"id": made.OTHER_BUILDER}, "'builder' in two spell"),
        ("dependencies-by-protobuf's-name", "buildDefinition", "resolved_dependencies", [], "read as 'resolvedDep"),
        (
            "repository-in-two-spellings",
            "buildDefinition",
            "externalParameters",
            {"workflow": {"repository": made.REPOSITORY, "Repository": "https://evil.test/"}},
            "'repository' in two spellings",
        ),
    ):
        wrong = predicate()
        wrong[where] = wrong[where] | {what: value}
        predicates[name] = (wrong, says)
    return {name: (envelope(statement(predicate=one)), says) for name, (one, says) in predicates.items()}


def signed() -> Defects:
    """Signed by nobody who may."""
    nobody, sound = "no signature of anybody trusted", envelope()
    other = envelope(statement(subject=[{"digest": {"sha256": "0" * 64}}]))
    return {
        "signed-by-another-builder": (envelope(keys=[OTHER_KEY]), "0 of 1 signers needed"),
        "names-another-builder": (
            envelope(statement(predicate=predicate(made.OTHER_BUILDER))),
            "0 of 1 signers needed",
        ),
        "builder-that-nobody-trusts": (
            envelope(statement(predicate=predicate("https://evil.test/"))),
            "is not trusted",
        ),
        "signed-by-a-stranger": (envelope(keys=[STRANGER]), nobody),
        "stranger-with-the-keyid-of-a-builder": (envelope(keys=[STRANGER], keyids=["release"]), nobody),
        "signature-of-another-payload": (sound | {"payload": other["payload"]}, nobody),
        "signature-over-the-bare-payload": (
            sound | {"signatures": [{"sig": made.b64(made.sign(KEY, base64.b64decode(sound["payload"])))}]},
            nobody,
        ),
        "type-changed-after-signing": (sound | {"payloadType": "application/json"}, nobody),
        "empty-signature": (sound | {"signatures": [{"sig": ""}]}, nobody),
        "one-of-two-signers": (envelope(_two(), keys=[KEY]), "1 of 2 signers needed"),
        "one-key-twice-for-two-signers": (envelope(_two(), keys=[KEY, KEY], keyids=["first", "second"]), "1 of 2"),
        "one-of-two-and-a-stranger": (envelope(_two(), keys=[KEY, STRANGER]), "1 of 2 signers needed"),
    }


def _two() -> dict[str, Any]:
    return statement(predicate=predicate(made.TWO_BUILDER))


def written() -> Defects:
    """No envelope, or one that two readers could read apart."""
    sound = envelope()
    text, payload = json.dumps(sound), sound["payload"]
    urlsafe = next(i for i in range(64) if "+" in _sig(i) and "/" in _sig(i))
    mixed = _sig(urlsafe).replace("+", "-")
    return {
        "duplicated-key": ('{"payload":"",' + text[1:], "'payload' twice"),
        "not-a-number": (text[:-1] + ',"n":NaN}', "cannot be read as JSON"),
        "lone-surrogate": (text[:-1] + ',"n":"\\ud800"}', "cannot be read as JSON"),
        "nested-without-end": ("[" * 50_000, "cannot be read as JSON"),
        "not-json": ("payload", "cannot be read as JSON"),
        "a-list": ("[]", "not a JSON object"),
        "both-alphabets-of-base64": (sound | {"signatures": [{"sig": mixed}]}, "mixes the two alphabets"),
        "alphabet-of-no-base64": (sound | {"payload": payload[:-4] + "!!!!"}, "not base64 of RFC 4648"),
        "base64-with-a-line-break": (sound | {"payload": payload[:4] + "\n" + payload[4:]}, "not base64 of RFC 4648"),
        "base64-without-padding": (sound | {"signatures": [{"sig": "QQ"}]}, "not base64 of RFC 4648"),
        "base64-with-bits-left-over": (sound | {"signatures": [{"sig": "QR=="}]}, "left over"),
        "payload-is-a-number": (sound | {"payload": 7}, "not a string of base64"),
        "no-payload": ({name: sound[name] for name in ("payloadType", "signatures")}, "not a string of base64"),
        "no-payload-type": (sound | {"payloadType": ""}, "no payloadType"),
        "no-signatures": (sound | {"signatures": []}, "1 to 8 signatures"),
        "nine-signatures": (sound | {"signatures": sound["signatures"] * 9}, "1 to 8 signatures"),
        "signature-is-a-string": (sound | {"signatures": ["QQ=="]}, "not a JSON object"),
        "keyid-is-a-number": (sound | {"signatures": [sound["signatures"][0] | {"keyid": 7}]}, "is not a string"),
    }


def _sig(i: int) -> str:
    return made.b64(made.sign(KEY, b"%d" % i))


def bundled() -> Defects:
    """Bundles with a sound envelope, or an SVID that speaks for nobody."""
    sound = made.authority().svid(made.BUILD_AGENT)
    other = made.authority().svid(made.BUILD_AGENT, key=STRANGER)
    old = made.authority().svid(made.BUILD_AGENT, not_before=NOW - made.MAX_AGE)
    ended = made.authority().svid(made.BUILD_AGENT, not_before=NOW - made.MAX_AGE, lifetime=-made.MAX_AGE / 24)
    document = statement(predicate=predicate(made.SVID_BUILDER))
    undated = statement(predicate=predicate(made.SVID_BUILDER, startedOn=None, finishedOn=None))
    return {
        "bundle-of-another-version": (made.bundle(mediaType="application/json"), "version 0.1 to 0.3"),
        "bundle-of-a-list-of-versions": (made.bundle(mediaType=[]), "version 0.1 to 0.3"),
        "bundle-without-an-envelope": (made.bundle(dsseEnvelope=None), "no dsseEnvelope"),
        "bundle-without-material": (made.bundle(verificationMaterial=None), "no verificationMaterial"),
        "bundle-with-two-signatures": (made.bundle(envelope(keys=[KEY, OTHER_KEY])), "exactly one signature"),
        "bundle-with-six-certificates": (made.bundle(chain=sound.chain * 6), "at most 5"),
        "svid-of-a-strange-domain": (
            made.svid_bundle(made.authority("evil.test").svid("spiffe://evil.test/build")),
            "no trust bundle",
        ),
        "svid-of-another-workload": (
            made.svid_bundle(made.authority().svid("spiffe://acme.test/web")),
            "0 of 1 signers",
        ),
        "svid-that-has-ended": (made.svid_bundle(ended), "has expired"),
        "svid-by-another-authority": (
            made.svid_bundle(CA("acme.test", seed="forged").svid(made.BUILD_AGENT)),
            "no X.509-SVID of a trusted domain",
        ),
        "svid-of-somebody-else": (made.bundle(envelope(document, keys=[KEY]), chain=other.chain), "not the signer's"),
        "svid-is-no-certificate": (made.bundle(envelope(keys=[STRANGER]), chain=[b"0"]), "none that signs"),
        "svid-signs-for-a-key's-builder": (made.svid_bundle(sound, statement()), "0 of 1 signers needed"),
        "undated-under-an-old-svid": (made.svid_bundle(old, undated), "is older than"),
    }


def sound() -> dict[str, Any]:
    """What differs from them in nothing but the defect."""
    svid = made.authority().svid(made.BUILD_AGENT)
    undated = statement(predicate=predicate(made.SVID_BUILDER, startedOn=None, finishedOn=None))
    plain = envelope()
    return {
        "envelope": plain,
        "two-signers": envelope(_two(), keys=[made.SECOND_KEY, KEY]),
        "two-signers-among-strangers": envelope(_two(), keys=[STRANGER, KEY, KEY, made.SECOND_KEY]),
        "urlsafe-base64": plain | {"payload": plain["payload"].translate(str.maketrans("+/", "-_"))},
        "keyid-of-somebody-else": envelope(keyids=["other"]),
        "more-subjects": envelope(
            statement(subject=[{"digest": {"sha512": "1" * 128}}, {"digest": {**ARTIFACT, "sha1": "0" * 40}}])
        ),
        "all-digests-agree": envelope(
            statement(subject=[{"digest": {"sha256": SHA256}}, {"digest": {**ARTIFACT, "sha384": "0" * 96}}])
        ),
        "names-that-nobody-knows": envelope(statement(more={"of": "it"})) | {"more": 1},
        "spellings-where-nobody-reads-names": envelope(statement(predicate=_proxies())),
        "a-second-before-too-old": envelope(
            statement(predicate=predicate(startedOn=made.at(90_000), finishedOn=made.at(86_399)))
        ),
        "started-but-not-finished": envelope(statement(predicate=predicate(finishedOn=None))),
        "bundle": made.bundle(),
        "svid": made.svid_bundle(svid),
        "svid-undated": made.svid_bundle(svid, undated),
    }


def _proxies() -> dict[str, Any]:
    """As BuildKit passes build arguments on."""
    found = predicate()
    arguments = {"build-arg:http_proxy": "http://proxy.acme.test/", "build-arg:HTTP_PROXY": "http://proxy.acme.test/"}
    found["buildDefinition"]["externalParameters"]["request"] = {"args": arguments}
    return found


CONTROLS = {"about": "envelope", "told": "envelope", "signed": "envelope", "written": "envelope", "bundled": "svid"}
OWN_CONTROLS = {
    "conflicting-digest": "all-digests-agree",
    "one-digest-too-few": "all-digests-agree",
    "without-the-sha256": "all-digests-agree",
    "digests-in-two-subjects": "all-digests-agree",
    "digests-that-another-subject-has": "all-digests-agree",
    "subject-in-two-spellings": "names-that-nobody-knows",
    "subject-with-a-long-s": "names-that-nobody-knows",
    "repository-in-two-spellings": "spellings-where-nobody-reads-names",
    "conflict-beside-a-match": "more-subjects",
    "weak-subject-beside-a-match": "more-subjects",
    "too-old": "a-second-before-too-old",
    "without-a-time": "started-but-not-finished",
    "one-of-two-signers": "two-signers",
    "one-key-twice-for-two-signers": "two-signers",
    "one-of-two-and-a-stranger": "two-signers-among-strangers",
    "stranger-with-the-keyid-of-a-builder": "keyid-of-somebody-else",
    "both-alphabets-of-base64": "urlsafe-base64",
    "undated-under-an-old-svid": "svid-undated",
    "bundle-of-another-version": "bundle",
    "bundle-of-a-list-of-versions": "bundle",
    "bundle-without-an-envelope": "bundle",
    "bundle-without-material": "bundle",
    "bundle-with-two-signatures": "bundle",
}
