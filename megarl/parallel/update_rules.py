"""Optimizers other than AdamW for Megatron's distributed optimizer, which knows the states of Adam alone.

All store their states in checkpoints under Adam's names: `exp_avg` is the momentum buffer, `exp_avg_sq` the mean of the
squared gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from megarl.config.sections.optim import OptimConfig
from megarl.parallel.grid import Grid
from megarl.parallel.orthogonal import Exchange
from megarl.parallel.quantised_moments import SIGNED, UNSIGNED, blocks_of, decode, encode
from megarl.parallel.trained import Trained

MOMENTS = ("exp_avg", "exp_avg_sq")
CODES = {"exp_avg": SIGNED, "exp_avg_sq": UNSIGNED}
PIECE = 2**22  # values whose moments are in float32 at once, a multiple of a block
Group = dict[str, Any]


def moments_of(settings: OptimConfig) -> tuple[str, ...]:
    """Return the states that an optimizer keeps for a trained value, besides the value itself; Muon has fewer for
    matrices."""
    if settings.kind in ("adamw", "adamw8bit", "muon"):
        return MOMENTS
    momentum = settings.kind == "lion" or settings.momentum_in_force > 0
    used = {"exp_avg": momentum, "exp_avg_sq": settings.kind == "rmsprop"}
    return tuple(name for name in MOMENTS if used[name])


class UpdateRule(torch.optim.Optimizer):
    """An optimizer with decoupled weight decay that counts its steps per parameter group."""

    def __init__(self, groups: Iterable[Group], settings: OptimConfig, trained: Sequence[Trained], grid: Grid) -> None:
        """`trained` are all tensors of the pipeline stage, whether this rank updates a part of them or not."""
        self.moments = moments_of(settings)
        self.trained = {tensor.parameter: tensor for tensor in trained}
        self.changed_by_rounding = False
        """Whether moments of the checkpoint that was loaded could not be stored exactly."""
        defaults = {
            "momentum": settings.momentum_in_force,
            "alpha": settings.beta2,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.eps,
            "step": 0,
        }
        super().__init__([{"params": []}], defaults)
        # Assigned, as Megatron does: torch's check refuses shards that are views of parameters.
        self.param_groups = [{**defaults, **group} for group in groups]

    def moments_for(self, tensor: Trained) -> tuple[str, ...]:
        """Return the states of a tensor."""
        return self.moments

    def allocate(self) -> None:
        """Create the states of what this rank updates, as zeros."""
        for tensor in self.trained.values():
            if tensor.shard is not None:
                self.state[tensor.shard] = self.zeros(tensor, tensor.shard.data)

    def zeros(self, tensor: Trained, shard: Tensor) -> dict[str, Tensor]:
        """Return the states of a tensor at the first step."""
        return {name: torch.zeros_like(shard) for name in self.moments_for(tensor)}

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

    @property
    def peak_bytes(self) -> int:
        """The most memory that a step needs beside the states, if it can be more than a few tensors of this rank."""
        return 0

    def read(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's moments for a checkpoint, in float32."""
        return dict(self.state[parameter])

    def write(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Set a parameter's moments to those of a checkpoint."""
        state = self.state[parameter]
        for name in state.keys() & moments.keys():
            state[name].copy_(moments[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state with a step count for each parameter: without Transformer Engine and Apex, Megatron reads
        it there, else in the groups."""
        found = super().state_dict()
        for group in found["param_groups"]:
            step = torch.tensor(float(group["step"]))
            found["state"].update({index: {**found["state"].get(index, {}), "step": step} for index in group["params"]})
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the groups. The states stay: Megatron passes those that are here, and torch would convert their types;
        the content of a checkpoint comes through `write`."""
        present = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = present


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


class Lion(UpdateRule):
    """Lion (Chen et al., arXiv 2302.06675, algorithm 2): every value moves by the learning rate, in the direction of
    the sign of a mean of gradients."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Follow the sign of the momentum, in which this gradient counts 1 - beta1; keep it with 1 - beta2."""
        (beta1, beta2), momentum = group["betas"], state["exp_avg"]
        direction = momentum.lerp(gradient, 1 - beta1).sign_()
        parameter.add_(direction, alpha=-group["lr"])
        momentum.lerp_(gradient, 1 - beta2)


def adamw(parameter: Tensor, gradient: Tensor, moments: dict[str, Tensor], group: Group) -> None:
    """Update a parameter and its moments in place as torch.optim.AdamW does; the decay is done."""
    beta1, beta2 = group["betas"]
    moments["exp_avg"].lerp_(gradient, 1 - beta1)
    moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    scale = moments["exp_avg_sq"].sqrt().div_(sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
    parameter.addcdiv_(moments["exp_avg"], scale, value=-group["lr"] / (1 - beta1 ** group["step"]))


class AdamW8bit(UpdateRule):
    """AdamW whose moments have 8 bits a value between steps (Dettmers et al., arXiv 2110.02861).

    Blocks are cut in this rank's part of a tensor. Biases and norms keep float32: they are a thousandth of a model, and
    a block would mix their scales. What counts is the number of dimensions, which is the same in every layout.
    """

    def zeros(self, tensor: Trained, shard: Tensor) -> dict[str, Tensor]:
        """Return codes of zeros and an absmax per block, or float32 zeros for tensors of one dimension."""
        if tensor.parameter.dim() == 1:
            return super().zeros(tensor, shard)
        found = {}
        for name, codes in CODES.items():
            found[f"{name}_codes"] = torch.full_like(shard, codes.zero, dtype=torch.uint8)
            found[f"{name}_absmax"] = shard.new_zeros(blocks_of(shard.numel()))
        return found

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Decode the moments piece by piece, update as AdamW does, and encode them again."""
        if "exp_avg" in state:
            adamw(parameter, gradient, state, group)
            return
        for start in range(0, parameter.numel(), PIECE):
            span = slice(start, start + PIECE)
            moments = _decoded(state, span)
            adamw(parameter[span], gradient[span], moments, group)
            _encode(state, moments, span)

    def read(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the moments in float32."""
        state = self.state[parameter]
        return dict(state) if "exp_avg" in state else _decoded(state, slice(0, parameter.numel()))

    def write(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Encode moments of a checkpoint. If it was written by parts of the same size, they are stored exactly."""
        state = self.state[parameter]
        if "exp_avg" in state:
            super().write(parameter, moments)
            return
        here = {name: moments[name].to(parameter.device) for name in self.moments}
        _encode(state, here, slice(0, parameter.numel()))
        stored = self.read(parameter)
        self.changed_by_rounding |= any(not torch.equal(stored[name], here[name]) for name in self.moments)


def _blocks(span: slice) -> slice:
    return slice(blocks_of(span.start), blocks_of(span.stop))


def _decoded(state: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    """Return the moments of a span of values, which begins with a block."""
    return {
        name: decode(state[f"{name}_codes"][span], state[f"{name}_absmax"][_blocks(span)], codes)
        for name, codes in CODES.items()
    }


def _encode(state: dict[str, Tensor], moments: dict[str, Tensor], span: slice) -> None:
    """Store the moments of a span of values, which begins with a block."""
    for name, codes in CODES.items():
        found, absmax = encode(moments[name], codes)
        state[f"{name}_codes"][span] = found
        state[f"{name}_absmax"][_blocks(span)] = absmax


class Muon(UpdateRule):
    """Muon (Jordan et al., 2024) for the matrices of the layers and of adapters, and AdamW for all else.

    A matrix follows its Nesterov momentum, orthogonalised. As in Moonlight (Liu et al., arXiv 2502.16982, equation 4),
    the update is scaled by 0.2 sqrt(max(rows, columns)): its values are then as large as AdamW's, so that learning rate
    and weight decay are the same for both. A fused projection (query, key and value; gate and up) is one matrix.
    """

    def __init__(self, groups: Iterable[Group], settings: OptimConfig, trained: Sequence[Trained], grid: Grid) -> None:
        super().__init__(groups, settings, trained, grid)
        self.tp = grid.layout.tp
        self.exchange = Exchange(grid, [tensor for tensor in trained if tensor.is_layer_matrix])

    @property
    def peak_bytes(self) -> int:
        """The memory for whole matrices."""
        return self.exchange.peak_bytes

    def moments_for(self, tensor: Trained) -> tuple[str, ...]:
        """Return the momentum for matrices, and Adam's states for all else."""
        return ("exp_avg",) if tensor.is_layer_matrix else self.moments

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Decay and update all but the matrices, whose momentum is updated; then update the matrices together."""
        result = super().step(closure)
        self.exchange.orthogonalise(self._nesterov, self._follow)
        return result

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group) -> None:
        """Update a matrix's momentum alone, anything else as AdamW does."""
        if "exp_avg_sq" in state:
            adamw(parameter, gradient, state, group)
        else:
            state["exp_avg"].lerp_(gradient, 1 - group["momentum"])

    def _nesterov(self, matrix: Trained) -> Tensor:
        """Return this rank's part of the mean of a matrix's gradient and its momentum, weighted by the momentum."""
        assert matrix.shard is not None
        assert matrix.shard.grad is not None
        return matrix.shard.grad.lerp(self.state[matrix.shard]["exp_avg"], self._group(matrix)["momentum"])

    def _follow(self, matrix: Trained, direction: Tensor) -> None:
        """Move this rank's part of a matrix."""
        assert matrix.shard is not None
        scale = 0.2 * sqrt(max(matrix.whole_shape(self.tp)))
        matrix.shard.add_(direction, alpha=-self._group(matrix)["lr"] * scale)

    def _group(self, matrix: Trained) -> Group:
        assert matrix.group is not None
        return self.param_groups[matrix.group]


RULES: dict[str, type[UpdateRule]] = {
    "adamw8bit": AdamW8bit,
    "lion": Lion,
    "muon": Muon,
    "rmsprop": RMSprop,
    "sgd": SGD,
}
