"""Asks reward servers for scores over HTTP: in parallel, with time-outs, repeated calls and waits after failures.

Every try of a call has a thread of its own, so that nothing that a server does can hold up the run.
"""

from __future__ import annotations

import contextlib
import http.client
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from megarl.command import printable
from megarl.errors import RewardError
from megarl.experience.reward_request import (
    FATAL,
    KEY,
    REFUSED,
    SILENT,
    WRONG,
    Entry,
    FailedTry,
    Post,
    Reply,
    connect,
)
from megarl.logging import get_logger
from megarl.rewards.answers import is_number

log = get_logger(__name__)
TICK_S = 0.5
"""Seconds after which an iteration yields None while it waits."""
LONGEST_REST_S = 30.0
_REST_S = 1.0
_SLACK_S = 1.0  # between the time-out of a thread and that of the loop that watches it


@dataclass(eq=False)
class Server:
    """A server and what is known of it.

    Attributes:
        key: the configuration key that names it, for messages.
        failures: number of its failures since the last success.
        silent: number of these without an answer, in this scoring.
        said: what was wrong last.
        rests_until: time before which it is not asked.
    """

    url: str
    key: str = KEY
    failures: int = 0
    silent: int = 0
    said: str = "was not asked"
    rests_until: float = 0.0
    busy: bool = False

    def failed(self, problem: FailedTry, now: float) -> None:
        """Note a failure, after which the server is left aside: for 1 s, 2 s, 4 s and so on."""
        self.said = str(problem)
        self.failures += 1
        self.silent += problem.kind == SILENT
        self.rests_until = now + min(_REST_S * 2 ** min(self.failures - 1, 10), LONGEST_REST_S)

    def succeeded(self) -> None:
        """Note an answer."""
        if self.failures:
            log.info("%s=%s answers again", self.key, self.url)
        self.failures, self.silent, self.rests_until = 0, 0, 0.0


@dataclass(eq=False)
class _Call:
    """Responses that are scored by one request, and what came of it so far."""

    entries: list[Entry]
    scores: dict[int, float] = field(default_factory=dict)
    failed: dict[Server, int] = field(default_factory=dict)
    refusal: str = ""

    @property
    def can_be_split(self) -> bool:
        """Whether a server refused several responses, so that others than one of them may be at fault."""
        return bool(self.refusal) and len(self.missing) > 1

    def halves(self) -> list[_Call]:
        """Return two calls with the responses that have no score yet."""
        missing = self.missing
        middle = (len(missing) + 1) // 2
        return [_Call(half) for half in (missing[:middle], missing[middle:])]

    @property
    def missing(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.row not in self.scores]

    @property
    def tries(self) -> int:
        return sum(self.failed.values())


@dataclass(frozen=True)
class Outcome:
    """The scores of some responses, None where there is none.

    Attributes:
        rows: indices of the responses.
        failed: number of tries without a score for all of them.
        repeated: number of repeated tries.
    """

    rows: list[int]
    scores: list[float | None]
    failed: int
    repeated: int


class _Try:
    """A request in its own thread, which puts itself into `done` when it has a result."""

    def __init__(self, server: Server, call: _Call | None, post: Post, done: queue.Queue[_Try]) -> None:
        self.server, self.call, self._post, self._done = server, call, post, done
        self.entries = [] if call is None else call.missing
        self.began = time.monotonic()
        self.result: Reply | FailedTry | BaseException | None = None
        self._connection: http.client.HTTPConnection | None = None
        server.busy = True
        threading.Thread(target=self._run, name=f"ask {server.url}", daemon=True).start()

    def abort(self) -> None:
        """Close the connection, so that the thread ends."""
        sock = None if self._connection is None else self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            self._connection = connect(self.server.url, self._post.timeout_s)
            self.result = self._post(self._connection, self.server.url, self.entries)
        except BaseException as problem:  # the thread has nobody else to tell
            self.result = problem
        self._done.put(self)


