"""What signing needs of a broker process, from its configuration: keys, CA, timestamps, provenance, approvals."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from attestors.approval import ApprovalAttestor
from attestors.contract import Attestor
from attestors.provenance import ProvenanceAttestor
from attestors.provenance_config import CurrentTrust
from attestors.provenance_signers import SignerChecks
from attestors.provenance_trust import SigstoreCheck
from attestors.rfc3161 import read_chain
from attestors.sigstore_identity import SigstoreVerifier
from broker.acts import Means
from broker.approval_records import RecordedApprovals
from broker.approval_text import Texts
from broker.approvals import Approvals
from broker.cli.config import Config
from broker.cli.config_signing import PUBLIC_SIGSTORE
from broker.cli.config_signing import OidcIssuer as OidcIssuerTable
from broker.cli.config_signing import Signing as SigningTable
from broker.cli.config_signing import Timestamp as TimestampTable
from broker.cli.current import CaKeys, CurrentAuthority, CurrentSigstore
from broker.cli.file_watch import FileWatch
from broker.cli.trust_file import read_trust_file
from broker.decision.store import PolicyStore
from broker.errors import BrokerError
from broker.exchange import Exchange
from broker.identity.id_token import IdTokens
from broker.identity.oidc_issuer import IssuerSettings, OidcIssuer
from broker.identity.svid_check import SvidCheck
from broker.identity.workload_api import WorkloadApi
from broker.ledger.store import Ledger
from broker.signing.file_key import FileSigner
from broker.signing.named_key import NamedKey, require_one_kind
from broker.signing.pkcs11 import Token
from broker.signing.signer import Signer
from broker.signing.timestamp import TimestampAuthority


class SetupError(Exception):
    """What the configuration leads to cannot be used; the text lists each mistake with its key, and what to do."""


@dataclass(slots=True)
class Watches:
    """What is looked at again while we serve."""

    files: list[FileWatch] = field(default_factory=list)

    async def watch(self) -> None:
        """Run it as a task."""
        async with asyncio.TaskGroup() as group:
            for one in self.files:
                group.create_task(one.watch())

    def reload(self) -> None:
        """Takes all of them again, now. Blocks."""
        for one in self.files:
            one.reload()


def signing_attestors(
    config: Config, ledger: Ledger, policies: PolicyStore, workload_api: WorkloadApi, watches: Watches
) -> dict[str, Attestor]:
    """`approval` always; `provenance` where somebody's is trusted. Raises: SetupError."""
    attestors: dict[str, Attestor] = {"approval": ApprovalAttestor(RecordedApprovals(ledger, policies))}
    file = config.provenance.trust_file
    if file is None:
        return attestors
    with Mistakes() as mistakes:
        with mistakes.of("provenance.trust_file"):
            trust = CurrentTrust(lambda: read_trust_file(file).load())
        with mistakes.of("provenance.sigstore_trusted_root"):
            sigstore = _sigstore(config.provenance.sigstore_trusted_root, watches)
    watches.files.append(FileWatch("provenance trust", lambda: _trust_files(file), trust.reload))
    checks = SignerChecks(x509_svid=SvidCheck(workload_api.snapshot), sigstore=sigstore)
    attestors["provenance"] = ProvenanceAttestor(trust, checks)
    return attestors


def _trust_files(file: Path) -> tuple[Path, ...]:
    try:
        return (file, *read_trust_file(file).files)
    except ValueError:
        return (file,)


def _sigstore(root: str | None, watches: Watches) -> SigstoreCheck | None:
    """Raises: ValueError."""
    if root is None:
        return None
    if root == PUBLIC_SIGSTORE:
        return SigstoreVerifier(None)
    file = Path(root)
    current = CurrentSigstore(file)
    watches.files.append(FileWatch("Sigstore trusted root", lambda: (file,), current.reload))
    return current


