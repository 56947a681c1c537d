"""`doctor` on what the broker keeps: policies, the ledger and its checkpoint."""

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final

import apsw

from broker.cli.config import Config
from broker.cli.doctor_finding import Finding, broken, ok, warning
from broker.decision.findings import PolicyError
from broker.decision.policy import PolicyDocuments
from broker.errors import BrokerError
from broker.ledger import reading
from broker.ledger.checkpoint import Checkpointer
from broker.ledger.verify import verify

MAX_VERIFIED: Final = 128 * 1024 * 1024  # bytes of a ledger; about a second's work


def policy(config: Config) -> Finding:
    """Whether the folder would be taken, and who it wants facts of."""
    try:
        found = PolicyDocuments.load(config.policy_folder)
    except PolicyError as error:
        return broken("policy", str(error), f"action-broker policy validate {config.policy_folder}")
    here = {"spire", "process", "approval"} | ({"provenance"} if config.provenance.trust_file else set())
    missing = found.attestors - here
    if missing:
        return broken(
            "policy",
            f"policies name attestors that are not here: {', '.join(sorted(missing))}",
            "Actions that need them are refused. Take them out of the policies.",
        )
    return ok("policy", f"{len(found.rules)} policies, revision {found.revision}")


def store(config: Config, now: datetime) -> Iterator[Finding]:
    """The state folder, the ledger in it, its room, and its checkpoint."""
    folder = config.state_folder
    if not folder.is_dir():
        yield warning("store", f"{folder} is not there yet", f"The broker makes it, if it may: mkdir -m 0700 {folder}")
        return
    if folder.stat().st_mode & 0o077:
        yield warning("store", f"{folder} is open to others", f"chmod 0700 {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        yield broken(
            "store", f"uid {os.geteuid()} may not write to {folder}", f"chown it to the broker's user: {folder}"
        )
        return
    file = config.ledger_file
    if not file.exists():
        yield ok("store", f"{file} will be made at the first start")
        return
    try:
        last = reading.last_seq(file)
        rows = list(reading.read(file, after=last - 1))
        at = rows[-1].record().at if rows else now
    except (BrokerError, apsw.Error, ValueError, OSError) as error:
        yield broken(
            "store", f"{file} cannot be read: {error}", "action-broker ledger verify says what is wrong with it."
        )
        return
    if at > now + timedelta(seconds=5):
        yield broken(
            "clock", f"the ledger's last record is of {at:%F %T} UTC, in our future", "Run NTP: the clock stepped back."
        )
    space = os.statvfs(folder)
    free = space.f_bavail * space.f_frsize
    if free < 256 * 1024 * 1024:
        yield warning(
            "store", f"{free // 2**20} MiB free in {folder}", "Make room: when the disk is full nothing is minted."
        )
    yield from _chain(config, last)
    if config.checkpoint_file.parent == file.parent:
        yield warning(
            "checkpoint",
            f"{config.checkpoint_file} lies beside the ledger",
            "Set ledger.checkpoint_file to another disk: who restores or cuts the ledger would restore both.",
        )


def _chain(config: Config, last: int) -> Iterator[Finding]:
    """The ledger against itself and against its outside checkpoint, where that does not take minutes."""
    file, key, known = config.ledger_file, None, None
    if config.checkpoint_key_file.exists():
        try:
            checkpointer = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name)
            key, known = checkpointer.verifier_key, checkpointer.read()
        except BrokerError as error:
            yield broken("checkpoint", error.detail, "The broker does not start before this is mended.")
            return
    elif config.checkpoint_file.exists():
        yield broken(
            "checkpoint",
            f"{config.checkpoint_file} is there, and the key that signed it, {config.checkpoint_key_file}, is not",
            "Put the key file back: the broker would make a new key, and then not believe the checkpoint.",
        )
        return
    if file.stat().st_size <= MAX_VERIFIED:
        outside = (config.checkpoint_file, str(key)) if known else (None, None)
        try:
            finding = verify(file, *outside).finding
        except (BrokerError, OSError, ValueError) as error:
            yield broken("store", f"{file} cannot be verified: {error}", "action-broker ledger verify")
            return
        if finding is not None:
            yield broken(
                "store",
                f"{file}: {finding.fault} at record {finding.seq}: {finding.detail}",
                "Keep a copy of it for whoever looks into this, then put a backup back: the broker starts a new epoch.",
            )
            return
    yield ok("store", f"{file}, {last} records")
    if key is not None:
        yield ok("checkpoint", f"verify with --checkpoint {config.checkpoint_file} --verifier-key {key}")
