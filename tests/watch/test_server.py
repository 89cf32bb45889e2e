"""The server of `megarl watch`: whom it answers, and what it tells while a run goes on."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import ConfigError
from megarl.run.csv_logger import MetricsFile
from megarl.watch import live
from megarl.watch import server as served
from megarl.watch.live import LivePage
from megarl.watch.server import WatchServer
from tests.report.made_up import made_up, write_run
from tests.report.parsed import parse

LIMIT_S = 30.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", made_up(3, samples=[], summary={"status": "running", "algorithm": "ppo"}))


@pytest.fixture
def server(folder: Path) -> Iterator[WatchServer]:
    with watched(LivePage(folder)) as watching:
        yield watching


@contextmanager
def watched(live: LivePage) -> Iterator[WatchServer]:
    """Serve a page in a thread."""
    with WatchServer(live, 0) as watching:
        thread = threading.Thread(target=watching.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield watching
        watching.shutdown()
        thread.join()


def asked(
    server: WatchServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send a request with exactly these headers, or else those of a browser that has opened the page."""
    with closing(http.client.HTTPConnection(*server.server_address[:2], timeout=LIMIT_S)) as connection:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in (own(server) if headers is None else headers).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def own(server: WatchServer, host: str = "localhost") -> dict[str, str]:
    """Return the headers of a browser that has opened the page."""
    port = host.rpartition(":")[2] if host[-1].isdigit() and ":" in host else "80"
    return {"Host": host, "Cookie": f"megarl-watch-{port}={server.token}"}


class Stream:
    """A browser that listens to the events."""

    def __init__(self, server: WatchServer) -> None:
        self.connection = http.client.HTTPConnection(*server.server_address[:2], timeout=LIMIT_S)
        self.connection.request("GET", "/events", headers=own(server))
        self.answer = self.connection.getresponse()

    def next(self) -> dict[str, Any]:
        """Return the data of the next event."""
        while line := self.answer.readline():
            if line.startswith(b"data: "):
                found: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return found
        pytest.fail("the stream has ended")

    def until(self, said: str) -> dict[str, Any]:
        """Return the first event that says something."""
        while said not in (state := self.next())["said"]:
            pass
        return state

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


# --- whom it answers --------------------------------------------------------------------------------------------------


def test_only_known_paths_are_answered(server: WatchServer) -> None:
    for path in ("/", "/?a=b", "/parts", "/parts?id=head"):
        assert asked(server, path)[0] == 200
    for path in (
        *("/metrics.csv", "/page.js", "/..", "/../", "/./", "/parts/", "/events/../", "/%2e%2e/etc/passwd", "*"),
        *("http://localhost/", "/etc/passwd", "//[", "/\x00", "/parts/../../etc/passwd"),
    ):
        status, _, body = asked(server, path.replace("\x00", "%00"))
        assert (status, body) == (404, b"There is no such page.\n"), path


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO"])
def test_other_methods_than_get_and_head_are_refused(server: WatchServer, method: str) -> None:
    status, headers, _ = asked(server, "/", method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/parts?id=head", "/events", "/nothing"])
def test_head_is_answered_like_get_without_a_body(server: WatchServer, path: str) -> None:
    status, headers, body = asked(server, path, "HEAD")
    assert (status, body) == (404 if path == "/nothing" else 200, b"")
    if path != "/events":
        assert headers["Content-Type"] == asked(server, path)[1]["Content-Type"]


def test_only_names_of_this_machine_are_answered(server: WatchServer) -> None:
    port = server.server_address[1]
    for host in ("localhost", f"localhost:{port}", "LOCALHOST:1", f"127.0.0.1:{port}", "[::1]:80", "127.1.2.3"):
        assert asked(server, "/parts", headers=own(server, host))[0] == 200, host
    wrong: list[dict[str, str]] = [{}]
    for host in ("evil.com", "localhost.evil.com", "evil.com:localhost", "127.0.0.1.evil.com", "localhost:80:80", ""):
        wrong.append({"Host": host})
    wrong.append({"Host": "localhost", "host": "evil.com"})
    for headers in wrong:
        status, _, body = asked(server, "/", headers=headers)
        assert (status, body) == (403, b"This server answers requests to localhost only.\n"), headers


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_another_page_may_link_to_the_page_and_reach_nothing_else(server: WatchServer, site: str, status: int) -> None:
    headers = {**own(server), "Sec-Fetch-Site": site}
    for path in ("/", "/parts", "/events"):
        for more in ({}, {"Sec-Fetch-Mode": "navigate"}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "document"}):
            assert asked(server, path, "HEAD", headers | more)[0] == status
    framed = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert asked(server, "/", "HEAD", headers | framed)[0] == status
    opened = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert asked(server, "/", "HEAD", headers | opened)[0] == 200
    assert asked(server, "/events", "HEAD", headers | opened)[0] == status


