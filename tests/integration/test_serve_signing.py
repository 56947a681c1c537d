"""What a serving broker takes anew: a rotated CA, distrusted builders; and what it does not start with."""

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from support.broker import ISSUER, folder_for, write_config
from support.cli import COMMAND, clean_environment, cli
from support.processes import until
from support.signing import ALICE, SigningBroker, signing_broker
from support.trust_domain import trust_domain

from broker.cli.current import CaKeys, CurrentAuthority
from broker.cli.file_watch import FileWatch
from broker.client.signing import Signature
from broker.errors import Reason, Refused
from broker.signing.ca_folder import CaError


@pytest.fixture(scope="module")
def broker() -> Iterator[SigningBroker]:
    with signing_broker() as found:
        yield found


async def signed(broker: SigningBroker) -> Signature:
    async with broker.client() as agent:
        grant = await broker.granted(agent, broker.action(), (broker.builder.envelope(),), ALICE)
        return await agent.signing.sign(grant)


def issuing(signature: Signature) -> bytes:
    return signature.certificate_chain[1]


def taken(broker: SigningBroker, what: str) -> int:
    return sum(one.get("what") == what for one in broker.whole.broker.events("files_taken"))


async def test_after_a_rotation_the_new_ca_signs_without_a_restart(broker: SigningBroker) -> None:
    first = await signed(broker)
    later = await asyncio.to_thread(
        cli, "ca", "rotate", broker.ca_folder, "--sign-in-hours", "24", "--issuing-days", "30"
    )
    assert later.code == 0, later.err
    await until(lambda: taken(broker, "signing CA") >= 2, "the folder is taken")
    assert issuing(await signed(broker)) == issuing(first)  # its time has not come
    at_once = await asyncio.to_thread(
        cli, "ca", "rotate", broker.ca_folder, "--sign-in-hours", "0", "--issuing-days", "30"
    )
    assert at_once.code == 0, at_once.err
    await until(lambda: taken(broker, "signing CA") >= 4, "the folder is taken")
    second = await signed(broker)
    assert issuing(second) != issuing(first)
    leaf, ca = map(x509.load_der_x509_certificate, second.certificate_chain[:2])
    leaf.verify_directly_issued_by(ca)


async def test_a_ca_folder_that_breaks_is_told_and_the_old_ca_goes_on(broker: SigningBroker) -> None:
    index = broker.ca_folder / "ca.json"
    kept, before = index.read_bytes(), await signed(broker)
    index.write_bytes(b"{")
    try:
        told = await asyncio.to_thread(broker.whole.broker.wait_for, "files_refused")
        assert (told["what"], "ca.json is damaged" in told["why"]) == ("signing CA", True)
        assert issuing(await signed(broker)) == issuing(before)
    finally:
        index.write_bytes(kept)


async def test_a_builder_is_distrusted_at_the_next_look_and_on_sighup_at_once(broker: SigningBroker) -> None:
    async with broker.client() as agent:
        grant = await broker.granted(agent, broker.action(), (broker.builder.envelope(),), ALICE)
        broker.builder.distrusted()
        try:
            await broker.reloaded()
            with pytest.raises(Refused) as refused:
                await agent.signing.sign(grant)
            assert refused.value.reason is Reason.PROVENANCE_REJECTED
        finally:
            broker.builder.trusted()
            await broker.reloaded()
        with pytest.raises(Refused) as spent:
            await agent.signing.sign(grant)
        assert spent.value.reason is Reason.ALREADY_USED  # what was refused does not come back
    assert (await signed(broker)).signature


async def test_a_trust_file_that_breaks_is_told_and_the_old_one_counts(broker: SigningBroker) -> None:
    before = len(broker.whole.broker.events("files_refused"))
    broker.builder.trust_file.write_text("max_age_s = 3600\n[builders")
    try:
        told = await asyncio.to_thread(broker.whole.broker.wait_for, "files_refused", before + 1)
        assert told["what"] == "provenance trust"
        assert (await signed(broker)).signature
    finally:
        broker.builder.trusted()


# -- by the clock ----------------------------------------------------------------------------------------------------


