"""From what an operator configures to whom is trusted: files are read here, and all mistakes are told at once."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

from attestors.provenance_trust import BuilderTrust, ProvenanceTrust, SigstoreIdentity
from attestors.rfc3161 import TimestampRoot, read_chain
from attestors.signature_keys import SigningKey, read_key

MAX_BUILDERS: Final = 64
MAX_KEYS: Final = 64
"""In all: each is tried with each signature that a caller sends."""
MAX_AGE: Final = timedelta(days=365)

_BUILDER = re.compile(r"[a-z][a-z0-9+.-]*:[\x21-\x7e]{1,2000}")  # a TypeURI of in-toto: a URI, compared as it stands
_KEY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(?:/[A-Za-z0-9._-]+)+")  # SPIFFE-ID.md section 2


class TrustError(ValueError):
    """The configuration of provenance cannot be used. problems: each one a sentence, beginning with where it is."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderConfig:
    """As configured. keys: name → file with a public key in PEM. The rest: as in `BuilderTrust`."""

    keys: Mapping[str, Path] = field(default_factory=dict)
    spiffe_ids: Sequence[str] = ()
    sigstore: Sequence[SigstoreIdentity] = ()
    threshold: int = 1


class CurrentTrust:
    """Whom we trust now: what the last `reload` that succeeded gave. It is what `ProvenanceAttestor` asks.

    load: makes it from the configuration as it then is. Raises: TrustError where that cannot be used at the start.
    """

    def __init__(self, load: Callable[[], ProvenanceTrust]) -> None:
        self._load = load
        self._current = load()

    def __call__(self) -> ProvenanceTrust:
        """Whom we trust now."""
        return self._current

    def reload(self) -> None:
        """Takes the configuration anew. Raises: TrustError; then nothing changed."""
        self._current = self._load()


def load_trust(
    builders: Mapping[str, BuilderConfig], *, max_age: timedelta, timestamp_chains: Sequence[Path] = ()
) -> ProvenanceTrust:
    """Reads the files. builders: by builder id. timestamp_chains: PEM files, as `attestors.rfc3161.read_chain` wants.

    Raises: TrustError with every mistake.
    """
    problems: list[str] = []
    if not timedelta(0) < max_age <= MAX_AGE:
        problems.append(f"max_age: it is above zero and at most {MAX_AGE.days} days")
    if len(builders) > MAX_BUILDERS:
        problems.append(f"builders: at most {MAX_BUILDERS} are trusted")
    if sum(len(one.keys) for one in builders.values()) > MAX_KEYS:
        problems.append(f"builders: they have at most {MAX_KEYS} keys in all")
    trusted = {name: _builder(name, config, problems) for name, config in builders.items()}
    roots = [_root(path, problems) for path in timestamp_chains]
    if problems:
        raise TrustError(problems)
    return ProvenanceTrust(
        builders={name: one for name, one in trusted.items() if one is not None},
        max_age=max_age,
        timestamp_roots=tuple(one for one in roots if one is not None),
    )


def _builder(name: str, config: BuilderConfig, problems: list[str]) -> BuilderTrust | None:
    found = [f"builder {name[:256]}: {problem}" for problem in _misnamed(name, config)]
    keys: dict[str, SigningKey] = {}
    for key_name, path in config.keys.items():
        try:
            keys[key_name] = read_key(path.read_bytes())
        except (OSError, ValueError) as error:
            found.append(f"builder {name[:256]}: key {key_name} in {path}: {_why(error)}")
    problems += found
    if found:
        return None
    try:
        return BuilderTrust(
            keys=keys,
            spiffe_ids=frozenset(config.spiffe_ids),
            sigstore=frozenset(config.sigstore),
            threshold=config.threshold,
        )
    except ValueError as error:
        problems.append(f"builder {name[:256]}: {error}")
        return None


def _misnamed(name: str, config: BuilderConfig) -> list[str]:
    found = [] if _BUILDER.fullmatch(name) else ["its id is not a URI, as runDetails.builder.id has it"]
    found += [f"key name {one!r} is not a word of lower-case letters, digits, . _ and -" for one in _bad_keys(config)]
    found += [f"{one!r} is not the SPIFFE ID of a workload" for one in config.spiffe_ids if not _is_workload(one)]
    found += ["a Sigstore identity needs issuer and identity" for one in config.sigstore if not _is_whole(one)]
    return found


def _bad_keys(config: BuilderConfig) -> list[str]:
    return [name for name in config.keys if not _KEY_NAME.fullmatch(name)]


def _is_workload(text: str) -> bool:
    return bool(_SPIFFE_ID.fullmatch(text)) and not {".", ".."} & set(text.split("/"))


def _is_whole(one: SigstoreIdentity) -> bool:
    return bool(one.issuer and one.identity)


def _root(path: Path, problems: list[str]) -> TimestampRoot | None:
    try:
        return read_chain(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"timestamp chain {path}: {_why(error)}")
        return None


def _why(error: Exception) -> str:
    return (error.strerror or "cannot be read") if isinstance(error, OSError) else str(error)
