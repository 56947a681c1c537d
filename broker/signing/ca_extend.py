"""Adds CAs to the folder: the first root and issuing CA, and later the next ones."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker.signing.authority import SignerOf
from broker.signing.ca_folder import CaEntry, CaError, CaFolder, KeyInFile, KeyInToken, NewCa
from broker.signing.ca_make import ISSUING_LIFETIME, ROOT_LIFETIME, make_issuing, make_root
from broker.signing.file_key import FileSigner
from broker.signing.signer import Signer

_CURVES = {"root": ec.SECP384R1(), "issuing": ec.SECP256R1()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be added: always an issuing CA, and a root above it where `root`.

    *_key: a key that is in a token already; None makes one in a file. use_from: when the issuing CA begins to sign.
    organization: stands in the names of new CAs.
    """

    organization: str
    use_from: datetime
    root: bool = False
    root_key: KeyInToken | None = None
    issuing_key: KeyInToken | None = None
    root_lifetime: timedelta = ROOT_LIFETIME
    issuing_lifetime: timedelta = ISSUING_LIFETIME


def organization_of(folder: CaFolder) -> str:
    """As in the newest root's name. Raises: CaError for a folder without a root."""
    names = folder.certificates[_newest_root(folder).name].subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(names[0].value) if names else ""


async def extend(folder: CaFolder, plan: Plan, signer_of: SignerOf, now: datetime) -> CaFolder:
    """Makes keys and certificates, then commits all of them to the folder.

    Raises: CaError; UnusableKey or Unavailable for a key that cannot be used, such as an offline root's.
    """
    new: list[NewCa] = []
    if plan.root:
        name = folder.next_name("root")
        signer, place, pem = _key("root", name, plan.root_key, signer_of)
        root = await make_root(signer, name, plan.organization, now, plan.root_lifetime)
        entry = CaEntry(name=name, parent=name, key=place, use_from=int(now.timestamp()))
        new.append(NewCa(entry=entry, certificate=root, key_pem=pem))
    else:
        entry = _newest_root(folder)
        root, signer = folder.certificates[entry.name], signer_of(folder.resolve(entry.key), entry.name)
    name = folder.next_name("issuing")
    key, place, pem = _key("issuing", name, plan.issuing_key, signer_of)
    made = await make_issuing(key, name, plan.organization, root, signer, now, plan.issuing_lifetime)
    issuing = CaEntry(name=name, parent=entry.name, key=place, use_from=int(plan.use_from.timestamp()))
    new.append(NewCa(entry=issuing, certificate=made, key_pem=pem))
    _require_new_keys(folder, [one.certificate for one in new])
    return folder.add(new)


def _newest_root(folder: CaFolder) -> CaEntry:
    if not folder.roots:
        raise CaError(f"{folder.path} has no root: make one with `action-broker ca init`")
    return folder.roots[-1]


def _key(
    kind: Literal["root", "issuing"], name: str, place: KeyInToken | None, signer_of: SignerOf
) -> tuple[Signer, KeyInFile | KeyInToken, bytes | None]:
    if place is not None:
        return signer_of(place, name), place, None
    private = ec.generate_private_key(_CURVES[kind])
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return FileSigner.from_key(private, name), KeyInFile(file=f"{name}.key.pem"), pem


def _require_new_keys(folder: CaFolder, made: list[x509.Certificate]) -> None:
    """A new CA with an old key would be the old one by another name: nothing would have been rotated."""
    keys = [one.public_key() for one in (*folder.certificates.values(), *made)]
    if any(key in keys[:place] for place, key in enumerate(keys)):
        raise CaError("this key is another CA's here: make a new key in the token, with a label of its own")
