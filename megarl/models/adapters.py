"""Low-rank adapters beside frozen linear layers: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

An adapter adds `scaling * up @ down @ x` to what a linear layer returns. Where one of our layers is several in the
Hugging Face family (query, key and value; gate and up), each of these parts has a `down` of its own, and `up` has the
rows of the whole layer, so that every part is an adapter of PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from megarl.models.adapter_spec import ADAPTER, AdapterSpec, Parts
from megarl.models.heads import head_of
from megarl.models.linear import affine
from megarl.parallel.digest import digest
from megarl.parallel.initialise import local_slice, partition_dim, partition_stride
from megarl.parallel.quantised import QuantisedWeight


class Adapter(nn.Module):
    """The factors of one linear layer.

    `down` [parts * rank, columns] and `up` [rows, rank] are cut over tensor-parallel ranks as the layer's weight is:
    columns of `down` for row-parallel layers, rows of `up` for column-parallel ones. What is not cut is replicated.
    """

    down: nn.Parameter
    up: nn.Parameter
    magnitude: nn.Parameter | None

    def __init__(self, linear: Any, parts: Parts, spec: AdapterSpec, config: Any, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.spec, self.config, self.tp_group = spec, config, tp_group
        weight = weight_of(linear)
        self.row_parallel = partition_dim(weight) == 1
        rows, columns = weight.shape
        stride = partition_stride(weight)
        self.down = self._parameter(len(parts.modules) * spec.rank, columns, cut=1 if self.row_parallel else None)
        self.up = self._parameter(rows, spec.rank, cut=None if self.row_parallel else 0, stride=stride)
        self.down.multiplied_by = self.up  # type: ignore[attr-defined]  # for the check of gradients
        self.magnitude = None
        if spec.kind == "dora":
            self.magnitude = self._parameter(rows, cut=None if self.row_parallel else 0, stride=stride)
        of_rows = parts.of_rows()
        if of_rows is not None:
            of_rows = of_rows.to(config.params_dtype)
            if not self.row_parallel:
                of_rows = local_slice(of_rows, self.up, tp_group.rank(), tp_group.size()).contiguous()
        self.register_buffer("part_of_rows", of_rows, persistent=False)
        self.part_of_rows: Tensor | None
        self.active = True
        self.squares: Tensor | None = None  # of the frozen weight's rows, once computed
        self.kept: Tensor | None = None  # the factor of every row
        self.keeps = False  # whether it is up to date, as weights do not change

    def _parameter(self, *shape: int, cut: int | None, stride: int = 1) -> nn.Parameter:
        place = {"dtype": self.config.params_dtype, "device": torch.cuda.current_device()}
        parameter = nn.Parameter(torch.zeros(shape, **place))
        if cut is not None:
            set_tensor_model_parallel_attributes(parameter, True, cut, stride)
        elif self.config.sequence_parallel:
            parameter.sequence_parallel = True  # type: ignore[attr-defined]  # each rank sees a part of the tokens
        return parameter

    def forward(self, linear: Any, x: Tensor, output: Tensor, *, has_bias: bool) -> Tensor:
        """Return the output of a linear layer with that of the adapter added.

        Args:
            linear: the layer, for its weight.
            x: the layer's input.
            output: what the layer returned.
            has_bias: whether the layer's bias is in it.
        """
        inner = self._inner(x)
        up = self._by_part() * self.spec.scaling
        if self.magnitude is None:
            return output + affine(inner, up, None)
        factor = self._factor(linear)
        plain = output - linear.bias if has_bias else output
        return torch.addcmul(output, plain, factor - 1) + affine(inner, up * factor[:, None], None)

    def _inner(self, x: Tensor) -> Tensor:
        """Return down @ x for the tokens of the layer's output, [..., parts * rank], on every rank."""
        part = affine(self._dropped(x), self.down, None)
        group, sequence_parallel = self.tp_group, self.config.sequence_parallel
        if group.size() == 1:
            return part
        inner: Tensor
        if self.row_parallel and sequence_parallel:
            inner = reduce_scatter_to_sequence_parallel_region(part, group=group)
        elif self.row_parallel:
            inner = reduce_from_tensor_model_parallel_region(part, group=group)
        elif sequence_parallel:
            inner = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group)
        else:
            inner = copy_to_tensor_model_parallel_region(part, group=group)
        return inner

    def _dropped(self, x: Tensor) -> Tensor:
        if self.spec.dropout == 0.0 or not self.training:
            return x
        if self.row_parallel or self.config.sequence_parallel:  # ranks have different values, so different masks
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, self.spec.dropout)
        return F.dropout(x, self.spec.dropout)

    def _by_part(self) -> Tensor:
        """Return `up` as [rows, parts * rank], where each row has its values at its part and zeros elsewhere."""
        if self.part_of_rows is None:
            return self.up
        return (self.part_of_rows[:, :, None] * self.up[:, None, :]).flatten(1)

    def _factor(self, linear: Any) -> Tensor:
        """Return what each row of the weight with factors is multiplied by: its trained length over its length.

        The length counts as a constant in the gradient, as in the paper. Rows without an adapter keep theirs.
        """
        assert self.magnitude is not None
        if self.keeps and self.kept is not None:
            return self.kept
        lengths = self._lengths(linear).to(self.magnitude.dtype)
        scaled = lengths > 0  # a row of zeros has no direction
        if self.part_of_rows is not None:
            scaled &= self.part_of_rows.sum(1) > 0
        return torch.where(scaled, self.magnitude / lengths.where(scaled, 1.0), 1.0)

    @torch.no_grad()
    def _lengths(self, linear: Any) -> Tensor:
        """Return the lengths of the rows of weight + scaling * up @ down, in float32."""
        up, down, scaling = self._by_part().float(), self.down.float(), self.spec.scaling
        weight = present_weight(linear).float()
        if self.squares is None:
            self.squares = self._summed(weight.square().sum(dim=1))
        crossed = (affine(weight, down, None) * up).sum(dim=1)
        own = ((up @ (down @ down.t())) * up).sum(dim=1)
        more = self._summed(2 * scaling * crossed + scaling**2 * own)
        return (self.squares + more).clamp(min=0).sqrt()

    def _summed(self, rows: Tensor) -> Tensor:
        """Return numbers per row, summed over the ranks that have columns of each row."""
        if self.row_parallel and self.tp_group.size() > 1:
            dist.all_reduce(rows, group=self.tp_group)
        return rows

    @torch.no_grad()
    def keep_factor(self, linear: Any) -> None:
        """Compute the factor of every row once for passes with the present weights. It stays where it is in memory, as
        recorded CUDA graphs read it there."""
        if self.magnitude is None:
            return
        factor = self._factor(linear)
        self.kept = factor if self.kept is None else self.kept.copy_(factor)
        self.keeps = True

    @torch.no_grad()
    def start(self, linear: Any) -> None:
        """Set the lengths of the rows to those of the weight with its factors, so that the factor of every row is 1."""
        if self.magnitude is not None:
            self.magnitude.copy_(self._lengths(linear))

    @torch.no_grad()
    def merged(self, linear: Any) -> Tensor:
        """Return this rank's slice of the weight that computes what layer and adapter do, in float32."""
        weight = present_weight(linear).float()
        weight = weight + (self._by_part().float() * self.spec.scaling) @ self.down.float()
        return weight if self.magnitude is None else weight * self._factor(linear).float()[:, None]


