"""What a permit obliges the broker to, and which signers it gives.

`@max_ttl("90s")`, `@single_use`, `@reuse("ttl")`; `@key("release nightly")`, `@agent_key`.

Read from Cedar annotations when a policy is loaded. Cedar itself takes any annotation, so a misspelt obligation would
be silently none at all: every name that is not known is refused.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from broker.artifacts import AGENT_KEY, KEYLESS, NAMED_KEY

Use = Literal["once", "single", "ttl"]

DEFAULT_TTL = timedelta(seconds=60)
LONGEST_TTL = timedelta(seconds=300)  # invariant 3: no credential lives longer, whatever a policy says

KEYLESS_ALONE: Final = frozenset({KEYLESS})
_SIGNERS = frozenset({"key", "agent_key"})
_OBLIGATIONS = frozenset({"max_ttl", "single_use", "reuse"}) | _SIGNERS
_DOCUMENTATION = frozenset({"id", "doc", "description", "owner"})
_KNOWN = sorted(_OBLIGATIONS | _DOCUMENTATION)
_DURATION = re.compile(r"([1-9][0-9]{0,3})([sm])")
_KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # what broker/artifacts.py takes after "key:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Obligations:
    """How long and how often a credential under this permit counts, and by which signers it lets a signature happen.

    signers: "keyless", "agent-key", "key:<name>". A permit that says nothing gives "keyless"; one with @key exactly the
    keys that it names; one with @agent_key "agent-key" and, because that bounds more, "keyless".
    """

    max_ttl: timedelta = DEFAULT_TTL
    use: Use = "once"
    signers: frozenset[str] = KEYLESS_ALONE

    def gives(self, signer: str | None) -> bool:
        """Whether it gives what is asked for; None where that is no signature."""
        return signer is None or signer in self.signers


def combine(permits: Iterable[Obligations]) -> Obligations:
    """Of all permits that gave the decision: the shortest life, single use if one wants it, reuse only if all do.

    A permit that says nothing says the default, so that adding a narrower permit never widens another. Signers are no
    bound but an authority: what one of them gives is given.
    """
    permits = tuple(permits)
    uses = {permit.use for permit in permits}
    use: Use = "single" if "single" in uses else "ttl" if uses == {"ttl"} else "once"
    return Obligations(
        max_ttl=min((permit.max_ttl for permit in permits), default=DEFAULT_TTL),
        use=use,
        signers=frozenset[str]().union(*(permit.signers for permit in permits)) or KEYLESS_ALONE,
    )


def read_obligations(effect: str, annotations: Mapping[str, str | None]) -> tuple[Obligations, list[tuple[str, str]]]:
    """The obligations, and each mistake as (problem, fix) beside the ones that could be read."""
    problems = list(_mistakes(effect, annotations))
    if problems:
        return Obligations(), problems
    use: Use = "single" if "single_use" in annotations else "ttl" if "reuse" in annotations else "once"
    max_ttl = parse_ttl(annotations["max_ttl"]) if "max_ttl" in annotations else None
    return Obligations(max_ttl=max_ttl or DEFAULT_TTL, use=use, signers=_signers(annotations)), []


def names_signers(annotations: Mapping[str, str | None]) -> bool:
    """Whether it says by which signers it lets a signature happen."""
    return not _SIGNERS.isdisjoint(annotations)


def parse_ttl(text: str | None) -> timedelta | None:
    """`"90s"` or `"5m"`, from 1 s to 300 s; None when it is not one."""
    found = _DURATION.fullmatch(text or "")
    ttl = timedelta(seconds=int(found[1]) * (60 if found[2] == "m" else 1)) if found else None
    return ttl if ttl and ttl <= LONGEST_TTL else None


def unknown_annotations(annotations: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Each annotation that means nothing here, as (problem, fix)."""
    for name in annotations:
        if name in _KNOWN:
            continue
        near = difflib.get_close_matches(name.lower(), _KNOWN, n=1, cutoff=0.6)
        fix = f"Did you mean @{near[0]}?" if near else f"Use one of @{', @'.join(_KNOWN)}, or a comment."
        yield f"@{name} means nothing here", fix


def _signers(annotations: Mapping[str, str | None]) -> frozenset[str]:
    if not names_signers(annotations):
        return KEYLESS_ALONE
    named = frozenset(f"{NAMED_KEY}{name}" for name in (annotations.get("key") or "").split())
    return named | {AGENT_KEY, KEYLESS} if "agent_key" in annotations else named


def _mistakes(effect: str, annotations: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    given = _OBLIGATIONS & annotations.keys()
    if effect != "permit" and given:
        yield f"@{min(given)} on a forbid obliges nobody", "Put it on the permits, or remove it."
    if "max_ttl" in given and not parse_ttl(annotations["max_ttl"]):
        yield "@max_ttl is not a time from 1 s to 300 s", 'Write seconds or minutes, such as @max_ttl("90s").'
    for name in ("single_use", "agent_key"):
        if annotations.get(name):
            yield f"@{name} takes no value", f"Write @{name} alone."
    if "reuse" in given and annotations["reuse"] != "ttl":
        yield '@reuse takes "ttl" alone', 'Write @reuse("ttl"), or leave it out for once in each guard.'
    if {"single_use", "reuse"} <= given:
        yield "@single_use and @reuse contradict each other", "Keep the one that is meant."
    if "key" in given and not _are_key_names(annotations["key"]):
        fix = 'Write @key("release"), or @key("release nightly") for two: a-z 0-9 . _ -, at most 64 characters each.'
        yield "@key does not name keys, each once, with one space between", fix


def _are_key_names(text: str | None) -> bool:
    names = (text or "").split(" ")
    return all(map(_KEY_NAME.fullmatch, names)) and len(set(names)) == len(names)
