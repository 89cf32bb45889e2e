"""Apex's kernels over lists of tensors, on the CPU."""

from torch import Tensor

from tests.fakes.lists import adam, multi_tensor_l2norm, multi_tensor_scale

__all__ = ["multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale"]


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor | None,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    decay: float,
) -> None:
    assert mode == 1
    adam(lists, lr, beta1, beta2, eps, step, bias_correction, decay)
