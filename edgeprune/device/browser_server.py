"""The web server behind a browser device: one page, its worker, the runtime's files, and a desk for jobs and results.

Everything lies below a token that nobody can guess; without it every request is refused. What is served is a fixed
list of names, so no path leads to a file. Headers isolate the page, which gives it a fine clock and threads.
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import json
import ssl
import threading
import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from edgeprune.device.desk import Desk, FinishedError, SupersededError
from edgeprune.device.pipe import HEADER_LIMIT, MAGIC

BODY_LIMIT = 256 << 20
LONG_POLL_S = 10.0
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
}
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def pack(header: Mapping[str, Any], blobs: tuple[bytes, ...] = ()) -> bytes:
    """One message as the pipe has it: a line of JSON, then the blobs whose sizes it lists."""
    document = {**header, "sizes": [len(blob) for blob in blobs]}
    return MAGIC + json.dumps(document).encode() + b"\n" + b"".join(blobs)


def unpack(body: bytes) -> tuple[dict[str, Any], tuple[bytes, ...]]:
    """Inverse of ``pack``. Raises ValueError for anything else."""
    line, newline, rest = body.partition(b"\n")
    if not newline or not line.startswith(MAGIC) or len(line) > HEADER_LIMIT:
        raise ValueError("no message")
    header = json.loads(line[len(MAGIC) :])
    sizes = header["sizes"] if isinstance(header, dict) and isinstance(header.get("sizes"), list) else [-1]
    if any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) != len(rest):
        raise ValueError("sizes do not fit")
    blobs, at = [], 0
    for size in sizes:
        blobs.append(rest[at : at + size])
        at += size
    return header, tuple(blobs)


class PageServer(http.server.ThreadingHTTPServer):
    """Serves ``files`` (name -> path) and the desk below ``/token/`` on one address.

    ``settings`` is what the page's worker is started with. Raises OSError when the address or port cannot be had.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        files: Mapping[str, Path],
        desk: Desk,
        settings: Mapping[str, Any],
        tls: ssl.SSLContext | None = None,
    ):
        self.token, self.files, self.desk, self.settings = token, files, desk, settings
        super().__init__(address, _Handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self.serve_forever, args=(0.2,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that goes away in the middle of a request is no error of ours."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version = "edgeprune"
    sys_version = ""
    timeout = 60.0

    def log_message(self, *_: Any) -> None:
        """The page shows its own state; the terminal is for the user's."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, handle: Any) -> None:
        parts = urllib.parse.urlsplit(self.path)
        token, _, name = parts.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()) or "/" + token == parts.path:
            self._refuse(HTTPStatus.FORBIDDEN, "wrong token; open the address that edgeprune prints")
            return
        page = (urllib.parse.parse_qs(parts.query).get("page") or [""])[0]
        try:
            handle(name, page)
        except SupersededError as error:
            self._refuse(HTTPStatus.CONFLICT, str(error))
        except FinishedError:
            self._refuse(HTTPStatus.GONE, "finished")

    def _get(self, name: str, page: str) -> None:
        desk, files = self.server.desk, self.server.files
        if name == "settings":
            self._send(json.dumps(self.server.settings).encode(), "application/json")
        elif name == "job":
            found = desk.take(page, LONG_POLL_S)
            if found is None:
                self._send(b"", "application/octet-stream", HTTPStatus.NO_CONTENT)
            else:
                self._send(pack(*found), "application/octet-stream")
        elif name in files:
            path = files[name]
            self._send(path.read_bytes(), TYPES[path.suffix], cached=name.startswith("ort/"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing here")

    def _post(self, name: str, page: str) -> None:
        desk = self.server.desk
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BODY_LIMIT:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {BODY_LIMIT} bytes")
            return
        body = self.rfile.read(int(length))
        try:
            if name == "hello":
                desk.arrive(page, unpack(body)[0])
                told: dict[str, Any] = {}
            elif name == "result":
                told = {"taken": desk.give(page, *unpack(body))}
            elif name == "alive":
                state = json.loads(body)
                told = desk.heartbeat(page, bool(state["hidden"]), int(state["job"]))
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "nothing here")
                return
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(HTTPStatus.BAD_REQUEST, f"not understood: {error}")
            return
        self._send(json.dumps(told).encode(), "application/json")

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, cached: bool = False) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            for header, value in ISOLATION.items():
                self.send_header(header, value)
            self.send_header("Cache-Control", "private, max-age=86400" if cached else "no-store")
            self.send_header("Content-Type", kind)
            if status != HTTPStatus.NO_CONTENT:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True
        self._send(why.encode(), "text/plain; charset=utf-8", status)
