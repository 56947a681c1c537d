"""The configuration of `action-broker guard`: one TOML file, everything in it checked before anything starts.

All mistakes come in one report. There is no key that switches a check off.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from broker.action import check_uri
from broker.cli.config import ConfigError
from broker.cli.config_types import Id, Issuer, Listen, OrNone, Socket, Table
from broker.errors import Invalid
from broker.guard.declared import Rules

DEFAULT_FILE: Final = Path("/etc/action-broker/guard.toml")
_LOOPBACK: Final = re.compile(r"(?:127\.[0-9.]+|\[::1\]|localhost):[0-9]{1,5}")


def _audience(text: str) -> str:
    try:
        return check_uri(text, "audience")
    except Invalid as error:
        raise ValueError(error.detail) from error


def _authority(text: str) -> str:
    try:
        check_uri(f"https://{text}", "an authority")
    except Invalid as error:
        raise ValueError(error.detail) from error
    if "/" in text or "?" in text:
        raise ValueError("an authority is a host, or host:port")
    return text


def _some(authorities: tuple[str, ...]) -> tuple[str, ...]:
    if not authorities:
        raise ValueError("name the authorities under which clients call the service")
    return authorities


def _near(text: str) -> str:
    if re.fullmatch(r"unix:(//)?/[^\0]+", text) or (
        _LOOPBACK.fullmatch(text) and int(text.rpartition(":")[2]) <= 65535
    ):
        return text
    raise ValueError(
        "Envoy is asked to be near: unix:///path/to/socket, or 127.0.0.1:PORT, since what it tells is plain"
    )


def _broker(text: str) -> str:
    if re.fullmatch(r"unix:(//)?/[^\0]+|(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}", text):
        return text
    raise ValueError("the broker is at unix:///path/to/socket or HOST:PORT")


def path_of(address: str) -> str | None:
    """The path of a Unix socket; None for HOST:PORT."""
    return f"/{address.removeprefix('unix:').lstrip('/')}" if address.startswith("unix:") else None


class BrokerTable(Table):
    """Where the broker is: at `unix:///path`, or at `HOST:PORT` with its SPIFFE ID and our own Workload API.

    spiffe_id, server_uids: with the socket alone: which identity to ask as, where SPIRE gives this process more than
    one; and the users that the broker may run as (none: root, or ours).
    """

    target: Annotated[str, AfterValidator(_broker)] = "unix:///run/action-broker/broker.sock"
    id: Id | None = None
    workload_api: Socket | None = None
    spiffe_id: Id | None = None
    server_uids: tuple[Annotated[int, Field(ge=0)], ...] = ()

    @model_validator(mode="after")
    def _knows_whom_it_asks(self) -> Self:
        if self.socket is not None and (self.id is not None or self.workload_api is not None):
            raise ValueError("id and workload_api are for a broker at HOST:PORT; behind a socket server_uids says who")
        if self.socket is None and (self.id is None or self.workload_api is None):
            raise ValueError(
                "a broker at HOST:PORT needs id, its SPIFFE ID, and workload_api, where our SVID comes from"
            )
        if self.socket is None and (self.spiffe_id is not None or self.server_uids):
            raise ValueError("spiffe_id and server_uids are for a broker behind a socket")
        return self

    @property
    def socket(self) -> str | None:
        """The path of its Unix socket, where that is how it is reached."""
        return path_of(self.target)


class GuardConfig(Rules):
    """The whole configuration, valid and frozen."""

    issuer: Issuer
    audience: Annotated[str, AfterValidator(_audience)]
    authorities: Annotated[tuple[Annotated[str, AfterValidator(_authority)], ...], AfterValidator(_some)]
    listen: Annotated[str, AfterValidator(_near)] = "unix:///run/action-broker/guard.sock"
    socket_mode: str = Field(default="0660", pattern=r"^0[0-7]{3}$")
    operations_listen: Annotated[Listen | None, OrNone] = "127.0.0.1:9465"
    broker: BrokerTable = BrokerTable()


def load(file: Path | None) -> GuardConfig:
    """The configuration from `file`, or /etc/action-broker/guard.toml. Raises: ConfigError with every mistake."""
    chosen = file or DEFAULT_FILE
    try:
        return GuardConfig(**tomllib.loads(chosen.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(f"{chosen} is not there: deploy/envoy/guard.toml is one to begin with") from error
    except ValidationError as error:
        found = [f"  {'.'.join(map(str, item['loc'])) or '(all)'}: {item['msg']}" for item in error.errors()]
        count = "1 mistake" if len(found) == 1 else f"{len(found)} mistakes"
        raise ConfigError("\n".join([f"{count} in {chosen}:", *found])) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{chosen}: {error}") from error
