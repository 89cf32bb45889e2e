"""The process in which reward functions run: `python -m megarl.rewards.worker`, started by `RewardWorker`.

It imports nothing heavy itself. It ends when the process that started it ends, even in the middle of a call.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import pickle
import queue
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from megarl.functions.named import Function
from megarl.rewards.answers import AnswerError, NoScore, read_scores
from megarl.rewards.combine import Combined, number_of
from megarl.rewards.wire import END_OF_CALL, Channel, PipeClosed

GRACE_S = 2.0
"""Seconds for which a function may continue after the run is gone."""
LATE_S = 5.0
"""Seconds after its timeout at which a call ends itself, if the run has not ended it."""

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Serve the process that passed the pipe descriptors."""
    parser = argparse.ArgumentParser(description="Scores samples for the process that started it; not for use by hand.")
    parser.add_argument("--requests", type=int, required=True, help="descriptor to read frames from")
    parser.add_argument("--answers", type=int, required=True, help="descriptor to write frames to")
    arguments = parser.parse_args()
    _keep_output_flowing()
    _leave_signals_to_the_run()
    serve(Channel(arguments.requests, arguments.answers))


def serve(channel: Channel) -> None:
    """Load the function from the first frame, then respond to each further frame until the pipe is closed."""
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, requests), daemon=True).start()
    setup = requests.get()
    if setup is None:
        return
    try:
        timeout_s, function, tokenizer, options = _prepare(setup)
    except BaseException as error:  # the user's module runs here and may raise anything, SystemExit too
        _reply(channel, _failure(error))
        return
    _reply(channel, {"ready": True})
    while (request := requests.get()) is not None:
        # Native code that holds the interpreter lock (a regular expression can) blocks the listening thread too, and
        # would outlive a killed run. This timer needs no lock.
        faulthandler.dump_traceback_later(timeout_s + LATE_S, exit=True)
        answer = _answer(function, tokenizer, options, request)
        faulthandler.cancel_dump_traceback_later()
        _mark_end_of_output()
        _reply(channel, answer)


def _mark_end_of_output() -> None:
    """Mark the end of a call's output in the output itself, as the run reads it in another thread than the scores."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a function may have replaced them
            stream.flush()
    with contextlib.suppress(OSError):
        os.write(1, END_OF_CALL + b"\n")


def _listen(channel: Channel, requests: queue.SimpleQueue[bytes | None]) -> None:
    """Put frames into the queue. When the run is gone, kill this process and all it started, even during a call."""
    parent = os.getppid()

    def check() -> None:
        # The pipe alone is not enough: a process forked by the run may keep its end open.
        if os.getppid() != parent:
            raise PipeClosed

    try:
        while True:
            requests.put(channel.receive(check))
    except PipeClosed:
        requests.put(None)
    time.sleep(GRACE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _prepare(setup: bytes) -> tuple[float, Function, Any, dict[str, Any]]:
    """Return the timeout of a call, the function, the tokenizer and the options, from the first frame."""
    first = pickle.loads(setup)
    sys.path[:] = first["path"]  # before the rest is unpickled, which may import the user's modules
    reward, tokenizer, options = pickle.loads(first["packed"])
    if isinstance(tokenizer, tuple):
        from megarl.tokenizers import build_tokenizer

        tokenizer = build_tokenizer(*tokenizer)
    function = reward.load()
    if isinstance(function, Combined):
        function.load()
    return first["timeout_s"], function, tokenizer, options


def _answer(function: Function, tokenizer: Any, options: Mapping[str, Any], request: bytes) -> dict[str, Any]:
    metadata: Mapping[str, Any] = {}
    try:
        asked = pickle.loads(request)
        texts, metadata = asked["texts"], asked["metadata"]
        parts: dict[str, list[float | None]] = {}
        columns = {**metadata, **options, **texts, "tokenizer": tokenizer}
        if isinstance(function, Combined):
            answer, parts = function.evaluate(**columns)
        else:
            answer = function(**columns)
        if isinstance(answer, Mapping):  # several named scores, the first of which is the reward
            count = len(texts["samples"])
            named = {str(name): read_scores(column, count) for name, column in answer.items()}
            parts = {name: [number_of(score) for score in own] for name, own in named.items()}
            answer = [*answer.values(), None][0]
        scores = read_scores(answer, len(texts["samples"]), asked["lengths"])
    except BaseException as error:  # whatever the user's function raises is returned, even SystemExit
        return _failure(error, metadata)
    values = [{"why": score.why} if isinstance(score, NoScore) else score for score in scores]
    return {"values": values, "parts": parts}


def _failure(error: BaseException, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what happened in one line, where in the user's code, and the whole traceback."""
    if isinstance(error, AnswerError):
        return {"failure": str(error), "kind": "count", "where": None, "traceback": ""}
    what = " ".join("".join(traceback.format_exception_only(type(error), error)).split())
    hint = ""
    if isinstance(error, TypeError) and "unexpected keyword argument" in what:
        unwanted = [name for name in metadata or {} if f"'{name}'" in what]
        hint = f"; {unwanted[0]} is a field of the records: let the function take **metadata" if unwanted else ""
    where = _users_frame(error)
    return {
        "failure": f"raised {what}{f' ({where})' if where else ''}{hint}",
        "kind": "raised",
        "where": where or None,
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
    }


def _users_frame(error: BaseException) -> str:
    """Return file:line of the innermost frame in the user's code, or of the innermost frame if all are in libraries."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    libraries = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")})
    own = [f for f in frames if not f.filename.startswith((*libraries, "<frozen"))]
    innermost = (own or frames)[-1:]
    return "".join(f"{frame.filename}:{frame.lineno}" for frame in innermost)


def _reply(channel: Channel, answer: Mapping[str, Any]) -> None:
    # JSON rather than pickle: the run must not unpickle what comes out of user code.
    channel.send(json.dumps(answer, allow_nan=False).encode("utf-8"), _nothing)


def _nothing() -> None:
    """Do nothing: this side may wait, as the listening thread watches the run."""


def _keep_output_flowing() -> None:
    """Flush the function's output after each line, and accept any characters."""
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream)


def _reconfigure(stream: TextIO) -> None:
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _leave_signals_to_the_run() -> None:
    """Ignore signals that a batch system sends to every process of a job. The run handles them and ends this process by
    its pipe.

    Child processes get the default handlers: `multiprocessing` ends its workers with SIGTERM.
    """
    for number in _IGNORED:
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_default_signals)


def _default_signals() -> None:
    for number in _IGNORED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if __name__ == "__main__":
    main()
