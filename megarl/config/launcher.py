"""Check the environment variables that a launcher sets, before anything reads them."""

from __future__ import annotations

from collections.abc import Mapping

from megarl.errors import ConfigError

Environment = Mapping[str, str]
_INTERACTIVE = ("bash", "interactive")
_SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NNODES")
_NUMBERS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID")
_SLURM_NUMBERS = ("SLURM_NODEID", "SLURM_JOB_ID")
_BELOW = (
    ("RANK", "WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
    ("SLURM_NODEID", "SLURM_NNODES"),
)
"""The first variable counts from 0 and must be below the second."""
_SHARED_OUT = (("WORLD_SIZE", "LOCAL_WORLD_SIZE"), ("SLURM_NTASKS", "SLURM_NNODES"))
"""The first variable must be a multiple of the second."""
_MOST = 2**31 - 1


def started_by_slurm(environ: Environment) -> bool:
    """Return whether this process is a task of `srun`, not of a shell inside an allocation."""
    return "SLURM_NTASKS" in environ and environ.get("SLURM_JOB_NAME") not in _INTERACTIVE


def check_launcher(environ: Environment) -> None:
    """Refuse an environment in which the processes of a run could not find each other. The error names the variable."""
    names = [*_SIZES, *_NUMBERS]
    by_slurm = started_by_slurm(environ)
    if by_slurm:
        names += _SLURM_NUMBERS
    else:  # a shell inside an allocation has them, too; only the rank is used, in names of logs
        names = [name for name in names if not name.startswith("SLURM_") or name == "SLURM_PROCID"]
    numbers = {name: _number(environ, name) for name in names if name in environ}
    if numbers.get("MASTER_PORT", 1) > 65535:
        raise ConfigError(
            f"MASTER_PORT={numbers['MASTER_PORT']} in the environment is not a port: use one below 65536",
            key="MASTER_PORT",
            value=numbers["MASTER_PORT"],
        )
    if "LOCAL_WORLD_SIZE" in numbers:
        _require(environ, "LOCAL_WORLD_SIZE", ("WORLD_SIZE",), "start with torchrun")
    for rank in ("RANK", "LOCAL_RANK"):
        # Lightning sets LOCAL_RANK in the processes that it starts, and removes WORLD_SIZE after each run of a script.
        by_lightning = rank == "LOCAL_RANK" and "NODE_RANK" in environ and "MASTER_PORT" in environ
        if numbers.get(rank, 0) > 0 and not by_lightning:
            _require(environ, rank, ("WORLD_SIZE",), "start with torchrun")
    if numbers.get("WORLD_SIZE", 1) > 1:
        if "RANK" not in numbers:
            _require(environ, "WORLD_SIZE", ("LOCAL_RANK",), "start with torchrun")
        _require(environ, "WORLD_SIZE", ("MASTER_ADDR", "MASTER_PORT"), "start with torchrun")
    if by_slurm and "WORLD_SIZE" not in numbers:
        _require(environ, "SLURM_NTASKS", ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "start with srun")
    for name, size in _BELOW:
        if name in numbers and size in numbers and numbers[name] >= numbers[size]:
            raise ConfigError(
                f"{name}={numbers[name]} and {size}={numbers[size]} in the environment contradict each other: ranks "
                "count from 0; unset both, or start with a launcher that sets both",
                key=name,
                value=numbers[name],
            )
    for name, size in _SHARED_OUT:
        if name in numbers and size in numbers and numbers[name] % numbers[size]:
            raise ConfigError(
                f"{name}={numbers[name]} in the environment is not a multiple of {size}={numbers[size]}: start the "
                "same number of processes on every node",
                key=name,
                value=numbers[name],
            )


def _number(environ: Environment, name: str) -> int:
    text = environ[name]
    least = 1 if name in _SIZES else 0
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= _MOST):
        what = "number of processes" if name in _SIZES else "number"
        raise ConfigError(
            f"the launcher's {name}={text[:80]} is not a valid {what}: unset it, or start with torchrun",
            key=name,
            value=text,
        )
    return int(text)


def _require(environ: Environment, given: str, needed: tuple[str, ...], remedy: str) -> None:
    missing = next((name for name in needed if not environ.get(name)), None)
    if missing:
        raise ConfigError(
            f"{given}={environ[given]} is set in the environment, but {missing} is not: {remedy}, or unset {given}",
            key=missing,
        )
