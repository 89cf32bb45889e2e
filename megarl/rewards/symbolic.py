"""Compares formulas with math-verify, in a process that is killed when it takes too long.

math-verify's own time-outs are signals, which reach only a main thread and wait for the end of native code.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

START_S = 60.0
"""Seconds in which the process imports its libraries."""
_MEMORY = 4 << 30
"""Maximum bytes of address space of the process."""
_LONGEST = 20_000
"""Characters of the end of a response that are read."""
TIMED_OUT, CRASHED = "timed out", "crashed"
_lock = threading.Lock()
_running: list[subprocess.Popen[bytes]] = []


def decide(outputs: Sequence[str], answers: Sequence[str], timeout_s: float, budget_s: float) -> list[str]:
    """Return a verdict for each response.

    It is equal, different, no answer (the answer cannot be read), timed out, or crashed (the process ended during the
    request, as where memory ran out). Once the responses that timed out or crashed, and the restarts after them, have
    taken `budget_s` together, the rest has timed out without a try, so that a few slow responses do not use up the time
    of the whole call. Responses that are decided do not count, however many they are.
    """
    verdicts: list[str] = []
    lost_s = 0.0
    with _lock:
        for output, answer in zip(outputs, answers, strict=True):
            if lost_s >= budget_s:
                verdicts.append(TIMED_OUT)
                continue
            start = time.monotonic()
            process = _ready_process()
            if verdicts:  # it was restarted, or is still running and this took no time
                lost_s += time.monotonic() - start
            start = time.monotonic()
            verdicts.append(_request(process, output, answer, timeout_s))
            if verdicts[-1] in (TIMED_OUT, CRASHED):
                lost_s += time.monotonic() - start
    return verdicts


def end_process() -> None:
    """End the process of math-verify, if there is one. The next request starts another."""
    for process in _running:
        process.kill()
        process.wait()
    _running.clear()


def _request(process: subprocess.Popen[bytes], output: str, answer: str, timeout_s: float) -> str:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([output[-_LONGEST:], answer]).encode() + b"\n")
        process.stdin.flush()
        reply = _read_line(process, timeout_s)
    except BrokenPipeError:
        reply = ""
    except TimeoutError:
        reply = TIMED_OUT
    if reply in ("", TIMED_OUT):
        end_process()
    return reply or CRASHED


def _ready_process() -> subprocess.Popen[bytes]:
    """Return the process of math-verify, a new one if it has ended."""
    if not _running or _running[0].poll() is not None:
        _running[:] = [_start()]
    return _running[0]


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "megarl.rewards.symbolic"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
    )
    try:
        ready = _read_line(process, START_S)
        problem = f"ended at its start with exit code {process.wait()}" if not ready else ""
    except TimeoutError:
        problem = f"did not start within {START_S:g} s"
    if problem:
        process.kill()
        process.wait()
        raise RuntimeError(f"symbolic: the process of math-verify {problem}; try it again")
    return process


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return a line that the process writes, or nothing if it ends without one. Raise TimeoutError if it is late."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    deadline, text = time.monotonic() + timeout_s, b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            return ""
        text += piece
    return text.decode().strip()


def main() -> None:
    """Reply to requests, one per line, until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable(logging.CRITICAL)
    replies = os.dup(1)
    os.dup2(2, 1)  # what the libraries print is no reply
    from math_verify import parse, verify

    os.write(replies, b"ready\n")
    for line in sys.stdin:
        output, answer = json.loads(line)
        reply = "different"
        try:
            bare = not any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
            gold = (bare and parse(f"${answer}$", parsing_timeout=None)) or parse(answer, parsing_timeout=None)
            found = parse(output, parsing_timeout=None)
            same = bool(gold and found) and verify(gold, found, timeout_seconds=None)
            reply = "equal" if same else "different" if gold else "no answer"
        except MemoryError:
            os._exit(1)  # this process would keep what it holds, in the caches of its libraries
        except Exception:
            pass  # a formula that math-verify cannot read or compare
        os.write(replies, f"{reply}\n".encode())


if __name__ == "__main__":
    main()