REFUSED = b"Open the address that megarl watch printed at its start.\n"


def test_the_printed_address_gives_a_cookie_with_which_everything_is_answered(server: WatchServer) -> None:
    assert server.address == f"http://127.0.0.1:{server.server_address[1]}/?token={server.token}"
    host = {"Host": f"localhost:{server.server_address[1]}"}
    for path in ("/", "/parts", "/events", "/nothing", f"/parts?token={server.token}", "/?token=", "/?token=%ff%00"):
        status, headers, body = asked(server, path, headers=host)
        assert (status, body, headers["Set-Cookie"]) == (403, REFUSED, None), path
    status, headers, _ = asked(server, f"/?token={server.token}", headers=host)
    assert (status, headers["Location"]) == (303, "/")
    cookie, *attributes = headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(attributes)
    others = 'a={"b": 1}; =; megarl-watch-1=x'  # ports of a machine share their cookies
    assert asked(server, "/", headers={**host, "Cookie": f"{others}; {cookie}; \xe4"})[0] == 200
    assert asked(server, "/nothing", headers={**host, "Cookie": cookie})[0] == 404
    for wrong in (
        cookie[:-1],
        f"{cookie}x",
        f"x{cookie}",
        cookie.partition("=")[0],
        f"{cookie[:-1]}\xe4",
        "",
        "x" * 9000,
    ):
        assert asked(server, "/", headers={**host, "Cookie": wrong})[0::2] == (403, REFUSED), wrong


def test_the_address_and_the_cookie_of_an_earlier_start_are_refused(server: WatchServer, folder: Path) -> None:
    with watched(LivePage(folder)) as again:
        assert asked(again, f"/?token={server.token}", headers={"Host": "localhost"})[0] == 403
        assert asked(again, "/events", headers=own(server))[0::2] == (403, REFUSED)
        assert asked(again, "/parts", headers=own(again))[0] == 200


def test_it_listens_to_this_machine_alone_and_lets_the_page_reach_nothing_else(server: WatchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    _, headers, body = asked(server, "/")
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    (meta,) = parse(body.decode()).all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert (meta.attributes["content"] or "").endswith("; connect-src 'self'")
    assert "Access-Control-Allow-Origin" not in headers


def test_a_port_that_is_used_is_refused_with_a_remedy(server: WatchServer, folder: Path) -> None:
    port = server.server_address[1]
    with pytest.raises(ConfigError) as refused:
        WatchServer(LivePage(folder), port)
    assert (refused.value.key, refused.value.value, refused.value.offers) == ("port", port, {"port": [0]})


# --- what it tells ----------------------------------------------------------------------------------------------------


def test_every_browser_hears_of_a_new_phase_and_gets_the_parts_that_it_changes(
    server: WatchServer, folder: Path
) -> None:
    with closing(Stream(server)) as one, closing(Stream(server)) as other:
        before = [one.next(), other.next()]
        assert before[0] == before[1]
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.625}, 4)
        after = one.until("phase 4: rollout/score 0.625")
        assert other.until("phase 4") == after
    changed = {name for name, version in after["parts"].items() if before[0]["parts"].get(name) != version}
    assert {"metric-rollout-score", "head", "values"} <= changed
    assert not {"metric-train-loss", "configuration", "samples"} & changed
    parts = json.loads(asked(server, "/parts?id=metric-rollout-score&id=samples&id=nothing&id=curves")[2])
    assert list(parts) == ["metric-rollout-score", "samples"]
    version, html = parts["metric-rollout-score"]
    assert version == after["parts"]["metric-rollout-score"]
    assert parse(html).with_class("last")[0].text() == "0.625 at phase 4"
    assert parts["samples"][1] == ""  # there are none


