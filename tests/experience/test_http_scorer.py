"""Reward servers that are slow, wrong, dead or another's: scores are right or there is one clear error."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config.sections.reward import RewardCallsConfig, RewardConfig
from megarl.data.prompts import Prompt
from megarl.errors import ConfigError, RewardError
from megarl.experience import reward_servers
from megarl.experience.http_scorer import HttpScorer
from megarl.experience.journal import Journal
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.rewards.scores import Scores
from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Rollout
from megarl.tokenizers import ByteTokenizer
from tests.refusals import refused
from tests.worlds import Worlds

TOKENIZER = ByteTokenizer()
ALONE: Any = SimpleNamespace(rank=0, run_on_rank0=lambda work: work())
TALK = ({"role": "user", "content": "hi"},)
PROMPTS = [Prompt(f"p{n}", tuple(TOKENIZER.encode(f"p{n}")), {}, messages=TALK if n == 3 else ()) for n in range(8)]
ROLLOUTS = [
    Rollout(n, s, TOKENIZER.encode(f"p{n}"), [*TOKENIZER.encode(f"r{n}{s}"), TOKENIZER.eos_id], [0.0] * 4, "eos")
    for n in range(8)
    for s in range(2)
]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_servers, "_REST_S", 0.02)
    monkeypatch.setattr(reward_servers, "_SLACK_S", 0.2)
    monkeypatch.setattr(reward_servers, "TICK_S", 0.05)


def score_of(prompt: Any, output: str) -> float:
    return sum(place * ord(letter) for place, letter in enumerate(output, 1)) + (
        0.5 if isinstance(prompt, str) else 0.25
    )


WANTED = [score_of(list(TALK) if n == 3 else f"p{n}", f"r{n}{s}") for n in range(8) for s in range(2)]


class StandIn:
    """A server that scores, or does what `act` does instead, and remembers the questions."""

    def __init__(self, act: Callable[[StandIn, Any, dict[str, Any]], bool], model: str = "m1") -> None:
        self.act, self.model = act, model
        self.questions: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.ended = threading.Event()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.headers.append(dict(self.headers))
                if question["outputs"]:
                    stand_in.questions.append(question)
                if not stand_in.act(stand_in, self, question):
                    answer(self, 200, {"scores": stand_in.scores(question), "model": stand_in.model})

            def log_message(self, *_: Any) -> None:
                """The test's output is not a log."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def scores(self, question: dict[str, Any]) -> list[Any]:
        asked = question.get("prompts", question.get("conversations"))
        return [score_of(prompt, output) for prompt, output in zip(asked, question["outputs"], strict=True)]

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


def answer(handler: Any, status: int, content: Any, kind: str = "application/json") -> bool:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
    return True


