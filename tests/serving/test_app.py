"""A server over real connections: right scores, clear refusals, and nothing that a client sends ends it."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megarl.rewards.reader import RewardReader
from megarl.tokenizers import ByteTokenizer
from tests.serving.standins import LONGEST, HashScorer, Running, ask, question, score_of, serving, wanted


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(batch_size=8, max_wait=0.001, max_texts=50, max_request_bytes=20_000, max_requests=80) as running:
        yield running


def counted(server: Running, line: str) -> float:
    """The value of a metric."""
    text = ask(server.port, method="GET", path="/metrics")[1]
    return sum(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line))


def words(draw: random.Random, count: int) -> list[str]:
    return ["".join(draw.choice("abcdefgh é€𝄞") for _ in range(draw.randint(0, 30))) for _ in range(count)]


def test_answers_have_the_scores_of_their_texts_and_the_model(server: Running) -> None:
    asked = question(["a", "b", ""], ["x", "", "y"])
    assert ask(server.port, asked) == (200, {"scores": wanted(asked), "model": "m1"})
    assert ask(server.port, question([], [])) == (200, {"scores": [], "model": "m1"})
    talk = [{"role": "user", "content": "hello"}]
    status, answer = ask(server.port, {"conversations": [talk], "outputs": ["hi"]})
    tokens = server.reader.of_messages(talk, "hi", "")
    assert (status, answer["scores"]) == (200, [score_of(tokens)])
    assert ask(server.port, method="GET", path="/health") == (200, {"status": "ok", "model": "m1"})


def test_64_clients_at_once_get_their_own_scores(server: Running) -> None:
    def client(number: int) -> bool:
        draw = random.Random(number)
        for _ in range(4):
            count = draw.randint(1, 12)
            asked = question(words(draw, count), words(draw, count))
            if ask(server.port, asked) != (200, {"scores": wanted(asked), "model": "m1"}):
                return False
        return True

    server.scorer.batches.clear()
    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(client, range(64)))
    assert max(server.scorer.batches) == 8, "requests share batches"


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "the body"),
    "nothing": (b"", "the body"),
    "no UTF-8": (b'{"prompts": ["\xff"], "outputs": ["a"]}', "the body"),
    "a list": ([], "the body"),
    "nested": (b'{"prompts": ' + b"[" * 9000 + b"]" * 9000 + b', "outputs": []}', "the body"),
    "an endless number": (b'{"prompts": ' + b"1" * 9000 + b"}", "the body"),
    "neither": ({"outputs": ["a"]}, "prompts"),
    "both": ({"prompts": ["a"], "conversations": [[]], "outputs": ["a"]}, "prompts"),
    "no outputs": ({"prompts": ["a"]}, "outputs"),
    "another key": ({**question(["a"], ["b"]), "temperature": 1}, "temperature"),
    "no list": ({"prompts": "a", "outputs": ["a"]}, "prompts"),
    "fewer outputs": (question(["a", "b"], ["a"]), "outputs"),
    "a number": ({"prompts": ["a", "b"], "outputs": ["a", 1]}, "outputs[1]"),
    "null": ({"prompts": ["a", None], "outputs": ["a", "b"]}, "prompts[1]"),
    "half a character": (b'{"prompts": ["a"], "outputs": ["\\ud800"]}', "outputs[0]"),
    "half a character in a message": (
        b'{"conversations": [[{"role": "user", "content": "", "name": "\\udfff"}]], "outputs": ["a"]}',
        "conversations[0]",
    ),
    "too long": (question(["a", "b"], ["a", "b" * LONGEST]), "prompts[1]"),
    "too many": (question(["a"] * 51, ["b"] * 51), "outputs"),
    "no turns": ({"conversations": [[]], "outputs": ["a"]}, "conversations[0]"),
    "an unknown role": ({"conversations": [[{"role": "x", "content": "y"}]], "outputs": ["a"]}, "conversations[0]"),
    "no content": ({"conversations": [[{"role": "user"}]], "outputs": ["a"]}, "conversations[0]"),
    "a text as a turn": ({"conversations": [["a"]], "outputs": ["a"]}, "conversations[0]"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_scored_is_refused_with_its_place(what: str, server: Running) -> None:
    body, where = BAD[what]
    status, answer = ask(server.port, body)
    assert (status, answer.get("where")) == (422, where), answer
    assert answer["error"].startswith(where)
    assert "Traceback" not in answer["error"]


def test_other_paths_and_methods_are_refused(server: Running) -> None:
    assert ask(server.port, question(["a"], ["b"]), path="/")[0] == 404
    assert ask(server.port, method="GET")[0] == 405
    assert ask(server.port, method="GET", path="/docs")[0] == 404
    status, page = ask(server.port, method="GET", path="/openapi.json")
    described = page["paths"]["/score"]["post"]
    assert status == 200
    assert {"200", "401", "413", "422", "503"} <= described["responses"].keys()
    assert len(described["requestBody"]["content"]["application/json"]["schema"]["oneOf"]) == 2


def test_a_texts_surprise_for_a_tokenizer_is_the_clients_error() -> None:
    class Surprised:
        def of_text(self, prompt: str, output: str, where: str) -> list[int]:
            raise RuntimeError("what is this?")

        of_messages = of_text

    with serving(reader=Surprised()) as server:
        status, answer = ask(server.port, question(["a"], ["b"]))
    assert (status, answer["where"]) == (422, "prompts[0]")


def test_a_text_that_is_too_long_names_its_number_and_the_servers_own_key() -> None:
    source: Any = SimpleNamespace(
        tokenizer=None,
        chat_template=None,
        model=SimpleNamespace(max_positions=9, encoder=None),
        vocab_size=ByteTokenizer().size,
        score_reads_eos=True,
    )
    with serving(reader=RewardReader(source, ByteTokenizer(), key="model.path")) as server:
        status, answer = ask(server.port, question(["a"] * 4, ["b", "b" * 8, "b" * 9, "b"]))
    assert (status, answer["where"]) == (422, "prompts[2]")
    assert "model.path" in answer["error"]
    assert "reward.model" not in answer["error"]


def test_a_large_request_is_refused_without_being_held(server: Running) -> None:
    """Of 100 MB, whether its size is said or not."""
    block = b"x" * 2**20
    before = psutil.Process().memory_info().rss
    peak = before

    def blocks() -> Iterator[bytes]:
        nonlocal peak
        for _ in range(100):
            peak = max(peak, psutil.Process().memory_info().rss)
            yield block

    for headers in ({}, {"Content-Length": str(100 * 2**20)}):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/score", blocks(), headers, encode_chunked=not headers)
        assert connection.getresponse().status == 413
        connection.close()
    assert peak - before < 30 * 2**20
    assert ask(server.port, question(["a"], ["b"]))[0] == 200


def test_a_token_is_needed_where_there_is_one() -> None:
    with serving(token="s3cret") as server:
        asked = question(["a"], ["b"])
        right = {"Authorization": "Bearer s3cret"}
        assert ask(server.port, asked, headers=right)[0] == 200
        for sent in ("Bearer s3cre", "Bearer s3crett", "s3cret", "Basic s3cret", "", "Bearer é"):
            status, answer = ask(server.port, asked, headers={"Authorization": sent})
            assert status == 401, sent
            assert "s3cret" not in json.dumps(answer)
        assert ask(server.port, asked)[0] == 401
        assert ask(server.port, method="GET", path="/metrics")[0] == 401
        assert ask(server.port, method="GET", path="/metrics", headers=right)[0] == 200
        assert ask(server.port, method="GET", path="/health")[0] == 200
        assert ask(server.port, method="GET", path="/nowhere")[0] == 401


def test_counts_are_those_of_what_was_sent() -> None:
    with serving(max_texts=3) as server:
        for count in (1, 2, 3, 4):
            ask(server.port, question(["a"] * count, ["b"] * count))
        ask(server.port, path='/a"b\n'.replace("\n", "%0A"))
        assert counted(server, 'megarl_requests_total{path="/score",status="200"}') == 3
        assert counted(server, 'megarl_errors_total{status="422"}') == 1
        assert counted(server, 'megarl_requests_total{path="other",status="404"}') == 1
        assert counted(server, "megarl_texts_total") == 6
        assert counted(server, "megarl_batches_total") == len(server.scorer.batches) == 3
        assert counted(server, "megarl_queue_length") == 0
        assert counted(server, "megarl_model_seconds_total") > 0


def test_more_requests_than_allowed_are_asked_to_come_later() -> None:
    with serving(HashScorer(seconds=0.5), max_requests=2, batch_size=1) as server, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: ask(server.port, question(["a"], ["b"]))[0], range(6)))
    assert set(found) == {200, 503}
    assert found.count(200) >= 2


def test_a_request_that_never_ends_is_refused_in_time() -> None:
    with serving(read_timeout=0.5) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        slow.settimeout(10)
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_the_texts_of_a_client_that_left_are_not_scored() -> None:
    with serving(HashScorer(seconds=0.3), batch_size=1, max_wait=0) as server:
        first = threading.Thread(target=ask, args=(server.port, question(["a"], ["b"])))
        first.start()
        time.sleep(0.1)
        body = json.dumps(question(["c"] * 20, ["d"] * 20)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as leaving:
            leaving.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            time.sleep(0.1)
        first.join()
        assert ask(server.port, question(["e"], ["f"]))[0] == 200
        assert len(server.scorer.batches) < 6


def test_a_server_that_stops_answers_or_refuses_what_is_open() -> None:
    with serving(HashScorer(seconds=0.2), batch_size=1, max_wait=0) as server, ThreadPoolExecutor(4) as pool:
        port = server.port
        asked = [question([letter], [letter]) for letter in "abcd"]
        answers = [pool.submit(ask, port, one) for one in asked]
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            half.settimeout(10)
            time.sleep(0.1)
            server.batcher.close()
            assert half.recv(100).startswith(b"HTTP/1.1 503 ")
        assert ask(port, question(["e"], ["f"]))[0] == 503
        assert ask(port, method="GET", path="/health")[0] == 503
        for one, answer in zip(asked, answers, strict=True):
            assert answer.result() == (200, {"scores": wanted(one), "model": "m1"})


def test_a_model_that_fails_refuses_what_is_open() -> None:
    scorer = HashScorer(seconds=0.2)
    scorer.problem = RuntimeError("no memory")
    with serving(scorer) as server:
        assert ask(server.port, question(["a"], ["b"]))[0] == 503
        assert server.failure is scorer.problem


def test_a_score_that_is_no_number_is_never_an_answer() -> None:
    scorer = HashScorer()
    scorer.value = float("nan")
    with serving(scorer) as server:
        status, answer = ask(server.port, question(["a"], ["b"]))
        assert (status, "scores" in answer) == (500, False)


# --- whatever a client may send -----------------------------------------------------------------------------------


def anything(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kinds = ["text", "number", "null", "truth", *(["list", "object"] * 2 if depth < 4 else [])]
    kind = draw.choice(kinds)
    if kind == "text":
        return "".join(chr(draw.choice([0, 10, 65, 0xE9, 0x2028, 0xD800, 0x1F600, 0xFDD0])) for _ in range(4))
    if kind == "number":
        return draw.choice([0, -1, 1e308, float("nan"), float("inf"), 2**70, 0.5])
    if kind == "list":
        return [anything(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    if kind == "object":
        keys = ("role", "content", "prompts", "outputs", "tool_calls", "", "x")
        return {draw.choice(keys): anything(draw, depth + 1) for _ in range(draw.randint(0, 4))}
    return draw.choice([True, False]) if kind == "truth" else None


def malformed(draw: random.Random) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a request that is wrong in some way, or by chance is not."""
    question: Any = {
        draw.choice(["prompts", "prompts", "conversations", "x"]): anything(draw),
        draw.choice(["outputs", "outputs", "output"]): anything(draw),
    }
    shape = draw.choice(["turns", "texts", "mutated", "whatever", "bytes", "cut"])
    if shape == "turns":
        turn = {
            "role": draw.choice(["user", "tool", "assistant", 1]),
            "content": anything(draw, 4),
            "x": anything(draw),
        }
        question = {"conversations": [[turn] * draw.randint(0, 3)], "outputs": ["a"]}
    elif shape == "texts":
        question = {"prompts": [anything(draw, 4)] * 2, "outputs": ["a" * draw.choice([1, 500]), anything(draw, 4)]}
    elif shape == "whatever":
        question = anything(draw)
    body = json.dumps(question).encode()
    if shape == "mutated":
        body = bytes(draw.choice(b'{}[]",:\\u0\xff\x00') if draw.random() < 0.05 else byte for byte in body)
    elif shape == "bytes":
        body = draw.randbytes(draw.randint(0, 300))
    elif shape == "cut":
        body = body[: draw.randint(0, len(body))]
    headers = {"Content-Type": draw.choice(["application/json", "text/html", "multipart/form-data", "\x7f"])}
    if draw.random() < 0.2:
        headers[draw.choice(["Content-Encoding", "Accept", "Expect", "Authorization"])] = draw.choice(["gzip", "é", ""])
    return body, headers