class RewardServers:
    """Servers that score responses. Use it from one thread."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str | None,
        timeout_s: float,
        retries: int,
        drops: bool = False,
        key: str = KEY,
    ) -> None:
        """
        Args:
            urls: the servers.
            token: what every request sends.
            timeout_s: maximum seconds of a call.
            retries: how often a server is asked again with the same responses.
            drops: whether responses without a score after the last try are left out; otherwise they are an error.
            key: the configuration key that names the servers.
        """
        self.servers = [Server(url, key) for url in urls]
        self.timeout_s, self.retries, self.drops, self.key = timeout_s, retries, drops, key
        self.model = ""
        self._post = Post(token, timeout_s)
        self._running: set[_Try] = set()
        self._done: queue.Queue[_Try] = queue.Queue()

    def connect(self) -> Iterator[str | None]:
        """Ask every server which model it has. Yields None while it waits, and the model at last.

        Raises:
            RewardError: no server answers, one refuses the token, or the models differ.
        """
        open_ = dict.fromkeys(self.servers, self.retries + 1)
        models: dict[Server, str] = {}
        try:
            while open_:
                now = time.monotonic()
                for server in open_:
                    if not server.busy and server.rests_until <= now:
                        self._running.add(_Try(server, None, self._post, self._done))
                for done, result in self._results():
                    if isinstance(result, Reply):
                        models[done.server] = result.model
                        done.server.succeeded()
                        open_.pop(done.server)
                        continue
                    if result.kind in (FATAL, REFUSED):
                        raise self._error(f"{done.server.url} {result}", _REMEDIES[result.kind])
                    open_[done.server] -= 1
                    done.server.failed(result, time.monotonic())
                    if not open_[done.server]:
                        open_.pop(done.server)
                        log.warning("%s=%s %s, and is left aside", self.key, done.server.url, result)
                yield None
        finally:
            self.close()
        if not models:
            raise self._silence("gave scores")
        first, self.model = next(iter(models.items()))
        for server, model in models.items():
            if model != self.model:
                raise self._other_model(server, model, first.url)
        yield self.model

    def score(self, calls: Iterable[Sequence[Entry]]) -> Iterator[Outcome | None]:
        """Score responses, those of one call by one request. Yields outcomes as they come, and None while it waits.

        A call that a server refuses is halved until the response that is refused is alone.

        Raises:
            RewardError: a call has failed on every server, no server answers, or one answers for another model.
        """
        waiting = deque(_Call(list(entries)) for entries in calls)
        open_ = len(waiting)
        for server in self.servers:
            server.silent = 0
        try:
            while open_:
                self._start(waiting)
                for done, result in self._results():
                    call = done.call
                    assert call is not None
                    self._take(done, call, result)
                    if not call.missing:
                        open_ -= 1
                        yield self._outcome(call)
                    elif call.can_be_split:
                        halves = call.halves()
                        open_ += len(halves) - 1
                        waiting.extendleft(reversed(halves))
                        yield self._outcome_of_split(call)
                    elif self._given_up(call):
                        lost = [call, *waiting] if self._all_silent() else [call]
                        self._report(lost, call)
                        for one in lost:
                            open_ -= 1
                            yield self._outcome(one)
                        waiting = deque(one for one in waiting if one not in lost)
                    else:
                        waiting.appendleft(call)
                yield None
        finally:
            self.close()

    def close(self) -> None:
        """End the calls under way."""
        for one in self._running:
            one.abort()
            one.server.busy = False
        self._running.clear()
        self._done = queue.Queue()  # what the threads still put into the old one is of no interest

    # --- inside -----------------------------------------------------------------------------------------------------

    def _start(self, waiting: deque[_Call]) -> None:
        """Give every free server the first call that it may still be asked."""
        now = time.monotonic()
        for server in sorted(self.servers, key=lambda one: one.failures):
            if server.busy or server.rests_until > now:
                continue
            call = next((call for call in waiting if call.failed.get(server, 0) <= self.retries), None)
            if call is not None:
                waiting.remove(call)
                self._running.add(_Try(server, call, self._post, self._done))

    def _results(self) -> list[tuple[_Try, Reply | FailedTry]]:
        """Wait for a moment, and return the tries that have ended, with those that are too late."""
        ended: list[_Try] = []
        with contextlib.suppress(queue.Empty):
            ended.append(self._done.get(timeout=TICK_S if self._running else _until_next(self.servers)))
            while True:
                ended.append(self._done.get_nowait())
        late = time.monotonic() - self.timeout_s - _SLACK_S
        ended = [one for one in ended if one in self._running]
        ended += [one for one in self._running if one.began < late and one not in ended]
        found: list[tuple[_Try, Reply | FailedTry]] = []
        for one in ended:
            self._running.discard(one)
            one.server.busy = False
            result = one.result
            if result is None:
                one.abort()
                result = FailedTry(SILENT, f"did not answer within {self.timeout_s:g} s")
            if not isinstance(result, Reply | FailedTry):
                raise result
            found.append((one, result))
        return found

    def _take(self, done: _Try, call: _Call, result: Reply | FailedTry) -> None:
        """Note the result of a try in its call and its server."""
        server = done.server
        if isinstance(result, Reply):
            if result.model != self.model:
                raise self._other_model(server, result.model, "the others")
            flaws = []
            for entry, score in zip(done.entries, result.scores, strict=True):
                if is_number(score):
                    call.scores[entry.row] = float(score)
                else:
                    flaws.append(score)
            if not flaws:
                server.succeeded()
                return
            what = "null" if flaws[0] is None else printable(repr(flaws[0])[:40])
            result = FailedTry(WRONG, f"gave {what} in the place of a score ({len(flaws)} of {len(done.entries)})")
        if result.kind == FATAL:
            raise self._error(f"{server.url} {result}", _REMEDIES[FATAL])
        if result.kind == REFUSED:  # the fault of the responses: the server is well
            server.succeeded()
            call.failed[server] = call.failed.get(server, 0) + 1
            call.refusal = f"{server.url} {result}"
            return
        if server.said != str(result):
            log.warning("%s=%s %s", self.key, server.url, result)
        server.failed(result, time.monotonic())
        call.failed[server] = call.failed.get(server, 0) + 1

    def _given_up(self, call: _Call) -> bool:
        """Return whether a call that failed is not repeated."""
        exhausted = all(call.failed.get(server, 0) > self.retries for server in self.servers)
        return bool(call.refusal) or exhausted or (call.tries > self.retries and self._all_silent())

    def _all_silent(self) -> bool:
        return all(server.silent > self.retries for server in self.servers)

    def _outcome(self, call: _Call) -> Outcome:
        scores = [call.scores.get(entry.row) for entry in call.entries]
        repeated = call.tries if not call.missing else max(call.tries - 1, 0)
        return Outcome([entry.row for entry in call.entries], scores, call.tries, repeated)

    def _outcome_of_split(self, call: _Call) -> Outcome:
        """Return the scores that a call got before it was split. Its two halves are repeated tries."""
        scored = [entry.row for entry in call.entries if entry.row in call.scores]
        return Outcome(scored, [call.scores[row] for row in scored], call.tries, call.tries + 1)

    def _report(self, lost: Sequence[_Call], reason: _Call) -> None:
        """Log that calls have no scores, or raise if that is an error. `reason` is the call that failed."""
        count = sum(len(call.missing) for call in lost)
        where = ""
        if reason.refusal:
            problem, remedy = reason.refusal, _REMEDIES[REFUSED]
            if len(reason.missing) == 1 and (where := reason.missing[0].where):
                problem = f"{problem} (the response to {where})"
        else:
            problem = "; ".join(f"{server.url} {server.said}" for server in self.servers)
            remedy = _REMEDIES[SILENT if self._all_silent() else WRONG]
        if not self.drops:
            raise self._error(
                f"no scores for {count} responses in {reason.tries} tries: {problem}", remedy, drop=True, where=where
            )
        log.warning("%s: %d responses are dropped (reward.calls.on_error=drop): %s", self.key, count, problem)

    def _silence(self, what: str) -> RewardError:
        said = "; ".join(f"{server.url} {server.said}" for server in self.servers)
        return self._error(f"no server {what} in {self.retries + 1} tries: {said}", _REMEDIES[SILENT])

    def _other_model(self, server: Server, model: str, others: str) -> RewardError:
        return self._error(
            f"{server.url} has the model {printable(model[:40])}, and {others} {self.model}",
            "start all servers with the same reward model, and this run again",
        )

    def _error(self, problem: str, remedy: str, *, drop: bool = False, where: str = "") -> RewardError:
        offers = {"reward.calls.on_error": ["drop"]} if drop else {}
        more = ", or leave such responses out with reward.calls.on_error=drop" if drop else ""
        urls = [server.url for server in self.servers]
        return RewardError(
            f"{self.key}: {problem}; {remedy}{more}", key=self.key, value=urls, offers=offers, where=where or None
        )


_REMEDIES = {
    SILENT: "start the servers, or give them more time (reward.calls.timeout), more tries (reward.calls.retries) or "
    "fewer responses per call (reward.calls.batch_size)",
    WRONG: "look into the server's log",
    REFUSED: "send what the server takes, such as shorter prompts and responses, or raise its limits",
    FATAL: "correct the URL, or the token in MEGARL_REWARD_TOKEN",
}


def _until_next(servers: Sequence[Server]) -> float:
    """Return the seconds until a server that rests may be asked again, at most those of a tick."""
    now = time.monotonic()
    rests = [one.rests_until - now for one in servers if one.rests_until > now]
    return max(min([*rests, TICK_S]), 0.01)
