"""Exact sizes of a rank's slice of a model: its engine is built on the meta device, as that rank would build it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from megarl.models.adapters import changed_linears, mergeable, weight_of
from megarl.models.build import empty_model, engine_of, refuse_quantised_experts
from megarl.models.config import GPTConfig
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.fake import fake_world, rank_of
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.optimizer import peak_bytes_of_a_step, stored_moments
from megarl.planning.parts import like
from megarl.planning.work import Work

FEW_EXPERTS = 2
"""Experts of a layer on a rank that are built where sizes need not be exact."""


@dataclass(frozen=True)
class OfExperts:
    """The part of a rank's slice that is experts which `parallel.ep` replicas share; nothing where none are shared."""

    trainable: int = 0  # elements
    weights: int = 0  # bytes
    moments: int = 0  # values
    bucket: int = 0  # elements


@dataclass(frozen=True)
class Shard:
    """One rank's slice of one model, without frozen weights that it shares with another. Sizes are bytes of all memory
    that its engine allocates."""

    stage: int
    parameters: int  # elements
    trainable: int  # elements
    weights: int
    gradients: int
    optimizer: int
    moments: int  # values of the optimizer's state in a checkpoint, besides the weights, of all holders of a weight
    stepping: int  # temporary memory of an optimizer step that needs whole matrices
    copy: int  # bytes of the trainable weights: a reference keeps them in host memory
    largest: int  # elements of the largest trainable parameter
    layers: int
    bucket: int  # elements of the largest gradient bucket that is communicated at once, besides those of `experts`
    merged: int = 0  # bytes of the weights into which adapters are merged while responses are sampled
    experts: OfExperts = OfExperts()

    def distributed(self, name: str, layout: Layout) -> float:
        """Return a rank's share of `trainable`, `weights` or `moments` where the ranks that hold a weight divide it. An
        expert is held by one of `ep` of them."""
        of_experts = getattr(self.experts, name)
        return float((getattr(self, name) - of_experts + of_experts * layout.ep) / layout.copies)


Sizes = TypeVar("Sizes", Shard, OfExperts)


def gpt_config(work: Work) -> GPTConfig:
    """Return the model's configuration; kernels do not change sizes and need not be importable here."""
    return GPTConfig.build(
        work.model,
        work.layout,
        vocab_size=work.vocab_size,
        precision=work.precision,
        recompute=work.parallel.recompute,
        kernels="torch",
        adapter=work.adapter,
    )


def shard(work: Work, role: Role, stage: int, *, exact: bool = True) -> Shard:
    """Return the sizes of a role's model on the ranks of a pipeline stage; many stages in the middle are equal.

    Args:
        work: the run.
        role: the role.
        stage: the pipeline stage.
        exact: whether to build all experts of a rank, which takes seconds where they are thousands; else see
            `_by_few_experts`.
    """
    if not exact and _experts_here(work.layout, role) > FEW_EXPERTS:
        return _by_few_experts(work, role, stage)
    # Ranks that share sequences hold what replicas hold.
    work = replace(work, layout=replace(work.layout, cp=1, dp=work.layout.copies))
    rank = rank_of(work.layout, pp=like(work.layout, role.model, stage))
    key = (repr(role), work.layout, work.precision, rank)
    found = _KNOWN.get(key)
    if found is None:
        with fake_world(work.layout, rank) as grid:
            found = _KNOWN[key] = measure(build_shard(grid, work, role), stage, shares_frozen=role.base is not None)
    return found


_KNOWN: dict[Any, Shard] = {}  # cache: many variants of a run have the same models


def _experts_here(layout: Layout, role: Role) -> int:
    """Return how many experts of a layer a rank holds."""
    experts = role.model.experts
    return 0 if experts is None else int(experts.count or 0) // layout.ep


def _by_few_experts(work: Work, role: Role, stage: int) -> Shard:
    """Return what `shard` does, from the sizes with few and twice as many experts on a rank: what an expert adds is the
    same for each, except for the padding of buffers."""
    experts = role.model.experts
    assert experts is not None

    def with_experts(here: int) -> Shard:
        count = here * work.layout.ep
        fewer = replace(experts, count=count, chosen=min(experts.chosen, count))
        return shard(work, replace(role, model=replace(role.model, experts=fewer)), stage)

    few = FEW_EXPERTS // 2
    steps = _experts_here(work.layout, role) / few - 1
    return _on_the_line(with_experts(few), with_experts(2 * few), steps)


