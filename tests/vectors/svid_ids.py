"""SPIFFE IDs with one defect each. Sections are of SPIFFE-ID.md ("ID")."""

from collections.abc import Iterator
from typing import Any

from support.pki import WORKLOAD


def id_vectors() -> Iterator[tuple[str, dict[str, Any]]]:
    domain = "d" * 255
    for label, text, why in (
        ("control-workload", WORKLOAD, "a trust domain and a path"),
        ("control-trust-domain", "spiffe://acme.test", "ID 2: the path is optional"),
        ("control-longest", "spiffe://acme.test/" + "x" * 2029, "ID 2.3: 2048 bytes"),
        ("control-longest-trust-domain", f"spiffe://{domain}/x", "ID 2.3: 255 bytes"),
        ("control-dots-inside", "spiffe://acme.test/.hidden/a..b/...", "ID 2.2: no relative segments"),
        ("control-ip-address", "spiffe://192.0.2.7/x", "ID 2.1: like any other name"),
    ):
        yield label, {"expect": "accepted", "why": why, "control": "", "id": text}
    for label, text, why, control in (
        ("scheme-missing", "acme.test/build/agent", "ID 2", "workload"),
        ("scheme-https", "https://acme.test/build/agent", "ID 2", "workload"),
        ("scheme-upper-case", "SPIFFE://acme.test/build/agent", "one spelling, as in go-spiffe and SPIRE", "workload"),
        ("one-slash-before-the-domain", "spiffe:/acme.test/build/agent", "ID 2", "workload"),
        ("trust-domain-empty", "spiffe:///build/agent", "ID 2.1", "workload"),
        ("trust-domain-upper-case", "spiffe://Acme.test/build/agent", "ID 2.1: MUST be lower case", "workload"),
        ("trust-domain-with-port", "spiffe://acme.test:443/build/agent", "ID 2.1", "workload"),
        ("trust-domain-with-empty-port", "spiffe://acme.test:/build/agent", "ID 2.1", "workload"),
        ("trust-domain-with-userinfo", "spiffe://root@acme.test/build/agent", "ID 2.1", "workload"),
        ("trust-domain-percent-encoded", "spiffe://acm%65.test/build/agent", "ID 2.1", "workload"),
        ("trust-domain-ipv6", "spiffe://[2001:db8::1]/x", "ID 2.1: excluded", "ip-address"),
        ("trust-domain-unicode", "spiffe://acmé.test/build/agent", "ID 2.1", "workload"),
        ("trust-domain-that-lower-cases", "spiffe://\u212acme.test/build/agent", "the Kelvin sign", "workload"),
        ("trust-domain-too-long", f"spiffe://{domain}d/x", "ID 2.3", "longest-trust-domain"),
        ("query", "spiffe://acme.test/build/agent?x=y", "ID 2", "workload"),
        ("empty-query", "spiffe://acme.test/build/agent?", "ID 2", "workload"),
        ("fragment", "spiffe://acme.test/build/agent#x", "ID 2", "workload"),
        ("query-without-path", "spiffe://acme.test?x", "ID 2", "trust-domain"),
        ("path-is-a-slash", "spiffe://acme.test/", "ID 2.2", "trust-domain"),
        ("trailing-slash", "spiffe://acme.test/build/agent/", "ID 2.2", "workload"),
        ("empty-segment", "spiffe://acme.test/build//agent", "ID 2.2", "workload"),
        ("dot-segment", "spiffe://acme.test/./agent", "ID 2.2", "dots-inside"),
        ("dot-dot-segment", "spiffe://acme.test/build/../agent", "ID 2.2", "dots-inside"),
        ("dot-dot-at-the-end", "spiffe://acme.test/build/..", "ID 2.2", "dots-inside"),
        ("path-percent-encoded", "spiffe://acme.test/%62uild/agent", "ID 2.2", "workload"),
        ("path-percent-encoded-dots", "spiffe://acme.test/%2e%2e/agent", "ID 2.2", "dots-inside"),
        ("path-with-space", "spiffe://acme.test/build agent", "ID 2.2", "workload"),
        ("path-with-backslash", "spiffe://acme.test/build\\agent", "ID 2.2", "workload"),
        ("path-with-bar", f"{WORKLOAD}|{WORKLOAD}", "ID 2.2", "workload"),
        ("path-with-star", "spiffe://acme.test/build/*", "ID 2.2", "workload"),
        ("path-with-newline", f"{WORKLOAD}\n", "ID 2.2", "workload"),
        ("path-with-nul", f"{WORKLOAD}\x00", "ID 2.2", "workload"),
        ("path-with-full-width-letter", "spiffe://acme.test/\uff41gent", "ID 2.2", "workload"),
        ("path-with-arabic-digit", "spiffe://acme.test/agent\u0661", "ID 2.2", "workload"),
        ("space-before", f" {WORKLOAD}", "ID 2", "workload"),
        ("too-long", "spiffe://acme.test/" + "x" * 2030, "ID 2.3", "longest"),
        ("empty", "", "ID 2", "workload"),
    ):
        yield label, {"expect": "malformed", "why": why, "control": f"control-{control}", "id": text}
