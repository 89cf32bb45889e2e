"""The order in which a pipeline stage runs its microbatches forward and backward, as Megatron's schedules do."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.parallel.layout import Layout


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of a microbatch through the layers that a stage has in one of its chunks.

    Attributes:
        microbatch: number of the microbatch.
        chunk: number of the virtual stage on this stage; 0 without interleaving.
        backward: whether it is a backward pass.
    """

    microbatch: int
    chunk: int
    backward: bool


@dataclass(frozen=True)
class _Stage:
    """What Megatron's function asks of its communicator: the size of the pipeline, and a place in it."""

    layout: Layout
    stage: int

    @property
    def pp_group(self) -> _Stage:
        return self

    def size(self) -> int:
        return self.layout.pp

    def rank(self) -> int:
        return self.stage

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        return self.layout.vpp if self.layout.vpp > 1 else None


def order_of_passes(layout: Layout, stage: int, microbatches: int) -> list[Pass]:
    """Return the passes of a stage in an optimizer step: 1F1B, or interleaved with virtual stages.

    The first forward passes fill the pipeline, then one forward and one backward pass alternate, and the remaining
    backward passes empty it. How many fill it, and which chunk comes when, Megatron's own functions say.
    """
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    total, _, filling, _ = get_pp_rank_microbatches(
        microbatches, layout.vpp, layout.pp, p2p_communicator=_Stage(layout, stage)
    )
    table = get_schedule_table(microbatches, layout.vpp, layout.pp)
    forward = [Pass(microbatch, chunk, backward=False) for microbatch, chunk in table]
    backward = [Pass(microbatch, layout.vpp - 1 - chunk, backward=True) for microbatch, chunk in table]
    found = forward[:filling]
    for number in range(total - filling):
        found += [forward[filling + number], backward[number]]
    return [*found, *backward[total - filling :]]
