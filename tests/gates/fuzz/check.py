"""What holds for every malformed input: one line by a known error, soon, and nothing written, lost or left running."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import megarl
from megarl.command import quiet
from megarl.errors import MegarlError

SEED = int(os.environ.get("MEGARL_FUZZ_SEED", "0"))
SCALE = float(os.environ.get("MEGARL_FUZZ_SCALE", "1"))
"""Environment: another seed draws other cases; a scale of 3 draws three times as many."""
ONLY = os.environ.get("MEGARL_FUZZ_ONLY")
"""Environment: a part of a case's name, to run that case alone and with its traceback."""

CPU_S, WALL_S = 10.0, 60.0  # the machine may be busy, so the limit is of processor time, and a looser one of the clock
LONGEST = 4_000  # characters of a message that a terminal still shows
LINES = 25  # what a reader of a file may print
PACKAGE = Path(megarl.__file__).parent


@dataclass(frozen=True)
class Case:
    """A malformed input.

    Attributes:
        name: kind, seed, number and what was done to the input.
        lay: write the input into an empty folder.
        act: read it. Refusing it is well, and so is accepting it, where it is harmless.
        names: words of which an error must have one, beside the path of the input.
    """

    name: str
    lay: Callable[[Path], None]
    act: Callable[[Path], object]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """What a case did that nothing may do. Faults of the same `what` and `where` are one."""

    what: str
    where: str
    case: str
    detail: str = ""


@dataclass
class Outcome:
    """Of many cases."""

    refused: int = 0
    accepted: int = 0
    faults: list[Fault] = field(default_factory=list)

    def report(self) -> str:
        """The distinct faults, the most frequent first, each with its first case."""
        groups: dict[tuple[str, str], list[Fault]] = {}
        for fault in self.faults:
            groups.setdefault((fault.what, fault.where), []).append(fault)
        total = self.refused + self.accepted + len(self.faults)
        lines = [f"{total} cases: {self.refused} refused, {self.accepted} accepted, {len(groups)} distinct faults"]
        for (what, where), found in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines.append(f"{len(found):4d} x {what} at {where}")
            lines += [f"       {fault.case}: {fault.detail}"[:400] for fault in found[:2]]
        return "\n".join(lines)


class Hang(BaseException):
    """A case took too long. No code under test catches it."""


def check(cases: Sequence[Case], room: Path) -> Outcome:
    """Run cases one after another in this process, each in its own empty folder under `room`."""
    outcome = Outcome()
    for number, case in enumerate(cases):
        if ONLY is not None and ONLY not in case.name:
            continue
        folder = room / f"case {number}"
        fault, refused = _check_one(case, folder)
        if fault is not None:
            outcome.faults.append(fault)
        outcome.refused += fault is None and refused
        outcome.accepted += fault is None and not refused
    return outcome


def _check_one(case: Case, folder: Path) -> tuple[Fault | None, bool]:
    """A fault, if there is one, and whether the input was refused."""
    inside, around, temporary = folder / "input", folder / "elsewhere", folder / "temporary"
    for path in (inside, around, temporary):
        path.mkdir(parents=True)
    case.lay(inside)
    before = tree(folder)
    children = _children()
    refused = False
    with _placed(around, temporary), _output() as output:
        try:
            with _limited():
                case.act(inside)
            problem: BaseException | None = None
        except (Exception, Hang, KeyboardInterrupt, SystemExit) as raised:
            problem = raised
    try:
        if problem is not None:
            if ONLY is not None:
                traceback.print_exception(problem)
            if not isinstance(problem, MegarlError):
                return _fault(case, problem), False
            refused = True
            flaw = flaw_of(str(problem), (str(inside), *case.names))
            if flaw:
                return Fault(flaw, innermost(problem), case.name, str(problem)), True
        changed = difference(before, tree(folder))
        if changed:
            return Fault("a file was changed or written", changed[0], case.name, ", ".join(changed[:4])), refused
        left = [child for child in _children() if child not in children]
        if left:
            return Fault("a process was left", str(left[0]), case.name), refused
        noise = noise_in(output[0])
        return (Fault(noise, "", case.name, output[0][-300:]) if noise else None), refused
    finally:
        _unlock(folder)
        shutil.rmtree(folder, ignore_errors=True)


def flaw_of(message: str, names: Sequence[str]) -> str | None:
    """What is wrong with an error's message."""
    if not message.strip():
        return "an error without a message"
    if "\n" in message or "\r" in message:
        return "a message of several lines"
    if len(message) > LONGEST:
        return "a message that is too long to read"
    if not any(name and name in message for name in names):
        return "a message that names neither file nor key"
    return None


def noise_in(output: str) -> str | None:
    """What a refusal must not print."""
    if "Traceback" in output:
        return "a traceback was printed"
    if re.search(r"\w*Warning\b", output):
        return "another library's warning was printed"
    if len(output.splitlines()) > LINES:
        return "more was printed than can be read"
    return None


def innermost(problem: BaseException) -> str:
    """The innermost line of megarl that an error came through."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if not ours:
        return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno} ({ours[-1].name})"


def tree(folder: Path) -> dict[str, Any]:
    """Every path below a folder, and what is there."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(root, name), folder)] = "folder"  # noqa: PTH118 - names that Path refuses
        for name in files:
            path = os.path.join(root, name)  # noqa: PTH118
            if os.path.islink(path) or not os.path.isfile(path):  # noqa: PTH113, PTH114
                found[os.path.relpath(path, folder)] = "no plain file"
                continue
            with contextlib.suppress(PermissionError), open(path, "rb") as file:  # noqa: PTH123
                found[os.path.relpath(path, folder)] = zlib.crc32(file.read())
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths that were changed, removed or made."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _fault(case: Case, problem: BaseException) -> Fault:
    what = "a hang" if isinstance(problem, Hang) else type(problem).__name__
    return Fault(what, innermost(problem), case.name, " ".join(str(problem).split()))


def _children() -> set[int]:
    with contextlib.suppress(psutil.Error):
        return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != "zombie"}
    return set()


@contextlib.contextmanager
def _placed(folder: Path, temporary: Path) -> Iterator[None]:
    """Another current folder, home and folder for temporary files, in which nothing may be left."""
    here, before, directory = Path.cwd(), dict(os.environ), tempfile.tempdir
    os.chdir(folder)
    os.environ.update(HOME=str(folder), TMPDIR=str(temporary))
    tempfile.tempdir = str(temporary)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = directory


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise `Hang` after some seconds of processor time, or of the clock."""

    def stop(number: int, frame: Any) -> None:
        raise Hang(f"more than {CPU_S:.0f} s of computing, or {WALL_S:.0f} s of waiting")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, CPU_S), (signal.SIGALRM, signal.ITIMER_REAL, WALL_S))
    handlers = [signal.signal(number, stop) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, handlers, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


@contextlib.contextmanager
def _output() -> Iterator[list[str]]:
    """What is written to stdout and stderr, by libraries in C too; in the list when the block is left."""
    written = [""]
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, open(file.fileno(), "w", encoding="utf-8", closefd=False) as stream:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), _warnings() as seen:
                yield written
        finally:
            stream.flush()
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            shown = "".join(f"{warning.category.__name__}: {warning.message}\n" for warning in seen)
            written[0] = file.read().decode("utf-8", "replace") + shown


@contextlib.contextmanager
def _warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings that a command would show."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        quiet()
        yield seen


def _unlock(folder: Path) -> None:
    """Give back permissions that a case took."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(root, name), 0o755)  # noqa: PTH101, PTH118
