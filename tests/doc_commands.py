"""Checks of the commands that the documentation shows, without running them: programs, keys, values and presets.

The configuration of a run is composed and checked for the number of processes that its launcher starts. Files that a
command names need not exist.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl import compare, convert, plan, selftest
from megarl.commands import ALGORITHMS, PROGRAMS, command_names
from megarl.config.algorithms import entry_point
from megarl.config.arguments import check_arguments
from megarl.config.compose import compose
from megarl.config.files import check_functions
from megarl.config.preset_files import preset_files
from megarl.config.rules import check
from megarl.config.world import local_devices
from megarl.report_run import arguments as report_arguments
from megarl.rm_train import translate
from megarl.trials.plan import read as read_sweep
from tests.doc_blocks import ROOT, Command

FOREIGN = frozenset(
    ["ssh", "git", "cd", "source", "eval", "cat", "id", "docker", "enroot", "apptainer", "../trl/bin/pip"]
)
"""Programs that are not megarl's, whose arguments nothing here can check."""
UNKNOWN = -1
"""Number of processes where a command leaves it to the cluster."""
MODULES = {module: command for command, (module, _) in PROGRAMS.items() if command != "chat"}
_LAUNCHER = re.compile(r"(?:.*/)?(?:launchers/(\w+)|launch)\.sh")


@dataclass(frozen=True)
class Checker:
    """Checks commands.

    Attributes:
        composes: whether configurations are composed and checked, a fifth of a second each; otherwise only the names of
            keys and presets are.
    """

    composes: bool = True

    def check(self, command: Command) -> None:
        """Raise an error if a command could not be started like this."""
        program, *rest = command.words
        if program in FOREIGN:
            return
        if program == "torchrun":
            self._torchrun(rest)
        elif program in ("python", "python3"):
            self._python(rest, None)
        elif program == "megarl":
            self._megarl(rest, None)
        elif program == "sbatch":
            self._sbatch(rest)
        elif program == "bash":
            self._script(rest, command.variables)
        elif program == "make":
            _make(rest)
        elif program == "rm_train":
            translate(rest, lambda files: 100)
        else:
            raise AssertionError(f"{program} is no program that the tests know")

    def run(self, entry: str, words: Sequence[str], processes: int | None = None) -> None:
        """Check the settings of a run. Those with "..." in them are left out, and then no rule can hold.

        Args:
            processes: number of processes that a launcher starts; None: as many as the settings say.
        """
        elided = any("..." in word for word in words)
        asks = {"--help", "--cfg", "--version"} & set(words)
        settings = [word for word in words if "..." not in word and "=" in word and not word.startswith("--")]
        check_arguments(settings, entry_point(entry).config)
        if not self.composes:
            return
        config, _ = compose(entry, settings)
        if elided or asks or processes == UNKNOWN:
            return
        check(config, processes or local_devices(config) * int(config.trainer.num_nodes))
        reward = getattr(config, "reward", None)
        if reward is not None and all(str(term.value).startswith("megarl.") for term in reward.sources):
            check_functions(config)

    def _megarl(self, words: Sequence[str], processes: int | None) -> None:
        name, *rest = words
        if name.startswith("-"):
            return
        assert name in command_names(), f"megarl has no command {name}"
        if name in ALGORITHMS:
            self.run(name, rest, processes)
        elif name in ("generate", "chat"):
            chats = name == "chat" or "--chat" in rest
            self.run("generate", [*_without_system(rest), *["chat=true"] * chats], processes)
        elif name in ("evaluate", "serve-reward"):
            self.run(name.replace("-", "_"), rest, processes)
        elif name in _READERS:
            if self.composes and "--help" not in rest:
                _READERS[name](rest)
        elif name == "show":
            assert rest[0] in preset_files(Path("conf")), f"no preset {rest[0]}"

    def _python(self, words: Sequence[str], processes: int | None) -> None:
        if words[0] != "-m":
            assert (ROOT / words[0]).is_file(), f"no file {words[0]}"
            return
        module, *rest = words[1:]
        if module == "megarl":
            self._megarl(rest, processes)
        elif module.startswith("megarl.train_"):
            self._megarl([module.removeprefix("megarl.train_"), *rest], processes)
        elif module.removeprefix("megarl.") in MODULES:
            self._megarl([MODULES[module.removeprefix("megarl.")], *rest], processes)
        elif module.startswith(("megarl.", "benchmarks", "tests")):
            file = ROOT / f"{module.replace('.', '/')}.py"
            assert file.is_file(), f"no module {module}"
            flags = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
            assert {word for word in rest if word.startswith("--")} <= flags, f"{module} lacks a flag of {rest}"
        else:
            assert module == "venv", f"no module {module}"

    def _torchrun(self, words: Sequence[str]) -> None:
        at = words.index("-m")
        before = " ".join(words[:at])
        counts = [re.search(rf"--{name}[= ](\d+)", before) for name in ("nproc-per-node", "nnodes")]
        self._python(words[at:], math.prod(int(count[1]) for count in counts if count))

    def _sbatch(self, words: Sequence[str]) -> None:
        at = next(i for i, word in enumerate(words) if not word.startswith("-"))
        flags = dict(word.lstrip("-").partition("=")[::2] for word in words[:at])
        nodes, per_node = flags.get("nodes"), flags.get("gpus-per-node") or flags.get("ntasks-per-node")
        most = nodes and nodes.rpartition("-")[2]  # of a range
        self._launch(words[at:], int(most) * int(per_node) if most and per_node else UNKNOWN)

    def _script(self, words: Sequence[str], variables: dict[str, str]) -> None:
        if _LAUNCHER.fullmatch(words[0]):
            nodes = int(variables.get("SLURM_JOB_NUM_NODES", 1))
            self._launch(words, nodes * int(variables.get("SLURM_GPUS_ON_NODE", 1)))
        else:
            assert (ROOT / words[0]).is_file(), f"no file {words[0]}"

    def _launch(self, words: Sequence[str], processes: int) -> None:
        script, *settings = words
        found = _LAUNCHER.fullmatch(script)
        assert found, f"{script} is no launcher"
        if found[1]:
            assert (ROOT / script).is_file(), f"no file {script}"
        if settings:
            self.run(found[1] or "ppo", settings, processes)