async def test_a_new_ca_signs_when_its_time_has_come_although_no_file_changes(tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    for command in (("init", folder, "--issuer", ISSUER), ("rotate", folder, "--sign-in-hours", "24")):
        ran = await asyncio.to_thread(cli, "ca", *command)
        assert ran.code == 0, ran.err
    now = [datetime.now(UTC) + timedelta(seconds=5)]
    with contextlib.ExitStack() as stack:
        current = CurrentAuthority(folder, ISSUER, CaKeys(stack), lambda: now[0])
        current.reload()
        assert current.get().name == "issuing-1"
        looks = [0]

        def files() -> tuple[Path, ...]:
            looks[0] += 1
            return current.files()

        async def looked_at() -> None:
            seen = looks[0]
            await until(lambda: looks[0] > seen + 3, "it is looked at")

        watching = asyncio.create_task(FileWatch("CA", files, current.reload).watch(0.01))
        await looked_at()
        assert current.get().name == "issuing-1"
        now[0] += timedelta(hours=25)
        await until(lambda: current.get().name == "issuing-2", "the new one signs")
        now[0] += timedelta(
            days=4000
        )  # all have ended: the last one stays, and what it would issue is refused elsewhere
        await looked_at()
        assert not watching.done()
        watching.cancel()
        with pytest.raises(CaError, match="may sign now"):
            current.reload()


def test_a_ca_of_another_issuer_is_not_used(tmp_path: Path) -> None:
    assert cli("ca", "init", tmp_path / "ca", "--issuer", "https://other.test").code == 0
    with contextlib.ExitStack() as stack:
        current = CurrentAuthority(tmp_path / "ca", ISSUER, CaKeys(stack), lambda: datetime.now(UTC))
        with pytest.raises(CaError, match=r"made for https://other\.test"):
            current.reload()


# -- what does not start ---------------------------------------------------------------------------------------------


def test_one_key_under_two_names_that_sign_two_kinds_is_told_when_it_starts() -> None:
    with folder_for({}) as folder, trust_domain(folder / "td") as domain:
        key = ec.generate_private_key(ec.SECP256R1())
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        (folder / "key.pem").chmod(0o600)
        config = write_config(folder, domain.workload_api, domain.broker_api)
        with config.open("a") as file:
            file.write(f'[signing.keys]\na = {{ file = "{folder}/key.pem" }}\n')
            file.write(f'b = {{ file = "{folder}/key.pem", signs = "statements" }}\n')
        assert "\n  signing.keys: a and b are one key" in starts(config, domain)


def test_all_that_signing_cannot_use_is_told_at_once_when_it_starts() -> None:
    with folder_for({}) as folder, trust_domain(folder / "td") as domain:
        (folder / "key.pem").write_text("no key")
        (folder / "key.pem").chmod(0o600)
        (folder / "open.pem").write_text("no key")
        (folder / "open.pem").chmod(0o644)
        signing = {"ca_folder": str(folder / "nothing"), "certificate_ttl_s": 60}
        config = write_config(folder, domain.workload_api, domain.broker_api, signing=signing)
        with config.open("a") as file:
            file.write(
                f'[signing.keys]\nbad = {{ file = "{folder}/key.pem" }}\nopen = {{ file = "{folder}/open.pem" }}\n'
            )
            file.write(f'[signing.timestamp]\nurl = "http://t.test"\nchain_file = "{folder}/key.pem"\n')
        told = starts(config, domain)
        for key in ("signing.ca_folder", "signing.keys.bad", "signing.keys.open", "signing.timestamp"):
            assert f"\n  {key}: " in told, key
        assert "chmod 600" in told


@pytest.mark.parametrize(
    ("name", "table", "key"),
    [
        ("provenance", {"trust_file": "/nonexistent/trust.toml"}, "provenance.trust_file"),
        ("approval", {"templates_folder": "/nonexistent"}, "approval.templates_folder"),
    ],
)
def test_what_is_believed_and_read_has_to_be_there_when_it_starts(name: str, table: dict[str, str], key: str) -> None:
    with folder_for({}) as folder, trust_domain(folder / "td") as domain:
        config = write_config(folder, domain.workload_api, domain.broker_api, **{name: table})
        assert f"\n  {key}: " in starts(config, domain)


def starts(config: Path, domain: object) -> str:
    """What `serve` says when it does not start, as one JSON value."""
    process = subprocess.Popen(
        ["sh", "-c", 'read begin; exec "$@"', "sh", *COMMAND, "--json", "serve", "--config", str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    with process:
        try:
            domain.entry("action-broker", process.pid)
            out, err = process.communicate("\n", 60)
        finally:
            process.kill()
    assert process.returncode == 2, err
    assert "Traceback" not in err
    return json.loads(out)["error"]
