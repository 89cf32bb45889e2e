"""plan.json: what the plan predicts for a run, written at its start, so that its report can show both side by side."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from megarl.config.world import world_size
from megarl.errors import UnavailableError, one_line
from megarl.logging import get_logger
from megarl.modules.base import Module
from megarl.planning.plain import prediction
from megarl.report.predicted import FILE
from megarl.run.run_folder import RunFolder

logger = get_logger(__name__)

MOST_PROCESSES = 1024
"""With more, the process groups that the plan imitates would delay the start of the run by seconds."""


def write_prediction(folder: RunFolder, algorithm: str, config: Any, module: Module) -> None:
    """Write plan.json into the folder of a run whose world does not exist yet. A run that cannot be planned goes on
    without it, and with no earlier prediction either.

    It takes 0.05 s of CPU time for a small model and 0.6 s for 175B parameters on 1024 GPUs: the plan builds models
    without memory, and most of what it imports is imported for the run anyway. Random states stay as they are.
    """
    world = world_size(config, os.environ)
    try:
        if world > MOST_PROCESSES:
            raise UnavailableError(f"the run has {world} processes; use megarl plan", key="cluster.gpus", value=world)
        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
        content = prediction(type(module), algorithm, config, world, module.vocab_size, module.sources, gpu)
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    except Exception as problem:  # whatever the plan does not know, the run does not need it
        logger.info("%s is not written: %s", FILE, one_line(problem))
        folder.set_aside(FILE)
    else:
        folder.write(FILE, text)
