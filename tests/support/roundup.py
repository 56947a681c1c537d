"""A real Roundup tracker on loopback: issues whose keywords say what they authorise. It may call our webhook.

Roundup refuses to run as root, so where we are root it runs as nobody.
"""

import base64
import contextlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from support.processes import PATIENCE_S

from broker.identity.trust import TrustSnapshot

DETECTOR = Path(__file__).parents[2] / "deploy/roundup/action_broker.py"
ADMIN = "admin:roundup-admin-password"
BROKER = "broker:what the broker says"
HOOK_SECRET = "what Roundup signs its webhooks with"
HEADERS = {"X-Requested-With": "rest"}
CA = "ca.pem"
TRIES = 5
"""Another process may take the port that was free a moment ago."""


@dataclass
class Tracker:
    """A running tracker. folder: its home, and what it may read."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    keywords: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return _web(self.port)

    def system(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """The keys of `[ticket.systems.NAME]`. folder: where the broker's credentials are put, for its user alone.

        A search, since Roundup shows a retired issue to whoever asks for it by its id, and does not say that it is.
        """
        credentials = secret_file(folder / "roundup.credentials", BROKER)
        return {
            "url": f"{self.url}rest/data/issue?id={{id}}&@verbose=2&@fields=status,keyword,assignedto",
            "id_pattern": "[1-9][0-9]*",
            "credentials": "basic",
            "credentials_file": str(credentials),
            "headers": HEADERS,
            "id": "/data/collection/0/id",
            "state": "/data/collection/0/status/name",
            "open_states": ["in-progress", "testing"],
            "authorises": "/data/collection/0/keyword",
            "authorises_each": "/name",
            "authorised_by": "/data/collection/0/assignedto/username",
        } | changes

    def hook(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """The keys of `[ticket.systems.NAME.webhook]`, as the detector sends it."""
        secret = secret_file(folder / "roundup.hook", HOOK_SECRET)
        headers = {"delivery_header": "X-Delivery", "timestamp_header": "X-Timestamp"}
        return {"secret_file": str(secret), "id": "/id"} | headers | changes

    def trust(self, snapshot: TrustSnapshot) -> None:
        """Whom its webhooks believe to be the broker: who is vouched for by the bundle of its own trust domain."""
        assert snapshot.own is not None
        authorities = snapshot.bundles[snapshot.own.spiffe_id.trust_domain].x509_authorities
        pem = b"".join(one.public_bytes(Encoding.PEM) for one in authorities)
        (self.folder / CA).write_bytes(pem)

    def create(self, *authorises: str, status: str = "in-progress", assigned_to: str = "admin") -> str:
        """A new issue that authorises these; its id."""
        keywords = [self.keyword(name) for name in authorises]
        fields = {"title": "an incident", "status": status, "keyword": keywords} | (
            {"assignedto": assigned_to} if assigned_to else {}
        )
        return str(self._ask("POST", "issue", fields)["data"]["id"])

    def keyword(self, name: str) -> str:
        """Its id; it is made where there is none yet."""
        if name not in self.keywords:
            self.keywords[name] = self._ask("POST", "keyword", {"name": name})["data"]["id"]
        return self.keywords[name]

    def change(self, issue: str, **fields: Any) -> None:
        """Writes these properties."""
        etag = self.read(issue)["@etag"]
        self._ask("PUT", f"issue/{issue}", fields, **{"If-Match": etag})

    def close(self, issue: str) -> None:
        """Resolves it."""
        self.change(issue, status="resolved")

    def retire(self, issue: str) -> None:
        """What Roundup has for deleting."""
        etag = self.read(issue)["@etag"]
        self._ask("DELETE", f"issue/{issue}", **{"If-Match": etag})

    def read(self, issue: str) -> Any:
        """As REST shows it."""
        return self._ask("GET", f"issue/{issue}?@verbose=2")["data"]

    def _ask(self, method: str, path: str, fields: Any = None, **headers: str) -> Any:
        """Raises: AssertionError with what Roundup says."""
        request = urllib.request.Request(  # noqa: S310 - http, to our own server
            f"{self.url}rest/data/{path}",
            None if fields is None else json.dumps(fields).encode(),
            {**HEADERS, "Origin": self.url.removesuffix("/t/"), "Referer": self.url, "Content-Type": "application/json"}
            | {"Authorization": f"Basic {base64.b64encode(ADMIN.encode()).decode()}"}
            | headers,
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{method} {path}: {error.status} {error.read().decode()}") from error


def _web(port: int) -> str:
    return f"http://127.0.0.1:{port}/t/"


def secret_file(file: Path, content: str) -> Path:
    """For our user alone."""
    file.write_text(content)
    file.chmod(0o600)
    return file


class _Home:
    """A tracker's home, and whoever runs Roundup in it: nobody where we are root."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "home"
        self._nobody = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self.own(folder)

    def own(self, path: Path) -> Path:
        """Gives it to who runs Roundup."""
        if self._nobody is not None:
            os.chown(path, self._nobody.pw_uid, self._nobody.pw_gid)
        return path

    def command(self, program: str, *arguments: str) -> list[str]:
        user = self._nobody
        other = (
            [] if user is None else ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        )
        return [*other, sys.executable, "-m", f"roundup.scripts.{program}", *arguments]

    def admin(self, *arguments: str) -> None:
        """roundup-admin, until it ends."""
        command = self.command("roundup_admin", "-i", str(self.path), *arguments)
        ran = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def write(self, port: int) -> None:
        """The tracker's own address, for which it answers, and what has no default. Few rounds: this is no secret."""
        file = self.path / "config.ini"
        text = file.read_text()
        for key, value in (
            ("web", _web(port)),
            ("domain", "acme.test"),
            ("password_pbkdf2_default_rounds", "1000"),
        ):
            text = re.sub(rf"^#?{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
        file.write_text(text.replace("#host = NO DEFAULT", "host = 127.0.0.1"))

    def install(self, port: int, webhook: str) -> None:
        """Makes the tracker, its detector and the user that the broker is."""
        self.admin("install", "classic", "sqlite")
        self.write(port)
        if webhook:
            self._detect(webhook)
        admin, broker = ADMIN.split(":", 1), BROKER.split(":", 1)
        self.admin("initialise", admin[1])
        self.admin("create", "user", f"username={broker[0]}", f"password={broker[1]}", "roles=User")

    def _detect(self, url: str) -> None:
        shutil.copyfile(DETECTOR, self.path / "detectors/action_broker.py")
        secret = self.own(secret_file(self.folder / "hook.secret", HOOK_SECRET))
        settings = ["", "[action_broker]", f"url = {url}", f"secret_file = {secret}"]
        ca_file = self.folder / CA
        ca_file.touch()
        with (self.path / "detectors/config.ini").open("a") as file:
            file.write("\n".join([*settings, f"ca_file = {ca_file}", ""]))

    @contextmanager
    def serving(self, port: int) -> Iterator[subprocess.Popen[bytes] | None]:
        """The server, once it answers. None where it ended: another process was faster."""
        command = self.command("roundup_server", "-n", "127.0.0.1", "-p", str(port), "-t", "thread", f"t={self.path}")
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        try:
            yield process if _answers(port, process) else None
        finally:
            process.kill()
            process.wait(PATIENCE_S)


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until it does, or has ended."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{_web(port)}rest/", timeout=PATIENCE_S):  # noqa: S310 - our own server
                return process.poll() is None
        except urllib.error.HTTPError as error:
            error.close()
            return process.poll() is None
        except OSError:
            time.sleep(0.02)
    return False


@contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on. It stays bound meanwhile, so that nobody is given it, and may be listened on."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def roundup_tracker(webhook: str = "") -> Iterator[Tracker]:
    """A new tracker that serves until the block ends. webhook: the URL that its issues' changes are told to."""
    with tempfile.TemporaryDirectory(prefix="ab-roundup-") as name, contextlib.ExitStack() as stack:
        home = _Home(Path(name))
        for attempt in range(TRIES):
            port = stack.enter_context(free_port())
            home.write(port) if attempt else home.install(port, webhook)
            process = stack.enter_context(home.serving(port))
            if process is not None:
                yield Tracker(home.folder, port, process)
                return
        raise AssertionError(f"Roundup does not serve: {(home.folder / 'log').read_text()}")
