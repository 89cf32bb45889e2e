"""plan.json: what the plan predicts for a run, written at its start, so that its report can show both side by side."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from megarl.config.world import world_size
from megarl.errors import one_line
from megarl.logging import get_logger
from megarl.modules.base import Module
from megarl.report.predicted import FILE
from megarl.run.run_folder import RunFolder

logger = get_logger(__name__)


def write_prediction(folder: RunFolder, algorithm: str, config: Any, module: Module) -> None:
    """Write plan.json into the folder of a run whose world does not exist yet. A run that cannot be planned goes on
    without it, and with no earlier prediction either.

    It takes less than 0.2 s of CPU time for the largest presets: the plan builds models without memory, and all that it
    imports is imported for the run anyway. Random states stay as they are.
    """
    from megarl.planning.plain import prediction  # a run in a process that has a world makes none

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    try:
        content = prediction(
            type(module), algorithm, config, world_size(config, os.environ), module.vocab_size, module.sources, gpu
        )
    except Exception as problem:  # whatever the plan does not know, the run does not need it
        logger.info("%s is not written: %s", FILE, one_line(problem))
        folder.set_aside(FILE)
    else:
        folder.write(FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
