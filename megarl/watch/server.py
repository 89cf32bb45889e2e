"""The server of `megarl watch`: a page, its parts and events, for browsers of this machine.

It answers GET and HEAD of the paths in `_PATHS`. No path of a request reaches the file system. All accounts of a
machine share its loopback interface. So a browser needs the token of the printed address, and gets a cookie for it.
"""

from __future__ import annotations

import errno
import hmac
import json
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

import megarl
from megarl.errors import ConfigError
from megarl.watch.live import POLICY_HERE, LivePage

HOST = "127.0.0.1"
POLL_S = 0.5
"""Seconds between two looks at the run folder."""
_SLOWEST_POLL_S = 10.0
_SHARE = 10  # a look that takes long, at a run of very many rows, is followed by a pause of so many times that
_ALIVE_S = 10.0  # a stream without news gets a comment as often, which tells that its browser is gone
_MOST_STREAMS = 32
_MOST_PARTS = 1000  # in a request
_LOOPBACK = re.compile(r"(?:localhost|127(?:\.\d{1,3}){3}|\[::1\])(?::(\d{1,5}))?", re.IGNORECASE)
_SECURITY = {
    "Content-Security-Policy": f"{POLICY_HERE}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class WatchServer(ThreadingHTTPServer):
    """Serves the page of a run, and looks at the run folder while a browser listens."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, live: LivePage, port: int) -> None:
        """Listen; raise `ConfigError` if another program does. Port 0 is any free one."""
        self.live = live
        self.token = secrets.token_urlsafe()
        """Whoever knows it may read the run. Each start has another one."""
        self.news = threading.Condition()
        self.streams = 0
        self.closing = False
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as problem:
            used = problem.errno == errno.EADDRINUSE
            said = "is used by another program" if used else f"cannot be listened on ({problem.strerror or problem})"
            raise ConfigError(
                f"port={port} {said}: choose another, such as port={port + 1 if 1024 <= port < 65535 else 8899}, or "
                "port=0 for any free one",
                key="port",
                value=port,
                offers={"port": [0]},
            ) from None
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    @property
    def address(self) -> str:
        """The address of the page, with the token."""
        return f"http://{HOST}:{self.server_address[1]}/?token={self.token}"

    def has_token(self, values: Iterable[str]) -> bool:
        """Return whether one of some values that a browser sent is the token."""
        return any(hmac.compare_digest(value.encode(), self.token.encode()) for value in values)

    def refresh(self) -> None:
        """Read what is new in the run folder, and tell the streams if anything is."""
        if self.live.refresh():
            with self.news:
                self.news.notify_all()

    def server_close(self) -> None:
        """Stop listening, and end the streams."""
        with self.news:
            self.closing = True
            self.news.notify_all()
        super().server_close()

    def wait(self, number: int, seconds: float) -> None:
        """Wait until the page has another number than this one, but not longer than some seconds."""
        with self.news:
            self.news.wait_for(lambda: self.closing or self.live.number != number, seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that is gone."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def _look(self) -> None:
        """Tell the streams when the run folder changes. What takes long is done more rarely."""
        pause = POLL_S
        while True:
            with self.news:
                self.news.wait_for(lambda: self.streams or self.closing)
                if not self.closing:
                    self.news.wait_for(lambda: self.closing, pause)
                if self.closing:
                    return
            began = time.thread_time()
            self.refresh()
            pause = min(max(POLL_S, _SHARE * (time.thread_time() - began)), _SLOWEST_POLL_S)


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version = f"megarl/{megarl.__version__}"
    sys_version = ""
    timeout = 30  # a connection that neither sends nor takes anything for so long is closed

    def parse_request(self) -> bool:
        """Refuse what is no GET or HEAD of this machine's browsers before anything else looks at it."""
        if not super().parse_request():
            return False
        hosts = self.headers.get_all("Host") or []
        host = _LOOPBACK.fullmatch(hosts[0].strip()) if len(hosts) == 1 else None
        if host is None:
            self.close_connection = True
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This server answers requests to localhost only.\n")
            return False
        self._cookie = f"megarl-watch-{host[1] or 80}"  # ports share cookies: each has its own, also a forwarded one
        self._linked = self.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site")
        opened = (self.headers.get("Sec-Fetch-Mode"), self.headers.get("Sec-Fetch-Dest")) == ("navigate", "document")
        if self._linked and not (opened and self.path.partition("?")[0] == "/"):
            self.close_connection = True  # another page could take all streams, though it cannot read them
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This server answers its own page only.\n")
            return False
        if self.command not in ("GET", "HEAD"):
            self.close_connection = True
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", "Use GET.\n", Allow="GET, HEAD")
            return False
        return True

    def do_GET(self) -> None:
        """Answer a request for one of the known paths."""
        path, _, query = self.path.partition("?")
        answer = _PATHS.get(path)
        if path == "/" and self.server.has_token(parse_qs(query).get("token", [])):
            self._enter()
        elif not self.server.has_token(self._cookies()):
            self._answer(
                HTTPStatus.FORBIDDEN, "text/plain", "Open the address that megarl watch printed at its start.\n"
            )
        elif answer is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is no such page.\n")
        else:
            answer(self, query)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log nothing: the terminal is the user's."""

    def _cookies(self) -> list[str]:
        """Return the values of this server's cookie."""
        sent = "; ".join(self.headers.get_all("Cookie") or []).split(";")
        pairs = (cookie.strip().partition("=") for cookie in sent)
        return [value for name, _, value in pairs if name == self._cookie]

    def _enter(self) -> None:
        """Give the browser its cookie, and send it to the page, whose address has no token."""
        cookie = f"{self._cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Strict"
        status, where = HTTPStatus.SEE_OTHER, {"Location": "/"}
        if self._linked:  # a strict cookie is not sent after the redirect of another site's link, but after a refresh
            status, where = HTTPStatus.OK, {"Refresh": "0; url=/"}
        self._answer(status, "text/plain", "The page is at /.\n", **where, **{"Set-Cookie": cookie})

    def _page(self, query: str) -> None:
        self.server.refresh()
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.live.page())

    def _parts(self, query: str) -> None:
        try:
            names = parse_qs(query, max_num_fields=_MOST_PARTS).get("id", [])
        except ValueError:
            self._answer(HTTPStatus.BAD_REQUEST, "text/plain", f"Ask for {_MOST_PARTS} parts at most.\n")
            return
        self._answer(HTTPStatus.OK, "application/json", json.dumps(self.server.live.parts(names)))

    def _events(self, query: str) -> None:
        """Send the state of the page at once and after every change, until the browser is gone."""
        self.close_connection = True
        server = self.server
        with server.news:
            full = server.streams >= _MOST_STREAMS
            server.streams += not full
            server.news.notify_all()
        if full:
            said = f"{_MOST_STREAMS} pages follow this run already.\n"
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", said, Connection="close")
            return
        try:
            self._head(HTTPStatus.OK, "text/event-stream", {"Connection": "close"})
            if self.command == "GET":
                self._stream()
        finally:
            with server.news:
                server.streams -= 1

    def _stream(self) -> None:
        server, sent = self.server, -1
        server.refresh()
        self.wfile.write(b"retry: 1000\n\n")
        while not server.closing:
            if server.live.number != sent:
                sent = server.live.number
                self.wfile.write(f"data: {json.dumps(server.live.state())}\n\n".encode())
            else:
                self.wfile.write(b": still here\n\n")
            server.wait(sent, _ALIVE_S)

    def _answer(self, status: HTTPStatus, kind: str, text: str, **headers: str) -> None:
        body = text.encode()
        self._head(status, kind, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **_SECURITY, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


_PATHS: dict[str, Callable[[_Handler, str], None]] = {
    "/": _Handler._page,
    "/parts": _Handler._parts,
    "/events": _Handler._events,
}
