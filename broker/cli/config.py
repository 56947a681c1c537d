"""One TOML file, `ACTION_BROKER_*` environment over it, everything checked before anything starts.

`ACTION_BROKER_GRPC__LISTEN=0.0.0.0:8443` sets `listen` of `[grpc]`. All mistakes come in one report. There is no key
that switches a check off.
"""

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from broker.action import check_uri
from broker.cli.config_session import Session
from broker.cli.config_signing import Approval, Provenance, Signing
from broker.cli.config_ticket import Ticket
from broker.cli.config_types import Id, Issuer, Listen, OrNone, Socket, Table, Target, TrustDomainName
from broker.errors import Invalid

_PREFIX = "ACTION_BROKER_"
DEFAULT_FILE = Path("/etc/action-broker/broker.toml")


class ConfigError(Exception):
    """The configuration does not hold; the text lists every mistake with its key."""


class Spire(Table):
    """Where the SPIRE agent is. agent_path: the path prefix of the agent's own SPIFFE ID."""

    workload_api: Socket = "unix:///run/spire/agent/public/api.sock"
    broker_api: Target = "unix:///run/spire/agent/broker/broker.sock"
    agent_path: str = Field(default="/spire/agent/", pattern=r"^/[A-Za-z0-9._/-]+/$")


class Unix(Table):
    """The socket for processes on this node; socket = "" for none. mode: octal digits."""

    socket: Annotated[Path | None, OrNone] = Path("/run/action-broker/broker.sock")
    mode: str = Field(default="0666", pattern=r"^0[0-7]{3}$")
    max_connections: int = Field(default=1024, ge=1, le=65536)
    max_connections_per_uid: int = Field(default=128, ge=1, le=65536)


class Grpc(Table):
    """gRPC over mutual TLS; listen = "" for none."""

    listen: Annotated[Listen | None, OrNone] = "0.0.0.0:8443"
    max_concurrent_requests: int = Field(default=1024, ge=1, le=65536)
    max_connection_age_s: int = Field(default=600, ge=10, le=86400)


class Http(Table):
    """HTTPS (token endpoint, metadata, key set) and, apart from it, plain HTTP for probes and Prometheus.

    listen = "" for none; operations_listen = "" to have probes over HTTPS, too, and metrics there
    for holders of an X.509-SVID of our own trust domain.
    """

    listen: Annotated[Listen | None, OrNone] = "0.0.0.0:8444"
    operations_listen: Annotated[Listen | None, OrNone] = "127.0.0.1:9464"


class LedgerTable(Table):
    """checkpoint_file belongs on another disk or host: it is what proves that nothing was cut off the ledger."""

    file: Path | None = None
    checkpoint_file: Path | None = None
    checkpoint_key_file: Path | None = None


class Limits(Table):
    """What one caller, and one request, may use."""

    requests_per_second: float = Field(default=100, gt=0, le=100_000)
    burst: int = Field(default=512, ge=1, le=1_000_000)
    attestations_per_second_per_uid: float = Field(default=500, gt=0, le=100_000)
    attestation_burst_per_uid: int = Field(default=1000, ge=1, le=1_000_000)
    attest_timeout_ms: int = Field(default=2000, ge=10, le=10_000)
    signing_key_lifetime_s: int = Field(default=86400, ge=1800, le=86400)

    @property
    def attest_timeout(self) -> timedelta:
        """As a duration."""
        return timedelta(milliseconds=self.attest_timeout_ms)


class Config(BaseSettings):
    """The whole configuration, valid and frozen."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=_PREFIX,
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    issuer: Issuer
    trust_domain: TrustDomainName
    state_folder: Path = Path("/var/lib/action-broker")
    policy_folder: Path = Path("/etc/action-broker/policy")
    spire: Spire = Spire()
    unix: Unix = Unix()
    grpc: Grpc = Grpc()
    http: Http = Http()
    ledger: LedgerTable = LedgerTable()
    limits: Limits = Limits()
    signing: Signing = Signing()
    provenance: Provenance = Provenance()
    approval: Approval = Approval()
    ticket: Ticket = Ticket()
    session: Session = Session()
    audiences: dict[str, tuple[Id, ...]] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file; nothing else is read."""
        del settings_cls, dotenv_settings, file_secret_settings
        return (env_settings, init_settings)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for audience in self.audiences:
            try:
                check_uri(audience, "audience")
            except Invalid as error:
                raise ValueError(f"audiences: {error.detail}") from error
        if self.unix.socket is None and self.grpc.listen is None and self.http.listen is None:
            raise ValueError("nobody could ask: set unix.socket, grpc.listen or http.listen")
        return self

    @property
    def ledger_name(self) -> str:
        """The ledger's name in its checkpoints: the issuer's host and port."""
        return urlsplit(self.issuer).netloc

    @property
    def ledger_file(self) -> Path:
        """The SQLite file."""
        return self.ledger.file or self.state_folder / "ledger.sqlite"

    @property
    def checkpoint_file(self) -> Path:
        """The outside checkpoint."""
        return self.ledger.checkpoint_file or self.state_folder / "checkpoint"

    @property
    def checkpoint_key_file(self) -> Path:
        """The key that signs checkpoints."""
        return self.ledger.checkpoint_key_file or self.state_folder / "checkpoint.key"


def load(file: Path | None, overrides: dict[str, Any] | None = None) -> Config:
    """The configuration from `file` (default: /etc/action-broker/broker.toml, if it is there) and the environment.

    Raises: ConfigError listing every mistake at once.
    """
    chosen = file or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    unknown = [
        f"  {name}: no such key"
        for name in sorted(os.environ)
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).partition("__")[0].lower() not in Config.model_fields
    ]
    try:
        values = dict(TomlConfigSettingsSource(Config, chosen)()) if chosen else {}
        if chosen and not chosen.is_file():
            raise ConfigError(f"{chosen} is not there: action-broker policy init writes a folder with an example")
        loaded = Config(**{**values, **(overrides or {})})
    except ValidationError as error:
        found = [f"  {'.'.join(map(str, item['loc'])) or '(all)'}: {item['msg']}" for item in error.errors()]
        raise _mistakes(found + unknown, chosen) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{chosen}: {error}") from error
    if unknown:
        raise _mistakes(unknown, chosen)
    return loaded


def _mistakes(lines: list[str], file: Path | None) -> ConfigError:
    """Names keys and rules, never a value: it may be somebody's secret in the wrong place."""
    where = f"{file} and the environment" if file else "the environment"
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return ConfigError("\n".join([f"{count} in {where}:", *lines]))
