"""Environments of launchers: those that torchrun, srun and Lightning make are taken, others refused by variable."""

import pytest

from megarl.config.launcher import check_launcher
from megarl.errors import ConfigError
from tests.refusals import refused

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {**ADDRESS, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1"}
LIGHTNING = {**ADDRESS, "WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "0"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
SHELL = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.mark.parametrize("environ", [{}, TORCHRUN, LIGHTNING, SRUN, SHELL, {**SHELL, **TORCHRUN}, {"WORLD_SIZE": "1"}])
def test_what_launchers_set_is_taken(environ: dict[str, str]) -> None:
    check_launcher(environ)


@pytest.mark.parametrize("text", ["", "two", "-1", "1.0", "²", "\u0661", "2(x3)", "9" * 5000])
@pytest.mark.parametrize(
    ("environ", "name"),
    [
        (TORCHRUN, "RANK"),
        (TORCHRUN, "LOCAL_WORLD_SIZE"),
        (TORCHRUN, "MASTER_PORT"),
        (SRUN, "SLURM_NNODES"),
        (SRUN, "SLURM_PROCID"),
        (SRUN, "SLURM_JOB_ID"),
    ],
)
def test_what_is_no_number_is_refused_by_name(environ: dict[str, str], name: str, text: str) -> None:
    with refused(ConfigError, key=name, value=text, names=(f"{name}=",)):
        check_launcher({**environ, name: text})


@pytest.mark.parametrize(
    ("environ", "missing", "named"),
    [
        (TORCHRUN, "WORLD_SIZE", "WORLD_SIZE"),
        (TORCHRUN, "MASTER_ADDR", "MASTER_ADDR"),
        (LIGHTNING, "LOCAL_RANK", "LOCAL_RANK"),
        (SRUN, "SLURM_PROCID", "SLURM_PROCID"),
        ({"RANK": "1"}, "", "WORLD_SIZE"),
    ],
)
def test_half_an_environment_is_refused_with_what_is_missing(environ: dict[str, str], missing: str, named: str) -> None:
    with refused(ConfigError, key=named, value=None):
        check_launcher({name: text for name, text in environ.items() if name != missing})


@pytest.mark.parametrize(
    ("environ", "changes", "key"),
    [
        (TORCHRUN, {"RANK": "4"}, "RANK"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        (TORCHRUN, {"LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE"),
        (TORCHRUN, {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (SRUN, {"SLURM_PROCID": "9"}, "SLURM_PROCID"),
        (SRUN, {"SLURM_NTASKS": "5"}, "SLURM_NTASKS"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(
    environ: dict[str, str], changes: dict[str, str], key: str
) -> None:
    (name,) = changes
    with refused(ConfigError, key=key, value=int({**environ, **changes}[key]), names=(name,)):
        check_launcher({**environ, **changes})
