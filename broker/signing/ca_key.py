"""Where a CA's key is, as a signer."""

from pathlib import Path

from broker.signing.ca_folder import KeyInFile, KeyPlace
from broker.signing.file_key import FileSigner
from broker.signing.signer import Signer


def signer_at(place: KeyPlace, name: str) -> Signer:
    """The key at a place, for an `Authority`.

    Resources: for a key in a token, the token's threads, as long as the process lives. Raises: UnusableKey; Unavailable
    where the token cannot be reached.
    """
    if isinstance(place, KeyInFile):
        return FileSigner.load(Path(place.file), name)
    from broker.signing.pkcs11 import Token  # noqa: PLC0415 - loads a C library that most brokers have no use for

    return Token(Path(place.module), place.token, Path(place.pin_file)).signer(place.label, name)