def well(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    return False


def badly(status: int, content: Any) -> Callable[[StandIn, Any, dict[str, Any]], bool]:
    """Answer every question with this; greet as usual."""
    return lambda server, handler, question: bool(question["outputs"]) and answer(handler, status, content)


def instead(change: Callable[[list[float]], Any]) -> Callable[[StandIn, Any, dict[str, Any]], bool]:
    """Answer every question with changed scores."""

    def act(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        changed = change(server.scores(question))
        return bool(question["outputs"]) and answer(handler, 200, {"scores": changed, "model": server.model})

    return act


def refusing(*outputs: str, most: int = 100) -> Callable[[StandIn, Any, dict[str, Any]], bool]:
    """Refuse every question with one of these outputs, and those of more texts than `most`."""

    def act(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        bad = [row for row, output in enumerate(question["outputs"]) if output in outputs]
        if not bad and len(question["outputs"]) <= most:
            return False
        return answer(handler, 422, {"error": f"prompts[{bad[0]}]: too long"} if bad else {"error": "too many"})

    return act


def silently(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    return bool(question["outputs"]) and (server.ended.wait(30) or True)


def abruptly(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    if not question["outputs"]:
        return False
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def drop_by_drop(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    """Answer a byte at a time, each well within the time-out."""
    if not question["outputs"]:
        return False
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 1000:
        if server.ended.wait(0.1):
            break
        try:
            handler.wfile.write(bytes([byte]))
        except OSError:
            break
    return True


def endlessly(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    """Answer more than anybody can hold."""
    if not question["outputs"]:
        return False
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while not server.ended.is_set():
            handler.wfile.write(b"[" * 2**16)
    except OSError:
        return True
    return True


Serve = Callable[..., StandIn]


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[StandIn] = []

    def start(act: Any = well, model: str = "m1") -> StandIn:
        servers.append(StandIn(act, model))
        return servers[-1]

    yield start
    for server in servers:
        if not server.ended.is_set():
            server.close()


def make(*servers: StandIn | str, journal: Journal | None = None, **calls: Any) -> HttpScorer:
    urls = [server if isinstance(server, str) else server.url for server in servers]
    settings = RewardConfig(calls=RewardCallsConfig(**{"timeout": 5.0, "batch_size": 3, **calls}))
    return HttpScorer(settings, urls, TOKENIZER, ALONE, journal=journal)


def score(scorer: HttpScorer, phase: int = 0) -> Scores:
    return scorer.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=phase)


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_calls_are_shared_out_and_scores_come_back_in_order(serve: Serve) -> None:
    servers = [serve(lambda *_: time.sleep(0.05)), serve(lambda *_: time.sleep(0.05))]
    scorer = make(*servers)
    scores = score(scorer)
    assert scores == Scores(WANTED)  # type: ignore[arg-type]
    assert scorer.fingerprint == "m1"
    assert all(len(server.questions) >= 2 for server in servers)
    asked = [question for server in servers for question in server.questions]
    assert {len(question["outputs"]) for question in asked} == {3, 2}  # 14 texts and a conversation's 2 responses
    (talks,) = [question for question in asked if "conversations" in question]
    assert talks == {"conversations": [list(TALK)] * 2, "outputs": ["r30", "r31"]}


def test_without_a_size_of_calls_every_server_gets_one(serve: Serve) -> None:
    servers = [serve(lambda *_: time.sleep(0.05)), serve(lambda *_: time.sleep(0.05))]
    plain = [rollout for rollout in ROLLOUTS if rollout.prompt_id != 3]
    make(*servers, batch_size=None).score(PROMPTS, plain, stream=TRAINING, phase=0)
    assert [[len(question["outputs"]) for question in server.questions] for server in servers] == [[7], [7]]


def test_without_a_size_of_calls_none_is_larger_than_256(serve: Serve) -> None:
    server = serve()
    many = [rollout for rollout in ROLLOUTS if rollout.prompt_id != 3] * 50
    scores = make(server, batch_size=None).score(PROMPTS, many, stream=TRAINING, phase=0)
    assert scores.values == [value for row, value in enumerate(WANTED) if row // 2 != 3] * 50
    assert [len(question["outputs"]) for question in server.questions] == [256, 256, 188]


def test_scores_are_in_the_journal_and_are_asked_once_for_a_model(serve: Serve, tmp_path: Path) -> None:
    server = serve(refusing("r31"))
    with refused(RewardError, key="reward.url"):
        score(make(server, journal=Journal(tmp_path, "reward")))
    server.act = well
    asked = len(server.questions)
    assert score(make(server, journal=Journal(tmp_path, "reward"))).values == WANTED
    assert [question["outputs"] for question in server.questions[asked:]] == [["r31"]], "all others have a score"
    server.model = "m2"
    assert score(make(server, journal=Journal(tmp_path, "reward"))).values == WANTED
    assert len([one for question in server.questions[asked:] for one in question["outputs"]]) == 1 + 16


WRONG: dict[str, tuple[Any, str]] = {
    "status 500": (badly(500, {"error": "no memory"}), "no memory"),
    "a page": (badly(200, b"<html>Welcome"), "Welcome"),
    "a page of a proxy": (badly(502, b"<html>Bad gateway"), "502"),
    "a redirection": (badly(302, b""), "302"),
    "nothing": (badly(200, b""), "JSON"),
    "a list": (badly(200, []), "JSON"),
    "other keys": (badly(200, {"score": [1]}), "score"),
    "no list": (instead(lambda scores: 1.0), "scores"),
    "fewer scores": (instead(lambda scores: scores[:-1]), "scores"),
    "more scores": (instead(lambda scores: [*scores, 0.0]), "scores"),
    "NaN": (instead(lambda scores: [float("nan"), *scores[1:]]), "nan"),
    "infinity": (instead(lambda scores: [float("inf"), *scores[1:]]), "inf"),
    "null": (instead(lambda scores: [None, *scores[1:]]), "null"),
    "a text": (instead(lambda scores: ["1", *scores[1:]]), "'1'"),
    "true": (instead(lambda scores: [True, *scores[1:]]), "True"),
    "a closed connection": (abruptly, ""),
    "silence": (silently, "0.5"),
    "a trickle": (drop_by_drop, "0.5"),
    "too much": (endlessly, "bytes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_that_is_no_scores_ends_in_one_line_that_names_the_server(what: str, serve: Serve) -> None:
    act, said = WRONG[what]
    server = serve(act)
    scorer = make(server, retries=1, timeout=0.5 if act in (silently, drop_by_drop) else 5.0)
    began = time.monotonic()
    offers = {"reward.calls.on_error": ["drop"]}
    with refused(RewardError, key="reward.url", value=[server.url], offers=offers, names=(server.url, said)):
        score(scorer)
    assert time.monotonic() - began < 20
    assert len(server.questions) == 2, "the first call is asked twice"


@pytest.mark.parametrize("what", WRONG)
def test_another_server_takes_over(what: str, serve: Serve) -> None:
    act, _ = WRONG[what]
    wrong, right = serve(act), serve()
    # More tries than a test of one server has: on a busy machine the right one may be late, too.
    scorer = make(wrong, right, timeout=0.5 if act in (silently, drop_by_drop) else 5.0, retries=9)
    scores = score(scorer)
    assert scores.values == WANTED
    assert scores.failed_calls == scores.repeated_calls >= 1


def test_a_score_that_is_none_drops_its_sample_alone(serve: Serve) -> None:
    server = serve(instead(lambda scores: [None if s in WANTED[:2] else s for s in scores]))
    scores = score(make(server, on_error="drop", batch_size=4))
    assert scores.values == [None, None, *WANTED[2:]]
    assert (scores.dropped, scores.failed_calls, scores.repeated_calls) == (2, 2, 1)
    counts = sorted(len(question["outputs"]) for question in server.questions)
    assert counts == [2, 2, 2, 4, 4, 4], "only what has no score is asked again"


def test_a_refused_response_alone_has_no_score_and_the_requests_add_up(serve: Serve) -> None:
    for bad in (["r00"], ["r21"], ["r71"], ["r10", "r61"]):
        server = serve(refusing(*bad))
        scores = score(make(server, on_error="drop", batch_size=14, retries=5))
        outputs = [f"r{n}{s}" for n in range(8) for s in range(2)]
        wanted = [None if output in bad else value for output, value in zip(outputs, WANTED, strict=True)]
        assert scores.values == wanted, bad
        assert scores.dropped == len(bad)
        refused_calls = [question for question in server.questions if set(question["outputs"]) & set(bad)]
        assert scores.failed_calls == len(refused_calls)
        assert len(server.questions) == 2 + scores.repeated_calls  # a call of texts, and one of conversations
        assert len(server.questions) <= 2 + 8 * len(bad)


def test_a_refused_response_is_named_with_its_record(serve: Serve) -> None:
    server = serve(refusing("r51"))
    scorer = make(server, batch_size=14, retries=5)
    prompts = [replace(prompt, where=f"a.jsonl:{n}") for n, prompt in enumerate(PROMPTS)]
    offers = {"reward.calls.on_error": ["drop"]}
    names = (server.url, "422", "prompts[0]", "a.jsonl:5")
    with refused(RewardError, key="reward.url", where="a.jsonl:5", offers=offers, names=names):
        scorer.score(prompts, ROLLOUTS, stream=TRAINING, phase=0)
    assert server.questions[-1]["outputs"] == ["r51"]


def test_a_server_that_takes_fewer_texts_gets_fewer(serve: Serve) -> None:
    server = serve(refusing(most=4))
    began = time.monotonic()
    assert score(make(server, batch_size=14)).values == WANTED
    assert time.monotonic() - began < 10, "a server that refuses does not rest"


def test_a_server_that_refuses_everything_gets_a_bounded_number_of_requests(serve: Serve) -> None:
    server = serve(badly(422, {"error": "prompts[1]: too long", "where": "prompts[1]"}))
    with refused(RewardError, key="reward.url", names=("422", "prompts[1]")):
        score(make(server, retries=5, batch_size=14))
    assert len(server.questions) <= 6, "the first response that is refused ends the run"
    server.questions.clear()
    scores = score(make(server, on_error="drop", retries=5, batch_size=14))
    assert scores.dropped == len(ROLLOUTS)
    assert len(server.questions) == 2 + scores.repeated_calls <= 2 * len(ROLLOUTS) + 4


def test_what_is_scored_before_a_call_is_split_is_kept(serve: Serve) -> None:
    """Of one call, a response gets no number at first, and another is refused."""
    server = serve()

    def act(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        if question["outputs"] and len(server.questions) == 1:
            scores = [None if output in ("r00", "r01") else 7.0 for output in question["outputs"]]
            return answer(handler, 200, {"scores": scores, "model": "m1"})
        return refusing("r01")(server, handler, question)

    server.act = act
    plain = [rollout for rollout in ROLLOUTS if rollout.prompt_id != 3]
    scores = make(server, on_error="drop", batch_size=14).score(PROMPTS, plain, stream=TRAINING, phase=0)
    assert scores.values == [WANTED[0], None, *[7.0] * 12]
    assert [len(question["outputs"]) for question in server.questions] == [14, 2, 1, 1]
    assert (scores.failed_calls, scores.repeated_calls) == (3, 3)


def test_a_wrong_token_ends_the_run_at_its_start_and_is_never_shown(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGARL_REWARD_TOKEN", "s3cret\n")

    def guarded(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        right = handler.headers["Authorization"] == "Bearer s3cret"
        return not right and answer(handler, 401, {"error": f"not {handler.headers['Authorization']}"})

    server = serve(guarded)
    assert score(make(server)).values == WANTED
    monkeypatch.setenv("MEGARL_REWARD_TOKEN", "wr0ng")
    asked = len(server.headers)
    with refused(RewardError, key="reward.url", names=(server.url, "401", "MEGARL_REWARD_TOKEN")) as found:
        make(server, retries=3, on_error="drop")
    assert "wr0ng" not in found.line
    assert len(server.headers) == asked + 1
    for content in ("", "two words"):
        monkeypatch.setenv("MEGARL_REWARD_TOKEN", content)
        with refused(ConfigError, key="MEGARL_REWARD_TOKEN"):
            make(server)


def test_servers_with_different_models_are_refused(serve: Serve) -> None:
    one, other = serve(), serve(model="m2")
    with refused(RewardError, key="reward.url", names=("m1", "m2", one.url, other.url)):
        make(one, other)
    scorer = make(one, on_error="drop")
    one.model = "m3"
    with refused(RewardError, key="reward.url", names=("m1", "m3", one.url)):
        score(scorer)


def test_what_is_no_reward_server_is_refused_at_the_start(serve: Serve) -> None:
    def elsewhere(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        return answer(handler, 404, b"<html>not here")

    server = serve(elsewhere)
    with refused(RewardError, key="reward.url", names=(server.url, "404")):
        make(serve(), server)


def test_a_dead_server_at_the_start_is_left_aside_if_another_answers(serve: Serve) -> None:
    dead = closed_port()
    assert score(make(dead, serve())).values == WANTED
    other = closed_port()
    began = time.monotonic()
    with refused(RewardError, key="reward.url", value=[dead, other], names=(dead, other, "refused")):
        make(dead, other, retries=2, timeout=30.0)
    assert time.monotonic() - began < 20


def test_a_run_goes_on_when_one_of_two_servers_dies_and_ends_when_both_are_dead(serve: Serve) -> None:
    one, other = serve(), serve()
    scorer = make(one, other, timeout=30.0)
    one.close()
    assert score(scorer).values == WANTED
    other.close()
    began = time.monotonic()
    with refused(RewardError, key="reward.url", names=(one.url, other.url)):
        score(scorer, phase=1)
    assert time.monotonic() - began < 20


def test_silent_servers_end_a_run_within_the_time_outs_of_one_call(serve: Serve) -> None:
    """Both are asked at the same time, and so is each again."""
    one, other = serve(silently), serve(silently)
    for on_error in ("error", "drop"):
        scorer = make(one, other, timeout=0.5, retries=1, on_error=on_error, batch_size=1)
        began = time.monotonic()
        if on_error == "error":
            with refused(RewardError, key="reward.url", names=(one.url, other.url, "0.5")):
                score(scorer)
        else:
            assert score(scorer).dropped == len(ROLLOUTS)
        assert time.monotonic() - began < 20
        assert one.questions
        assert other.questions
        assert 4 <= len(one.questions) + len(other.questions) <= 6, "the other calls are not tried"
        one.questions.clear()
        other.questions.clear()


def test_a_server_that_comes_back_is_asked_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = serve(badly(503, {"error": "stopping"})), serve()
    scorer = make(one, other, batch_size=1)
    assert score(scorer).values == WANTED
    asked = len(one.questions)
    one.act = well
    other.act = lambda *_: time.sleep(0.05)
    time.sleep(0.1)
    assert score(scorer, phase=1).values == WANTED
    assert len(one.questions) > asked + 1


def test_a_certificate_that_nobody_signed_is_refused(serve: Serve, tmp_path: Path) -> None:
    plain = serve()
    with refused(RewardError, key="reward.url", names=(plain.url.replace("http", "https"),)):
        make(plain.url.replace("http", "https"), retries=0, timeout=2.0)
    assert ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED


def test_a_path_of_a_url_comes_before_the_servers_own(serve: Serve) -> None:
    seen = []

    def note(server: StandIn, handler: Any, question: dict[str, Any]) -> bool:
        seen.append(handler.path)
        return False

    server = serve(note)
    make(f"{server.url}/models/7/")
    make(server.url)
    assert seen == ["/models/7/score", "/score"]


def on_every_rank(url: str, dead: str) -> tuple[Any, str, str]:
    grid = Grid(Layout.for_world(dist.get_world_size()), start_world())
    try:
        scorer = HttpScorer(RewardConfig(calls=RewardCallsConfig(batch_size=3)), [url], TOKENIZER, grid)
        values = scorer.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0).values
        try:
            HttpScorer(RewardConfig(calls=RewardCallsConfig(retries=0)), [dead], TOKENIZER, grid)
        except RewardError as problem:
            return values, scorer.fingerprint, str(problem.key)
        return values, scorer.fingerprint, ""
    finally:
        grid.close()


def test_all_ranks_get_the_same_scores_or_the_same_error(serve: Serve, worlds: Worlds) -> None:
    server = serve()
    assert worlds.run(2, on_every_rank, server.url, closed_port()) == [(WANTED, "m1", "reward.url")] * 2
    assert len([one for question in server.questions for one in question["outputs"]]) == 16, "one rank asks"


# --- texts that a server cannot read ----------------------------------------------------------------------------------


def refuses_long(stand_in: StandIn, handler: Any, question: dict[str, Any]) -> bool:
    """Refuse a request for its first output that ends in 1, as `serve_reward` refuses one that is too long."""
    long = [index for index, output in enumerate(question["outputs"]) if output.endswith("1")]
    if not long:
        return False
    key = "prompts" if "prompts" in question else "conversations"
    answer(handler, 422, {"error": f"{key}[{long[0]}]: is too long", "where": f"{key}[{long[0]}]"})
    return True


def test_a_text_that_a_server_cannot_read_is_dropped_alone(serve: Serve) -> None:
    scores = score(make(serve(refuses_long), on_error="drop"))
    assert scores.values == [None if row % 2 else wanted for row, wanted in enumerate(WANTED)]
    assert scores.dropped == 8


def test_a_text_that_a_server_cannot_read_is_an_error_otherwise(serve: Serve) -> None:
    with refused(RewardError, key="reward.url", offers={"reward.calls.on_error": ["drop"]}, names=("is too long",)):
        score(make(serve(refuses_long)))
