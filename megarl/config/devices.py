"""Which devices this process may see."""

import os
import sys

from megarl.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def hide_gpus(accelerator: str) -> None:
    """Let a run with trainer.accelerator=cpu see no GPU: Megatron would build its models on one.

    CUDA reads the variable when it is first asked for a device, so this comes before torch is imported where it can.
    """
    if accelerator != "cpu":
        return
    os.environ[VISIBLE] = ""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator=cpu, but torch has already found a GPU in this process: start it with "
            "CUDA_VISIBLE_DEVICES='' in the environment, or use trainer.accelerator=gpu"
        )
