"""The issuing CA in use: its key signs what `to_be_signed` has linted, and nothing else."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from broker.signing.assemble import sign_certificate
from broker.signing.ca_folder import CaError, CaFolder, KeyPlace
from broker.signing.profile import Issuing, ToBeSigned
from broker.signing.signer import Signer, spki_of

SignerOf = Callable[[KeyPlace, str], Signer]
"""Gives the key at a place, under a name; `KeyInFile.file` is absolute. Raises: UnusableKey, Unavailable."""


class Authority:
    """One issuing CA with its key. It stays the same: after `ca rotate`, open the folder again.

    issuing: what certificates are built for. chain: DER, the issuing CA and its root. name: in `ca show`.
    """

    def __init__(self, name: str, chain: tuple[bytes, ...], issuing: Issuing, signer: Signer) -> None:
        """Raises: CaError when the key is not the certificate's."""
        if spki_of(signer.public_key) != issuing.spki:
            raise CaError(f"the key of {name} is not the one in its certificate: bring back the right key")
        self.name = name
        self.chain = chain
        self.issuing = issuing
        self._signer = signer

    @classmethod
    def open(cls, folder: Path, signer_of: SignerOf, now: datetime) -> "Authority":
        """The newest CA of the folder that may sign now.

        Raises: CaError; NotInProfile for an issuing CA of another make; what `signer_of` raises.
        """
        found = CaFolder.open(folder)
        entry = found.current(now)
        certificates = found.chain(entry)
        return cls(
            entry.name,
            tuple(one.public_bytes(Encoding.DER) for one in certificates),
            Issuing.of(certificates[0]),
            signer_of(found.resolve(entry.key), entry.name),
        )

    async def issue(self, tbs: ToBeSigned) -> bytes:
        """The certificate (DER). Call it only after the intent is durable. It uses `tbs` up, whatever comes of it.

        Raises: ValueError when it was used before, or is for another CA. Unavailable when the key cannot be reached, or
        when what it gave does not verify over exactly these bytes.
        """
        if tbs.issuing_sha256 != self.issuing.sha256:
            raise ValueError("this certificate was built for another CA: build it again")
        return await sign_certificate(tbs.spend(), self._signer)
