"""`ca init|rotate|show|trusted-root`: the folder of the CA that certifies signing keys, without a running broker."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click
from cryptography.hazmat.primitives import hashes
from rich.markup import escape

from broker.cli.output import UNAVAILABLE, USAGE, Output, pass_output
from broker.errors import Unavailable
from broker.signing.ca_extend import Plan, extend, organization_of
from broker.signing.ca_folder import CaEntry, CaError, CaFolder, KeyInFile, KeyInToken, KeyPlace
from broker.signing.ca_key import signer_at
from broker.signing.signer import UnusableKey
from broker.signing.trusted_root import read_tsa_chain, to_json, trusted_root

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
_MAX_CHAIN = 64 * 1024  # bytes of PEM
_DAYS = click.IntRange(1, 36500)

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _key_options(command: _Command) -> _Command:
    """Where the keys are, and how long the certificates live."""
    for option in (
        click.option("--issuing-days", type=_DAYS, default=365, show_default=True, help="Life of the issuing CA."),
        click.option("--root-days", type=_DAYS, default=3650, show_default=True, help="Life of a root made now."),
        click.option("--root-label", help="Of a root made now: its key in the token; else in a file."),
        click.option("--label", help="The issuing CA's key in the token, ECDSA P-256 or P-384; else in a file."),
        click.option("--pin-file", type=click.Path(path_type=Path, dir_okay=False), help="Holds the token's PIN."),
        click.option("--token", help="The token's label."),
        click.option("--module", type=click.Path(path_type=Path, dir_okay=False), help="The PKCS#11 library."),
    ):
        command = option(command)
    return command


@click.group()
def ca() -> None:
    """Make and look after the CA of signing certificates.

    It certifies one key for each signature, for minutes. The broker needs the issuing CA's key alone: take the root's
    key away, and bring it back to rotate.
    """


@ca.command()
@FOLDER
@click.option("--issuer", required=True, help="The broker's issuer (https URL), as in its configuration.")
@click.option("--organization", help="Stands in the CAs' names. Default: the issuer's host.")
@_key_options
@pass_output
def init(
    output: Output,
    folder: Path,
    issuer: str,
    organization: str | None,
    module: Path | None,
    token: str | None,
    pin_file: Path | None,
    label: str | None,
    root_label: str | None,
    root_days: int,
    issuing_days: int,
) -> None:
    """Make a root (P-384) and an issuing CA (P-256) in a new FOLDER.

    With --module, --token and --pin-file their keys are in a PKCS#11 token: make them there first, and name them with
    --label and --root-label.
    """
    host = urlsplit(issuer).hostname if issuer.startswith("https://") and issuer.isprintable() else None
    if host is None:
        output.fail("--issuer is no https URL", USAGE)
    now = datetime.now(UTC)
    plan = Plan(
        organization=_organization(output, organization or host),
        use_from=now,
        root=True,
        root_key=_in_token(output, None, module, token, pin_file, root_label),
        issuing_key=_in_token(output, None, module, token, pin_file, label),
        root_lifetime=timedelta(days=root_days),
        issuing_lifetime=timedelta(days=issuing_days),
    )
    if (module or token or pin_file) and not (label or root_label):
        output.fail("which key of the token? Name it with --label, a root's with --root-label", USAGE)
    made = _extend(output, lambda: CaFolder.create(folder, issuer), plan, now)
    _tell(output, made, made.authorities, now)
    output.say("next: set ca_folder under \\[signing] in the broker's configuration, and hand out to verifiers:")
    output.say(f"action-broker ca trusted-root {escape(str(folder))}")


@ca.command()
@FOLDER
@click.option("--root", is_flag=True, help="Make a new root, too.")
@click.option(
    "--sign-in-hours",
    type=click.FloatRange(0, 8760),
    default=24.0,
    show_default=True,
    help="When the new CA begins to sign: until then verifiers can be given the new trusted root.",
)
@_key_options
@pass_output
def rotate(
    output: Output,
    folder: Path,
    root: bool,  # noqa: FBT001 - click's
    sign_in_hours: float,
    module: Path | None,
    token: str | None,
    pin_file: Path | None,
    label: str | None,
    root_label: str | None,
    root_days: int,
    issuing_days: int,
) -> None:
    """Make the next issuing CA, in good time; the old one stays in the trusted root until it ends.

    The broker signs with it after --sign-in-hours, without being reloaded.
    """
    now = datetime.now(UTC)
    found = _open(output, folder)
    if root_label and not root:
        output.fail("--root-label is of a new root: add --root", USAGE)
    before = found.issuing[-1].key if found.issuing else None
    root_before = found.roots[-1].key if found.roots else None
    plan = Plan(
        organization=_guarded(output, lambda: organization_of(found)),
        use_from=now + timedelta(hours=sign_in_hours),
        root=root,
        root_key=_in_token(output, root_before, module, token, pin_file, root_label),
        issuing_key=_in_token(output, before, module, token, pin_file, label),
        root_lifetime=timedelta(days=root_days),
        issuing_lifetime=timedelta(days=issuing_days),
    )
    if isinstance(before, KeyInToken) and plan.issuing_key is None:
        output.fail("the issuing CA's key is in a token: make a new key there, and name it with --label", USAGE)
    made = _extend(output, lambda: found, plan, now)
    new = made.authorities[len(found.authorities) :]
    _tell(output, made, new, now)
    output.say(f"hand out before it signs: action-broker ca trusted-root {escape(str(folder))}")


@ca.command()
@FOLDER
@pass_output
def show(output: Output, folder: Path) -> None:
    """Show every CA: which one signs, until when, and where its key is."""
    found = _open(output, folder)
    _tell(output, found, found.authorities, datetime.now(UTC))


@ca.command("trusted-root")
@FOLDER
@click.option(
    "--tsa-chain",
    "tsa_chains",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="PEM, a timestamp authority's own certificate first, its root last. May be repeated.",
)
@click.option("--with-ended", is_flag=True, help="Also CAs that have ended, for signatures with a timestamp.")
@pass_output
def trusted_root_command(output: Output, folder: Path, tsa_chains: tuple[Path, ...], *, with_ended: bool) -> None:
    """Print Sigstore's TrustedRoot (JSON), by which cosign and `action-broker verify` verify our bundles."""
    found = _open(output, folder)
    chains = [_guarded(output, lambda file=file: read_tsa_chain(_read(file))) for file in tsa_chains]  # type: ignore[misc]
    click.echo(to_json(trusted_root(found, chains, datetime.now(UTC), with_ended=with_ended)), nl=False)


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(_MAX_CHAIN)


