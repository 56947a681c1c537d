"""The table `[session]`: who may tell us, by security events, how risky agents' sessions are."""

from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from broker.cli.config_types import AbsolutePath, HttpUrl, OidcIssuerUrl, OrNone, Table
from broker.errors import Invalid
from broker.identity.spiffe_id import SpiffeId


def _https(text: str) -> str:
    if not text.startswith("https://") or "#" in text:
        raise ValueError("it is an https URL without fragment")
    return text


def _principal(text: str) -> str:
    try:
        SpiffeId.parse(text.removesuffix("/"))
    except Invalid as error:
        raise ValueError(error.detail) from error
    return text


class Transmitter(Table):
    """A transmitter of security events (OpenID Shared Signals Framework 1.0). POST <issuer>/ssf/events.

    audience: what its events call us; "" for our issuer. jwks_url, jwks_file: its public keys, at an https URL or in a
    file that is read again when it changes; without either they are where its /.well-known/ssf-configuration says.
    ca_file: PEM, who vouches for the https server that has them. bearer_file: one secret a line, the second for while
    it changes; its requests show one in `Authorization: Bearer`. principals: SPIFFE IDs, or with a slash at its end all
    below a path, whose sessions it may score; empty for everybody's. lowers: whether it may also lower a score.
    """

    audience: str = Field(default="", max_length=512)
    jwks_url: Annotated[Annotated[HttpUrl, AfterValidator(_https)] | None, OrNone] = None
    jwks_file: AbsolutePath | None = None
    ca_file: AbsolutePath | None = None
    bearer_file: AbsolutePath | None = None
    principals: tuple[Annotated[str, AfterValidator(_principal)], ...] = ()
    lowers: bool = True

    @model_validator(mode="after")
    def _keys_are_in_one_place(self) -> Self:
        if self.jwks_file is not None and (self.jwks_url or self.ca_file) is not None:
            raise ValueError("keys are in jwks_file, or fetched (jwks_url, ca_file)")
        return self


class Session(Table):
    """transmitters: by their issuers, as their events name them."""

    transmitters: dict[OidcIssuerUrl, Transmitter] = Field(default_factory=dict)
