"""Scores responses that are Python code by running it against tests, in sandboxes.

Tests that call the code's functions run in a separate sandbox (`code_judge.py`). Tests of a program's input and output
compare here what it printed. In both cases the code runs where there is no expected value and no verdict, so there is
nothing that it could read or forge.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from megarl.rewards.code_peer import OUT_OF_MEMORY
from megarl.rewards.sandbox import GRACE_S, End, Limits, Program, read_until, run, working_isolation

OUTCOMES = ("passed", "failed", "timed_out", "out_of_memory", "killed", "refused")
"""Outcomes of a response. failed: a test did not pass. killed: by a signal or for too much output. refused: it has no
code that could be run."""

_BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE | re.IGNORECASE
)
_ANY_BLOCK = re.compile(r"^[ \t]*```[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_LONGEST = 1 << 20
_MORE_S = 2.0
"""Seconds that tests have beyond the code's time, to find that it has ended."""


@dataclass(frozen=True)
class Verdict:
    """Result of a response: the share of tests that passed, and one of OUTCOMES."""

    share: float
    outcome: str

    def score(self, partial: bool) -> float:
        """Return the share, or whether all tests passed."""
        return self.share if partial else float(self.outcome == "passed")


@dataclass(frozen=True)
class Calls:
    """Tests that call the code: one text, or several that count as one test each."""

    tests: str | list[str]
    entry_point: str | None


@dataclass(frozen=True)
class Cases:
    """Tests that run the code as a program: its input, and the output that is expected."""

    pairs: list[tuple[str, str]]


def check_responses(
    responses: Sequence[str], tests: Sequence[Calls | Cases], *, limits: Limits, workers: int, partial: bool
) -> list[Verdict]:
    """Return a verdict for each response.

    Raises:
        SandboxError: there is no sandbox on this machine.
    """
    working_isolation()  # once, before the threads need it
    with ThreadPoolExecutor(workers) as pool:
        check = functools.partial(_check, limits=limits, keep_going=partial)
        return list(pool.map(check, responses, tests))


def find_code(response: str) -> str:
    """Return the last block that is marked as Python, else the last block without a mark, else the whole text."""
    for pattern in (_BLOCK, _ANY_BLOCK):
        if blocks := pattern.findall(response):
            return str(blocks[-1])
    return response


def read_tests(value: object, entry_point: object = None) -> Calls | Cases | None:
    """Return the tests that a record's field holds, or None if it holds none.

    It is Python source or a list of such; or a list of {"input": ..., "output": ...}; or one object with the lists
    `inputs` and `outputs`; or one of the last three as JSON text.

    Raises:
        SyntaxError: the source is not valid Python.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    name = entry_point if isinstance(entry_point, str) and entry_point else None
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= value.keys():
        inputs, outputs = value["inputs"], value["outputs"]
        if not (isinstance(inputs, list | tuple) and isinstance(outputs, list | tuple) and len(inputs) == len(outputs)):
            return None
        value = [{"input": one, "output": two} for one, two in zip(inputs, outputs, strict=True)]
    if isinstance(value, str) and value.strip():
        _check_python([value])
        return Calls(value, name)
    if not isinstance(value, list | tuple) or not value:
        return None
    if all(isinstance(one, str) and one.strip() for one in value):
        _check_python(value)
        return Calls(list(value), name)
    if all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in value):
        return Cases([(_text(one["input"]), _text(one["output"])) for one in value])
    return None


def _check_python(texts: Sequence[str]) -> None:
    """Raise a SyntaxError for the first text that is not valid Python."""
    for text in texts:
        try:
            compile(text, "tests", "exec", dont_inherit=True)
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:  # a NUL, or nested too deep
            raise SyntaxError(str(error) or "it is nested too deep") from error


def _text(value: object) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check(response: str, tests: Calls | Cases, *, limits: Limits, keep_going: bool) -> Verdict:
    code = find_code(response)
    if not code.strip() or len(code) > _LONGEST:
        return Verdict(0.0, "refused")
    if isinstance(tests, Calls):
        return _check_calls(code, tests, limits, keep_going)
    return _check_cases(code, tests, limits, keep_going)


def _check_cases(code: str, tests: Cases, limits: Limits, keep_going: bool) -> Verdict:
    """Run a program once per case; all runs together have `limits.wall_s`."""
    source = _sent("code_peer") + f"\nrun_program({code!a})\n"
    deadline = time.monotonic() + limits.wall_s
    passed, outcome = 0, "passed"
    for entry, expected in tests.pairs:
        left = deadline - time.monotonic()
        if left <= 0:
            outcome = "timed_out"
            break
        max_output = 4 * len(expected.encode("utf-8", "replace")) + (64 << 10)
        end, output = run(
            source.encode(), entry.encode("utf-8", "replace"), replace(limits, wall_s=left), max_output=max_output
        )
        if end.code == 0 and _lines(output.decode("utf-8", "replace")) == _lines(expected):
            passed += 1
            continue
        outcome = _outcome(end) if outcome == "passed" else outcome
        if not keep_going or end.how == "timed_out":
            break
    return Verdict(passed / len(tests.pairs), outcome)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _check_calls(code: str, tests: Calls, limits: Limits, keep_going: bool) -> Verdict:
    """Run the code in one sandbox and its tests in another, joined by pipes."""
    code_source = _sent("code_peer") + f"\nserve_code({code!a})\n"
    test_source = (
        _sent("code_peer") + _sent("code_judge") + f"\njudge({tests.tests!a}, {tests.entry_point!a}, {keep_going})\n"
    )
    with contextlib.ExitStack() as opened:
        null = os.open(os.devnull, os.O_RDWR)
        opened.callback(os.close, null)
        questions, questions_end = os.pipe()
        answers, answers_end = os.pipe()
        verdict, verdict_end = os.pipe()
        opened.callback(os.close, verdict)
        try:
            served = opened.enter_context(
                Program(code_source.encode(), (null, null, null, questions, answers_end), limits)
            )
            slower = replace(limits, wall_s=limits.wall_s + _MORE_S)
            judged = opened.enter_context(
                Program(test_source.encode(), (null, null, null, answers, questions_end, verdict_end), slower)
            )
        finally:
            for number in (questions, questions_end, answers, answers_end, verdict_end):
                os.close(number)
        text = b"".join(read_until(verdict, time.monotonic() + slower.wall_s + GRACE_S))
        judge_end = judged.wait()
        count, _, results = text.partition(b"\n")
        code_end = served.wait() if b"x" in results else served.stop()
    passed, total = results.count(b"1"), int(count or b"0")
    if total and passed == total and judge_end.code == 0:
        return Verdict(1.0, "passed")
    outcome = _outcome(code_end)
    if outcome in ("failed", "killed") and judge_end.how in ("timed_out", "out_of_memory"):
        outcome = judge_end.how  # the tests waited for the code, or its replies filled their memory
    elif code_end.why == "no longer wanted":
        outcome = "failed"
    return Verdict(min(passed, max(0, total - 1)) / total if total else 0.0, outcome)


def _outcome(end: End) -> str:
    if end.how == "ended":
        return "out_of_memory" if end.code == OUT_OF_MEMORY else "failed"
    return end.how


@functools.cache
def _sent(name: str) -> str:
    """Return the text of a file of this folder, without what only the type checker needs."""
    lines = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8").splitlines(keepends=True)
    dropped = ("from __future__ ", "from typing ", "from megarl.")
    kept = "".join(line for line in lines if not line.startswith(dropped))
    return kept if name != "code_peer" else f"from __future__ import annotations\n{kept}"
