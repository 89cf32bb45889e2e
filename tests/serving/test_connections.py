"""Connections that send slowly or not at all, and many large requests, never fill a server."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.standins import HashScorer, Running, ask, question, serving, wanted


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ends_within(connection: socket.socket, seconds: float, drip: bytes = b"") -> bool:
    """Return whether the server closes a connection in time, while a byte after the other is sent."""
    deadline = time.monotonic() + seconds
    connection.settimeout(0.1)
    while time.monotonic() < deadline:
        try:
            connection.sendall(drip[:1])
            drip = drip[1:]
            if connection.recv(1000) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def open_connections(server: Running) -> int:
    return len(server.service.http._server.server_state.connections)


def test_headers_that_never_end_close_their_connection() -> None:
    asked = question(["a"], ["b"])
    with serving(read_timeout=0.5) as server:
        for first, drip in ((b"", b""), (b"POST /score HTTP/1.1\r\n", b""), (b"GET / HTTP/1.1\r\nX: ", b"x" * 1000)):
            with socket.create_connection(("127.0.0.1", server.port)) as slow:
                slow.sendall(first)
                assert ends_within(slow, 5, drip), (first, drip)
        assert ask(server.port, asked) == (200, {"scores": wanted(asked), "model": "m1"})


def test_a_second_request_whose_headers_never_end_closes_the_connection() -> None:
    with serving(read_timeout=0.5) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b" 200 " in slow.recv(1000)
        assert ends_within(slow, 4, b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000)


def test_a_content_that_nobody_reads_and_that_never_ends_closes_the_connection() -> None:
    with serving(read_timeout=0.5) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert ends_within(slow, 5, b"x" * 999)


def test_a_request_that_is_answered_slowly_keeps_its_connection() -> None:
    asked = question(["a"], ["b"])
    with serving(HashScorer(seconds=1.0), read_timeout=0.3) as server:
        assert ask(server.port, asked) == (200, {"scores": wanted(asked), "model": "m1"})


def test_more_connections_than_allowed_are_refused_and_the_others_stay() -> None:
    asked = question(["a"], ["b"])
    with serving(max_requests=2, read_timeout=60) as server:
        opened = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        try:
            assert wait_until(lambda: open_connections(server) == 20)
            with socket.create_connection(("127.0.0.1", server.port)) as late:
                late.settimeout(5)
                assert late.recv(100).startswith(b"HTTP/1.1 503 ")
            opened[0].sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert opened[0].recv(100).startswith(b"HTTP/1.1 200 ")
            opened.pop().close()
            assert wait_until(lambda: open_connections(server) < 20)
            assert ask(server.port, asked)[0] == 200
        finally:
            for connection in opened:
                connection.close()


def test_requests_that_are_large_together_are_asked_to_come_later() -> None:
    """Of four requests of 6000 bytes, two fit; afterwards there is room again."""
    asked = question(["a" * 100] * 50, ["b"] * 50)
    limits = {"max_request_bytes": 8000, "max_open_bytes": 13_000}
    with serving(HashScorer(seconds=0.5), batch_size=64, **limits) as server, ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(lambda _: ask(server.port, asked)[0], range(4)))
        assert found == [200, 200, 503, 503]
        assert ask(server.port, asked)[0] == 200


def test_a_request_that_is_not_scored_gives_its_bytes_back() -> None:
    bad = question(["a" * 3000], [1])  # type: ignore[list-item]
    with serving(max_request_bytes=4000, max_open_bytes=4000, read_timeout=0.3) as server:
        for _ in range(3):
            assert ask(server.port, bad)[0] == 422
            with socket.create_connection(("127.0.0.1", server.port)) as half:
                half.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 3500\r\n\r\n" + b"x" * 3000)
                half.settimeout(10)
                assert half.recv(100).startswith(b"HTTP/1.1 408 ")
        assert ask(server.port, question(["a"], ["b"]))[0] == 200


def test_a_text_of_more_tokens_than_the_server_takes_is_refused_with_its_place() -> None:
    with serving(max_tokens=10) as server:
        assert ask(server.port, question(["a" * 4], ["b" * 5]))[0] == 200
        status, answer = ask(server.port, question(["a", "a" * 5], ["b", "b" * 5]))
        assert (status, answer["where"]) == (422, "prompts[1]")


@pytest.mark.parametrize("count", [1, 100])
def test_connections_that_come_and_go_leave_nothing(count: int) -> None:
    with serving() as server:
        for _ in range(count):
            socket.create_connection(("127.0.0.1", server.port)).close()
        assert wait_until(lambda: open_connections(server) == 0)
