"""`doctor` on whom the broker believes: builders, people by their issuers; and on what approvers read."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from attestors.provenance_config import TrustError
from attestors.sigstore_identity import SigstoreVerifier
from broker.approval_text import SUFFIX, Texts
from broker.cli.config import Config
from broker.cli.config_signing import PUBLIC_SIGSTORE
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.cli.serve_signing import issuer_settings
from broker.cli.trust_file import TrustFile, read_trust_file
from broker.decision.findings import PolicyError
from broker.decision.policy import PolicyDocuments
from broker.errors import BrokerError
from broker.identity.oidc_issuer import FETCH_TIMEOUT_S, discover, get_document, parse_keys, tls_to_issuer


def provenance(config: Config) -> Iterator[Finding]:
    """Whose provenance is believed."""
    what, file = "provenance trust", config.provenance.trust_file
    if file is None:
        return
    try:
        read = read_trust_file(file)
        trust = read.load()
    except TrustError as error:
        for problem in error.problems:
            yield broken(what, problem, "The broker does not start before this is mended; a running one keeps the old.")
        return
    for path in (file, *read.files):
        if path.stat().st_mode & 0o022:
            yield broken(what, f"others can write to {path}", f"chmod go-w {path}: who writes there is every builder.")
    if trust.builders:
        yield ok(what, f"{len(trust.builders)} builders, for {read.max_age_s} s after the build")
    else:
        yield warning(what, f"{file} names no builder: all provenance is refused", "Name one under [builders].")
    yield from _sigstore(config.provenance.sigstore_trusted_root, read)


def _sigstore(root: str | None, read: TrustFile) -> Iterator[Finding]:
    what = "Sigstore trusted root"
    if root is None:
        if any(one.sigstore for one in read.builders.values()):
            yield warning(
                what,
                "builders have Sigstore identities, and nothing says whom to believe about them",
                f'Set provenance.sigstore_trusted_root: a file, or "{PUBLIC_SIGSTORE}".',
            )
        return
    try:
        SigstoreVerifier(None if root == PUBLIC_SIGSTORE else Path(root))
    except ValueError as error:
        yield broken(what, str(error), "The broker does not start before this is mended.")
    else:
        yield ok(what, root)


async def approvals(config: Config) -> AsyncIterator[Finding]:
    """What approvers read, and who says which people there are."""
    for finding in _templates(config):
        yield finding
    for issuer, table in config.approval.issuers.items():
        what = f"OIDC issuer {issuer}"
        fix = "Is it reachable from here, and is this its name in its own metadata? A private CA goes into ca_file."
        try:
            settings = issuer_settings(issuer, table)
            tls = tls_to_issuer(settings.ca_file)
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                metadata = await discover(issuer, tls)
                keys = parse_keys(await get_document(metadata.jwks_uri, tls))
        except TimeoutError:
            yield broken(what, f"no answer within {FETCH_TIMEOUT_S:g} s", fix)
        except (BrokerError, OSError) as error:
            yield broken(what, error.detail if isinstance(error, BrokerError) else str(error), fix)
        else:
            count = sum(map(len, keys.values()))
            if count:
                yield ok(what, f"answers; {count} keys; people log in for {table.audience}")
            else:
                yield broken(what, "it has no key that signs ID tokens here", "Look at its jwks_uri.")


def _templates(config: Config) -> Iterator[Finding]:
    what, folder = "approval templates", config.approval.templates_folder
    if folder is None:
        return
    try:
        Texts.load(folder)
        names = sorted(one.stem for one in folder.glob(f"*{SUFFIX}"))
    except (ValueError, OSError) as error:
        yield broken(what, f"{folder}: {error}", "The broker does not start before this is mended.")
        return
    with contextlib.suppress(PolicyError):  # told of before
        known = PolicyDocuments.load(config.policy_folder).slices
        for name in names:
            if name not in known:
                yield warning(what, f"{name}{SUFFIX} is for no action of the policies", "Name it after one of them.")
    if folder.stat().st_mode & 0o022:
        yield warning(what, f"others can write to {folder}", f"chmod go-w {folder}: it is what approvers believe.")
    yield ok(what, f"{len(names)} in {folder}")