_Result = TypeVar("_Result")


def _guarded(output: Output, work: Callable[[], _Result]) -> _Result:
    try:
        return work()
    except (CaError, UnusableKey) as error:
        output.fail(str(error), USAGE)
    except Unavailable as error:
        output.fail(f"the key cannot be reached: {error.detail}", UNAVAILABLE)
    except OSError as error:
        output.fail(f"{error.filename}: {error.strerror}", USAGE)


def _open(output: Output, folder: Path) -> CaFolder:
    return _guarded(output, lambda: CaFolder.open(folder))


def _extend(output: Output, folder: Callable[[], CaFolder], plan: Plan, now: datetime) -> CaFolder:
    return _guarded(output, lambda: asyncio.run(extend(folder(), plan, signer_at, now)))


def _organization(output: Output, text: str) -> str:
    if not text.isprintable() or not 1 <= len(text) <= 64:
        output.fail("--organization is 1 to 64 characters that can be shown (RFC 5280, ub-organization-name)", USAGE)
    return text


def _in_token(
    output: Output,
    before: KeyPlace | None,
    module: Path | None,
    token: str | None,
    pin_file: Path | None,
    label: str | None,
) -> KeyInToken | None:
    """The key of this label; what is not given is as before. None without a label."""
    if label is None:
        return None
    known = before if isinstance(before, KeyInToken) else None
    place = [
        str(module.absolute()) if module else known.module if known else None,
        token or (known.token if known else None),
        str(pin_file.absolute()) if pin_file else known.pin_file if known else None,
    ]
    if not all(place):
        output.fail("a key in a token needs --module, --token and --pin-file", USAGE)
    return KeyInToken(module=place[0] or "", token=place[1] or "", pin_file=place[2] or "", label=label)


def _tell(output: Output, folder: CaFolder, entries: Sequence[CaEntry], now: datetime) -> None:
    rows = [_row(folder, entry, now) for entry in entries]
    output.value(rows)
    shown: list[tuple[str, ...]] = [
        (row["name"], row["state"], row["signs_from"][:10], row["ends"][:10], escape(row["key"]), row["sha256"][:16])
        for row in rows
    ]
    output.table(("name", "state", "signs from", "ends", "key", "SHA-256"), shown)


def _row(folder: CaFolder, entry: CaEntry, now: datetime) -> dict[str, str]:
    certificate = folder.certificates[entry.name]
    key = entry.key
    return {
        "name": entry.name,
        "root": entry.parent,
        "state": _state(folder, entry, now),
        "signs_from": datetime.fromtimestamp(entry.use_from, UTC).isoformat(),
        "ends": certificate.not_valid_after_utc.isoformat(),
        "key": f"file {key.file}" if isinstance(key, KeyInFile) else f"token {key.token}, {key.label}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _state(folder: CaFolder, entry: CaEntry, now: datetime) -> str:
    if now >= folder.certificates[entry.name].not_valid_after_utc:
        return "ended"
    if entry.is_root:
        return "root"
    try:
        current = folder.issuing.index(folder.current(now))
    except CaError:
        current = -1
    place = folder.issuing.index(entry)
    return "signs" if place == current else "next" if place > current else "replaced"
