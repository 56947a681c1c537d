"""A timestamp authority over HTTP that answers when it is told to, and how it is told to; in threads of its own."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.processes import PATIENCE_S, until
from support.timestamps import Tsa


class Stamping:
    """tsa: who stamps. asked: how often it was. changes: what is wrong with its answers (see `Tsa.answer`)."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        self.tsa, self.stranger = Tsa.made(now), Tsa.made(now)
        self.by = self.tsa
        self.changes: dict[str, Any] = {}
        self.status = 200
        self.asked = 0
        self._goes_on = threading.Event()
        self._goes_on.set()
        stamping = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = self.rfile.read(int(self.headers["Content-Length"]))
                stamping.asked += 1
                stamping._goes_on.wait(PATIENCE_S)
                answer = stamping.by.answer(query, **{"at": datetime.now(UTC)} | stamping.changes)
                with contextlib.suppress(OSError):  # whoever asked may be gone by now
                    self.send_response(stamping.status)
                    self.send_header("Content-Type", "application/timestamp-reply")
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/"

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Nobody gets an answer while the block lasts."""
        self._goes_on.clear()
        try:
            yield
        finally:
            self._goes_on.set()

    async def waits(self, count: int) -> None:
        """Until it was asked so often."""
        await until(lambda: self.asked >= count, "the authority is asked")

    @contextmanager
    def answering(self, by: Tsa | None = None, *, http_status: int = 200, **changes: Any) -> Iterator[None]:
        """Otherwise than it should, while the block lasts."""
        self.by, self.status, self.changes = by or self.tsa, http_status, changes
        try:
            yield
        finally:
            self.by, self.status, self.changes = self.tsa, 200, {}


@contextmanager
def stamping() -> Iterator[Stamping]:
    """Running, on a port of its own."""
    found = Stamping()
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.server.shutdown()
        thread.join(PATIENCE_S)
        found.server.server_close()
