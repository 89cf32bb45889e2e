"""Running mean and standard deviation, for scaling scores."""

import math

import torch
from torch import Tensor

from megarl.errors import NumericsError


class RunningMoments:
    """Mean and unbiased standard deviation over all batches so far, merged batch by batch (Chan et al., 1979).

    The state is three float64 numbers on the host, so a resumed run continues bit for bit. Each rank must pass the
    same values, those of the whole phase.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squared_deviations = 0.0

    @property
    def std(self) -> float:
        """Standard deviation with ddof 1; 1 before two values were added, so that dividing by it changes nothing."""
        return math.sqrt(self.squared_deviations / (self.count - 1)) if self.count > 1 else 1.0

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch of values.

        Args:
            x: values of any shape.

        Returns:
            mean and std of all values so far, scalars with the dtype and device of `x`.
        """
        batch = x.detach().to("cpu", torch.float64).flatten()
        if not torch.isfinite(batch).all():
            raise NumericsError(
                "a running mean received nan or inf: drop or fix failed scores before this", key="running mean"
            )
        added = batch.numel()
        if added:
            batch_mean = batch.mean().item()
            batch_deviations = (batch - batch_mean).square().sum().item()
            total, shift = self.count + added, batch_mean - self.mean
            # Merge two samples: their own squared deviations, and those of their means from the common mean.
            self.squared_deviations += batch_deviations + shift * shift * self.count * added / total
            self.mean += shift * added / total
            self.count = total
        return x.new_tensor(self.mean), x.new_tensor(self.std)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squared_deviations": self.squared_deviations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self.squared_deviations = float(state["squared_deviations"])
