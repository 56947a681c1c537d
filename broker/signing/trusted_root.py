"""Sigstore's TrustedRoot (JSON): by which CAs and timestamp authorities bundles of ours are verified.

Source: https://github.com/sigstore/protobuf-specs/blob/main/protos/sigstore_trustroot.proto
"""

import base64
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.signing.ca_folder import CaError, CaFolder

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.trustedroot+json;version=0.1"
_LONGEST_CHAIN: Final = 6  # what readers take

_NO_CHAIN: Final = (
    "the timestamp authority's chain is not a few certificates in PEM, its own first, its root last, each signed by "
    "the next: fetch it again, and put it in this order"
)

Chain = tuple[x509.Certificate, ...]


def trusted_root(
    folder: CaFolder, tsa_chains: Sequence[Chain], now: datetime, *, with_ended: bool = False
) -> dict[str, Any]:
    """The document. Every issuing CA is in it, old ones too, and the next one before it signs.

    tsa_chains: from `read_tsa_chain`. with_ended: also CAs that have ended, for signatures with a timestamp of their
    time. No transparency logs are named: none is asked.
    """
    chains = [folder.chain(entry) for entry in folder.issuing]
    return {
        "mediaType": MEDIA_TYPE,
        "tlogs": [],
        "certificateAuthorities": [
            _authority(chain, folder.issuer) for chain in chains if with_ended or now < _valid_for(chain)[1]
        ],
        "ctlogs": [],
        "timestampAuthorities": [_authority(chain, "") for chain in tsa_chains],
    }


def to_json(document: dict[str, Any]) -> str:
    """For a file."""
    return json.dumps(document, indent=1) + "\n"


def read_tsa_chain(pem: bytes) -> Chain:
    """A timestamp authority's certificates: its own first where it is there, its root last, each signed by the next.

    Raises: CaError when it is not that, or its own is not for timestamping alone (RFC 3161 section 2.3).
    """
    try:
        chain = tuple(x509.load_pem_x509_certificates(pem))
        for certificate, above in zip(chain, (*chain[1:], chain[-1]), strict=True):
            certificate.verify_directly_issued_by(above)
        authorities = [_is_authority(one) for one in chain]
        stamps = authorities[0] or _stamps_time_alone(chain[0])
    except (ValueError, TypeError, InvalidSignature, x509.DuplicateExtension) as error:
        raise CaError(_NO_CHAIN) from error
    if not all(authorities[1:]) or not authorities[-1] or len(chain) > _LONGEST_CHAIN:
        raise CaError(_NO_CHAIN)
    if not stamps:
        raise CaError("the first certificate of the timestamp authority's chain is not for timestamping alone")
    return chain


def _is_authority(certificate: x509.Certificate) -> bool:
    return any(isinstance(one.value, x509.BasicConstraints) and one.value.ca for one in certificate.extensions)


def _stamps_time_alone(certificate: x509.Certificate) -> bool:
    purposes = [one for one in certificate.extensions if isinstance(one.value, x509.ExtendedKeyUsage)]
    only = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
    return [(one.critical, one.value) for one in purposes] == [(True, only)]


def _authority(chain: Chain, uri: str) -> dict[str, Any]:
    begin, end = _valid_for(chain)
    subject = chain[-1].subject
    return {
        "subject": {
            "organization": _first(subject, NameOID.ORGANIZATION_NAME),
            "commonName": _first(subject, NameOID.COMMON_NAME),
        },
        **({"uri": uri} if uri else {}),
        "certChain": {
            "certificates": [{"rawBytes": base64.b64encode(one.public_bytes(Encoding.DER)).decode()} for one in chain]
        },
        "validFor": {"start": _rfc3339(begin), "end": _rfc3339(end)},
    }


def _valid_for(chain: Chain) -> tuple[datetime, datetime]:
    """When all of it is valid."""
    return max(one.not_valid_before_utc for one in chain), min(one.not_valid_after_utc for one in chain)


def _first(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    values = name.get_attributes_for_oid(oid)
    return str(values[0].value) if values else ""


def _rfc3339(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")
