"""The code blocks of the documentation: commands can be started as they are written, and what is code or data is valid.

tests/gates/test_doc_python.py runs the blocks of Python.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megarl
from megarl.config.algorithms import ALGORITHMS
from megarl.config.leaf import leaves
from megarl.errors import MegarlError
from megarl.trials.plan import read as read_sweep
from tests.doc_blocks import KINDS, Block, all_blocks, blocks_of, commands_of
from tests.doc_commands import Checker

BLOCKS = all_blocks()
PRESET = "# @package _global_\ndata:\n  train: [prompts.jsonl]\nreward:\n  fn: rewards.py:score\n"
KEYS = {leaf.key.partition(".")[0] for algorithm in ALGORITHMS.values() for leaf in leaves(algorithm.config)}


FIRST = ("README.md", "docs/quickstart.md", "docs/questions.md")
"""Pages whose commands `make test` composes; `make gates` composes those of the others."""


def blocks(kind: str, gated: bool = False) -> list[Any]:
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.gate] * (gated and block.page not in FIRST))
        for block in BLOCKS
        if block.kind == kind and not block.reason
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the presets and settings that the pages call `mine` and `theirs`."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(PRESET)
    for name in ("mine.yaml", "theirs.yaml"):
        (tmp_path / name).write_text("data: {train: [prompts.jsonl]}\nreward.fn: rewards.py:score\n")
    (tmp_path / "sweep.yaml").write_text("metric: eval/score\nsearch: {optim.lr: 'loguniform(1e-6, 1e-4)'}\n")
    (tmp_path / "own.py").write_text("def above_median(scores, groups):\n    return scores\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_names_its_language_and_an_unchecked_one_its_reason() -> None:
    assert [str(block) for block in BLOCKS if block.kind not in KINDS] == []
    assert [str(block) for block in BLOCKS if block.reason and len(block.reason.split()) < 3] == []
    assert len(BLOCKS) > 150


def check_commands(text: str) -> None:
    for command in commands_of(text):
        Checker().check(command)


def check_all(block: Block, checker: Checker) -> None:
    found = list(commands_of(block.text))
    assert found
    for command in found:
        try:
            checker.check(command)
        except (AssertionError, MegarlError) as error:
            pytest.fail(f"{command}\n{error}")


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_have_names_of_programs_keys_and_presets(project: Path, block: Block) -> None:
    check_all(block, Checker(composes=False))


@pytest.mark.parametrize("block", blocks("bash", gated=True))
def test_commands_can_be_started_as_they_are_written(project: Path, block: Block) -> None:
    check_all(block, Checker())


@pytest.mark.parametrize("block", blocks("text", gated=True))
def test_lines_of_settings_are_accepted(project: Path, block: Block) -> None:
    """Blocks of text may be anything; of those that begin with a setting, every line is a command line."""
    begins = block.text.strip().lstrip('"').partition("=")[0]
    if begins.partition(".")[0] not in KEYS or " raised " in block.text:
        return
    given = ["+conf=mine", "reward.fn=null", "reward.terms=[{fn: rewards.py:score}, {fn: rewards.py:other, weight: 1}]"]
    for command in commands_of("\n".join(f"megarl {line}" for line in block.text.splitlines())):
        indexed = any(word.startswith("reward.terms.") for word in command.words)
        Checker().run("ppo", [*given[: 3 if indexed else 2], *command.words[1:]])


@pytest.mark.parametrize("block", blocks("yaml"))
def test_settings_in_yaml_compose(project: Path, block: Block) -> None:
    if "@package _global_" in block.text:
        (project / "conf" / "shown.yaml").write_text(block.text)
        Checker().run("ppo", ["+conf=[mine,shown]", *["reward.fn=null"] * ("terms:" in block.text)])
    else:
        assert "search" in yaml.safe_load(block.text)
        (project / "shown.yaml").write_text(block.text)
        assert read_sweep(["ppo", "sweep.file=shown.yaml"]).spaces


@pytest.mark.parametrize("block", blocks("json"))
def test_json_is_valid(block: Block) -> None:
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_imports_what_there_is_and_sets_keys_that_exist(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megarl"):
            found = importlib.util.find_spec(str(node.module))  # reads no more than the package, unlike an import
            assert found is not None
            assert found.origin is not None
            source = Path(found.origin).read_text()
            assert [name.name for name in node.names if not re.search(rf"\b{name.name}\b", source)] == []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "megarl.default_config":
            megarl.default_config(*(ast.literal_eval(argument) for argument in node.args))


def test_a_block_with_a_marker_is_not_checked_and_one_after_it_is() -> None:
    page = "<!-- not checked: shows a wrong command -->\n\n```bash\nmegarl pop\n```\n\n```bash\nmegarl ppo\n```\n"
    assert [block.reason for block in blocks_of("page", page)] == ["shows a wrong command", ""]


@pytest.mark.parametrize(
    "line",
    [
        "megarl pop",
        "megarl ppo optim.lrr=1",
        "megarl ppo +conf=randomwalk",
        "python -m megarl.train_ppo ppo.kl_coef=-1",
        "torchrun --nproc-per-node=3 -m megarl sft parallel.tp=2",
        "sbatch --nodes=1 launchers/pop.sh",
        "megarl sweep ppo sweep.metric=x 'sweep.optim.lrr=loguniform(1,2)'",
        "python -m benchmarks.decode --no-such-flag",
        "A=1 megarl show nothing && echo",
        "x=$(megarl pop)",
    ],
)
def test_a_wrong_command_is_found(project: Path, line: str) -> None:
    with pytest.raises((MegarlError, AssertionError)):
        check_commands(line)
