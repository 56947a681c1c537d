"""`doctor` on what signs: the CA, named keys, the timestamp authority."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from attestors.rfc3161 import TimestampRoot, read_chain
from broker.cli.config import Config
from broker.cli.config_signing import Signing as SigningTable
from broker.cli.config_signing import Timestamp
from broker.cli.current import CaKeys
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.errors import Unavailable
from broker.signing.authority import Authority
from broker.signing.ca_folder import CaEntry, CaError, CaFolder, KeyInFile
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey, require_one_kind
from broker.signing.pkcs11 import Pkcs11Signer, Token
from broker.signing.signer import Signer, UnusableKey
from broker.signing.timestamp import TimestampAuthority

SOON: Final = timedelta(days=30)  # enough to hand a new trusted root out in
_PROBE: Final = b"action-broker doctor: is there a timestamp authority?"
_TRIED: Final = "It was logged in to once: a token locks itself after a few wrong PINs."


async def signing(config: Config, now: datetime) -> AsyncIterator[Finding]:
    """What signs. Nothing to say where nothing is configured."""
    table = config.signing
    if table.ca_folder is not None:
        for finding in await asyncio.to_thread(lambda: list(_ca(config, now))):
            yield finding
    with contextlib.ExitStack() as stack:
        for finding in await asyncio.to_thread(lambda: list(_keys(table, stack))):
            yield finding
    if table.timestamp.url is not None:
        async for finding in _timestamps(table.timestamp, now):
            yield finding
    elif table.ca_folder is not None:
        yield warning(
            "timestamp authority",
            "none: a bundle stops verifying when its certificate ends, after minutes",
            "Set signing.timestamp.url and chain_file, unless bundles are verified at once and never again.",
        )


# -- the CA ----------------------------------------------------------------------------------------------------------


def _ca(config: Config, now: datetime) -> Iterator[Finding]:
    what, folder = "signing CA", config.signing.ca_folder
    if folder is None:
        return
    try:
        found = CaFolder.open(folder)
        if found.issuer != config.issuer:
            yield broken(
                what,
                f"{folder} was made for the issuer {found.issuer}, and we are {config.issuer}",
                f"action-broker ca init NEW-FOLDER --issuer {config.issuer}, or mend issuer.",
            )
        if folder.stat().st_mode & 0o077:
            yield broken(what, f"{folder} is open to others", f"chmod 700 {folder}")
        entry = found.current(now)
        with contextlib.ExitStack() as stack:
            Authority.open(folder, CaKeys(stack), now)
    except CaError as error:
        yield broken(what, str(error), f"action-broker ca show {folder} says what is there.")
        return
    except UnusableKey as error:
        yield broken(what, str(error), "The broker does not start before this is mended.")
        return
    except (Unavailable, ValueError, OSError) as error:
        yield broken(what, _why(error), f"Is the token there, and its module? {_TRIED}")
        return
    yield from _lifetimes(found, entry, now)


def _lifetimes(found: CaFolder, entry: CaEntry, now: datetime) -> Iterator[Finding]:
    what = "signing CA"
    newest = found.issuing[-1]
    ends = min(one.not_valid_after_utc for one in found.chain(newest))
    where = "in a file" if isinstance(entry.key, KeyInFile) else "in a token"
    detail = f"{entry.name} signs, its key {where}; {newest.name} ends {ends:%Y-%m-%d}, in {(ends - now).days} days"
    if ends - now < SOON:
        yield warning(what, detail, f"action-broker ca rotate {found.path}, and give verifiers the new trusted root.")
    else:
        yield ok(what, detail)
    for root in found.roots:
        place = found.resolve(root.key)
        if isinstance(place, KeyInFile) and Path(place.file).exists():
            yield warning(
                what,
                f"the key of {root.name} is here: {place.file}",
                "Take it away, and bring it back for `ca rotate` alone: who has it makes CAs that everybody trusts.",
            )


# -- named keys ------------------------------------------------------------------------------------------------------


def _keys(table: SigningTable, stack: contextlib.ExitStack) -> Iterator[Finding]:
    tokens: dict[str, Token] = {}
    named: list[NamedKey] = []
    for name, token in table.tokens.items():
        try:
            tokens[name] = stack.enter_context(Token(token.module, token.label, token.pin_file, token.sessions))
        except (UnusableKey, Unavailable) as error:
            yield broken(f"PKCS#11 token {name}", _why(error), f"Is {token.module} the library of the token's maker?")
    for name, key in table.keys.items():
        what = f"signing key {name}"
        try:
            signer: Signer
            if key.file is not None:
                signer = FileSigner.load(key.file, name)
            elif key.token in tokens:
                signer = tokens[str(key.token)].signer(str(key.label), name)
            else:
                continue
            named.append(NamedKey.of(signer, key.signs))
            require_one_kind(named)
            yield from _named(what, signer)
        except ValueError as error:
            yield broken(what, str(error), "The broker does not start before this is mended.")
        except Unavailable as error:
            yield broken(what, error.detail, f"Is the token there, and its PIN right? {_TRIED}")


def _named(what: str, signer: Signer) -> Iterator[Finding]:
    if isinstance(signer, FileSigner):
        yield warning(
            what,
            f"{signer.algorithm}, in a file: who can read it signs without the broker",
            "Good for development. Else put it into a PKCS#11 token: token and label instead of file.",
        )
        return
    warnings = signer.warnings if isinstance(signer, Pkcs11Signer) else ()
    for one in warnings:
        yield warning(what, one, "Make a key in the token that never was outside, and never can be.")
    if not warnings:
        yield ok(what, f"{signer.algorithm}, in its token")


# -- timestamps ------------------------------------------------------------------------------------------------------


async def _timestamps(table: Timestamp, now: datetime) -> AsyncIterator[Finding]:
    what, fix = "timestamp authority", "Set signing.timestamp.chain_file: PEM, the authority's own certificate first."
    if table.url is None or table.chain_file is None:
        return
    try:
        root = read_chain(table.chain_file.read_bytes())
        ca_file = None if table.ca_file is None else str(table.ca_file)
        authority = TimestampAuthority(table.url, (root,), table.timeout_ms / 1000, ca_file=ca_file)
    except (ValueError, OSError) as error:
        yield broken(what, f"{table.chain_file}: {error}", fix)
        return
    try:
        async with authority:
            await authority.stamp(_PROBE)
    except Unavailable as error:
        yield broken(what, error.detail, f"Is {table.url} reachable, and is the chain its own? {fix}")
        return
    ends, name = _first_end(root)
    detail = f"{table.url} answers, and its answer verifies; {name} ends {ends:%Y-%m-%d}, in {(ends - now).days} days"
    if ends - now < SOON:
        yield warning(what, detail, "Put its new chain there, too, and into the trusted root, before that.")
    else:
        yield ok(what, detail)


def _first_end(root: TimestampRoot) -> tuple[datetime, str]:
    first: x509.Certificate = min(root.chain, key=lambda one: one.not_valid_after_utc)
    return first.not_valid_after_utc, first.subject.rfc4514_string()


def _why(error: Exception) -> str:
    return error.detail if isinstance(error, Unavailable) else str(error)
