"""Command lines, overrides and presets, composed and checked as an entry point does it before anything is built."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megarl.config.algorithms import entry_point, entry_points
from megarl.config.compose import _needs_hydra, compose
from megarl.config.files import check_files
from megarl.config.leaf import Leaf, leaves, sections
from megarl.config.preset_files import HEADER
from megarl.config.rules import check
from megarl.config.world import world_size
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case

TEXTS = (
    "",
    "null",
    "true",
    "no",
    "0",
    "-1",
    "1",
    "3",
    "7",
    "2.5",
    "1e400",
    "-inf",
    "nan",
    "99999999999999999999",
    "1" + "0" * 400,
    "0x10",
    "1_000",
    "two",
    "auto",
    "[]",
    "[1,2]",
    "[a,",
    "{}",
    "{a:1}",
    "{a:{b:[}",
    "'",
    '"',
    "''",
    "a b",
    "a,b",
    "$",
    "${seed}",
    "${gone}",
    "${oc.env:GONE}",
    "${oc.env:HOME}",
    "${model}",
    "${.}",
    "${",
    "${resource:}",
    "a=b",
    "=",
    "?",
    "???",
    "_target_",
    "!!python/object/apply:os.system [ls]",
    "../../x",
    "/etc/passwd",
    "/dev/null",
    "/proc/self/mem",
    "~nobody/x",
    "~",
    ".",
    "x" * 300,
    "x/" * 200,
    "x" * 5000,
    "a\nb",
    "a\tb",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "é",
    "\U0001f600",
    "range(1,3)",
    "choice(a,b)",
    "glob(*)",
    "int(x)",
    "sweep",
    "*",
    "&a",
    "%",
    "#",
    "\\",
    "\\,",
    "tp3",
    "tp2xpp2",
    "train.jsonl",
    "nobody/nothing",
    "a:b",
    "a.b:c",
    "::",
    "01:00:00",
    "99:99:99",
    "-",
    "--",
    "1,",
    "(",
    ")",
)
ALWAYS = ("override", "conf", "data.train", "reward.fn", "prompts", "unknown key", "key=value")
"""Words of errors that name what is missing, or show what was typed in other signs."""
SIGNS = ("", "", "", "", "", "+", "++", "~", "+~", "@", "-", "--", " ", "=")
FLAGS = (
    "--help=1",
    "--cfg",
    "-c",
    "--multirun",
    "-m",
    "--config-name",
    "--config-dir=/gone",
    "-cp",
    "--experimental-rerun=x",
    "--info",
    "--resolve",
    "--package",
    "--no",
    "-",
    "--",
    "-h5",
    "--hydra-help",
    "--shell-completion",
    "--seed=1",
)
PRESET = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "activation": "swiglu"},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.95]},
    "trainer": {"max_steps": 3, "devices": "auto", "max_time": "01:00:00"},
    "data": {"train": ["a.jsonl"], "eval": []},
    "parallel": {"tp": 1, "pp": 1},
    "run": {"name": "mine"},
}
ODD_PRESETS = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: &d [*c, *c]\ne: &e [*d, *d]\nf: [*e, *e]\n",
    "model: &m\n  path: *m\n",
    "model: {num_layers: 1, num_layers: 2}\n",
    "1: 2\n",
    "null: 1\n",
    "? [a, b]\n: 1\n",
    "model:\n\tnum_layers: 1\n",
    "model: !!python/object/apply:os.system ['touch ran']\n",
    "model: ${gone}\n",
    "model: ${model}\n",
    "optim:\n  lr: ${optim.lr}\n",
    "seed: ???\n",
    "defaults:\n  - model: gone\nseed: 1\n",
    "defaults: 3\n",
    "defaults: [_self_]\nseed: 3\n",
    "hydra:\n  run:\n    dir: /tmp/megarl-fuzz-outside\n",
    "- a\n- b\n",
    "text\n",
    "---\nseed: 1\n---\nseed: 2\n",
    "%YAML 9.9\n---\nseed: 1\n",
    "seed: 2001-01-01\n",
    "seed: 12:30:45\n",
    "seed: 0o17\n",
    "model: []\n",
    "model: null\n",
    "model: text\n",
    "data: {train: a.jsonl}\n",
    "data: {train: {a: 1}}\n",
    "a" * 3000 + ": 1\n",
    "{" * 3000,
    "seed: " + "9" * 5000 + "\n",
    "seed: !!binary aGVsbG8=\n",
    "seed: !!set {a}\n",
    "seed: !unknown 1\n",
    "model.num_layers: 2\n",
    "_target_: os.system\n",
    "run: {name: ../../outside}\n",
    "run: {name: '${oc.env:HOME}'}\n",
    "seed: .nan\n",
    "seed: .inf\n",
)


def cases(seed: int, count: int, store: Path) -> list[Case]:
    made = []
    trees = {name: list(leaves(entry.config)) for name, entry in entry_points().items()}
    for number in range(count):
        draw = Random(f"settings {seed} {number}")
        kind = draw.choices(("override", "preset", "command"), (6, 3, 2))[0]
        make: Callable[..., Case] = {"override": _override, "preset": _preset, "command": _command}[kind]
        made.append(make(draw, f"settings {kind} {seed}.{number}", trees))
    return made


def _composed(entry: str, argv: list[str]) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        os.chdir(folder)
        if _needs_hydra(argv, entry_point(entry).config):
            return
        config, _ = compose(entry, argv)
        check(config, world_size(config, {}))
        check_files(config)

    return act


def _nothing(folder: Path) -> None:
    """No files."""


def _override(draw: Random, name: str, trees: dict[str, list[Leaf]]) -> Case:
    entry = draw.choice(list(trees))
    words, names = [], [*ALWAYS]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        key = draw.choice(trees[entry]).key
        if draw.random() < 0.12:
            key = draw.choice(sections(entry_point(entry).config))
        if draw.random() < 0.15:
            key = _misspelt(draw, key)
        names += [key, key.rpartition(".")[2], key.partition(".")[0]]
        sign, value = draw.choice(SIGNS), draw.choice(TEXTS)
        word = f"{sign}{key}={value}" if draw.random() < 0.95 else f"{sign}{key}"
        if draw.random() < 0.02:
            word = value
        names += [word, word[:40]]
        words.append(word)
    if draw.random() < 0.05:
        words.append(draw.choice(FLAGS))
        names.append(words[-1].partition("=")[0])
    return Case(f"{name}: {entry} {str(words)[:200]}", _nothing, _composed(entry, words), tuple(filter(None, names)))


def _misspelt(draw: Random, key: str) -> str:
    at = draw.randrange(len(key))
    other = draw.choice(("", "x", ".", "..", " ", "é", "[0]", "@", "/", ":", "\0", "-", "${seed}", "'"))
    return key[:at] + other + key[at + draw.choice((0, 1)) :]


def _preset(draw: Random, name: str, trees: dict[str, list[Leaf]]) -> Case:
    entry = draw.choice(list(trees))
    kind = draw.randrange(4)
    header = HEADER if draw.random() < 0.95 else draw.choice(("", "# @package model", "\ufeff" + HEADER))
    body: bytes
    if kind == 0:
        what = draw.choice(ODD_PRESETS)
        body = what.encode()
    elif kind == 1:
        what, tree = mutate.tree(draw, PRESET, [pair for pair in mutate.VALUES if not isinstance(pair[1], mutate.Raw)])
        body = yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
    elif kind == 2:
        what, body = mutate.text(draw, yaml.safe_dump(PRESET))
    else:
        what, body = mutate.data(draw, yaml.safe_dump(PRESET).encode())

    def lay(folder: Path) -> None:
        (folder / "conf").mkdir()
        (folder / "conf" / "mine.yaml").write_bytes(f"{header}\n".encode() + body)

    words = ["+conf=mine", *(["trainer.max_steps=2"] if draw.random() < 0.1 else [])]
    keys = [f"{section}.{key}" for section, own in PRESET.items() for key in own]
    names = ("mine", *PRESET, *keys, "seed", "mine.yaml", *ALWAYS)
    return Case(f"{name}: {entry} {what[:200]!r}", lay, _composed(entry, words), names)


def _command(draw: Random, name: str, trees: dict[str, list[Leaf]]) -> Case:
    """Commands that read their settings themselves."""
    from megarl import convert, plan, selftest, why_stuck

    def planned(words: list[str]) -> object:
        own, theirs = plan.split(words)
        return plan.compose_run(plan.read(own), theirs)

    readers: dict[str, tuple[Callable[[list[str]], Any], tuple[str, ...]]] = {
        "convert": (convert.parse, convert.KEYS),
        "selftest": (selftest.parse, ("tp", "pp", "dp", "vpp", "sequence_parallel", "recompute", "precision", "steps")),
        "plan": (
            planned,
            ("cluster.gpus", "cluster.gpu", "algorithm", "mfu", "suggest", "json", "model.num_layers", "parallel.tp"),
        ),
        "why_stuck": (why_stuck.run, ("beat", "run")),
    }
    chosen = draw.choice(list(readers))
    reader, keys = readers[chosen]
    words, names = [], ["from", "RUN", *keys, *ALWAYS]
    for _ in range(draw.choice((1, 1, 2, 3))):
        key = draw.choice(keys)
        key = _misspelt(draw, key) if draw.random() < 0.15 else key
        words.append(f"{draw.choice(SIGNS)}{key}={draw.choice(TEXTS)}" if draw.random() < 0.9 else draw.choice(TEXTS))
        names += [words[-1], key]

    def act(folder: Path) -> None:
        os.chdir(folder)
        reader(words)

    return Case(f"{name}: {chosen} {str(words)[:200]}", _nothing, act, tuple(filter(None, names)))
