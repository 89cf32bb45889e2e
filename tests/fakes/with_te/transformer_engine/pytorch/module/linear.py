from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .base import TransformerEngineBaseModule, set_tensor_model_parallel_attributes


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: tuple[str, ...] | dict[str, int] | None = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert parallel_mode in (None, "row", "column"), f"parallel_mode {parallel_mode} not supported"
        overlaps = (ub_overlap_ag, ub_overlap_rs, ub_overlap_rs_dgrad, ub_bulk_dgrad, ub_bulk_wgrad)
        assert not any((*overlaps, fuse_wgrad_accumulation, delay_wgrad_compute, symmetric_ar_type, parameters_split))
        self.tp_group = tp_group
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.parallel_mode = parallel_mode
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features = _divided(out_features, self.tp_size)
        if parallel_mode == "row":
            self.in_features = _divided(in_features, self.tp_size)
        place = {"device": device, "dtype": params_dtype or torch.get_default_dtype()}
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, **place))  # type: ignore[arg-type]
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, **place))  # type: ignore[arg-type]
        else:
            self.bias = torch.empty(0, **place)  # type: ignore[arg-type]
        if self.weight.is_meta:
            return
        with torch.no_grad():
            tracked = nullcontext() if get_rng_state_tracker is None else get_rng_state_tracker().fork()
            with tracked:
                assert init_method is not None
                init_method(self.weight)
            self.bias.zero_()
        set_tensor_model_parallel_attributes(self.weight, True, 1 if parallel_mode == "row" else 0, 1)
        if bias and parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif bias and parallel_mode == "column":
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from megatron.core.tensor_parallel import mappings  # which imports Transformer Engine

        self.check_input(inp)
        assert inp.shape[-1] == self.in_features, "GEMM not possible"
        alone, group = self.tp_size == 1, self.tp_group
        if self.parallel_mode == "column" and self.sequence_parallel:
            inp = mappings.gather_from_sequence_parallel_region(inp, tensor_parallel_output_grad=True, group=group)
        elif self.parallel_mode == "column" and not alone:
            inp = mappings.copy_to_tensor_model_parallel_region(inp, group=group)
        apply_bias = self.use_bias and not self.return_bias
        early = apply_bias and self.parallel_mode != "row"
        out = F.linear(inp, self.weight, self.bias if early else None)
        if self.parallel_mode == "row" and self.sequence_parallel:
            out = mappings.reduce_scatter_to_sequence_parallel_region(out, group=group)
        elif self.parallel_mode == "row" and not alone:
            out = mappings.reduce_from_tensor_model_parallel_region(out, group=group)
        if apply_bias and not early:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(TransformerEngineBaseModule):
    """A name that Megatron subclasses; megarl has its norms apart from its products."""


def _divided(numerator: int, denominator: int) -> int:
    assert numerator % denominator == 0, f"{numerator} is not divisible by {denominator}"
    return numerator // denominator
