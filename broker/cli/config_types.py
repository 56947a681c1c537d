"""What values in the configuration look like: each is checked where it is read, and says what it should have been."""

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from broker.action import check_uri
from broker.errors import Invalid
from broker.identity.person import check_issuer
from broker.identity.spiffe_id import SpiffeId, TrustDomain


def _oidc_issuer(text: str) -> str:
    try:
        return check_issuer(text)
    except Invalid as error:
        raise ValueError(error.detail) from error


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
        raise ValueError("it is an http or https URL without user name")
    return text


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("paths are absolute: a service has no folder of its own to start from")
    return path


def _issuer(text: str) -> str:
    try:
        check_uri(text, "issuer")
    except Invalid as error:
        raise ValueError(error.detail) from error
    parts = urlsplit(text)
    if parts.scheme != "https" or parts.path or parts.query:
        raise ValueError("the issuer is https://HOST or https://HOST:PORT, without a path (RFC 8414 section 2)")
    return text


def _trust_domain(text: str) -> str:
    try:
        return TrustDomain.parse(text).name
    except Invalid as error:
        raise ValueError(error.detail) from error


def _spiffe_id(text: str) -> str:
    try:
        return str(SpiffeId.parse(text))
    except Invalid as error:
        raise ValueError(error.detail) from error


def _listen(text: str) -> str:
    if (
        not re.fullmatch(r"(?:[0-9.]+|\[[0-9a-fA-F:]+\]|[a-z0-9.-]+):[0-9]{1,5}", text)
        or int(text.rpartition(":")[2]) > 65535
    ):
        raise ValueError("an address to listen on is HOST:PORT, for example 0.0.0.0:8443")
    return text


def _socket(text: str) -> str:
    if not re.fullmatch(r"unix:(//)?/[^\0]+", text):
        raise ValueError("a socket is unix:///path/to/socket")
    return text


def _target(text: str) -> str:
    if not re.fullmatch(r"unix:(//)?/[^\0]+|tcp://[^/\0]+:[0-9]{1,5}", text):
        raise ValueError("a Broker API socket is unix:///path or tcp://host:port")
    return text


def _none_where_empty(value: Any) -> Any:
    """TOML and environments have no null, and these keys have defaults."""
    return None if value == "" else value


OrNone = BeforeValidator(_none_where_empty)
Issuer = Annotated[str, AfterValidator(_issuer)]
Listen = Annotated[str, AfterValidator(_listen)]
Socket = Annotated[str, AfterValidator(_socket)]
Target = Annotated[str, AfterValidator(_target)]
Id = Annotated[str, AfterValidator(_spiffe_id)]
TrustDomainName = Annotated[str, AfterValidator(_trust_domain)]
OidcIssuerUrl = Annotated[str, AfterValidator(_oidc_issuer)]
HttpUrl = Annotated[str, AfterValidator(_http_url)]
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class Table(BaseModel):
    """A table of the file: unknown keys are mistakes, and it never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
