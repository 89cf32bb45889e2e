"""Mean and deviation of everything seen so far, for scaling scores by it."""

import math

import torch
from torch import Tensor

from megarl.errors import NumericsError


class RunningMoments:
    """Mean and unbiased standard deviation over all batches so far, merged batch by batch.

    Kept as float64 numbers on the host: the state is three numbers, and a resumed run goes on bit for bit.
    Each rank must see the same values, those of the whole phase.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.squared_deviations = 0.0

    @property
    def std(self) -> float:
        """With ddof 1; 1 before two values were seen, so that dividing by it changes nothing."""
        return math.sqrt(self.squared_deviations / (self.count - 1)) if self.count > 1 else 1.0

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a batch.

        Args:
            x: values of any shape.

        Returns:
            mean and std of all seen so far, scalars of the dtype and device of `x`.
        """
        batch = x.detach().to("cpu", torch.float64).flatten()
        if not torch.isfinite(batch).all():
            raise NumericsError(
                "a running mean was given nan or inf: drop or mend failed scores before this", key="running mean"
            )
        added = batch.numel()
        if added:
            batch_mean = batch.mean().item()
            batch_deviations = (batch - batch_mean).square().sum().item()
            total, shift = self.count + added, batch_mean - self.mean
            # Two samples joined: their own deviations, and those of their means from the common one.
            self.squared_deviations += batch_deviations + shift * shift * self.count * added / total
            self.mean += shift * added / total
            self.count = total
        return x.new_tensor(self.mean), x.new_tensor(self.std)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"count": self.count, "mean": self.mean, "squared_deviations": self.squared_deviations}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.count = int(state["count"])
        self.mean = float(state["mean"])
        self.squared_deviations = float(state["squared_deviations"])
