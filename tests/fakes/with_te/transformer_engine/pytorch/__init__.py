from . import distributed, fp8, ops, optimizers, router, tensor
from .module import LayerNorm, LayerNormLinear, Linear, RMSNorm


class DotProductAttention:
    """A name that Megatron subclasses; megarl has attention of its own."""


class GroupedLinear:
    """A name that Megatron subclasses; megarl has no mixture of experts."""


__all__ = [
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "distributed",
    "fp8",
    "ops",
    "optimizers",
    "router",
    "tensor",
]