def test_no_request_ends_the_server_or_is_answered_by_500(server: Running) -> None:
    draw, found = random.Random(5), set()
    for _ in range(250):
        body, headers = malformed(draw)
        status, answer = ask(server.port, body, headers=headers)
        assert status in (200, 422), (status, answer, body, headers)
        assert "Traceback" not in str(answer)
        found.add(status)
    assert 422 in found
    assert ask(server.port, question(["a"], ["b"]))[0] == 200
    assert server.failure is None


def test_no_bytes_on_a_connection_end_the_server(server: Running) -> None:
    draw = random.Random(6)
    lines = [b"POST /score HTTP/1.1", b"GET / HTTP/9.9", b"Content-Length: -1", b"Content-Length: 5", b"Host: a", b""]
    lines += [b"Transfer-Encoding: chunked", b"zz", b"Expect: 100-continue", b"Content-Length: 99999999999999999999"]
    for _ in range(60):
        sent = b"\r\n".join(draw.choice(lines) for _ in range(draw.randint(1, 8))) + draw.randbytes(draw.randint(0, 9))
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.settimeout(0.05)
            connection.sendall(sent)
            try:
                answer = connection.recv(1000)
            except (TimeoutError, ConnectionResetError):
                answer = b""
            assert b" 500 " not in answer, (sent, answer)
    assert ask(server.port, question(["a"], ["b"]))[0] == 200
