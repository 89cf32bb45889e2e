"""Runs inside a sandbox, after the text of `code_peer.py`: the tests of a response's code, and what they find.

`code_tests.py` sends both texts as one; nothing imports this file.
"""

from __future__ import annotations

import ast
import builtins
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from megarl.rewards.code_peer import Peer, PeerGoneError, Remote


def judge(tests: list[str] | str, entry_point: str | None, keep_going: bool) -> None:
    """Run the tests and write to descriptor 6 how many there are, 1 or 0 for each, and x if the code's process ended.

    Args:
        tests: a text, each of whose tests counts, or several texts, each of which counts as one.
        entry_point: name of the function of the response that a function `check` of the tests is given.
        keep_going: go on after a test has failed.
    """
    peer = Peer(4, 5, _may)
    try:
        _judge(peer, tests, entry_point, keep_going)
    except PeerGoneError:
        pass
    if peer.gone:
        os.write(6, b"x")


def _judge(peer: Peer, tests: list[str] | str, entry_point: str | None, keep_going: bool) -> None:
    whole = [Tests(text, entry_point) for text in ([tests] if isinstance(tests, str) else tests)]
    os.write(6, b"%d\n" % (whole[0].count if isinstance(tests, str) else len(whole)))
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    try:
        found = {name: value for name, value in peer.request("names") if _is_name(name)}
    except BaseException:  # the code raised, ended its process, or sent an invalid message
        return
    solution = types.ModuleType("solution")
    vars(solution).update(found)
    sys.modules["solution"] = solution
    for tested in whole:
        for name, value in tested.own_names(found).items():
            vars(module).setdefault(name, value)
        results = tested.run(vars(module), peer)
        if not isinstance(tests, str):
            results = iter([all(results)])
        for passed in results:
            os.write(6, b"1" if passed else b"0")
            if not (passed or keep_going):
                return


def _is_name(name: object) -> bool:
    """Return whether the code may define a name: not `__builtins__`, where the tests would look up `all`."""
    return isinstance(name, str) and name.isidentifier() and not name.startswith("__")


class Tests:
    """A text with tests: its asserts outside of functions, its functions test_..., the test methods of its classes, and
    its function `check` where there is an entry point. A text with none of these is one test as a whole."""

    def __init__(self, text: str, entry_point: str | None) -> None:
        self._entry_point = entry_point
        self._body = ast.parse(text).body
        self._functions = [s.name for s in self._body if isinstance(s, ast.FunctionDef) and s.name.startswith("test")]
        if entry_point and any(isinstance(s, ast.FunctionDef) and s.name == "check" for s in self._body):
            self._functions.append("check")
        self._cases = {
            s.name: sum(isinstance(one, ast.FunctionDef) and one.name.startswith("test") for one in s.body)
            for s in self._body
            if isinstance(s, ast.ClassDef) and any("TestCase" in ast.unparse(base) for base in s.bases)
        }
        asserts = sum(isinstance(s, ast.Assert) for s in self._body)
        self._as_one = not (asserts or self._functions or sum(self._cases.values()))
        self.count = 1 if self._as_one else asserts + len(self._functions) + sum(self._cases.values())

    def own_names(self, found: dict[str, Any]) -> dict[str, Any]:
        """Return what the text finds defined: names of the code, but none that would replace a builtin or a module of
        the standard library that it uses without importing it."""
        loaded = {n.id for s in self._body for n in ast.walk(s) if isinstance(n, ast.Name)}
        parents = {
            n.value.id
            for s in self._body
            for n in ast.walk(s)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        modules = {name for name in loaded if name in parents or name not in found} & sys.stdlib_module_names
        names = {name: value for name, value in found.items() if not hasattr(builtins, name)}
        for name in modules:
            names[name] = __import__(name)
        return names

    def run(self, space: dict[str, Any], peer: Peer) -> Iterator[bool]:
        """Yield whether each test passes. After a statement that fails, those that follow it are not run."""
        whole = True
        for statement in self._body:
            code = compile(ast.Module([statement], []), "tests.py", "exec", dont_inherit=True)
            if isinstance(statement, ast.Assert):
                yield _passes(peer, exec, code, space)
            elif not _passes(peer, exec, code, space):
                whole = False
                break
        if self._as_one:
            yield whole
        if not whole:
            return
        for name in self._functions:
            given = [space.get(self._entry_point)] if name == "check" and self._entry_point else []
            yield _passes(peer, space[name], *given)
        for name, count in self._cases.items():
            yield from _run_case(space[name], count, peer)


def _run_case(case: Any, count: int, peer: Peer) -> Iterator[bool]:
    """Yield for each of the methods of a test case whether it passes, those that do first."""
    import unittest

    result = unittest.TestResult()
    peer.assertion_failed = False
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    bad = [*result.failures, *result.errors, *result.skipped, *result.expectedFailures, *result.unexpectedSuccesses]
    fine = not (bad or peer.assertion_failed or peer.gone) and result.testsRun >= count
    good = count if fine else min(count - 1, max(0, result.testsRun - max(1, len(bad))))
    yield from (index < good for index in range(count))


def _passes(peer: Peer, step: Callable[..., Any], *arguments: Any) -> bool:
    """Return whether a step raises nothing, and no function of the tests that the code has called found a fault."""
    peer.assertion_failed = False
    try:
        step(*arguments)
    except PeerGoneError:
        raise
    except BaseException:  # SystemExit too
        return False
    return not (peer.assertion_failed or peer.gone)


def _may(target: Any, do: str, name: str) -> bool:
    """Return whether the code may do something with an object of the tests: call functions, step through iterators, and
    use the public attributes of objects whose class the tests define."""
    if do == "call":
        return callable(target)
    if isinstance(target, Iterator):
        return do in ("iter", "next")
    kind = type(target)
    of_files = kind.__module__ == "_io" and kind.__name__ in ("StringIO", "BytesIO")
    of_tests = kind.__module__ == "tests" and not hasattr(target, "assertEqual") and not isinstance(target, type)
    return (of_tests or of_files) and not name.startswith("_") and not isinstance(target, Remote)
