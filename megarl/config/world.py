"""How many processes a run has, and how a batch is divided among them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megarl.config.launcher import started_by_slurm
from megarl.errors import ConfigError


def world_size(config: Any, environ: Mapping[str, str]) -> int:
    """Processes of the whole run: what torchrun or SLURM say, else `trainer.devices * trainer.num_nodes`.

    Args:
        config: an entry point's typed tree.
        environ: the environment, `os.environ`.
    """
    if "WORLD_SIZE" in environ:
        return _count(environ, "WORLD_SIZE")
    if started_by_slurm(environ):
        return _count(environ, "SLURM_NTASKS")
    return local_devices(config) * int(config.trainer.num_nodes)


def local_devices(config: Any) -> int:
    """Processes per node when megarl starts them itself; "auto" counts GPUs, or is 1 on CPU."""
    trainer = config.trainer
    if trainer.devices != "auto":
        return int(trainer.devices)
    if trainer.accelerator == "cpu":
        return 1
    import torch  # only this answer needs it, and importing it takes seconds

    count = torch.cuda.device_count()
    if count == 0 and trainer.accelerator == "gpu":
        raise ConfigError(
            "trainer.devices=auto with trainer.accelerator=gpu, but no GPU is visible: use trainer.accelerator=cpu",
            key="trainer.devices",
            value="auto",
            offers={"trainer.accelerator": ["cpu"]},
        )
    return max(count, 1)


def replica_size(config: Any) -> int:
    """Processes that hold one whole model."""
    return int(config.parallel.tp * config.parallel.pp * config.parallel.cp)


def layout_sizes(layout: str) -> tuple[int, int]:
    """Return tp and pp of a layout for generation: `tp4`, `pp2` or `tp2xpp2`."""
    axes = layout.lower().split("x")
    sizes = {match[1]: int(match[2]) for axis in axes if (match := re.fullmatch(r"(tp|pp)([1-9]\d*)", axis))}
    if len(sizes) < len(axes):
        raise ConfigError(
            f"rollout.engine.layout={layout} is not a valid layout: use tp4, pp2 or tp2xpp2, or null for the training "
            "layout",
            key="rollout.engine.layout",
            value=layout,
            offers={"rollout.engine.layout": [None]},
        )
    return sizes.get("tp", 1), sizes.get("pp", 1)


def data_parallel_size(config: Any, world_size: int) -> int:
    """Replicas of the model in a world of that many processes."""
    return world_size // replica_size(config)


def accumulation(config: Any, world_size: int) -> int:
    """Microbatches per optimizer step and replica."""
    trainer = config.trainer
    return int(trainer.global_batch_size // (trainer.micro_batch_size * data_parallel_size(config, world_size)))


def _count(environ: Mapping[str, str], name: str) -> int:
    """A number of processes that the launcher left in the environment."""
    text = environ[name]
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            f"the launcher set {name}={text}, which is not a positive number of processes: unset it, or start with "
            "torchrun",
            key=name,
            value=text,
        )
    return int(text)
