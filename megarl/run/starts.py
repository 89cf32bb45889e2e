"""A record of each start of a run, for starts.jsonl: when, where, on how many processes, and in which layout."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from megarl.config.world import accumulation, world_size
from megarl.parallel.layout import Layout


def start_of(config: Any, environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the record of a start.

    Args:
        config: the configuration in the layout of this start.
        environ: the environment, which says how many processes there are and, under SLURM, the job.
    """
    world = world_size(config, environ)
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "host": platform.node(),
        "job": environ.get("SLURM_JOB_ID"),
        "restart": int(environ.get("SLURM_RESTART_COUNT", "0")),
        "processes": world,
        "layout": str(Layout.of(config.parallel, world)),
        "global_batch_size": config.trainer.global_batch_size,
        "micro_batch_size": config.trainer.micro_batch_size,
        "accumulation": accumulation(config, world),
    }
