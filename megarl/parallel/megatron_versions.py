"""The releases of megatron-core that megarl runs on, and everything that differs between them.

Code that depends on a release is here alone: other modules call its functions. Importing this module imports neither
torch nor Megatron.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megarl.errors import UnavailableError
from megarl.logging import get_logger, warn_once

PACKAGE = "megatron-core"
OLDEST, NEWEST = "0.16.1", "0.19.2"
"""The range of releases that the tests ran on; pyproject.toml admits all patches of the newest one."""
_NEEDS_TRITON = (0, 18)
"""From this release on, Megatron imports triton, which comes with torch's CUDA builds and not with its CPU builds."""

NAMES = {
    "megatron.core.tensor_parallel.random": (
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
        "CudaRNGStatesTracker.add",
    ),
    "megatron.core.tensor_parallel": ("ColumnParallelLinear._forward_impl", "RowParallelLinear._forward_impl"),
    "megatron.core.distributed": (
        "DistributedDataParallel.finish_grad_sync",
        "DistributedDataParallel.start_param_sync",
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        "DistributedOptimizer._get_main_param_and_optimizer_states",
        "DistributedOptimizer._set_main_param_and_optimizer_states",
        "DistributedOptimizer.get_parameter_state_dp_zero",
        "DistributedOptimizer.sharded_param_state_fully_reshardable",
    ),
    "megatron.core.pipeline_parallel.schedules": ("get_pp_rank_microbatches", "get_schedule_table"),
    "megatron.core.resharding": ("execute_reshard_plan",),
}
"""Names that megarl replaces, overrides or uses although Megatron does not document them, by their modules. A release
without one of them cannot be used."""

log = get_logger(__name__)


def installed() -> str | None:
    """Return the installed release, or None if no package of this name is installed.

    From 0.18 on, the package's own `__version__` ends with the commit of whatever Git repository it lies in.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def engine() -> str:
    """Return the releases of Megatron and torch that compute in this process, in words."""
    import torch

    return f"{PACKAGE} {installed() or 'of unknown release'}, torch {torch.__version__}"


def refuse_unusable() -> None:
    """Raise if Megatron cannot be used: it is older than OLDEST, or lacks a package that it imports."""
    found = installed()
    if found is None:
        return  # from a checkout, or missing: then its import says so
    if _numbers(found) < _numbers(OLDEST):
        raise UnavailableError(
            f"{PACKAGE} {found} is older than {OLDEST}, the oldest that megarl runs on: pip install "
            f"'{PACKAGE}>={OLDEST}'",
            key=PACKAGE,
            value=found,
            offers={PACKAGE: [OLDEST, NEWEST]},
        )
    if _numbers(found) >= _NEEDS_TRITON and importlib.util.find_spec("triton") is None:
        raise UnavailableError(
            f"{PACKAGE} {found} imports triton, which a CPU build of torch does not bring: pip install triton, or pip "
            f"install {PACKAGE}=={OLDEST}",
            key="triton",
            offers={PACKAGE: [OLDEST]},
        )


def check_newer() -> None:
    """Warn, once in a process, of a release newer than NEWEST. Raise if it lacks a name that megarl touches."""
    found = installed()
    if found is None or _release(found) <= _release(NEWEST):
        return
    if absent := missing_names():
        raise UnavailableError(
            f"{PACKAGE} {found} has no {absent[0]}, which megarl needs: pip install {PACKAGE}=={NEWEST}",
            key=PACKAGE,
            value=found,
            where=absent[0],
            offers={PACKAGE: [NEWEST]},
        )
    warn_once(log, f"{PACKAGE} {found} is newer than {NEWEST}, the newest that megarl was tested on")


def missing_names() -> list[str]:
    """Return which of NAMES the installed release does not have."""
    return [f"{module}.{name}" for module, names in NAMES.items() for name in names if not _has(module, name)]


def hide_notices() -> None:
    """Hide what Megatron's DDP says, from 0.18 on, to programs that let it compute the layout of its buffers. A layout
    that is passed to it would be the same."""
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(_not_of_layouts)


def _not_of_layouts(record: logging.LogRecord) -> bool:
    return "full_param_layout not provided" not in record.getMessage()


def plan_copies(source: Any, target: Any) -> Any:
    """Return Megatron's plan of the copies that fill `target`'s weights from `source`'s. Call on all ranks."""
    resharding = import_module("megatron.core.resharding")
    # 0.19 plans on every rank instead of on the first, under another name; the old name warns.
    plan = getattr(resharding, "build_local_reshard_plan", None) or resharding.build_centralized_reshard_plan
    return plan(source, target)


def receives_in_place() -> bool:
    """Return whether a plan's execution receives a slice of a weight without a buffer where its values are adjacent in
    memory: from 0.17 on."""
    return _numbers(installed() or NEWEST) >= (0, 17)


def _has(module: str, name: str) -> bool:
    try:
        found: Any = import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is not None


def _numbers(release: str) -> tuple[int, ...]:
    """Return 0.19.2rc1+local as (0, 19, 2)."""
    numbers = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def _release(release: str) -> tuple[int, ...]:
    """Return the part of a release that its patches share."""
    return _numbers(release)[:2]
