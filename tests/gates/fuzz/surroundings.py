"""Environments of launchers: numbers of processes and nodes that are odd, missing, or contradict each other."""

from __future__ import annotations

import copy
import os
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from megarl.command import process_number, say
from megarl.config.compose import compose
from megarl.config.launcher import check_launcher
from megarl.config.rules import check
from megarl.config.world import world_size
from megarl.parallel.processes import set_env_from_slurm
from megarl.run import trainer
from megarl.run.run_folder import resolve_run_dir
from tests.gates.fuzz.check import Case

NUMBERS = (
    "",
    " ",
    "0",
    "1",
    "2",
    "3",
    "-1",
    "+1",
    "1.0",
    "1e3",
    "0x2",
    "two",
    "²",
    "\u0661",
    "00",
    "999999999999999999999",
    "2(x3)",
    "2,1",
    "1\n",
    "None",
)
NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_NNODES",
    "SLURM_STEP_ID",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_JOB_NODELIST",
    "SLURM_NODELIST",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_TASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_RESTART_COUNT",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "XDG_CACHE_HOME",
    "HOME",
)
WORDS = (
    "host[1-2]",
    "host[",
    "localhost",
    "bash",
    "interactive",
    "",
    "none",
    "a b",
    "../../x",
    "x" * 300,
    "é",
    "127.0.0.1",
    "::1",
    "gone.invalid",
    "/",
)
LAUNCHERS: dict[str, dict[str, str]] = {
    "torchrun": {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "TORCHELASTIC_RUN_ID": "none",
    },
    "slurm": {
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_STEP_ID": "0",
    },
    "nothing": {},
}


def drawn(draw: Random) -> dict[str, str | None]:
    """Variables to set, or to take away (None)."""
    found: dict[str, str | None] = dict(LAUNCHERS[draw.choice(list(LAUNCHERS))])
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice((*found, *NAMES))
        if name.endswith(("ADDR", "LIST", "NAME", "RUN_ID", "DIR", "HOME", "DEVICES")) and draw.random() < 0.7:
            found[name] = draw.choice(WORDS)
        else:
            found[name] = None if draw.random() < 0.25 else draw.choice(NUMBERS)
    return found


def cases(seed: int, count: int, store: Path) -> list[Case]:
    made = []
    for number in range(count):
        draw = Random(f"surroundings {seed} {number}")
        variables = drawn(draw)
        shown = " ".join(f"{name}={value!r:.40}" for name, value in variables.items())
        entry = draw.choice(("sft", "ppo", "generate"))
        name = f"surroundings {entry} {seed}.{number}: {shown}"
        made.append(
            Case(name, lambda folder: None, _act(entry, variables), (*variables, "srun", "run.name", "trainer."))
        )
    return made


@cache
def _config(entry: str) -> Any:
    words = {"sft": [], "ppo": ["data.train=[a.jsonl]", "reward.fn=a:b"], "generate": ["prompts=a"]}[entry]
    return compose(entry, words)[0]


def apply(variables: dict[str, str | None], environ: Any) -> None:
    for name, value in variables.items():
        if value is None:
            environ.pop(name, None)
        else:
            environ[name] = value


def _act(entry: str, variables: dict[str, str | None]) -> Any:
    def act(folder: Path) -> None:
        os.chdir(folder)
        config = copy.deepcopy(_config(entry))
        apply(variables, os.environ)
        say("a word")
        check_launcher(os.environ)
        world = world_size(config, os.environ)
        check(config, world)
        set_env_from_slurm()
        if entry == "generate":
            return
        process_number()
        assert trainer._devices(config) * trainer._nodes(config) >= 1
        runs = folder.parent.parent / "runs of all cases"  # a run on its own makes its folder at once
        runs.mkdir(exist_ok=True)
        os.chdir(runs)
        resolve_run_dir(entry, config)

    return act
