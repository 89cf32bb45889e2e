"""What a rank's part of a model takes, exactly: its engine is built on the meta device, as that rank would build it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megarl.models.build import empty_model, engine_of
from megarl.models.config import GPTConfig
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.fake import fake_world, rank_of
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.planning.work import Work


@dataclass(frozen=True)
class Shard:
    """One rank's part of one model. Sizes are in bytes, of all the memory that its engine allocates for them."""

    stage: int
    parameters: int  # elements
    trainable: int  # elements
    weights: int
    gradients: int
    optimizer: int
    copy: int  # of the weights that train: what a reference keeps in host memory
    largest: int  # elements of the largest parameter
    layers: int
    bucket: int  # elements of the largest part of the gradients that is communicated at once


def gpt_config(work: Work) -> GPTConfig:
    """The model's configuration; kernels do not change what is allocated and need not be importable here."""
    return GPTConfig.build(
        work.model,
        work.layout,
        vocab_size=work.vocab_size,
        precision=work.precision,
        recompute=work.parallel.recompute,
        kernels="torch",
    )


def stages_that_differ(layout: Layout) -> list[int]:
    """One of each kind: the first, one between, the last."""
    return sorted({0, min(1, layout.pp - 1), layout.pp - 1})


def shard(work: Work, role: Role, stage: int) -> Shard:
    """The part of a role's model on the ranks of a pipeline stage; stages in the middle are alike."""
    kinds = stages_that_differ(work.layout)
    built = stage if stage in kinds else kinds[1]
    rank = rank_of(work.layout, pp=built)
    key = (repr(role), work.layout, work.precision, rank)
    found = _KNOWN.get(key)
    if found is None:
        with fake_world(work.layout, rank) as grid:
            found = _KNOWN[key] = measure(build_shard(grid, work, role), stage)
    return found


_KNOWN: dict[Any, Shard] = {}  # plans of one run differ in much that changes no model


def build_shard(grid: Grid, work: Work, role: Role) -> Engine:
    """Build a role's engine as training does, with weights that are not filled."""
    return engine_of(role, grid, empty_model(gpt_config(work.of(role)), grid, role.heads), total_steps=1)


def measure(engine: Engine, stage: int) -> Shard:
    """Sizes of what an engine holds, every storage counted once."""
    parameters = [parameter for _, parameter in engine.parameters()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    buffers = [
        buffer
        for chunk in (engine.chunks if engine.optimizer is not None else ())  # else they are the bare models
        for buffer in (*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ()))
        if hasattr(buffer, "grad_data")
    ]
    weights = [*parameters, *(buffer.param_data for buffer in buffers if buffer.param_data is not None)]
    held = _storages(weights)
    return Shard(
        stage=stage,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trained),
        weights=sum(held.values()),
        gradients=sum(_storages(buffer.grad_data for buffer in buffers).values()),
        optimizer=sum(size for key, size in _storages(_optimizer_tensors(engine)).items() if key not in held),
        copy=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        largest=max((parameter.numel() for parameter in parameters), default=0),
        layers=sum(len(model.decoder.layers) for model in engine.models),
        bucket=max((bucket.grad_data.numel() for buffer in buffers for bucket in buffer.buckets), default=0),
    )


def _optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Master weights and Adam's moments; float32 parameters are their own master weights."""
    if engine.optimizer is None:
        return
    for part in engine.optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        for parameter, state in part.optimizer.state.items():
            yield parameter
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.numel() > 1)


def _storages(tensors: Any) -> dict[int, int]:
    """Bytes by storage."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
