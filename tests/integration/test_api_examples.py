"""Every example in README.md and docs/api.md, run as it stands, by real processes against a whole broker.

A code block says behind its language what is done with it:

    file=NAME      written to NAME in the broker's configuration folder, before the broker starts
    put=NAME       written to NAME in the folder that each example is run in
    before         run before the broker starts
    as=A,B         run by a process that has these SPIFFE IDs of the trust domain; `nobody` has none
    name=X         not run by itself; use=X puts it in front of another block
    output         what the block before it prints; … stands for anything
    base, shown    not run: tests/unit/test_docs.py holds them to the code
    spire          run in order on a real SPIRE: `until` it succeeds, `serve` to the end, as=UID by that user

Only where things are is replaced: paths, addresses and ports (`places`). `sudo -u NAME COMMAND` stands for another user
of the node, whose entry has the path /release-managers/NAME: it runs COMMAND as a process with that SPIFFE ID.
"""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from support.broker import start
from support.spire import Spire
from tools.build_spire import spire_binaries

from broker.cli.config import load
from broker.cli.serve import Broker, running
from broker.dev.server import DevTrustDomain
from broker.identity.peer import read_process

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(?P<language>\w*)(?P<said>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python": [sys.executable], "bash": ["sh", "-eu"]}
WITHOUT_RUN = {"output", "base", "shown", "spire", "guard"}
SUDO = """#!/bin/sh
[ "$1" = -u ] || exit 64
export EXAMPLE_AS="release-managers/$2"
shift 2
exec "$@"
"""
# What a registration entry does for a service: this very process gets its IDs, then becomes the program.
ENTITLED = """
import os, sys
from broker.dev.run_as import register
for one in os.environ["EXAMPLE_AS"].split(","):
    if one != "nobody":
        register(os.environ["EXAMPLE_ENTRIES"], f"spiffe://acme.test/{one}", os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block. said: the words behind its language. output: the block after it, None where that is another."""

    where: str
    language: str
    said: Mapping[str, str]
    text: str
    output: str | None


def blocks(document: str) -> list[Block]:
    found = list(BLOCK.finditer((ROOT / document).read_text(encoding="utf-8")))
    said = [dict(word.partition("=")[::2] for word in match["said"].split()) for match in found]
    after = [match["text"] if "output" in words else None for match, words in zip(found, said, strict=True)]
    return [
        Block(
            where=f"{document}:{match.string.count(chr(10), 0, match.start()) + 1}",
            language=match["language"],
            said=words,
            text=match["text"],
            output=output,
        )
        for match, words, output in zip(found, said, [*after[1:], None][: len(found)], strict=True)
    ]


BLOCKS = [*blocks("docs/api.md"), *blocks("README.md")]
ON_SPIRE = [block for block in BLOCKS if "spire" in block.said]
RUN = [block for block in BLOCKS if "as" in block.said and block not in ON_SPIRE]
BEFORE = [block for block in BLOCKS if "before" in block.said]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """folder: the examples' own. places: what stands in the text, and what is there instead.

    before: what was printed before the broker started, by block.
    """

    folder: Path
    places: Mapping[str, str]
    environment: Mapping[str, str]
    before: Mapping[str, subprocess.CompletedProcess[str]]


def moved(text: str, places: Mapping[str, str]) -> str:
    for place, instead in places.items():
        text = text.replace(place, instead)
    return text


def first_places(folder: Path, domain: DevTrustDomain) -> dict[str, str]:
    return {
        "/etc/action-broker/": f"{folder}/etc/",
        "/var/lib/action-broker-checkpoint": f"{folder}/outside",
        "/var/lib/action-broker": f"{folder}/state",
        "/run/action-broker/broker.sock": f"{folder}/broker.sock",
        "unix:///run/spire/agent/public/api.sock": f"unix://{domain.workload_socket}",
        "unix:///run/spire/agent/broker/broker.sock": f"unix://{domain.broker_socket}",
        "0.0.0.0:8443": "127.0.0.1:0",
        "0.0.0.0:8444": "127.0.0.1:0",
    }


def later_places(broker: Broker) -> dict[str, str]:
    """An issuer stays what it is; a URL under it leads to where the broker listens."""
    return {
        "broker.acme.test:8443": f"127.0.0.1:{broker.grpc_port}",
        "https://broker.acme.test:8444/": f"https://127.0.0.1:{broker.http_port}/",
        '"broker.acme.test", 8444': f'"127.0.0.1", {broker.http_port}',
        "127.0.0.1:9464": f"127.0.0.1:{broker.operations_port}",
    }


def write_files(folder: Path, places: Mapping[str, str]) -> None:
    (folder / "outside").mkdir()
    for block in BLOCKS:
        if "file" in block.said:
            file = folder / "etc" / block.said["file"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(moved(block.text, places).replace('"127.0.0.1:9464"', '"127.0.0.1:0"'))
    (folder / "bin").mkdir()
    commands = {
        "action-broker": f'#!/bin/sh\nexec {sys.executable} {folder}/entitled.py -m broker.cli "$@"\n',
        "python3": f'#!/bin/sh\nexec {sys.executable} {folder}/entitled.py "$@"\n',
        "sudo": SUDO,
    }
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "entitled.py").write_text(ENTITLED)


def run_before(
    folder: Path, places: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, subprocess.CompletedProcess[str]]:
    return {block.where: shell(moved(block.text, places), folder, environment, None) for block in BEFORE}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def setting() -> AsyncIterator[Setting]:
    """The broker of docs/api.md, in the embedded trust domain."""
    with tempfile.TemporaryDirectory(prefix="ab-") as name:
        folder = Path(name)
        async with DevTrustDomain(folder / "dev", lambda: datetime.now(UTC), trust_domain="acme.test") as domain:
            own = read_process(os.getpid())
            domain.create_entry(str(domain.broker), [f"dev:process:{own.pid}:{own.start_time}"])
            places = first_places(folder, domain)
            write_files(folder, places)
            environment = {
                **os.environ,
                "PATH": f"{folder}/bin:{os.environ['PATH']}",
                "COLUMNS": "120",
                "EXAMPLE_AS": "nobody",
                "EXAMPLE_ENTRIES": str(domain.entries_socket),
                "SPIFFE_ENDPOINT_SOCKET": f"unix://{domain.workload_socket}",
                "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            }
            before = await asyncio.to_thread(run_before, folder, places, environment)
            config = load(folder / "etc/broker.toml")
            # What commands read in /etc/action-broker/broker.toml where nothing else is said.
            defaults = {"ACTION_BROKER_ISSUER": config.issuer, "ACTION_BROKER_UNIX__SOCKET": f"{folder}/broker.sock"}
            async with running(config) as broker:
                yield Setting(
                    folder=folder,
                    places={**places, **later_places(broker)},
                    environment={**environment, **defaults},
                    before=before,
                )


async def run(block: Block, setting: Setting) -> tuple[str, str, int]:
    """What the block prints, on both streams, and its exit code."""
    named = {one.said["name"]: one.text for one in BLOCKS if "name" in one.said}
    text = "".join([*(named[name] for name in block.said.get("use", "").split(",") if name), block.text])
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    for one in BLOCKS:
        if "put" in one.said:
            (folder / one.said["put"]).write_text(moved(one.text, setting.places))
    file = folder / "example"
    file.write_text(moved(text, setting.places))
    command = [*LANGUAGES[block.language], str(file)]
    if block.language == "python":
        command = [sys.executable, f"{setting.folder}/entitled.py", str(file)]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={**setting.environment, "EXAMPLE_AS": block.said["as"]},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return out.decode(), err.decode(), process.returncode or 0


def matches(found: str, expected: str) -> bool:
    """Line by line, blanks at their ends aside; … is anything within its line."""
    lines = [line.rstrip() for line in found.strip().splitlines()]
    pattern = "\n".join(re.escape(line.rstrip()).replace("…", ".*") for line in expected.strip().splitlines())
    return re.fullmatch(pattern, "\n".join(lines)) is not None


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.where)
async def test_an_example_does_what_the_text_says(block: Block, setting: Setting) -> None:
    assert block.output is not None, "say what it prints, in a block `text output` behind it"
    out, err, code = await run(block, setting)
    assert code == 0, f"{out}\n{err}"
    assert matches(out, block.output), f"it printed:\n{out}\n{err}"


@pytest.mark.parametrize("block", BEFORE, ids=lambda block: block.where)
async def test_what_comes_before_the_broker_does_what_the_text_says(block: Block, setting: Setting) -> None:
    done = setting.before[block.where]
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert matches(done.stdout, block.output or ""), f"it printed:\n{done.stdout}\n{done.stderr}"


async def test_an_example_that_fails_is_noticed(setting: Setting) -> None:
    """The control of the above: neither an exception nor another output passes."""
    failing = Block(where="", language="python", said={"as": "nobody"}, text="raise SystemExit(1)", output="")
    assert (await run(failing, setting))[2] == 1
    assert matches("a 17 c\n", "a … c")
    assert not matches("a 17 c\nmore", "a … c")
    assert not matches("b 17 c", "a … c")


async def test_no_example_is_left_out() -> None:
    ways = {"as", "before", "file", "name", "put", *WITHOUT_RUN}
    kinds = [ways & block.said.keys() for block in BLOCKS if block not in ON_SPIRE]
    assert [kind for kind in kinds if len(kind) != 1] == []
    used = {name for block in BLOCKS for name in block.said.get("use", "").split(",")}
    assert {block.said["name"] for block in BLOCKS if "name" in block.said} <= used
    assert len(RUN) >= 15


async def test_the_readme_shows_what_the_demo_prints() -> None:
    (shown,) = (block.text for block in BLOCKS if block.text.startswith("$ make demo\n"))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli", "demo", stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    printed = {measured(line) for line in out.decode().splitlines()}
    assert [line for line in shown.splitlines()[1:] if line != "…" and measured(line) not in printed] == []
    assert process.returncode == 0


def measured(line: str) -> str:
    """Without what differs from run to run."""
    return re.sub(r"[0-9.]+ (m?s)\b", r"N \1", line)


# -- README.md on a real SPIRE -----------------------------------------------------------------------------------------

# Only where the configuration is differs from the command.
COMMAND = """#!{python}
import sys
from pathlib import Path
sys.path.insert(0, "{root}")
from broker.cli import config
config.DEFAULT_FILE = Path("{folder}/etc/broker.toml")
from broker.cli.main import main
main()
"""


def prepare(folder: Path, spire: Spire) -> None:
    """action-broker, spire-server and spire-agent as a shell finds them, and a folder to work in for every user."""
    folder.chmod(0o755)
    (folder / "work").mkdir()
    (folder / "work").chmod(0o1777)
    (folder / "bin").mkdir()
    server = f'#!/bin/sh\nexec {spire_binaries()}/spire-server "$@" -socketPath {spire.folder}/server/api.sock\n'
    broker = COMMAND.format(python=sys.executable, root=ROOT, folder=folder)
    for name, text in (("action-broker", broker), ("spire-server", server)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    shutil.copy(spire_binaries() / "spire-agent", folder / "bin")  # for every user; the cache is its owner's alone


def configure_agent(spire: Spire, block: str) -> None:
    """Gives the agent README's `experimental` in place of the one that it has."""
    config = spire.folder / "agent.conf"
    text, count = re.subn(r"  experimental \{.*?\n  \}\n", lambda _: block, config.read_text(), flags=re.DOTALL)
    assert count == 1
    spire.kill_agent()
    config.write_text(text)
    spire.start_agent()


def shell(
    text: str, folder: Path, environment: Mapping[str, str], user: str | None
) -> subprocess.CompletedProcess[str]:
    other = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
    return subprocess.run(
        [*other, "sh", "-eu", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.spire
@pytest.mark.root
async def test_the_readme_sets_up_a_broker_on_a_real_spire() -> None:
    """Every command of README's section on SPIRE, in its order. Its issuer's name leads to this machine."""
    with Spire() as spire, tempfile.TemporaryDirectory(prefix="ab-") as name, ExitStack() as stack:
        folder = Path(name)
        prepare(folder, spire)
        places = {
            "/etc/action-broker": f"{folder}/etc",
            "/run/spire/agent/public/api.sock": f"{spire.folder}/workload/api.sock",
            "/run/spire/agent/broker/": f"{spire.folder}/broker/",
        }
        # What the two lines of configuration leave to the defaults: nothing of it may touch this machine.
        environment = {
            **os.environ,
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "NODE": spire.id("node"),
            "CURL_HOME": str(folder),
            "ACTION_BROKER_STATE_FOLDER": f"{folder}/state",
            "ACTION_BROKER_POLICY_FOLDER": f"{folder}/etc/policy",
            "ACTION_BROKER_UNIX__SOCKET": f"{folder}/broker.sock",
            "ACTION_BROKER_SPIRE__WORKLOAD_API": f"unix://{spire.folder}/workload/api.sock",
            "ACTION_BROKER_SPIRE__BROKER_API": f"unix://{spire.folder}/broker/broker.sock",
            "ACTION_BROKER_GRPC__LISTEN": "127.0.0.1:0",
            "ACTION_BROKER_HTTP": '{"listen": "127.0.0.1:0", "operations_listen": "127.0.0.1:0"}',
        }
        for block in ON_SPIRE:
            text = moved(block.text, places)
            if block.language == "hcl":
                configure_agent(spire, text)
                continue
            if "serve" in block.said:
                assert text == "action-broker serve\n"
                broker = stack.enter_context(start(folder / "etc/broker.toml", **environment))
                redirect = f'connect-to = "broker.acme.test:8444:127.0.0.1:{broker.http_port}"\n'
                (folder / ".curlrc").write_text(redirect)
                continue
            tries = 60 if "until" in block.said else 1  # agent and broker hear of what is new after a moment
            while tries:
                tries -= 1
                ran = shell(text, folder / "work", environment, block.said.get("as"))
                good = ran.returncode == 0 and (block.output is None or matches(ran.stdout, block.output))
                if good:
                    break
                await asyncio.sleep(0.25)
            assert good, f"{block.where} ended with {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
