"""Whole commands as a user starts them: odd surroundings, and a sample of spoilt files of every kind."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.gates.fuzz import archives, checkpoints, models, mutate, records, scorers, surroundings, traces
from tests.gates.fuzz.check import ONLY, Fault, Outcome, difference, flaw_of, noise_in, tree
from tests.gates.fuzz.runs import PPO, REWARDS, SFT, lay_ppo, ppo_run, sft_run

CPU_S, WALL_S = 60, 300.0  # the machine may be busy: nothing here takes more than some seconds of computing
DOCUMENTED = {
    "train": (0, 2, 3),
    "generate": (0, 2, 3),
    "plan": (0, 2),
    "convert": (0, 1, 2),
    "selftest": (0, 1, 2),
    "why_stuck": (0, 1, 2),
}
MARK = "MEGARL_FUZZ_CASE"
PRINTED = "rewards.py:score: "
"""Stands before what a reward function printed, of which more may be logged than of a command itself."""


@dataclass(frozen=True)
class Command:
    """A command and what surrounds it.

    Attributes:
        module: entry point, without `megarl.`.
        lay: write its input into its current folder.
        variables: environment to set, or to take away (None).
        streams: arguments of Popen that take the place of pipes.
        written: folders in which it may write.
    """

    name: str
    module: str
    words: list[str]
    lay: Callable[[Path], Any] = lambda folder: None
    variables: dict[str, str | None] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ("run", "out.jsonl", "exported", "home", "tmp")
    here: str = "."


def cases(seed: int, count: int, store: Path) -> list[Command]:
    makers = (_surrounded, _placed, _resumed, _scored, _fed, _generated, _converted, _small)
    made = []
    for number in range(count):
        draw = Random(f"commands {seed} {number}")
        maker = makers[number % len(makers)]
        made.append(maker(draw, f"commands {maker.__name__[1:]} {seed}.{number}", store))
    return made


def check(commands: Sequence[Command], room: Path) -> Outcome:
    """Run commands, two at a time."""
    outcome = Outcome()
    chosen = [command for command in commands if ONLY is None or ONLY in command.name]
    with ThreadPoolExecutor(2) as pool:
        folders = [room / f"command {number}" for number in range(len(chosen))]  # a name with a space
        for fault, refused in pool.map(_check_one, chosen, folders):
            if fault is not None:
                outcome.faults.append(fault)
            else:
                outcome.refused += refused
                outcome.accepted += not refused
    return outcome


def _check_one(command: Command, folder: Path) -> tuple[Fault | None, bool]:
    (folder / "home").mkdir(parents=True)
    (folder / "tmp").mkdir()
    command.lay(folder)
    before = tree(folder)
    mark = uuid.uuid4().hex
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MEGARL_", "PYTEST_"))}
    environ |= {"OMP_NUM_THREADS": "1", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), MARK: mark}
    surroundings.apply(command.variables, environ)
    outputs: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [sys.executable, "-m", f"megarl.{command.module}", *command.words],
        cwd=folder / command.here,
        env=environ,
        start_new_session=True,
        **{**outputs, **command.streams},
    )
    try:
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_S, CPU_S))
        said, told = process.communicate(timeout=WALL_S)
    except subprocess.TimeoutExpired:
        return Fault("a hang", command.module, command.name, f"more than {WALL_S:.0f} s"), False
    finally:
        left = _marked(mark)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        process.wait()
    if left:
        return Fault("a process was left", command.module, command.name, str(left)), False
    text = (told or b"").decode("utf-8", "replace")
    fault = _flaw(command, process.returncode, (said or b"").decode("utf-8", "replace"), text)
    if fault is None:
        changed = [path for path in difference(before, tree(folder)) if Path(path).parts[0] not in command.written]
        if changed:
            fault = Fault("a file was changed or written", changed[0], command.name, ", ".join(changed[:4]))
    if fault is None:
        shutil.rmtree(folder, ignore_errors=True)
    return fault, process.returncode != 0


def _flaw(command: Command, code: int, said: str, told: str) -> Fault | None:
    kind = "train" if command.module.startswith("train") else command.module
    tail = " | ".join(told.strip().splitlines()[-3:])
    if code not in DOCUMENTED[kind]:
        last = told.strip().splitlines()[-1:] or [""]
        return Fault(f"exit code {code}", last[0].partition(":")[0][:60], command.name, tail)
    noise = noise_in("\n".join(line for line in (said + told).splitlines() if PRINTED not in line))
    if noise:
        return Fault(noise, command.module, command.name, tail)
    if code in (2, 3) and command.streams.get("stderr") is None and command.variables.get("RANK", "0") in ("0", None):
        errors = [found[1] for line in told.splitlines() if (found := re.match(r"(?:\[rank .*?\] )?error: (.*)", line))]
        if len(errors) != 1:
            return Fault(f"{len(errors)} lines of error", command.module, command.name, tail)
        flaw = flaw_of(errors[0], (".", "=", "/", "_"))
        if flaw:
            return Fault(flaw, command.module, command.name, errors[0])
    return None


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# --- what is started --------------------------------------------------------------------------------------------------

TRAIN = [*SFT, "trainer.max_steps=1", "checkpoint.every=null", "run.dir=run"]


def _surrounded(draw: Random, name: str, store: Path) -> Command:
    """Variables of launchers. A world of several processes would wait for the others, so those are left out."""
    variables = surroundings.drawn(draw)
    for key in ("WORLD_SIZE", "SLURM_NTASKS"):
        if (variables.get(key) or "").strip().isdecimal() and int(variables[key] or 0) > 1:
            variables[key] = "1"
    shown = " ".join(f"{key}={value!r:.30}" for key, value in variables.items())
    words = TRAIN if draw.random() < 0.5 else [word for word in TRAIN if not word.startswith("run.dir")]
    return Command(f"{name}: {shown}", "train_sft", words, variables=variables, written=("run", "runs", "home", "tmp"))


def _placed(draw: Random, name: str, store: Path) -> Command:
    """Folders, locales, terminals and streams."""
    full = open("/dev/full", "wb")  # noqa: PTH123, SIM115 - closed with the process
    odd: dict[str, tuple[dict[str, str | None], dict[str, Any]]] = {
        "locale C": ({"LC_ALL": "C", "LANG": "C"}, {}),
        "ASCII streams": ({"PYTHONIOENCODING": "ascii"}, {}),
        "a locale that is not there": ({"LC_ALL": "gone.UTF-8"}, {}),
        "no HOME": ({"HOME": None}, {}),
        "a HOME that is not there": ({"HOME": "/gone/home"}, {}),
        "a HOME that cannot be written": ({"HOME": "/proc"}, {}),
        "no TMPDIR": ({"TMPDIR": "/gone"}, {}),
        "no PATH": ({"PATH": ""}, {}),
        "a dumb terminal": ({"TERM": "dumb", "COLUMNS": "0"}, {}),
        "an unknown terminal": ({"TERM": "x" * 300, "COLUMNS": "-5", "LINES": "two"}, {}),
        "no terminal": ({"TERM": None}, {}),
        "colours asked for": ({"FORCE_COLOR": "1", "COLUMNS": "3"}, {}),
        "stdin closed": ({}, {"stdin": None, "preexec_fn": lambda: os.close(0)}),
        "stdout closed": ({}, {"stdout": None, "preexec_fn": lambda: os.close(1)}),
        "all streams closed": (
            {},
            {"stdin": None, "stdout": None, "stderr": subprocess.DEVNULL, "preexec_fn": lambda: os.closerange(0, 2)},
        ),
        "stdout full": ({}, {"stdout": full}),
        "two gigabytes of memory at most": ({"MALLOC_ARENA_MAX": "2"}, {}),
        "another seed of hashes": ({"PYTHONHASHSEED": "7", "PYTHONWARNINGS": "default"}, {}),
        "optimised bytecode": ({"PYTHONOPTIMIZE": "1"}, {}),
    }
    what = draw.choice(list(odd))
    variables, streams = odd[what]
    folder = draw.choice(("here", "a folder with spaces", "é", "quote'", "$HOME", "a=b", "[x]", "{y}", "x,y", "-r"))
    bad = draw.random() < 0.4
    words = [word for word in TRAIN if not word.startswith("run.dir")]
    words += ["run.dir=../run", f"data.train=[{'gone é.jsonl' if bad else 'data.jsonl'}]"]

    def lay(place: Path) -> None:
        (place / folder).mkdir()
        lines = "".join(f'{{"prompt": "a é {number}", "completion": "b"}}\n' for number in range(4))
        mutate.put(place / folder / "data.jsonl", lines)

    name = f"{name}: {what}, in {folder!r}{', data missing' if bad else ''}"
    return Command(name, "train_sft", words, lay, variables, streams, here=folder)


def _resumed(draw: Random, name: str, store: Path) -> Command:
    """A run whose newest checkpoint is spoilt goes on from the one before it, or is refused."""
    original = sft_run(store)
    make = draw.choice((checkpoints._file, checkpoints._common, checkpoints._common, checkpoints._json_file))
    what, change = make(draw, original / "checkpoints" / checkpoints.STEP)
    mended = draw.random() < 0.6

    def lay(folder: Path) -> None:
        shutil.copytree(original, folder / "run")
        change(folder / "run" / "checkpoints" / checkpoints.STEP)
        if mended:
            checkpoints.mend(folder / "run" / "checkpoints" / checkpoints.STEP)

    words = [*SFT, "trainer.max_steps=3", "checkpoint.every=1", "run.dir=run"]
    return Command(f"{name}: {what}{', manifest put right' if mended else ''}", "train_sft", words, lay)


def _scored(draw: Random, name: str, store: Path) -> Command:
    """A reward function that misbehaves."""
    what = draw.choice([one for one in scorers.BODIES if "hang" not in one])
    source = scorers.source_of(what)

    def lay(folder: Path) -> None:
        lay_ppo(folder)
        mutate.put(folder / "rewards.py", source)

    words = [
        *PPO,
        "run.dir=run",
        "reward.calls.timeout=3",
        "reward.calls.retries=0",
        f"reward.calls.on_error={draw.choice(('error', 'drop'))}",
    ]
    return Command(f"{name}: {what}", "train_ppo", [*words, "trainer.max_phases=1"], lay)


def _fed(draw: Random, name: str, store: Path) -> Command:
    """Spoilt files of a run that is resumed, or spoilt data."""
    home = ppo_run(store)
    if draw.random() < 0.5:
        what, file, laid = draw.choice((records._jsonl, records._json, records._folder))(
            draw, records.RECORDS["offline"]
        )
        words = [word for word in SFT if not word.startswith("data.eval")]
        words += [f"data.train=[{file}]", "data.cache=null", "trainer.max_steps=1", "run.dir=run"]
        return Command(f"{name}: ILQL of {file}: {what}", "train_ilql", words, laid)
    files = ("journal", "dump", "metrics.csv", "summary.json", "config.yaml", "versions.json", "breadcrumbs")
    kind = draw.choice(files)
    source = {
        "journal": "run/journal/reward-train-000001.jsonl",
        "dump": "dump/train-000001.jsonl",
        "breadcrumbs": "run/breadcrumbs/rank-0.json",
    }.get(kind, f"run/{kind}")
    spoil = traces._lines if source.endswith("jsonl") else lambda draw, path: mutate.data(draw, path.read_bytes())
    what, content = spoil(draw, home / source)

    def lay(folder: Path) -> None:
        for item in ("run", "dump"):
            shutil.copytree(home / item, folder / item)
        shutil.rmtree(folder / "run" / "checkpoints" / "step-0000002", ignore_errors=True)
        lay_ppo(folder)
        mutate.put(folder / source, content)

    more = ["rollout.replay=dump"] if kind == "dump" else []
    return Command(f"{name}: {source}: {what}", "train_ppo", [*PPO, "run.dir=run", "checkpoint.every=1", *more], lay)


def _generated(draw: Random, name: str, store: Path) -> Command:
    place = store.parent / "models"
    models.cases(0, 0, _made(place))
    base, what, laid = draw.choice((models._config, models._header, models._body, models._pickle))(draw, place)
    words = [
        "model.path=model",
        "prompts=abc",
        "tokenizer.kind=characters",
        "tokenizer.path=abcdef",
        "out=out.jsonl",
        "rollout.max_new_tokens=4",
    ]
    if draw.random() < 0.3:
        file_what, file, records_laid = draw.choice((records._jsonl, records._folder))(draw, records.RECORDS["prompts"])
        words = [
            "model.num_layers=1",
            "model.hidden_size=16",
            "model.num_heads=2",
            f"prompts='{file}'",
            "rollout.max_new_tokens=2",
        ]
        return Command(f"{name}: prompts {file}: {file_what}", "generate", words, records_laid)
    return Command(f"{name}: {base} {what}", "generate", words, laid)


def _converted(draw: Random, name: str, store: Path) -> Command:
    place = _made(store.parent / "archives")
    case = archives.cases(draw.randrange(10**6), 1, place)[0]
    target = draw.choice(("exported", "exported", "exported/a b", "/proc/gone", "/dev/null", "model.nemo"))
    words = ["from=model.nemo", f"to={target}"]
    variables: dict[str, str | None] = {"XDG_CACHE_HOME": None}
    return Command(f"{name}: {case.name} to {target}", "convert", words, case.lay, variables)


def _small(draw: Random, name: str, store: Path) -> Command:
    """Commands that train nothing."""
    home = ppo_run(store)
    if draw.random() < 0.4:
        what, content = traces._lines(draw, home / "run" / "breadcrumbs" / "rank-0.json")

        def lay(folder: Path) -> None:
            shutil.copytree(home / "run", folder / "run")
            mutate.put(folder / "run" / "breadcrumbs" / "rank-0.json", content)

        return Command(f"{name}: {what}", "why_stuck", ["run"], lay)
    module = draw.choice(("plan", "selftest", "train_rft"))
    keys = {
        "plan": ["cluster.gpus=8", "model.num_layers=2"],
        "selftest": ["steps=1"],
        "train_rft": ["data.train=[prompts.jsonl]", "reward.fn=rewards.py:score"],
    }[module]
    from tests.gates.fuzz.settings import TEXTS

    value = draw.choice([text for text in TEXTS if "\0" not in text and "\ud800" not in text])
    key = draw.choice(
        ("steps", "precision", "tp")
        if module == "selftest"
        else ("seed", "model.path", "parallel.tp", "optim.lr", "trainer.devices")
    )

    def lay_files(folder: Path) -> None:
        lay_ppo(folder)
        mutate.put(folder / "rewards.py", REWARDS)

    words = [*keys, f"{key}={value}"]
    if module == "train_rft":
        words += ["trainer.max_phases=1", "run.dir=run", *PPO[:6], "rollout.n=2", "rollout.max_new_tokens=2"]
    return Command(f"{name}: {module} {key}={value[:60]!r}", module, words, lay_files, written=("run", "home", "tmp"))


def _made(store: Path) -> Path:
    store.mkdir(exist_ok=True)
    return store
