"""`[provenance] trust_file`: whose provenance is believed, in a file of its own that may change while we run.

max_age_s = 86400
timestamp_chains = ["/etc/action-broker/tsa.pem"]

[builders."https://ci.acme.test/builder/v1"]
keys = { release = "/etc/action-broker/builder.pub" }
spiffe_ids = ["spiffe://acme.test/ci/builder"]
sigstore = [{ issuer = "https://…", identity = "https://…" }]
threshold = 1
"""

import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from pydantic import Field, ValidationError

from attestors.provenance_config import BuilderConfig, TrustError, load_trust
from attestors.provenance_trust import ProvenanceTrust, SigstoreIdentity
from broker.cli.config_types import AbsolutePath, Table


class _Sigstore(Table):
    issuer: str
    identity: str


class _Builder(Table):
    keys: dict[str, AbsolutePath] = Field(default_factory=dict)
    spiffe_ids: tuple[str, ...] = ()
    sigstore: tuple[_Sigstore, ...] = ()
    threshold: int = Field(default=1, ge=1)


class TrustFile(Table):
    """What the file says."""

    max_age_s: int = Field(ge=1, le=365 * 86400)
    timestamp_chains: tuple[AbsolutePath, ...] = ()
    builders: dict[str, _Builder] = Field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """What it leads to."""
        keys = [path for builder in self.builders.values() for path in builder.keys.values()]
        return (*keys, *self.timestamp_chains)

    def load(self) -> ProvenanceTrust:
        """Raises: TrustError with every mistake."""
        return load_trust(
            {name: _config(builder) for name, builder in self.builders.items()},
            max_age=timedelta(seconds=self.max_age_s),
            timestamp_chains=self.timestamp_chains,
        )


def read_trust_file(path: Path) -> TrustFile:
    """Raises: TrustError with every mistake."""
    try:
        return TrustFile(**tomllib.loads(path.read_text()))
    except ValidationError as error:
        problems = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise TrustError(problems) from error
    except (OSError, ValueError) as error:
        raise TrustError([f"{path}: {error}"]) from error


def _config(builder: _Builder) -> BuilderConfig:
    keys: Mapping[str, Path] = builder.keys
    sigstore = tuple(SigstoreIdentity(issuer=one.issuer, identity=one.identity) for one in builder.sigstore)
    return BuilderConfig(keys=keys, spiffe_ids=builder.spiffe_ids, sigstore=sigstore, threshold=builder.threshold)
