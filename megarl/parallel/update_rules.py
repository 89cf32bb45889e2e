"""RMSprop and SGD for Megatron's distributed optimizer, which knows the states of Adam alone.

Both store their states under Adam's names: `exp_avg` is the momentum buffer, `exp_avg_sq` the mean of the squared
gradients.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from megarl.config.sections.optim import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
Group = dict[str, Any]


def moments_of(settings: OptimConfig) -> tuple[str, ...]:
    """Return the states that an optimizer keeps for each trained value, besides the value itself."""
    if settings.kind == "adamw":
        return MOMENTS
    used = {"exp_avg": settings.momentum > 0, "exp_avg_sq": settings.kind == "rmsprop"}
    return tuple(name for name in MOMENTS if used[name])


class UpdateRule(torch.optim.Optimizer):
    """An optimizer with decoupled weight decay that counts its steps per parameter group."""

    def __init__(self, groups: Iterable[Group], settings: OptimConfig) -> None:
        self.moments = moments_of(settings)
        defaults = {"momentum": settings.momentum, "alpha": settings.beta2, "eps": settings.eps, "step": 0}
        super().__init__([{"params": []}], defaults)
        # Assigned, as Megatron does: torch's check refuses shards that are views of parameters.
        self.param_groups = [{**defaults, **group} for group in groups]

    def allocate(self) -> None:
        """Create the states of all parameters, as zeros."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {name: torch.zeros_like(parameter.data) for name in self.moments}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Decay the parameters as AdamW does, and update those that have a gradient."""
        result = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    self.update(parameter, parameter.grad, self.state[parameter], group)
        return result

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Update one parameter and its states in place."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return the state with a step count for each parameter: without Transformer Engine and Apex, Megatron reads
        it there, else in the groups."""
        found = super().state_dict()
        for group in found["param_groups"]:
            step = torch.tensor(float(group["step"]))
            found["state"].update({index: {**found["state"].get(index, {}), "step": step} for index in group["params"]})
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state without the step counts of parameters; those of the groups count."""
        states = {
            index: {name: value for name, value in state.items() if name != "step"}
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": states})


class RMSprop(UpdateRule):
    """torch.optim.RMSprop, not centered, except that weight decay is decoupled."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Divide the gradient by the root of its mean square, and follow it or its momentum."""
        mean_square = state["exp_avg_sq"]
        mean_square.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
        scale = mean_square.sqrt().add_(group["eps"])
        if "exp_avg" in state:
            momentum = state["exp_avg"].mul_(group["momentum"]).addcdiv_(gradient, scale)
            parameter.add_(momentum, alpha=-group["lr"])
        else:
            parameter.addcdiv_(gradient, scale, value=-group["lr"])


class SGD(UpdateRule):
    """torch.optim.SGD, without dampening or Nesterov's momentum, except that weight decay is decoupled."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Follow the gradient or its momentum."""
        if "exp_avg" in state:
            gradient = state["exp_avg"].mul_(group["momentum"]).add_(gradient)
        parameter.add_(gradient, alpha=-group["lr"])


RULES: dict[str, type[UpdateRule]] = {"rmsprop": RMSprop, "sgd": SGD}
