"""Which GPUs this process can see."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megarl.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@contextmanager
def hide_gpus(accelerator: str) -> Iterator[None]:
    """Hide all GPUs from a run with trainer.accelerator=cpu, as Megatron would build its models on one.

    CUDA reads the variable when it is first used, so call this before torch is imported if possible. The environment is
    restored afterwards, unless Megatron has been patched for CPUs. That patch cannot be undone, so later runs of this
    process see no GPU either.
    """
    if accelerator != "cpu":
        yield
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = ""
    try:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            raise ConfigError(
                "trainer.accelerator=cpu, but torch has already found a GPU in this process: start it with "
                "CUDA_VISIBLE_DEVICES='' in the environment, or use trainer.accelerator=gpu",
                key="trainer.accelerator",
                value="cpu",
                offers={"trainer.accelerator": ["gpu"]},
            )
        yield
    finally:
        adapter = sys.modules.get("megarl.parallel.cpu")
        if adapter is None or not adapter.installed():
            if before is None:
                os.environ.pop(VISIBLE, None)
            else:
                os.environ[VISIBLE] = before
