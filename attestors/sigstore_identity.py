"""Provenance signed by a Sigstore identity: a CI job or a person, by a certificate of Fulcio logged in Rekor.

The verification is sigstore-python's (extra `sigstore`), offline, against a trusted root from a file or against the
public instance's, which comes with the library: certificate chain and SCT, identity, signature, log entry with its
inclusion proof and checkpoint. Imported only where it is wanted.
"""

import threading
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from attestors.provenance_trust import SigstoreIdentity, SigstoreSigned

if TYPE_CHECKING:
    from sigstore.verify import Verifier

_PUBLIC_INSTANCE: Final = "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"


class SigstoreVerifier:
    """Verifies bundles of one Sigstore instance. It is a `SigstoreCheck`.

    trusted_root: a TrustedRoot in JSON; None for that of the public instance as it was when the library was packaged.

    Raises: ValueError where the extra is not installed, or the trusted root cannot be used.
    """

    def __init__(self, trusted_root: Path | None) -> None:
        self._verifier = _verifier(trusted_root)
        self._lock = threading.Lock()  # the library does not say that a verifier may be used by two threads

    def __call__(self, bundle: bytes, identities: tuple[SigstoreIdentity, ...]) -> SigstoreSigned:
        """Which of the identities signed what. Raises: ValueError where none of them did."""
        from sigstore.errors import Error  # noqa: PLC0415 - an extra
        from sigstore.models import Bundle  # noqa: PLC0415
        from sigstore.verify.policy import Identity  # noqa: PLC0415

        try:
            found = Bundle.from_json(bundle)
            certificate = found.signing_certificate
            for one in identities:
                policy = Identity(identity=one.identity, issuer=one.issuer)
                try:
                    policy.verify(certificate)
                except Error:
                    continue
                with self._lock:
                    payload_type, payload = self._verifier.verify_dsse(found, policy)
                return SigstoreSigned(
                    identity=one,
                    payload=payload,
                    payload_type=payload_type,
                    not_before=certificate.not_valid_before_utc,
                    spki=certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                )
        except Exception as error:  # whatever a hostile bundle makes it raise is a no
            raise ValueError(f"{type(error).__name__}: {error}"[:512]) from error
        raise ValueError("its certificate names none of them")


def _verifier(trusted_root: Path | None) -> "Verifier":
    try:
        from sigstore.errors import Error  # noqa: PLC0415
        from sigstore.models import TrustedRoot  # noqa: PLC0415
        from sigstore.verify import Verifier  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("Sigstore identities need the extra: install action-broker[sigstore]") from error
    packaged = resources.files("sigstore") / "_store" / _PUBLIC_INSTANCE / "trusted_root.json"
    try:
        with resources.as_file(packaged) as path:
            return Verifier(trusted_root=TrustedRoot.from_file(str(trusted_root or path)))
    except (Error, ValueError, OSError) as error:
        raise ValueError(
            f"the trusted root {trusted_root or 'of the public instance'} cannot be used: {error}"
        ) from error