def test_a_browser_that_is_gone_or_beyond_the_limit_does_not_keep_others_from_the_run(
    server: WatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "_MOST_STREAMS", 2)
    monkeypatch.setattr(served, "_ALIVE_S", 0.02)
    gone = Stream(server)
    gone.next()
    with closing(Stream(server)) as there:
        there.next()
        assert asked(server, "/events")[0] == 503
        gone.close()
        pause = threading.Event()
        for _ in range(1000):  # until writing to the one that is gone has failed
            if asked(server, "/events", "HEAD")[0] == 200:
                break
            pause.wait(0.02)
        else:
            pytest.fail("the stream of a browser that is gone still counts")
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 4)
        there.until("phase 4")


def test_what_one_page_brings_up_to_date_is_told_to_the_others_at_once(
    server: WatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that looks at the folder is not needed for that, and no page waits for its next comment."""
    monkeypatch.setattr(served, "POLL_S", LIMIT_S * 9)
    monkeypatch.setattr(served, "_ALIVE_S", LIMIT_S * 9)
    with closing(Stream(server)) as one:
        one.next()
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 4)
        asked(server, "/")
        one.until("phase 4")
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 5)
        with closing(Stream(server)) as other:
            other.until("phase 5")
            one.until("phase 5")


def test_a_refresh_that_fails_is_told_and_the_next_change_is_shown(
    server: WatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: object) -> None:
        raise RuntimeError("no luck")

    with closing(Stream(server)) as stream:
        assert stream.next()["problem"] == ""
        monkeypatch.setattr(live, "findings_of", fail)
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 4)
        assert "RuntimeError: no luck" in stream.next()["problem"]
        assert asked(server, "/")[0] == 200
        monkeypatch.undo()
        MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 5)
        assert stream.until("phase 5")["problem"] == ""


def test_a_folder_that_vanishes_is_told(server: WatchServer, folder: Path) -> None:
    with closing(Stream(server)) as stream:
        assert stream.next()["problem"] == ""
        folder.rename(folder.with_name("elsewhere"))
        assert "gone" in stream.next()["problem"]
    assert asked(server, "/")[0] == 200


def test_the_run_folder_is_only_read(server: WatchServer, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}
    with closing(Stream(server)) as stream:
        names = stream.next()["parts"]
    asked(server, "/")
    asked(server, "/parts?" + "&".join(f"id={name}" for name in names))
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))} == before


def test_what_is_no_http_does_not_end_the_server(server: WatchServer) -> None:
    for sent in (
        b"\x16\x03\x01\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET " + b"a" * 70_000,
        b"",
    ):
        with socket.create_connection(server.server_address[:2], timeout=LIMIT_S) as connection:
            connection.sendall(sent)
    many = "&".join(f"id={index}" for index in range(1001))
    assert asked(server, f"/parts?{many}")[0] == 400
    assert asked(server, "/")[0] == 200


def test_the_server_reads_nothing_while_nobody_listens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "POLL_S", 0.01)
    live = LivePage(folder)
    reads: list[int] = []
    refresh = live.refresh
    monkeypatch.setattr(live, "refresh", lambda: bool(reads.append(1)) or refresh())
    with watched(live) as server:
        threading.Event().wait(0.3)
        assert reads == []
        with closing(Stream(server)) as stream:
            stream.next()
            MetricsFile(folder / "metrics.csv").log_metrics({"rollout/score": 0.5}, 4)
            stream.until("phase 4")
    assert reads
