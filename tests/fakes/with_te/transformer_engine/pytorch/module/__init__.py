from .base import TransformerEngineBaseModule
from .linear import LayerNormLinear, Linear
from .norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "LayerNormLinear", "Linear", "RMSNorm", "TransformerEngineBaseModule"]
