"""One process with the embedded trust domain and a broker in it, which meets SPIRE's protocols there as anywhere."""

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from broker.cli.config import Config
from broker.cli.dev_entries import selector
from broker.cli.dev_folder import ISSUER, TRUST_DOMAIN, DevFolder
from broker.cli.serve import Broker, serve, utc_now
from broker.cli.starter_policy import write_starter_policy
from broker.dev.server import DevTrustDomain
from broker.errors import Invalid
from broker.ledger.checkpoint import Checkpointer


class _DevConfig(Config):
    """Ours alone: the environment may be that of somebody who also runs a real broker here."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing but what we say."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


async def run_dev(
    folder: DevFolder,
    *,
    policy: Path | None,
    grpc_listen: str,
    http_listen: str,
    told: Callable[[dict[str, Any]], None],
) -> None:
    """Serves until SIGTERM or SIGINT. told: called once it serves, with what a caller needs to know.

    Raises: Invalid for a folder or an address that cannot be used; PolicyError; OSError; Unavailable.
    """
    folder.take()
    config = _config(folder, policy, grpc_listen, http_listen, utc_now())
    if policy is None and not (folder.policy.is_dir() and any(folder.policy.iterdir())):
        write_starter_policy(folder.policy)
    async with DevTrustDomain(folder.trust, utc_now, trust_domain=TRUST_DOMAIN) as trust:
        trust.create_entry(str(trust.broker), [selector(os.getpid())])

        def serving(broker: Broker) -> None:
            told(_shown(folder, str(trust.broker), broker))

        await serve(config, serving)


def _config(folder: DevFolder, policy: Path | None, grpc_listen: str, http_listen: str, now: datetime) -> Config:
    """state_folder: a new one at each start. The trust domain's keys are new, so the old ledger's vouch for nothing."""
    values: dict[str, Any] = {
        "issuer": ISSUER,
        "trust_domain": TRUST_DOMAIN,
        "state_folder": folder.path / "state" / f"{now:%Y%m%dT%H%M%S.%f}",
        "policy_folder": policy or folder.policy,
        "spire": {
            "workload_api": f"unix://{folder.trust / 'workload.sock'}",
            "broker_api": f"unix://{folder.trust / 'broker.sock'}",
        },
        "unix": {"socket": folder.broker_socket},
        "grpc": {"listen": grpc_listen},
        "http": {"listen": http_listen, "operations_listen": "127.0.0.1:0"},
    }
    try:
        return _DevConfig(**values)
    except ValidationError as error:
        raise Invalid("; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())) from error


def _shown(folder: DevFolder, broker_id: str, broker: Broker) -> dict[str, Any]:
    config = broker.config
    key = Checkpointer(config.checkpoint_key_file, config.checkpoint_file, config.ledger_name).verifier_key
    return {
        "environment": folder.environment,
        "folder": str(folder.path),
        "trust_domain": TRUST_DOMAIN,
        "issuer": ISSUER,
        "broker_id": broker_id,
        "entries": str(folder.entries),
        "policy": str(config.policy_folder),
        "ledger": str(config.ledger_file),
        "checkpoint": str(config.checkpoint_file),
        "verifier_key": str(key),
        "grpc": f"127.0.0.1:{broker.grpc_port}",
        "key_set": f"https://127.0.0.1:{broker.http_port}/.well-known/jwks.json",
        "operations": f"http://127.0.0.1:{broker.operations_port}",
        "pid": os.getpid(),
    }
