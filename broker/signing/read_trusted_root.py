"""Whom a verifier believes: certificate authorities and timestamp authorities, each with the time in which it counts.

Source: https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_trustroot.proto, in protobuf's JSON form,
as `action-broker ca trusted-root` and `cosign trusted-root create` write it. Transparency logs in it are passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509

from attestors.dsse import EnvelopeError, decode_base64, parse_document
from attestors.rfc3161 import TimestampRoot
from broker.errors import Invalid

MEDIA_TYPES: Final = frozenset(
    {
        "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
        "application/vnd.dev.sigstore.trustedroot.v0.2+json",
    }
)
MAX_AUTHORITIES: Final = 64  # of each kind: one is added with each change of a key
MAX_CHAIN: Final = 6

_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)
_END: Final = datetime.max.replace(tzinfo=UTC)
_UNREADABLE = (ValueError, x509.InvalidVersion, x509.DuplicateExtension)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateAuthority:
    """One CA. chain: the issuing one first, the root last, which may be the same. valid_*: when it counts, included."""

    chain: tuple[x509.Certificate, ...]
    valid_from: datetime
    valid_until: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedRoot:
    """All that are believed."""

    certificate_authorities: tuple[CertificateAuthority, ...]
    timestamp_authorities: tuple[TimestampRoot, ...]


def read_trusted_root(raw: bytes) -> TrustedRoot:
    """From its JSON text, of at most 512 KiB.

    Raises: Invalid. Not checked: who says so; who can change the file decides what verifies.
    """
    try:
        document = parse_document(raw, "the trusted root")
        if document.get("mediaType") not in MEDIA_TYPES:
            raise Invalid(f"the trusted root's mediaType is none of {', '.join(sorted(MEDIA_TYPES))}")
        return TrustedRoot(
            certificate_authorities=tuple(map(_authority, _listed(document, "certificateAuthorities"))),
            timestamp_authorities=tuple(map(_timestamp_root, _listed(document, "timestampAuthorities"))),
        )
    except EnvelopeError as error:
        raise Invalid(str(error)) from error
    except _UNREADABLE as error:
        raise Invalid(f"the trusted root cannot be read: {error}") from error


def _listed(document: Mapping[str, Any], name: str) -> list[Any]:
    found = document.get(name, [])
    if not isinstance(found, list) or len(found) > MAX_AUTHORITIES:
        raise Invalid(f"the trusted root's {name} are not a list of at most {MAX_AUTHORITIES}")
    return found


def _authority(found: Any) -> CertificateAuthority:
    valid_from, valid_until = _valid_for(found)
    return CertificateAuthority(chain=_chain(found), valid_from=valid_from, valid_until=valid_until)


def _timestamp_root(found: Any) -> TimestampRoot:
    valid_from, valid_until = _valid_for(found)
    return TimestampRoot(chain=_chain(found), valid_from=valid_from, valid_until=valid_until)


def _chain(found: Any) -> tuple[x509.Certificate, ...]:
    listed = _member(_member(found, "certChain"), "certificates", list)
    if not 1 <= len(listed) <= MAX_CHAIN:
        raise Invalid(f"a chain of the trusted root does not have 1 to {MAX_CHAIN} certificates")
    ders = (decode_base64(_member(one, "rawBytes", str), "a certificate of the trusted root") for one in listed)
    return tuple(map(x509.load_der_x509_certificate, ders))


def _valid_for(found: Any) -> tuple[datetime, datetime]:
    """An absent start or end is open (sigstore_common.proto, TimeRange)."""
    range_ = _member(found, "validFor") if isinstance(found, dict) and "validFor" in found else {}
    return _time(range_.get("start"), _BEGINNING), _time(range_.get("end"), _END)


def _time(text: Any, absent: datetime) -> datetime:
    if text is None:
        return absent
    at = datetime.fromisoformat(text) if isinstance(text, str) else None
    if at is None or at.tzinfo is None:
        raise Invalid("a time of the trusted root is not RFC 3339 with an offset")
    return at


def _member(found: Any, name: str, kind: type = dict) -> Any:
    value = found.get(name) if isinstance(found, dict) else None
    if not isinstance(value, kind):
        raise Invalid(f"the trusted root's {name} is missing or of another type")
    return value
