"""The command: run the suite, print its table, write its page, and say whether all cases agree."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megarl.command import say
from megarl.conformance.features import BY_KEY, FEATURES, Case, cases
from megarl.conformance.settings import ALL, Suite
from megarl.progress import waiting, waiting_for_imports
from megarl.report.shell import SELFTEST
from megarl.report.write import page_path, write_page

if TYPE_CHECKING:
    from rich.console import Console

    from megarl.conformance.running import Result


def run(suite: Suite) -> int:
    """Run the suite. Return 1 if a case fails, else 0."""
    began = time.monotonic()
    with waiting_for_imports():
        from megarl.conformance.running import FAILED, run_given, run_here
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        given = run_given(suite)
        if given is None:
            return 0
        results = given
    else:
        with waiting("training each pair of features", len(list(cases(suite.only)))) as finished:
            results = run_here(suite, finished)
    results.sort(key=lambda result: _places(result.case))
    seconds = time.monotonic() - began
    show(results, seconds)
    draw(suite, results, seconds)
    return int(any(result.state == FAILED for result in results))


def _places(case: Case) -> tuple[int, ...]:
    """Return the places of a case's features in the table, single ones first."""
    order = [feature.key for feature in FEATURES]
    return (len(case.keys), *(order.index(key) for key in case.keys))


def verdict(results: Sequence[Result]) -> str:
    """Return how many cases agree, fail and are refused."""
    counts = {state: sum(result.state == state for result in results) for state in ("ok", "FAIL", "refused")}
    agree = f"{counts['ok']} of {len(results)} cases give the numbers of one process"
    return f"{agree}, {counts['FAIL']} FAIL, {counts['refused']} are refused"


def show(results: Sequence[Result], seconds: float) -> None:
    """Print the table of pairs, the failures with their differences, and what is refused with its reason."""
    from rich.console import Console

    from megarl.parallel.device import device_settings
    from megarl.parallel.megatron_versions import engine

    console = Console(soft_wrap=True)
    console.print(f"engine: {engine()}")
    console.print(f"settings of the device: {device_settings()}")
    console.print(_triangle(results))
    for result in results:
        _show_failure(console, result)
    _show_refused(console, results)
    console.print(f"{verdict(results)}; {seconds:.0f} s", markup=False)


def grid(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return the features and, for each, the state of its pair with those up to itself; alone in the diagonal."""
    states = {frozenset(result.case.keys): result.state for result in results}
    there = [feature.key for feature in FEATURES if frozenset({feature.key}) in states]
    return there, [
        [states.get(frozenset({row, column}), "") for column in there[: index + 1]] for index, row in enumerate(there)
    ]


def _triangle(results: Sequence[Result]) -> str:
    """Return the table of pairs as text."""
    there, rows = grid(results)
    first = max(map(len, there))
    widths = [max(len(key), len("refused")) for key in there]
    lines = [" " * first + " " + " ".join(key.rjust(width) for key, width in zip(there, widths, strict=True))]
    for key, states in zip(there, rows, strict=True):
        cells = [state.rjust(width) for state, width in zip(states, widths, strict=False)]
        lines.append(f"{key.ljust(first)} {' '.join(cells)}")
    return "\n".join(lines)


def _show_failure(console: Console, result: Result) -> None:
    if result.state != "FAIL":
        return
    console.print(f"\nFAIL {result.case.name} ({described(result.case)}), {result.case.world} processes", markup=False)
    if result.reason:
        console.print(result.reason.rstrip(), markup=False)
    for one in result.found:
        console.print(
            f"  {one.objective}: {one.quantity} differ by {one.size:.1e}, more than {one.limit:.1e}: {one.where}",
            markup=False,
        )
    console.print(f"  again: {again(result.case)}", markup=False)


def _show_refused(console: Console, results: Sequence[Result]) -> None:
    """Print the cases that a rule forbids, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for result in results:
        if result.state == "refused":
            by_reason.setdefault(result.reason, []).append(result.case.name)
    for reason, names in by_reason.items():
        console.print(f"\nrefused {', '.join(names)}: {reason}", markup=False)


def described(case: Case) -> str:
    """Return what a case switches on, in words."""
    return " and ".join(BY_KEY[key].about for key in case.keys)


def again(case: Case) -> str:
    """Return the command that runs a case again."""
    return f"python -m megarl.selftest {ALL} only={','.join(case.keys)}"


def draw(suite: Suite, results: Sequence[Result], seconds: float) -> None:
    """Write the page, if the settings name a file."""
    if suite.html:
        path = page_path(suite.html, "html", SELFTEST)
        write_page(page(suite, results, seconds), path, "html", SELFTEST)
        say(f"page: {path}")


def page(suite: Suite, results: Sequence[Result], seconds: float) -> str:
    """Return the page of the results."""
    from megarl.parallel.device import device_settings
    from megarl.parallel.megatron_versions import engine
    from megarl.report.conformance import CaseRow, conformance_page

    rows = [
        CaseRow(
            keys=result.case.keys,
            about=described(result.case),
            processes=result.case.world,
            reference=result.case.reference.name,
            state=result.state,
            reason=result.reason,
            differences=[(one.objective, one.quantity, one.size, one.limit, one.where) for one in result.differences],
            seconds=result.seconds,
        )
        for result in results
    ]
    settings = {"steps": suite.steps, "engine": engine(), "settings of the device": device_settings()}
    shown = [(name, str(value)) for name, value in {**settings, "seconds": f"{seconds:.0f}"}.items()]
    return conformance_page(verdict(results), rows, shown)
