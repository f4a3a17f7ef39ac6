"""A web server on this machine that counts and can be told to fail."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[int], str | None]
"""Number of the request for a file (from 0) -> what goes wrong, None for nothing: "404", "500", "stall" (headers, half
of the body, then silence), "drip" (a byte now and then), "cut" (closed after half of the body), "short" (half of the
body, announced as all of it), "other" (other bytes of the same length), "refuse" (closed at once), "redirect URL"."""


class Server:
    """Files of a folder over HTTP.

    Attributes:
        requests: by file name, failed ones too.
        authorizations: the header of that name of each request.
        faults: by file name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.authorizations: list[str | None] = []
        self.faults: dict[str, Fault] = {}
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def num_fetches(self) -> int:
        """Requests for tars."""
        return sum(count for name, count in self.requests.items() if name.endswith(".tar"))


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A running server."""
    server = Server(folder)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop.set()
        server.http.shutdown()
        server.http.server_close()


def always(fault: str) -> Fault:
    """Fails every time."""
    return lambda number: fault


def first(count: int, fault: str) -> Fault:
    """Fails `count` times, then works."""
    return lambda number: fault if number < count else None


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.lstrip("/").partition("?")[0]
            with server.lock:
                number = server.requests[name]
                server.requests[name] += 1
                server.authorizations.append(self.headers["Authorization"])
            fault = server.faults.get(name, lambda number: None)(number)
            path = server.folder / name
            if fault == "refuse":
                self.close_connection = True
                return
            if fault and fault.startswith("redirect "):
                self.send_response(302)
                self.send_header("Location", fault.removeprefix("redirect "))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault in ("404", "403", "500", "503") or not path.is_file():
                self.send_error(int(fault or 404))
                return
            self._send(path.read_bytes(), fault)

        def _send(self, body: bytes, fault: str | None) -> None:
            half = body[: len(body) // 2]
            if fault == "other":
                body = bytes(byte ^ 1 for byte in body)
            self.send_response(200)
            self.send_header("Content-Length", str(len(half) if fault == "short" else len(body)))
            self.end_headers()
            try:
                if fault in ("stall", "cut", "short"):
                    self.wfile.write(half)
                    if fault == "stall":
                        server.stop.wait(30)
                elif fault == "drip":
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        self.wfile.flush()
                        if server.stop.wait(0.02):
                            return
                else:
                    self.wfile.write(body)
            except OSError:
                pass  # the client has hung up, as it should

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fails where the body takes longer; it does not stop it."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds
