"""What both stand-ins' kernels over lists of tensors compute."""

import torch
from torch import Tensor


def adam(
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: int,
    decay: float,
) -> None:
    """One step of AdamW; `lists` are gradients, parameters and both moments."""
    assert type(step) is int, f"{step!r} does not suit the kernel's signature, which wants an int"
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for grad, parameter, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + eps)
        parameter.sub_(update + decay * parameter, alpha=lr)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    assert noop_flag.dtype == torch.int
    assert not per_tensor
    return torch.stack([tensor.float().norm() for tensor in lists[0]]).norm().reshape(1), None


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
