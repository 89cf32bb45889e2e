from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import WithExtraState


class _Norm(WithExtraState):
    """The basic operation below both norms: its arguments are all that are known, and input is cast to the weight's
    dtype."""

    names: tuple[str, ...]

    def __init__(
        self,
        normalized_shape: Iterable[int] | int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ) -> None:
        super().__init__()
        if (normalized_shape is None) == (hidden_size is None):
            raise RuntimeError("one of `normalized_shape` and `hidden_size` is wanted")
        if params_dtype is not None and dtype is not None:
            raise RuntimeError("Both `dtype` and `params_dtype` (deprecated) kwargs are provided")
        assert not zero_centered_gamma
        shape = hidden_size if normalized_shape is None else normalized_shape
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape or ())
        self.eps, self.sequence_parallel = eps, sequence_parallel
        for name in self.names:
            value = torch.empty(self.shape, dtype=params_dtype or dtype, device=device)
            parameter = nn.Parameter(value.fill_(float(name == "weight")))
            if sequence_parallel is not None:
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)


class LayerNorm(_Norm):
    names = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.layer_norm(input.to(self.weight.dtype), self.shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    names = ("weight",)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.rms_norm(input.to(self.weight.dtype), self.shape, self.weight, self.eps)
