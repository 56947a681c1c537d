"""What of signing is taken anew while we serve: the CA that signs now, and whose Sigstore identities are believed."""

import contextlib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from attestors.provenance_trust import SigstoreIdentity, SigstoreSigned
from attestors.sigstore_identity import SigstoreVerifier
from broker.signing.authority import Authority
from broker.signing.ca_folder import INDEX, CaError, CaFolder, KeyInFile, KeyPlace
from broker.signing.file_key import FileSigner
from broker.signing.pkcs11 import Token
from broker.signing.signer import Signer


class CaKeys:
    """The CA's keys: their tokens are opened once, and closed with the broker."""

    def __init__(self, stack: contextlib.AsyncExitStack | contextlib.ExitStack) -> None:
        self._stack = stack
        self._tokens: dict[tuple[str, str, str], Token] = {}

    def __call__(self, place: KeyPlace, name: str) -> Signer:
        """See broker.signing.authority.SignerOf."""
        if isinstance(place, KeyInFile):
            return FileSigner.load(Path(place.file), name)
        which = (place.module, place.token, place.pin_file)
        token = self._tokens.get(which)
        if token is None:
            token = Token(Path(place.module), place.token, Path(place.pin_file))
            self._stack.callback(token.close)
            self._tokens[which] = token
        return token.signer(place.label, name)


class CurrentAuthority:
    """The CA that signs now. `reload` takes the folder again, after `ca rotate` and when a new CA's time has come."""

    def __init__(self, folder: Path, issuer: str, signer_of: CaKeys, clock: Callable[[], datetime]) -> None:
        self._folder, self._issuer, self._signer_of, self._clock = folder, issuer, signer_of, clock
        self._read: CaFolder | None = None
        self._current: Authority | None = None

    def get(self) -> Authority:
        """It. `reload` came first."""
        if self._current is None:
            raise RuntimeError("reload() before get()")
        return self._current

    def files(self) -> tuple[Path, ...]:
        """What to watch: the index, and the certificate of the CA that should sign now, which changes by the clock."""
        index = self._folder / INDEX
        if self._read is None:
            return (index,)
        try:
            return index, self._folder / f"{self._read.current(self._clock()).name}.pem"
        except CaError:
            return (index,)

    def reload(self) -> None:
        """Blocks. Raises: CaError, UnusableKey, Unavailable; then nothing changed but what `files` names."""
        self._read = CaFolder.open(self._folder)
        if self._read.issuer != self._issuer:
            raise CaError(
                f"{self._folder} was made for {self._read.issuer}: make one with `ca init --issuer {self._issuer}`"
            )
        self._current = Authority.open(self._folder, self._signer_of, self._clock())


class CurrentSigstore:
    """The verifier of a Sigstore instance whose trusted root is in a file. Raises: ValueError."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._current = SigstoreVerifier(file)

    def __call__(self, bundle: bytes, identities: tuple[SigstoreIdentity, ...]) -> SigstoreSigned:
        """See SigstoreVerifier."""
        return self._current(bundle, identities)

    def reload(self) -> None:
        """Blocks. Raises: ValueError; then nothing changed."""
        self._current = SigstoreVerifier(self._file)