def _on_the_line(first: Sizes, second: Sizes, steps: float) -> Sizes:
    """Return the sizes that are `steps` times as far from the first as the second are."""

    def extended(one: Any, two: Any) -> Any:
        return _on_the_line(one, two, steps) if is_dataclass(one) else round(one + (two - one) * steps)

    names = [each.name for each in fields(first)]
    return type(first)(**{name: extended(getattr(first, name), getattr(second, name)) for name in names})


def build_shard(grid: Grid, work: Work, role: Role) -> Engine:
    """Build a role's engine as training does, with uninitialised weights."""
    refuse_quantised_experts(role)
    return engine_of(role, grid, empty_model(gpt_config(work.of(role)), grid, role.heads), total_steps=1)


def measure(engine: Engine, stage: int, *, shares_frozen: bool = False) -> Shard:
    """Return the sizes of an engine's memory; every storage is counted once.

    Args:
        engine: the engine.
        stage: the pipeline stage that it is planned for.
        shares_frozen: whether its frozen weights are those of another engine.
    """
    parameters = [parameter for _, parameter in engine.parameters() if parameter.requires_grad or not shares_frozen]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    linears = [linear for model in engine.models for _, linear in changed_linears([model])]
    quantised = [] if shares_frozen else [linear for linear in linears if linear.quantised is not None]
    masks = [linear.adapter.part_of_rows for linear in linears if linear.adapter is not None]
    common, of_experts = (_buffers(engine, name) for name in ("buffers", "expert_parallel_buffers"))
    buffers = [*common, *of_experts]
    weights = [*parameters, *(buffer.param_data for buffer in buffers if buffer.param_data is not None)]
    weights += [stored for linear in quantised for stored in linear.quantised.buffers()]
    weights += [mask for mask in masks if mask is not None]
    held = _storages(weights)
    return Shard(
        stage=stage,
        parameters=sum(parameter.numel() for parameter in parameters)
        + sum(weight_of(linear).numel() for linear in quantised),
        trainable=sum(parameter.numel() for parameter in trained),
        weights=sum(held.values()),
        gradients=sum(_storages(buffer.grad_data for buffer in buffers).values()),
        optimizer=sum(size for key, size in _storages(_optimizer_tensors(engine)).items() if key not in held),
        moments=stored_moments(engine.optimizer) if engine.optimizer is not None else 0,
        stepping=peak_bytes_of_a_step(engine.optimizer) if engine.optimizer is not None else 0,
        copy=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        largest=max((parameter.numel() for parameter in trained), default=0),
        layers=sum(len(model.decoder.layers) for model in engine.models),
        bucket=_largest_bucket(common),
        merged=sum(linear.weight.nbytes for linear in linears if linear.adapter is not None and mergeable(linear)),
        experts=_of_experts(engine, parameters, of_experts),
    )


def _buffers(engine: Engine, name: str) -> list[Any]:
    """Return Megatron's buffers of gradients, those of shared experts or the others, of a model that trains."""
    chunks = engine.chunks if engine.optimizer is not None else ()  # else the bare models
    return [buffer for chunk in chunks for buffer in getattr(chunk, name, ()) if hasattr(buffer, "grad_data")]


def _largest_bucket(buffers: Sequence[Any]) -> int:
    return max((bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets), default=0)


def _of_experts(engine: Engine, parameters: Sequence[Any], buffers: Sequence[Any]) -> OfExperts:
    """Return the sizes of the experts that replicas share, which Megatron marks."""
    shared = [parameter for parameter in parameters if not getattr(parameter, "allreduce", True)]
    return OfExperts(
        trainable=sum(parameter.numel() for parameter in shared if parameter.requires_grad),
        weights=sum(parameter.numel() * parameter.element_size() for parameter in shared),
        moments=0 if engine.optimizer is None else stored_moments(engine.optimizer, buffers),
        bucket=_largest_bucket(buffers),
    )


def _optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Yield master weights and the optimizer's moments; float32 parameters are their own master weights."""
    if engine.optimizer is None:
        return
    for part in engine.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter, state in part.optimizer.state.items():
            yield parameter
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim() > 0)


def _storages(tensors: Any) -> dict[int, int]:
    """Return the bytes of each distinct storage."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
