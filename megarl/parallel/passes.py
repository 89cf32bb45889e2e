"""What an engine is given to build a model and to run it, and what its passes return."""

from collections.abc import Callable
from typing import Any, Protocol

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megarl.parallel.rows import Microbatch

Stats = dict[str, Tensor]
Outputs = dict[str, Tensor]

# loss_fn(model, output, microbatch, counts) -> (loss, stats). `counts` are sums over all microbatches and data-parallel
# ranks: a loss divided by one does not depend on how its batch was split. Stats are such quotients, to be summed.
LossFn = Callable[[Any, Tensor, Microbatch, dict[str, float]], tuple[Tensor, Stats]]
CountFn = Callable[[Microbatch], Stats]
# fn(model, output, microbatch) -> tensors [bins, ...]
Finish = Callable[[Any, Microbatch, Tensor], Any]  # (model, batch, output)
ForwardFn = Callable[[Any, Tensor, Microbatch], Outputs]


class StepObserver(Protocol):
    """What a model's layers report of a training step besides its loss."""

    def begin(self) -> None:
        """Forget the earlier steps."""

    def stats(self) -> dict[str, float]:
        """Return the step's statistics by name, the same on every rank. All ranks call this."""


class BuildModel(Protocol):
    """Builds one chunk; `vp_stage` is None without virtual stages."""

    def __call__(self, *, pre_process: bool, post_process: bool, vp_stage: int | None) -> LanguageModule:
        """Build the chunk of this pipeline stage."""
