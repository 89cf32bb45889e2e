"""Compares formulas with math-verify, in a process that is killed when it takes too long.

math-verify's own time-outs are signals, which reach only a main thread and wait for the end of native code.
"""

from __future__ import annotations

import contextlib
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
_LONGEST = 20_000
_lock = threading.Lock()
_running: list[subprocess.Popen[bytes]] = []


def decide(outputs: Sequence[str], answers: Sequence[str], timeout_s: float) -> list[str]:
    """Return equal, different, timed out, or no answer (the answer cannot be read), for each response."""
    with _lock:
        return [_ask(output, answer, timeout_s) for output, answer in zip(outputs, answers, strict=True)]


def _ask(output: str, answer: str, timeout_s: float) -> str:
    if not _running or _running[0].poll() is not None:
        _running[:] = [_start()]
    process = _running[0]
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps([output[-_LONGEST:], answer]).encode() + b"\n")
        process.stdin.flush()
        said = _line(process, timeout_s)
    except BrokenPipeError:
        said = ""
    if not said:
        process.kill()  # it is late, or ran out of memory
        process.wait()
        return "timed out"
    return said


def _start() -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "megarl.rewards.symbolic"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
    )
    if _line(process, START_S) != "ready":
        process.kill()
        process.wait()
        raise RuntimeError(f"symbolic: the process of math-verify did not start within {START_S:g} s; try it again")
    return process


def _line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return a line that the process writes in time, or nothing."""
    assert process.stdout is not None
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    deadline, text = time.monotonic() + timeout_s, b""
    while not text.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return ""
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            return ""
        text += piece
    return text.decode().strip()


def main() -> None:
    """Answer questions, a line each, until the pipe is closed."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    answers = os.dup(1)
    os.dup2(2, 1)
    os.write(answers, b"ready\n")
    for line in sys.stdin:
        output, answer = json.loads(line)
        said = "different"
        with contextlib.suppress(Exception):
            bare = not any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
            gold = (bare and parse(f"${answer}$", parsing_timeout=None)) or parse(answer, parsing_timeout=None)
            found = parse(output, parsing_timeout=None)
            same = bool(gold and found) and verify(gold, found, timeout_seconds=None)
            said = "equal" if same else "different" if gold else "no answer"
        os.write(answers, f"{said}\n".encode())


if __name__ == "__main__":
    main()
