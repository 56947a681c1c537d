"""A server on loopback between a broker and a real timestamp authority: it hands on, or does what a test tells it."""

import contextlib
import http.server
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Answer = Callable[["Handler", bytes], None]
"""Answers one query, in a thread of its own."""
TYPE = "application/timestamp-reply"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    server: "Server"

    def do_POST(self) -> None:
        """Whatever the test wants."""
        query = self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(OSError):  # whoever asked has gone
            self.server.front.answer(self, query)

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        """The whole answer."""
        self.send_response(status)
        for name, value in {"Content-Type": TYPE, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Server(http.server.ThreadingHTTPServer):
    """block_on_close: its threads are daemons, and one that never answers is let go by `Front.ended`."""

    front: "Front"
    block_on_close = False
    daemon_threads = True


class Front:
    """answer: what is done with each query; first it hands on. ended: set when those that wait may go."""

    def __init__(self, behind: str) -> None:
        self.behind = behind
        self.answer: Answer = self.hand_on
        self.ended = threading.Event()
        self.queries = 0
        self._port = 0
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """Stays the same over `down` and `up`."""
        return f"http://127.0.0.1:{self._port}/api/v1/timestamp"

    def up(self) -> None:
        """Listens."""
        self._server = Server(("127.0.0.1", self._port), Handler)
        self._server.front, self._port = self, self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def down(self) -> None:
        """Nobody listens there."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def stamped(self, query: bytes) -> bytes:
        """What the real authority says to a query."""
        self.queries += 1
        kind = {"Content-Type": "application/timestamp-query"}
        asked = urllib.request.Request(self.behind, query, kind)  # noqa: S310 - loopback
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            body: bytes = answer.read()
            return body

    def hand_on(self, handler: Handler, query: bytes) -> None:
        """The real authority's answer."""
        handler.reply(self.stamped(query))

    @contextmanager
    def doing(self, answer: Answer) -> Iterator[None]:
        """Does this while the block lasts."""
        self.answer = answer
        try:
            yield
        finally:
            self.answer = self.hand_on


@contextmanager
def front_of(url: str) -> Iterator[Front]:
    """One that listens, until the block ends."""
    front = Front(url)
    front.up()
    try:
        yield front
    finally:
        front.ended.set()
        front.down()