def _without_system(words: Sequence[str]) -> list[str]:
    """Return the settings of `generate` without its flags."""
    kept, skip = [], False
    for word in words:
        if skip or word == "--chat":
            skip = False
        elif word == "--system":
            skip = True
        else:
            kept.append(word)
    return kept


def _sweep(words: list[str]) -> None:
    found = read_sweep(words)
    middle = [f"{space.key}={space.value(0.5)}" for space in found.spaces]
    compose(found.algorithm, [*found.settings, *middle])


def _compare(words: list[str]) -> None:
    found = compare.read(["." if word.startswith("HEAD") else word for word in words])
    for side in found.sides:
        compose(found.algorithm, [*found.settings, *side.words])


def _plan(words: list[str]) -> None:
    own, theirs = plan.split([word for word in words if word != "..."])
    if not any(word.startswith("algorithm=") and ":" in word for word in own):
        plan.compose_run(plan.read(own), theirs)


_READERS: dict[str, Callable[[list[str]], Any]] = {
    "sweep": _sweep,
    "compare": _compare,
    "plan": _plan,
    "convert": convert.parse,
    "selftest": selftest.parse,
    "report": report_arguments,
}


def _make(words: Sequence[str]) -> None:
    makefiles = [ROOT / "Makefile", ROOT / "megarl" / "project" / "Makefile"]
    targets = {target for file in makefiles for target in re.findall(r"^(\w+):", file.read_text(), re.MULTILINE)}
    assert {word for word in words if "=" not in word} <= targets