class Mistakes:
    """Collects what is wrong, so that it is told at once."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._found:
            raise SetupError("\n".join(self._found))

    @contextlib.contextmanager
    def of(self, key: str) -> Iterator[None]:
        """What the block raises is a mistake of this key."""
        try:
            yield
        except BrokerError as error:
            self._found.append(f"  {key}: {error.detail}")
        except (ValueError, OSError) as error:
            self._found.append(f"  {key}: {error}")


async def open_means(
    stack: contextlib.AsyncExitStack, config: Config, clock: Callable[[], datetime], watches: Watches
) -> Means:
    """Keys, CA and timestamp authority. Raises: SetupError with all that cannot be used."""
    table = config.signing
    tokens: dict[str, Token] = {}
    keys: dict[str, NamedKey] = {}
    authority: CurrentAuthority | None = None
    timestamps: TimestampAuthority | None = None
    with Mistakes() as mistakes:
        for name, token in table.tokens.items():
            with mistakes.of(f"signing.tokens.{name}"):
                tokens[name] = stack.enter_context(Token(token.module, token.label, token.pin_file, token.sessions))
        for name, key in table.keys.items():
            if key.token is None or key.token in tokens:
                with mistakes.of(f"signing.keys.{name}"):
                    keys[name] = await asyncio.to_thread(_key, name, table, tokens)
        with mistakes.of("signing.keys"):
            require_one_kind(keys.values())
        if table.ca_folder is not None:
            with mistakes.of("signing.ca_folder"):
                authority = CurrentAuthority(table.ca_folder, config.issuer, CaKeys(stack), clock)
                await asyncio.to_thread(authority.reload)
                watches.files.append(FileWatch("signing CA", authority.files, authority.reload))
        with mistakes.of("signing.timestamp"):
            timestamps = await _timestamps(stack, table.timestamp, watches)
    return Means(
        issuer=config.issuer,
        authority=None if authority is None else authority.get,
        keys=keys,
        timestamps=timestamps,
        certificate_ttl=table.certificate_ttl,
        node=table.node,
    )


async def _timestamps(
    stack: contextlib.AsyncExitStack, table: TimestampTable, watches: Watches
) -> TimestampAuthority | None:
    """Raises: ValueError, OSError."""
    if table.url is None or table.chain_file is None:
        return None
    chain_file = table.chain_file
    ca_file = None if table.ca_file is None else str(table.ca_file)
    found = await stack.enter_async_context(
        TimestampAuthority(table.url, (read_chain(chain_file.read_bytes()),), table.timeout_ms / 1000, ca_file=ca_file)
    )

    def reload() -> None:
        found.roots = (read_chain(chain_file.read_bytes()),)

    watches.files.append(FileWatch("timestamp authority", lambda: (chain_file,), reload))
    return found


def _key(name: str, table: SigningTable, tokens: dict[str, Token]) -> NamedKey:
    key = table.keys[name]
    signer: Signer
    if key.file is not None:
        signer = FileSigner.load(key.file, name)
    else:
        signer = tokens[str(key.token)].signer(str(key.label), name)
    return NamedKey.of(signer, key.signs)


def open_approvals(config: Config, exchange: Exchange) -> Approvals:
    """The desk for approvals, which the exchange then uses. Raises: SetupError."""
    folder, texts = config.approval.templates_folder, Texts()
    issuers: dict[str, OidcIssuer] = {}
    with Mistakes() as mistakes:
        if folder is not None:
            with mistakes.of("approval.templates_folder"):
                texts = Texts.load(folder)
        for issuer, one in config.approval.issuers.items():
            with mistakes.of(f"approval.issuers.{issuer}"):
                issuers[issuer] = OidcIssuer(issuer_settings(issuer, one))
    people = IdTokens(issuers) if issuers else None
    approvals = Approvals(exchange, texts, people, remembered=config.approval.remembered)
    exchange.desk = approvals
    return approvals


def issuer_settings(issuer: str, table: OidcIssuerTable) -> IssuerSettings:
    """Raises: Invalid."""
    return IssuerSettings(
        issuer=issuer,
        audience=table.audience,
        max_auth_age=timedelta(seconds=table.max_auth_age_s),
        ca_file=None if table.ca_file is None else str(table.ca_file),
        groups_claim=table.groups_claim,
    )
