"""Choose the classes of linear layers, norms and word embedding: Transformer Engine's or Apex's if requested and
importable, else Megatron's or megarl's."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from megarl.errors import UnavailableError
from megarl.models.adapters import adaptable
from megarl.models.linear import ColumnLinear, RowLinear, WordEmbedding
from megarl.models.norm import LayerNorm, RMSNorm
from megarl.parallel.device import device_settings


@dataclass(frozen=True)
class Kernels:
    """Classes with Megatron's constructor signatures. Linear layers can have adapters."""

    column: type
    row: type
    layernorm: Any
    rmsnorm: Any
    words: type = VocabParallelEmbedding

    def norm(self, normalization: str) -> Any:
        """Return the class for `normalization`: RMSNorm or LayerNorm."""
        return self.rmsnorm if normalization == "RMSNorm" else self.layernorm


def kernels(kind: str = "auto") -> Kernels:
    """`auto` chooses Transformer Engine, then Apex, then torch; on a CPU, torch and megarl's own layers."""
    return _kernels(kind, device_settings().cpu_layers)


@cache
def _kernels(kind: str, cpu_layers: bool) -> Kernels:
    found = _choose(kind, cpu_layers)
    return replace(found, column=adaptable(found.column), row=adaptable(found.row))


def _choose(kind: str, cpu_layers: bool) -> Kernels:
    if cpu_layers and kind in ("torch", "auto"):
        return Kernels(ColumnLinear, RowLinear, LayerNorm, RMSNorm, words=WordEmbedding)
    plain = Kernels(ColumnParallelLinear, RowParallelLinear, LayerNorm, RMSNorm)
    if kind == "torch":
        return plain
    for name, load in (("te", _transformer_engine), ("apex", _apex)):
        if kind not in (name, "auto"):
            continue
        try:
            return load(plain)
        except Exception as problem:  # TE's empty meta package raises RuntimeError, a broken build anything
            if kind == name:
                raise UnavailableError(
                    f"parallel.kernels={kind} cannot be imported ({' '.join(str(problem).split())}): "
                    "set parallel.kernels=torch or use the Docker image",
                    key="parallel.kernels",
                    value=kind,
                    offers={"parallel.kernels": ["torch"]},
                ) from problem
    return plain


def _transformer_engine(plain: Kernels) -> Kernels:
    import transformer_engine.pytorch  # noqa: F401
    from megatron.core.extensions import transformer_engine as te

    if not te.HAVE_TE:  # then its classes exist but cannot be instantiated
        raise ImportError("Megatron does not find the classes that it needs")
    return Kernels(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, te.TENorm)


def _apex(plain: Kernels) -> Kernels:
    import apex.normalization  # noqa: F401
    from megatron.core.fusions import fused_layer_norm

    if not fused_layer_norm.HAVE_FUSED_LAYER_NORM:
        raise ImportError("Megatron does not find the classes that it needs")
    return Kernels(plain.column, plain.row, fused_layer_norm.FusedLayerNorm, plain.rmsnorm)
