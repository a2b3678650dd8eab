"""A web server on loopback that fails when told to, for tests of remote shards."""

import contextlib
import gzip
import http.server
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from urllib.parse import unquote

HALF = 100_000  # bytes that come before something happens in the middle of a body
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class WebServer:
    """A real HTTP/1.1 server. `files` has the bodies by path; `faults` what happens instead, one word a request.

    Words: a status ("503"), "reset" and "short" (the connection ends in mid-body, hard or softly), "endless" (it does,
    and no length was said), "hold" (waits in mid-body until `release` is called), "mute" (waits before the first byte),
    "page" (200 with HTML), "gzip", "to PATH" (a redirect), and "" (the file). The last word stays for later requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []  # "GET /path", in order of arrival
        self.before: Callable[[str], None] | None = None  # called with the path of each GET before it is answered
        self.released = threading.Event()
        server = self

        class Handler(_Handler):
            web = server

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def release(self) -> None:
        """Lets every held request go on, and those to come."""
        self.released.set()

    def close(self) -> None:
        """Ends the server; from then on every connection is refused."""
        self.release()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the other side may be killed at any time
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(http.server.BaseHTTPRequestHandler):
    web: WebServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.web.requests.append(f"HEAD {unquote(self.path)}")
        self._answer(405, b"")

    def do_GET(self) -> None:
        path = unquote(self.path)
        self.web.requests.append(f"GET {path}")
        if self.web.before is not None:
            self.web.before(path)
        words = self.web.faults.get(path, [""])
        self._act(words.pop(0) if len(words) > 1 else words[0], self.web.files.get(path))

    def _act(self, word: str, body: bytes | None) -> None:
        if word.isdigit():
            self._answer(int(word), b"no")
        elif word == "page":
            self._answer(200, PAGE, {"Content-Type": "text/html"})
        elif word.startswith("to "):
            self._answer(302, b"", {"Location": word[3:]})
        elif body is None:
            self._answer(404, PAGE)
        elif word == "gzip":
            self._answer(200, gzip.compress(body), {"Content-Encoding": "gzip"})
        elif word == "mute":
            self.web.released.wait()
            self._answer(200, body)
        elif word:
            self._answer_half(word, body)
        else:
            self._answer(200, body)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _answer_half(self, word: str, body: bytes) -> None:
        self.send_response(200)
        self.close_connection = True
        if word == "endless":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:HALF])
        self.wfile.flush()
        if word == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()
        elif word == "hold":
            self.web.released.wait()
            self.wfile.write(body[HALF:])


@contextlib.contextmanager
def web_server() -> Iterator[WebServer]:
    """Gives a WebServer."""
    server = WebServer()
    try:
        yield server
    finally:
        server.close()
