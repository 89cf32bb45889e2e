"""Check the configuration of a cluster job before its nodes start work. `launchers/shared.sh` calls it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megarl.command import say
from megarl.config.compose import compose, run
from megarl.config.elastic import fitted, nodes_to_use
from megarl.config.world import replica_size, world_size
from megarl.errors import ConfigError, MegarlError


def check_job(argv: Sequence[str]) -> NoReturn:
    """Compose a configuration as the processes of a job will, print the number of nodes that its run uses, and exit:
    with 2 and one line if it cannot run.

    Args:
        argv: entry point, device (gpu or cpu), nodes, processes per node, and the settings of the run.
    """
    entry, device, nodes, per_node = argv[0], argv[1], int(argv[2]), int(argv[3])
    settings = list(argv[4:])
    # As the first process will have.
    os.environ.update(RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    used = _nodes(entry, settings, nodes, per_node)
    os.environ.update(WORLD_SIZE=str(used * per_node), LOCAL_WORLD_SIZE=str(per_node))

    def report(config: Any) -> None:
        if config.trainer.accelerator == "gpu" and device == "cpu":
            raise ConfigError(
                "trainer.accelerator=gpu, but the job has no GPU: sbatch --gpus-per-node=8, or MEGARL_DEVICE=cpu",
                key="trainer.accelerator",
                value="gpu",
            )
        world = world_size(config, os.environ)
        in_force, fit = fitted(config, world)
        if fit is not None:
            say(fit.told(config))
        if used < nodes:
            say(
                f"launch.elastic: {used} of the {nodes} nodes are used, as no layout divides over more; the others idle"
            )
        size = replica_size(in_force)
        say(f"layout: {world} processes = {size} per model x {world // size} replicas, on {device}")
        sys.stdout.write(f"{used}\n")

    run(entry, settings, report)


def _nodes(entry: str, settings: list[str], nodes: int, per_node: int) -> int:
    """Return how many of the job's nodes the run uses; all of them if `run` will refuse the settings."""
    if nodes == 1:
        return 1
    try:
        config, _ = compose(entry, settings)
        return nodes_to_use(config, nodes, per_node)
    except MegarlError:
        return nodes


if __name__ == "__main__":
    check_job(sys.argv[1:])
