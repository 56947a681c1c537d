"""The tables of signing: `[signing]`, `[provenance]` and `[approval]`. All of them may be left out."""

from datetime import timedelta
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from broker.cli.config_types import AbsolutePath, HttpUrl, OidcIssuerUrl, OrNone, Table
from broker.signing.named_key import Signs

PUBLIC_SIGSTORE: Final = "public"
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]


def _root_or_public(found: str | None) -> str | None:
    if found is not None and found != PUBLIC_SIGSTORE and not found.startswith("/"):
        raise ValueError(f'it is the absolute path of a TrustedRoot in JSON, or "{PUBLIC_SIGSTORE}"')
    return found


class Timestamp(Table):
    """The RFC 3161 authority that says when a signature was made; url = "" for none.

    chain_file: PEM, the authority's certificate and those above it. ca_file: PEM, who vouches for its https server.
    """

    url: Annotated[HttpUrl | None, OrNone] = None
    chain_file: AbsolutePath | None = None
    ca_file: AbsolutePath | None = None
    timeout_ms: int = Field(default=5000, ge=100, le=9000)

    @model_validator(mode="after")
    def _believed(self) -> Self:
        if self.url is not None and self.chain_file is None:
            raise ValueError("a timestamp authority is believed by its certificates: set chain_file")
        return self


class Token(Table):
    """A PKCS#11 token. module: the library of its maker. pin_file: read at each login, for our user alone."""

    module: AbsolutePath
    label: str = Field(min_length=1, max_length=32)
    pin_file: AbsolutePath
    sessions: int = Field(default=4, ge=1, le=64)


class Key(Table):
    """A named key: in a token, by its label there; or, for development, in a PEM file.

    signs: artifacts or statements, never both; where it is left out artifacts, and statements by Ed25519.
    """

    token: str | None = None
    label: str | None = None
    file: AbsolutePath | None = None
    signs: Signs | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> Self:
        if (self.file is None) == (self.token is None) or (self.token is None) != (self.label is None):
            raise ValueError("a key is in a token (token and label) or in a file")
        return self


class Signing(Table):
    """What signs. ca_folder: of `action-broker ca init`; "" for no certificates. node: our machine's name in them."""

    ca_folder: Annotated[AbsolutePath | None, OrNone] = None
    certificate_ttl_s: int = Field(default=120, ge=10, le=300)
    node: str = Field(default="", max_length=253, pattern=r"^[A-Za-z0-9.-]*$")
    timestamp: Timestamp = Timestamp()
    tokens: dict[Name, Token] = Field(default_factory=dict)
    keys: dict[Name, Key] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _tokens_are_there(self) -> Self:
        for name, key in self.keys.items():
            if key.token is not None and key.token not in self.tokens:
                raise ValueError(f"keys.{name}: there is no token {key.token} under [signing.tokens]")
        return self

    @property
    def certificate_ttl(self) -> timedelta:
        """As a duration."""
        return timedelta(seconds=self.certificate_ttl_s)


class Provenance(Table):
    """trust_file: TOML, whose provenance is believed (trust_file.py); read again when it changes.

    sigstore_trusted_root: for builders with a Sigstore identity: a TrustedRoot in JSON, or "public" for that of the
    public instance as the library has it; "" for none.
    """

    trust_file: Annotated[AbsolutePath | None, OrNone] = None
    sigstore_trusted_root: Annotated[str | None, OrNone, AfterValidator(_root_or_public)] = None


class OidcIssuer(Table):
    """Who says which people there are. audience: our client id there. groups_claim: "" where it tells none."""

    audience: str = Field(min_length=1, max_length=512)
    max_auth_age_s: int = Field(default=300, ge=1, le=3600)
    ca_file: AbsolutePath | None = None
    groups_claim: str = "groups"


class Approval(Table):
    """templates_folder: `<action>.txt`, what approvers are shown; "" for the text that suits all actions.

    remembered_s: how long a request waits for approvals unless it is asked again.
    """

    templates_folder: Annotated[AbsolutePath | None, OrNone] = None
    remembered_s: int = Field(default=3600, ge=60, le=86400)
    issuers: dict[OidcIssuerUrl, OidcIssuer] = Field(default_factory=dict)

    @property
    def remembered(self) -> timedelta:
        """As a duration."""
        return timedelta(seconds=self.remembered_s)