@cache
def adaptable(base: type) -> type:
    """Return a subclass of one of the classes of linear layers that can have an adapter."""

    class Adaptable(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.adapter: Adapter | None = None
            self.quantised: QuantisedWeight | None = None
            self.shape_config, self.group = options["config"], options["tp_group"]
            spec = self.shape_config.adapter
            if spec is not None and spec.base_bits < 16:
                quantise(self, spec.base_bits)

        def forward(self, input_: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            if self.quantised is None:
                output, bias = super().forward(input_, *args, **options)
            else:
                output, bias = _quantised_product(self, input_), None
            if self.adapter is None or not self.adapter.active:
                return output, bias
            return self.adapter(self, input_, output, has_bias=bias is None and _has_bias(self)), bias

    Adaptable.__name__ = Adaptable.__qualname__ = base.__name__
    return Adaptable


def _has_bias(linear: Any) -> bool:
    """Return whether a linear layer has a bias; Transformer Engine's layers have an empty one instead of none."""
    return linear.bias is not None and linear.bias.numel() > 0


def quantise(linear: Any, bits: int) -> None:
    """Give a linear layer a quantised weight, without values, in the place of its own."""
    weight, tp_group = linear.weight, linear.group
    like = torch.empty_like(weight, device="meta")
    set_tensor_model_parallel_attributes(like, True, partition_dim(weight), partition_stride(weight))
    shape = list(weight.shape)
    shape[partition_dim(weight)] *= tp_group.size()
    del linear.weight
    linear.register_parameter("weight", None)
    linear.weight_like = like
    linear.quantised = QuantisedWeight(
        *shape,
        bits=bits,
        dtype=linear.shape_config.params_dtype,
        device=weight.device,
        partition_dim=partition_dim(weight),
        stride=partition_stride(weight),
        rank=tp_group.rank(),
        tp=tp_group.size(),
    )


def _quantised_product(linear: Any, x: Tensor) -> Tensor:
    """Return what a column- or row-parallel layer with a quantised weight computes, its bias included."""
    group, sequence_parallel = linear.group, linear.shape_config.sequence_parallel
    row_parallel, alone = partition_dim(linear.weight_like) == 1, group.size() == 1
    if not row_parallel and not alone:
        x = (
            gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
            if sequence_parallel
            else copy_to_tensor_model_parallel_region(x, group=group)
        )
    output: Tensor = linear.quantised.product(x)
    if row_parallel and not alone:
        together = (
            reduce_scatter_to_sequence_parallel_region
            if sequence_parallel
            else reduce_from_tensor_model_parallel_region
        )
        output = together(output, group=group)
    return output + linear.bias if _has_bias(linear) else output


def weight_of(linear: Any) -> Tensor:
    """Return a tensor with the shape and Megatron's attributes of a linear layer's weight."""
    weight: Tensor = linear.weight if linear.quantised is None else linear.weight_like
    return weight


def present_weight(linear: Any) -> Tensor:
    """Return this rank's slice of a linear layer's frozen weight."""
    weight: Tensor = linear.weight.detach() if linear.quantised is None else linear.quantised.dequantised()
    return weight


def quantised_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the global names of the quantised weights of a model's chunk, and the layers that have them."""
    yield from ((name, linear) for name, linear in changed_linears([model]) if linear.quantised is not None)


def changed_linears(models: Iterable[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the global names of the weights that are not what they compute with: adapted or quantised ones."""
    for model in models:
        layers: Any = model.decoder.layers  # type: ignore[union-attr]
        for layer in layers:
            for place, linear in layer.named_modules():
                if getattr(linear, "adapter", None) is not None or getattr(linear, "quantised", None) is not None:
                    yield f"decoder.layers.{layer.layer_number - 1}.{place}.weight", linear


def fill(linear: Any, whole: Tensor) -> None:
    """Quantise a whole weight and keep this rank's slice of it, and the checksum of what was quantised."""
    linear.quantised.fill(whole)
    linear.quantised_digest = digest(whole.to(linear.quantised.dtype))


def frozen_digests(engine: Any) -> dict[str, int]:
    """Return the checksums of the weights beside an engine's adapters by global name, on every rank. Those of quantised
    weights are of the weights as they were before."""
    found: dict[str, int] = engine.digests(lambda name: ADAPTER not in name and head_of(name) is None)
    here = {name: linear.quantised_digest for model in engine.models for name, linear in quantised_linears(model)}
    for theirs in engine.grid.gather(here):
        found |= theirs
    return found


def attach(layers: Iterable[Any], spec: AdapterSpec, config: Any, tp_group: dist.ProcessGroup) -> None:
    """Give the linear layers of transformer layers their adapters."""
    for layer in layers:
        for place, parts in spec.at(layer.layer_number - 1).items():
            linear = layer.get_submodule(place)
            linear.adapter = Adapter(linear, parts, spec, config, tp_group)


def adapted(models: Sequence[nn.Module]) -> Iterator[Any]:
    """Yield the linear layers with adapters of a model's chunks."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(getattr(module, "adapter", None), Adapter))


@contextmanager
def switched_off(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run with the frozen weights alone."""
    linears = list(adapted(models))
    for linear in linears:
        linear.adapter.active = False
    try:
        yield
    finally:
        for linear in linears:
            linear.adapter.active = True


@contextmanager
def for_sampling(models: Sequence[nn.Module]) -> Iterator[None]:
    """Run with weights that do not change, which makes passes over few tokens faster.

    In float32 the factors are merged into the weights, which are restored bit for bit afterwards. In bf16 the sum would
    be rounded, and policies would differ; there the lengths of rows are computed only once.
    """
    linears = list(adapted(models))
    aside: list[tuple[Any, Tensor]] = []
    try:
        for linear in linears:
            adapter = linear.adapter
            if mergeable(linear):
                aside.append((linear, linear.weight.detach().clone()))
                linear.weight.data.copy_(adapter.merged(linear))
                adapter.active = False
            else:
                adapter.keep_factor(linear)
        yield
    finally:
        for linear, weight in aside:
            linear.weight.data.copy_(weight)
        for linear in linears:
            linear.adapter.active, linear.adapter.keeps = True, False


def mergeable(linear: Any) -> bool:
    """Return whether a layer's factors can be added to its weight without rounding away what they change."""
    return linear.quantised is None and linear.weight.dtype == torch.float32
