"""The numbers of docs/staleness.md are those of the code, and what only a library bounds is bounded there.

Which test proves what happens at each bound is in the page itself, and tests/unit/test_docs.py holds it to that.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner
from support.constants import value_of

from broker import action, again
from broker.cli.main import main
from broker.credentials import jose
from broker.decision import question
from broker.edges import grpc_peer
from broker.ledger import schema

PAGE = (Path(__file__).parents[2] / "docs/staleness.md").read_text(encoding="utf-8")
UNITS = {"": 1, " s": 1, " ms": 0.001, " h": 3600, " KiB": 1024, " MiB": 1024**2}
NUMBER = re.compile(r"(?<![\d.,/])(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)( s| ms| h| KiB| MiB)?(?![\d.]*\d)")

BOUNDS = {
    # how late a change is noticed
    "a registration entry is deleted": {"attestors.spire:AT_ONCE", "attestors.spire:POLL_S"},
    "a process runs another program, or as another user": {"attestors.process:ProcessAttestor.max_watched"},
    "the policy folder changes": {"broker.decision.store:WATCH_INTERVAL_S", "broker.scope.case:AT_ONCE"},
    "nobody can look at SPIRE, or at a ticket system, any more": {"broker.scope.case:Bounds.blind_s"},
    "a fact alone cannot be looked at, while its source answers about others": {"broker.scope.case:Bounds.blind_s"},
    "an operator revokes, the holder gives a token back": {"broker.scope.case:AT_ONCE"},
    "the broker's store stops answering, cannot keep a refusal, or the broker is gone": {
        "broker.guard.scope_state:MAX_SILENCE"
    },
    "the clock of a receiving service is set back": {"broker.guard.scope_state:SKEW"},
    "a builder, its key or the age of builds, in the trust file": {"broker.cli.file_watch:INTERVAL_S"},
    "a transmitter's keys": {"broker.identity.oidc_issuer:KEEP", "broker.cli.file_watch:INTERVAL_S"},
    "a ticket is closed, or authorises another thing": {
        "attestors.ticket_polls:SOON_S",
        "attestors.ticket_polls:RESTLESS_S",
    },
    "a key of an OIDC issuer is withdrawn": {"broker.identity.oidc_issuer:KEEP"},
    "anything of it, for a signing grant already given": {"broker.credentials.signing_grant:LONGEST"},
    "the same, at a guard without the feed that does not ask": {
        "broker.decision.obligations:DEFAULT_TTL",
        "broker.decision.obligations:LONGEST_TTL",
        "broker.credentials.action_token:LEEWAY",
    },
    "a signing key is withdrawn": {"broker.guard.keys:MAX_AGE"},
    "the outside checkpoint, after a record": {"broker.ledger.group:Limits.maintain_s"},
    # who, and whom we trust
    "X.509 chains that verified": {"broker.identity.x509_svid:REMEMBERED"},
    "tokens from SPIRE's Broker API that verified": {"broker.identity.spire_broker_api:REMEMBERED"},
    "a question to the agent that is under way": {"broker.identity.spire_broker_api:SpireBrokerApi.deadline_s"},
    "channel to the agent's Broker API": {"broker.identity.spire_broker_api:DRAIN_S"},
    "TLS settings of a dialled connection": {"broker.identity.tls_dial:RECHECK_S"},
    "the process behind a connection, held by a pidfd": {
        "broker.cli.config:Unix.max_connections",
        "broker.cli.config:Unix.max_connections_per_uid",
    },
    "calls whose message has not come": {"broker.edges.places:PATIENCE_S"},
    "streams on which nobody is known yet": {
        "broker.edges.places:PATIENCE_S",
        "broker.edges.places:MAX_UNKNOWN_STREAMS",
        "broker.edges.places:MAX_UNKNOWN_STREAMS_OF_ONE",
    },
    "streams of known callers": {"broker.edges.places:MAX_STREAMS", "broker.edges.places:MAX_STREAMS_OF_ONE"},
    "which reasons were logged": {"broker.identity.unix_front:_TELL_AGAIN_S"},
    "gRPC connections": {"broker.cli.config:Grpc.max_connection_age_s"},
    "gRPC health, gauges": {"broker.cli.serve:READY_S", "broker.cli.guard_serve:READY_S"},
    "HTTPS connections, with handshakes that have not ended": {
        "broker.edges.http_server:MAX_CONNECTIONS",
        "broker.edges.http_server:HANDSHAKE_TIMEOUT_S",
        "broker.edges.http_server:FIRST_REQUEST_TIMEOUT_S",
        "broker.edges.http_server:KEEPALIVE_S",
    },
    # evidence
    "hash of an executable": {"attestors.process:_HASHES"},
    "executables that are being hashed": {"attestors.process:MAX_EXE"},
    "processes followed for changes": {"attestors.process:ProcessAttestor.max_watched", "attestors.process:_WATCH_S"},
    "processes asked about at SPIRE, and what was told": {
        "attestors.spire:WATCHED",
        "attestors.spire:WATCH_S",
        "attestors.spire:POLL_S",
    },
    "whose provenance is believed: the trust file, its public keys and timestamp chains": {
        "broker.cli.file_watch:INTERVAL_S"
    },
    "keys of an OIDC issuer": {
        "broker.identity.oidc_issuer:KEEP",
        "broker.identity.oidc_issuer:MAX_KEYS",
        "broker.identity.oidc_issuer:MAX_DOCUMENT",
        "broker.identity.oidc_issuer:REFETCH",
        "broker.identity.oidc_issuer:RETRY",
        "broker.identity.oidc_issuer:FETCH_TIMEOUT_S",
    },
    "evidence, and statements to sign, that are being read": {"attestors.provenance:WAITING"},
    "what an open ticket said, with its ETag": {
        "attestors.ticket_reads:REMEMBERED",
        "attestors.ticket_mapping:MAX_TEXT",
    },
    "tickets that are watched, and what was told of them": {
        "attestors.ticket_polls:WATCHED",
        "attestors.ticket_polls:WATCH_S",
    },
    "tickets that new requests are about": {"attestors.ticket:ASKED"},
    "tickets said to have changed, which a watcher has not taken": {"attestors.ticket_polls:GAP_S"},
    "signed deliveries of webhooks": {"broker.edges.http_hooks:DELIVERIES"},
    # policy
    "the policy in force": {"broker.decision.store:WATCH_INTERVAL_S"},
    "token buckets: requests": {"broker.callers:MAX_CALLERS"},
    # keys, proofs, credentials
    "our signing keys": {"broker.credentials.keys:KEY_LIFETIME", "broker.credentials.keys:PUBLISH_AHEAD"},
    "published public keys": {
        "broker.cli.serve:MAINTAIN_S",
        "broker.credentials.keys:LAST_CREDENTIAL",
        "broker.credentials.keyring:_PREDECESSORS",
    },
    "nonces that came back": {"broker.credentials.nonce:LIFETIME_MS", "broker.credentials.nonce:MAX_REMEMBERED"},
    "JOSE headers": {"broker.credentials.jose:_SHORT"},
    # signing
    "PKCS#11 modules": {"broker.signing.pkcs11_module:RENEW_EVERY_S"},
    "calls into a token that wait, or hang": {
        "broker.signing.module_threads:MOST_WAITING",
        "broker.signing.pkcs11:TIMEOUT_S",
    },
    "grants that are being spent": {"broker.in_time:REQUEST_TIMEOUT_S"},
    "stored answers of signatures: signature, chain, timestamp, bundle": {"broker.ledger.operations:KEEP_S"},
    "who waits for approvals": {
        "broker.edges.grpc_approvals:MAX_WAITS",
        "broker.edges.grpc_approvals:MAX_WAITS_OF_ONE",
    },
    # scope
    "changes, by number": {"broker.scope.changes:KEPT_S", "broker.scope.changes:MAX_KEPT"},
    "what is refused for good": {
        "broker.scope.scope:GRACE_S",
        "broker.scope.scope:LONGEST_S",
        "broker.ledger.operations:KEEP_S",
    },
    "what is suspended, and released": {"broker.scope.case:Bounds.blind_s"},
    "refusals that the store has not taken yet": {"broker.scope.refusing:AGAIN_S"},
    "facts looked at for one credential, for others of its caller; those that were settled and not told yet": {
        "broker.scope.case:RELEASE_S"
    },
    "who cannot see what it watches": {"broker.scope.case:Bounds.blind_s"},
    "the last changes, for guards that come back": {"broker.scope.feed:KEPT", "broker.scope.feed:_FRESH"},
    "who listens": {
        "broker.edges.grpc_scope:MAX_WATCHERS",
        "broker.edges.grpc_scope:MAX_WATCHERS_OF_ONE",
        "broker.edges.grpc_scope:MAX_IDLE_WATCHERS",
        "broker.edges.grpc_scope:MAX_IDLE_WATCHERS_OF_ONE",
        "broker.edges.grpc_scope:PATIENCE_S",
    },
    "standing denials, break-glass permits": {"broker.operator_revocation:MAX_STANDING"},
    # the ledger
    "outside checkpoint": {"broker.ledger.group:Limits.maintain_s"},
    "operations that wait": {
        "broker.ledger.group:Limits.queue",
        "broker.ledger.group:Limits.wait_s",
        "broker.ledger.group:Limits.later_s",
    },
    "counted refusals": {"broker.ledger.group:Limits.counts_s"},
    "live credentials, redemptions, first keys of assertions": {"broker.ledger.operations:KEEP_S"},
    "requests that wait, approvals, what used them up": {
        "broker.ledger.operations:KEEP_S",
        "broker.ledger.recovery:_READ_BACK_RECORDS",
    },
    "SQLite's pages": {"broker.ledger.schema:WAL_PAGES"},
    # in callers
    "nonces not used yet": {"broker.client.nonces:MAX_HELD", "broker.client.nonces:USABLE_S"},
    "channels of an earlier SVID": {"broker.client.routes:GRACE_S"},
    "a connection on which nothing comes": {"broker.client.link:SILENCE_MS"},
    "a stream of the scope feed": {"broker.client.scope:STREAM_S"},
    "requests on a stream": {"broker.client.stream:MAX_IN_FLIGHT"},
    # in receiving services
    "what the broker's feed told: refused, suspended, the issuer's keys": {
        "broker.guard.scope_state:MAX_SILENCE",
        "broker.guard.scope_state:MAX_REFUSED",
    },
    "without the feed: the issuer's keys": {
        "broker.guard.keys:MAX_AGE",
        "broker.guard.keys:REFRESH_AFTER",
        "broker.guard.keys:MAX_KEY_SET",
        "broker.guard.keys:MAX_KEYS",
        "broker.guard.keys:RETRY_AFTER",
    },
    "tokens that count once": {"broker.guard.once:CAPACITY", "broker.guard.once:PER_PRINCIPAL"},
    # in a command; in the embedded trust domain
    "registration entries": {"broker.dev.entries:MAX_ENTRIES"},
    "SVIDs it made": {"broker.dev.domain:_TOKENS"},
}


def rows() -> Iterator[tuple[str, str]]:
    """What is bounded, and the whole row."""
    for line in PAGE.partition("## Shown by")[0].splitlines():
        if line.startswith("| "):
            yield line.removeprefix("| ").partition(" | ")[0], line


def numbers(row: str) -> set[float]:
    """All of them, in seconds and bytes."""
    return {float(number.replace(",", "")) * UNITS[unit] for number, unit in NUMBER.findall(row)}


def test_numbers_are_read_with_their_units() -> None:
    assert numbers("4,096; 24 h, 50 ms or 0.25 s; 64 KiB of 256 MiB, 1,000,000") == {
        4096,
        24 * 3600,
        0.05,
        0.25,
        64 * 1024,
        256 * 1024**2,
        1_000_000,
    }


@pytest.mark.parametrize("what", BOUNDS)
def test_a_bound_that_is_said_is_the_one_in_the_code(what: str) -> None:
    row = dict(rows())[what]
    said = numbers(row)
    assert {name: value_of(name) for name in BOUNDS[what] if value_of(name) not in said} == {}


PURE: dict[str, tuple[str, Any, int]] = {
    "PEM certificates as DER": ("PEM certificates as DER", grpc_peer._ders, 1024),
    "JOSE headers": ("JOSE headers", jose._repeated_header, 1024),
    "P-256 points": ("P-256 points, key thumbprints", jose._point, 4096),
    "key thumbprints": ("P-256 points, key thumbprints", jose.thumbprint, 4096),
    "entities of workloads": ("Cedar entities of a principal, of a resource", question._workload, 4096),
    "entities of people": ("Cedar entities of a principal, of a resource", question._person, 4096),
    "entities of resources": ("Cedar entities of a principal, of a resource", question._resource, 4096),
    "URIs in normal form": ("URIs in normal form, and their ancestors", action._checked_uri, 4096),
    "ancestors of URIs": ("URIs in normal form, and their ancestors", action.ancestors, 4096),
    "SPIFFE IDs of callers": ("SPIFFE IDs of callers, parsed", again._principal, 4096),
}


@pytest.mark.parametrize("what", PURE)
def test_what_is_pure_is_kept_in_bounded_memory(what: str) -> None:
    row, function, bound = PURE[what]
    assert function.cache_info().maxsize == bound
    assert bound in numbers(dict(rows())[row])
    assert "pure" in dict(rows())[row]


def test_connections_to_others_idle_for_15_s_as_the_library_says() -> None:
    """No connector of ours says otherwise; see the modules that the page names."""
    source = inspect.getsource(aiohttp.TCPConnector.__mro__[1].__init__)
    assert "keepalive_timeout = 15.0" in source
    named = [line for name, line in rows() if name.startswith("connections to ")]
    assert len(named) == 2
    for line in named:
        assert 15 in numbers(line)
        for file in re.findall(r"`((?:broker|attestors)/\S+\.py)`", line):
            assert "keepalive_timeout" not in (Path(__file__).parents[2] / file).read_text(encoding="utf-8")


def test_sqlite_keeps_so_many_pages(tmp_path: Path) -> None:
    connection = schema.open_writable(tmp_path / "ledger.sqlite")
    try:
        kib = -connection.pragma("cache_size")
        assert kib * 1024 in numbers(dict(rows())["SQLite's pages"])
        assert connection.pragma("wal_autocheckpoint") in numbers(dict(rows())["SQLite's pages"])
    finally:
        connection.close()


def test_a_command_keeps_nothing_of_the_one_before_it(tmp_path: Path) -> None:
    said = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.cedar").write_text("no policy")
        said.append(CliRunner().invoke(main, ["policy", "validate", str(folder)]).output)
    assert "first.cedar" in said[0]
    assert "second.cedar" in said[1]
    assert "first" not in said[1]
