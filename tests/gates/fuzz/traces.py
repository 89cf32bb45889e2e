"""What runs leave for later processes of theirs: journals of scores, dumps of rollouts, breadcrumbs, metrics."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from megarl import why_stuck
from megarl.experience.journal import Journal
from megarl.heartbeat import FOLDER
from megarl.rollout import stored
from megarl.rollout.requests import Request
from megarl.run.csv_logger import MetricsFile
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case
from tests.gates.fuzz.runs import ppo_run

NAMES = (
    "reward-backup.jsonl",
    "reward-train-.jsonl",
    "reward-train-1e9.jsonl",
    "reward-train-000001 (copy).jsonl",
    "reward-.jsonl",
    "reward-train--5.jsonl",
    "reward-train-²³.jsonl",
)


def make_store(store: Path) -> None:
    ppo_run(store)


def cases(seed: int, count: int, store: Path) -> list[Case]:
    home = ppo_run(store)
    ways = {"journal": _journal, "dump": _dump, "breadcrumbs": _breadcrumbs, "metrics": _metrics}
    made = []
    for number in range(count):
        draw = Random(f"traces {seed} {number}")
        kind = draw.choices(list(ways), (4, 4, 3, 2))[0]
        made.append(ways[kind](draw, f"traces {kind} {seed}.{number}", home))
    return made


def _lines(draw: Random, path: Path) -> tuple[str, bytes]:
    """A file of JSON lines with a spoilt one, or spoilt as a whole."""
    content = path.read_text()
    kind = draw.randrange(5)
    if kind == 0:
        return mutate.data(draw, content.encode())
    if kind == 1:
        return mutate.text(draw, content)
    lines = content.splitlines()
    at = draw.randrange(len(lines))
    what, tree = mutate.tree(draw, json.loads(lines[at]))
    lines[at] = mutate.dumps(tree)
    return f"line {at + 1}: {what}", ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _journal(draw: Random, name: str, home: Path) -> Case:
    file = draw.choice(sorted((home / "run" / "journal").glob("reward-*.jsonl")))
    by = json.loads(file.read_text().splitlines()[0])["by"]
    what, spoilt = _lines(draw, file)
    stray = draw.choice(NAMES) if draw.random() < 0.3 else None

    def lay(folder: Path) -> None:
        shutil.copytree(home / "run" / "journal", folder / "journal")
        mutate.put(folder / "journal" / file.name, spoilt)
        if stray:
            mutate.put(folder / "journal" / stray, spoilt)

    def act(folder: Path) -> None:
        journal = Journal(folder / "journal", "reward", by)
        for phase in (0, 1, 2):
            for score, parts in journal.read(0, phase).values():
                assert score is None or isinstance(score, int | float | list), score
                assert isinstance(parts, dict), parts
        journal.forget(0)

    return Case(f"{name}: {what}{f', beside {stray}' if stray else ''}", lay, act)


def _dump(draw: Random, name: str, home: Path) -> Case:
    what, spoilt = _lines(draw, home / "dump" / "train-000000.jsonl")
    requests = [
        Request(r.prompt_id, r.sample_id, tuple(r.prompt)) for r in stored.load(home / "dump" / "train-000000.jsonl")
    ]

    def lay(folder: Path) -> None:
        mutate.put(folder / "train-000000.jsonl", spoilt)

    def act(folder: Path) -> None:
        for rollout in stored.replay(folder, 0, 0, requests):
            assert all(isinstance(token, int) and token >= 0 for token in rollout.response), rollout
            assert all(isinstance(value, int | float) for value in rollout.logprobs), rollout
            assert rollout.response_without_eos is not None

    return Case(f"{name}: {what}", lay, act)


def _breadcrumbs(draw: Random, name: str, home: Path) -> Case:
    what, spoilt = _lines(draw, home / "run" / FOLDER / "rank-0.json")

    def lay(folder: Path) -> None:
        shutil.copytree(home / "run" / FOLDER, folder / FOLDER)
        mutate.put(folder / FOLDER / draw.choice(("rank-0.json", "rank-1.json", "rank-x.json")), spoilt)

    def act(folder: Path) -> None:
        os.chdir(folder)
        assert why_stuck.run(["."]) in (0, 1)

    return Case(f"{name}: {what}", lay, act, (f"{FOLDER}/rank-*.json",))


def _metrics(draw: Random, name: str, home: Path) -> Case:
    content = (home / "run" / "metrics.csv").read_bytes()
    what, spoilt = mutate.text(draw, content.decode()) if draw.random() < 0.5 else mutate.data(draw, content)

    def lay(folder: Path) -> None:
        mutate.put(folder.parent / "metrics.csv", spoilt)

    def act(folder: Path) -> None:
        path = folder.parent.parent / "written" / "metrics.csv"  # a logger rewrites its file
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder.parent / "metrics.csv", path)
        logger = _logger(path)
        logger.log_metrics({"a": 1.0}, 1)
        logger.log_metrics({"b": 1.0}, 3)

    return Case(f"{name}: {what}", lay, act, ("metrics.csv",))


def _logger(path: Path) -> Any:
    make: Callable[..., Any] = MetricsFile
    return make(path)
