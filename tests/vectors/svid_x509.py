"""X.509-SVIDs with one defect each. Sections are of X509-SVID.md ("X") and SPIFFE_Trust_Domain_and_Bundle.md ("TDB").

All keys come from a seed and all signatures are deterministic, so the same vectors are made each time.
"""

import base64
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.pki import CA, NOW, WORKLOAD, Svid, der, name, seeded_rsa_key, usage

SEED = "action broker test vectors"
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
CODE_SIGNING = ExtendedKeyUsageOID.CODE_SIGNING
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")
LIMITS = x509.NameConstraints([x509.UniformResourceIdentifier("acme.test")], None)
Named = Iterator[tuple[str, dict[str, Any]]]


class World:
    """Two federated domains and a stranger, made afresh so that serial numbers do not depend on who asked before."""

    def __init__(self) -> None:
        self.root = CA(seed=SEED)
        self.between = CA(parent=self.root)
        self.other = CA("other.test", seed=SEED)

    def vector(
        self,
        chain: Sequence[bytes],
        why: str,
        *,
        control: str,
        expect: str = "unauthenticated",
        bundles: Mapping[str, Sequence[x509.Certificate]] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        known = {"acme.test": [self.root.certificate], "other.test": [self.other.certificate]} | dict(bundles or {})
        return {
            "expect": expect,
            "why": why,
            "control": control,
            "now": NOW.isoformat(),
            "peer": "client",
            "bundles": {domain: [_base64(der(item)) for item in items] for domain, items in known.items()},
            "chain": [_base64(item) for item in chain],
        } | more

    def sound(self, svid: Svid, why: str, **more: Any) -> dict[str, Any]:
        names = svid.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return self.vector(svid.chain, why, control="", expect="accepted", spiffe_id=uri, **more)


def x509_vectors() -> Named:
    """Each with its name."""
    parts = (controls, leaf_defects, id_defects, authority_defects, path_defects, encoding_defects)
    return itertools.chain.from_iterable(part(World()) for part in parts)


def controls(world: World) -> Named:
    root = world.root
    federated = world.other.svid("spiffe://other.test/x")
    servers = CA(parent=root, purposes=[SERVER])
    for label, svid, why in (
        ("from-root", root.svid(), "a leaf that the root of its own trust domain signed"),
        ("from-intermediate", world.between.svid(), "a leaf and an intermediate under that root"),
        ("without-extended-key-usage", root.svid(purposes=()), "X 4.4: the extension is a SHOULD"),
        ("dns-names-beside", root.svid(dns=["orders.acme.test"]), "X 2: any number of other names"),
        ("subject-left-out", root.svid(subject="", names_critical=True), "X 3.1: names are critical then"),
        ("federated", federated, "by the federated domain's own bundle"),
    ):
        yield f"control-{label}", world.sound(svid, why)
    yield "control-server", world.sound(servers.svid(), "below a CA for servers", peer="server")


def leaf_defects(world: World) -> Named:
    root = world.root
    no_dns = world.vector(root.svid(uris=[], dns=["acme.test"]).chain, "X 2", control="control-dns-names-beside")
    yield "no-uri-name", no_dns
    unnamed = root.svid(subject="", names_critical=False)
    why = "X 3.1, RFC 5280 4.1.2.6"
    yield "no-subject-and-names-not-critical", world.vector(unnamed.chain, why, control="control-subject-left-out")
    defects: list[tuple[str, str, dict[str, Any]]] = [
        ("two-uri-names", "X 2: exactly one URI name", {"uris": [WORKLOAD, "spiffe://acme.test/admin"]}),
        ("two-equal-uri-names", "X 2: exactly one, even when they agree", {"uris": [WORKLOAD, WORKLOAD]}),
        ("web-address-beside-the-id", "X 2: one URI of any kind", {"uris": [WORKLOAD, "https://acme.test/"]}),
        ("no-names-at-all", "X 2", {"uris": []}),
        ("no-path", "X 3.1: a leaf has a path", {"uri": "spiffe://acme.test"}),
        ("ca-leaf", "X 5.2: cA is false", {"basic_constraints": x509.BasicConstraints(ca=True, path_length=None)}),
        ("leaf-may-sign-certificates", "X 5.2", {"key_usage": usage("digital_signature", "key_cert_sign")}),
        ("leaf-may-sign-revocations", "X 5.2", {"key_usage": usage("digital_signature", "crl_sign")}),
        ("no-digital-signature", "X 4.3", {"key_usage": usage("key_encipherment")}),
        ("no-key-usage", "X 4.3: MUST be set", {"key_usage": None}),
        ("key-usage-not-critical", "X 4.3: MUST be critical", {"key_usage_critical": False}),
        ("for-servers-only", "X 4.4: both MUST be set", {"purposes": [SERVER]}),
        ("for-clients-only", "X 4.4: both MUST be set", {"purposes": [CLIENT]}),
        ("for-code-signing", "X 4.4", {"purposes": [CODE_SIGNING]}),
        ("name-constraints-on-a-leaf", "X 4.2: signing certificates only", {"extra": [(LIMITS, True)]}),
        ("unknown-critical-extension", "RFC 5280 4.2", {"extra": [(UNKNOWN, True)]}),
        ("rsa-1024-leaf-key", "a key that can be factored", {"key": seeded_rsa_key(f"{SEED}/leaf", 1024)}),
        ("not-valid-yet", "RFC 5280 6.1.3", {"not_before": NOW + timedelta(seconds=1)}),
    ]
    for label, why, defect in defects:
        yield label, world.vector(root.svid(**defect).chain, why, control="control-from-root")
    expired = root.svid(lifetime=timedelta(seconds=-1))
    yield "expired", world.vector(expired.chain, "RFC 5280 6.1.3", control="control-from-root", expect="expired")


def id_defects(world: World) -> Named:
    for label, uri in (
        ("id-with-dot-segments", "spiffe://acme.test/x/../admin"),
        ("id-with-trailing-slash", "spiffe://acme.test/x/"),
        ("id-with-upper-case-domain", "spiffe://Acme.test/x"),
        ("id-with-port", "spiffe://acme.test:443/x"),
        ("id-with-nul", "spiffe://acme.test/x\x00.other.test"),
        ("id-is-a-web-address", "https://acme.test/x"),
    ):
        chain = world.root.svid(uri).chain
        yield label, world.vector(chain, "SPIFFE-ID.md 2", control="control-from-root", expect="malformed")


def authority_defects(world: World) -> Named:
    impostor = CA(seed=f"{SEED}/impostor", common_name="root of acme.test")
    lonely = CA("lonely.test", seed=SEED).svid("spiffe://lonely.test/x")
    foreign = CA("other.test", parent=world.other)
    for label, svid, why, control in (
        ("foreign-authority", world.other.svid(WORKLOAD), "its bundle is here, and not for this ID", "federated"),
        ("foreign-intermediate", foreign.svid(WORKLOAD), "likewise", "federated"),
        ("our-authority-for-a-foreign-id", world.root.svid("spiffe://other.test/x"), "nor ours", "federated"),
        ("same-name-as-our-root", impostor.svid(), "names prove nothing", "from-root"),
        ("no-bundle-for-its-domain", lonely, "not federated", "federated"),
    ):
        yield label, world.vector(svid.chain, why, control=f"control-{control}")
    chain = (*impostor.svid().chain, der(impostor.certificate))
    yield "unknown-root-sent-along", world.vector(chain, "sent is not trusted", control="control-from-root")
    svid, ended = world.root.svid(), CA(seed=f"{SEED}/ended", not_after=NOW - timedelta(seconds=1))
    for label, chain, why, authorities in (
        ("empty-bundle", svid.chain, "TDB 4.1.3: trusts nobody", []),
        ("leaf-in-the-bundle", svid.chain, "X 3.2: a bundle holds signing certificates", [svid.leaf]),
        ("root-expired", ended.svid().chain, "an authority too has an end", [ended.certificate]),
    ):
        yield label, world.vector(chain, why, control="control-from-root", bundles={"acme.test": authorities})


def path_defects(world: World) -> Named:
    root = world.root
    control = "control-from-intermediate"
    defects: list[tuple[str, str, dict[str, Any]]] = [
        ("intermediate-id-has-a-path", "X 3.2", {"uri": "spiffe://acme.test/ca"}),
        ("intermediate-key-usage-not-critical", "X 4.3", {"key_usage_critical": False}),
        ("intermediate-without-key-cert-sign", "X 3.2", {"key_usage": usage("digital_signature")}),
        ("intermediate-without-key-usage", "X 4.3", {"key_usage": None}),
        ("intermediate-without-basic-constraints", "X 4.1", {"basic_constraints": None}),
        ("intermediate-for-code-signing", "X 4.4", {"purposes": [CODE_SIGNING]}),
        ("intermediate-with-unknown-critical-extension", "RFC 5280 4.2", {"extra": [(UNKNOWN, True)]}),
        ("intermediate-with-uri-name-constraints", "X 4.2: not supported, so refused", {"extra": [(LIMITS, True)]}),
        ("intermediate-not-valid-yet", "RFC 5280 6.1.3", {"not_before": NOW + timedelta(seconds=1)}),
    ]
    for label, why, defect in defects:
        yield label, world.vector(CA(parent=root, **defect).svid().chain, why, control=control)
    old = CA(parent=root, not_after=NOW - timedelta(seconds=1)).svid()
    yield "intermediate-expired", world.vector(old.chain, "RFC 5280 6.1.3", control=control, expect="expired")
    yield "intermediate-missing", world.vector(world.between.svid().chain[:1], "X 5.1", control=control)
    forger, caught = CA(parent=root), root.svid()
    forger.certificate, forger.key, forger.name = caught.leaf, caught.key, name("a workload")
    forged = forger.svid("spiffe://acme.test/admin").chain
    yield "signed-by-a-leaf", world.vector(forged, "X 3.2: a leaf signs nothing", control=control)
    short = CA(parent=CA(parent=root, basic_constraints=x509.BasicConstraints(ca=True, path_length=0)))
    yield "beyond-path-length", world.vector(short.svid().chain, "RFC 5280 6.1.4 (l)", control=control)
    servers = CA(parent=root, purposes=[SERVER]).svid().chain
    limited = world.vector(servers, "X 4.4: it limits what is below", control="control-server")
    yield "client-below-a-ca-for-servers", limited
    deep = functools.reduce(lambda above, _: CA(parent=above), range(5), root).svid().chain
    yield "chain-too-long", world.vector(deep, "over four intermediates", control=control, expect="malformed")


def encoding_defects(world: World) -> Named:
    svid = world.root.svid()
    (good,) = svid.chain
    forged = good[:-1] + bytes([good[-1] ^ 1])
    yield "forged-signature", world.vector([forged], "RFC 5280 6.1.3 (a)", control="control-from-root")
    for label, chain in (
        ("bytes-after-the-certificate", [good + b"\x00"]),
        ("certificate-cut-off", [good[:-1]]),
        ("pem-for-der", [svid.leaf.public_bytes(Encoding.PEM)]),
        ("no-certificate", [b"hello"]),
        ("empty-chain", []),
    ):
        yield label, world.vector(chain, "RFC 5280 4.1", control="control-from-root", expect="malformed")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
