"""Copy an engine's weights to a second layout over the same ranks, with Megatron's resharding plan.

The second engine only computes forward passes. The cost of a copy is computed before the first one.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.resharding import execute_reshard_plan
from megatron.core.resharding.copy_services.base import CopyService
from megatron.core.resharding.copy_services.nccl_copy_service import NCCLCopyService
from megatron.core.resharding.utils import ReshardPlan
from torch import Tensor

from megarl.errors import ConfigError
from megarl.parallel.engine import BuildModel, Engine
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, partition_dim
from megarl.parallel.layout import Layout
from megarl.parallel.megatron_versions import plan_copies, receives_in_place

Link = tuple[int, int]  # from rank, to rank


class SecondGrid(Grid):
    """The process groups of another layout, beside the live grid.

    Megatron's globals stay those of the live grid, so only code that takes its groups from this object can use it.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        order = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp")
        made = {
            axis: dist.new_subgroups_by_enumeration(order.get_ranks(axis))[0] for axis in ("tp", "pp", "dp", "cp", "ep")
        }
        self._made = list(made.values())
        # Tied embeddings over stages are not supported, see `refuse_what_cannot_be_moved`, and no sequence is split.
        self.groups = ProcessGroupCollection(**made, tp_cp=made["tp"], dp_cp=made["dp"], expt_dp=made["dp"], embd=None)
        self.tp_rank, self.pp_rank, self.dp_rank = (made[axis].rank() for axis in ("tp", "pp", "dp"))
        self.ep_rank = 0

    def close(self) -> None:
        """Destroy the process groups of this layout."""
        for group in self._made:
            dist.destroy_process_group(group)


class Reshard:
    """Build `engine`, a copy of `source` in another layout; `refresh()` copies the source's present weights into it.

    `links` maps each pair of ranks (also of a rank with itself) to the bytes that one copy sends. `weight_bytes` and
    `peak_bytes` list the extra memory of every rank: permanently, and at most while weights are copied.
    """

    def __init__(self, source: Engine, layout: Layout, build: Callable[[Grid], BuildModel]) -> None:
        """Call on all ranks. `build(grid)` builds the model for that grid, whose layout has one chunk per rank."""
        tied = source.models[0].share_embeddings_and_output_weights
        refuse_what_cannot_be_moved(source.grid.layout, layout, tied=tied)
        self.source, self.grid = source, SecondGrid(layout, source.grid.device)
        self.engine = Engine(self.grid, build(self.grid), name=source.name)
        _check_shapes(source, self.engine)
        # `swap_model_weights` in two steps, so that the plan can be shown before it is executed.
        self._plan: ReshardPlan = plan_copies(source.models[0], self.engine.models[0])
        self._service: CopyService = _GlooCopies() if self.grid.device.type == "cpu" else NCCLCopyService()
        self.links, self.weight_bytes, self.peak_bytes = self._cost()
        self._trained_alone, self.trained_bytes = self._plan_of_trained()
        self._loaded: int | None = None  # value of `source.loads` when all weights were copied

    def refresh(self) -> None:
        """Copy the source's present weights: all of them, or, where it loaded none since, those that train. Call on all
        ranks."""
        plan = self._trained_alone if self._loaded == self.source.loads else self._plan
        self._loaded = self.source.loads
        if self.grid.device.type == "cuda":
            torch.cuda.synchronize()  # Megatron's service copies on its own stream without waiting for this one
        execute_reshard_plan(plan, self.source.models[0], self.engine.models[0], self._service)

    def _plan_of_trained(self) -> tuple[ReshardPlan, int]:
        """Return the part of the plan that moves trained parameters, and the bytes that all ranks send for it.

        Of an engine without an optimizer nobody knows which weights change, so all are moved.
        """
        trained = {
            name
            for name, parameter in self.source.parameters()
            if parameter.requires_grad or getattr(parameter, "moves", False) or not self.source.trains
        }
        trained = set().union(*self.grid.gather(trained))
        here, there = (_local_names(engine) for engine in (self.source, self.engine))
        plan = ReshardPlan(
            [op for op in self._plan.send_ops if here[op.param_name] in trained],
            [op for op in self._plan.recv_ops if there[op.param_name] in trained],
        )
        parameters = dict(self.engine.models[0].named_parameters())
        received = sum(_bytes(parameters[op.param_name][op.my_slice]) for op in plan.recv_ops)
        return plan, sum(self.grid.gather(received))

    def table(self) -> str:
        """Return a readable table of the bytes that a copy sends and the memory that it needs."""
        between = sum(count for (source, target), count in self.links.items() if source != target)
        lines = [
            f"weights from {self.source.grid.layout} to {self.grid.layout}: {_size(sum(self.links.values()))}, "
            f"of which {_size(between)} between processes; {_size(self.trained_bytes)} after the first time",
            f"{'from':>6} {'to':>6} {'sent':>12}",
            *(f"{source:>6} {target:>6} {_size(count):>12}" for (source, target), count in self.links.items()),
            f"{'process':>13} {'weights':>12} {'while moving, at most':>24}",
        ]
        for rank, (weights, peak) in enumerate(zip(self.weight_bytes, self.peak_bytes, strict=True)):
            lines.append(f"{rank:>13} {_size(weights):>12} {_size(peak):>24}")
        return "\n".join(lines)

    def close(self) -> None:
        """Destroy the second engine's groups; it cannot be used afterwards. Call on all ranks."""
        self.grid.close()

    def _cost(self) -> tuple[dict[Link, int], list[int], list[int]]:
        received, buffers, sent = Counter[int](), 0, 0
        in_place = receives_in_place()
        here, there = (dict(engine.models[0].named_parameters()) for engine in (self.source, self.engine))
        for op in self._plan.recv_ops:
            part = there[op.param_name][op.my_slice]
            received[op.peer_rank] += _bytes(part)
            buffers += 0 if in_place and part.is_contiguous() else _bytes(part)
        for op in self._plan.send_ops:
            part = here[op.param_name][op.my_slice]
            sent += 0 if part.is_contiguous() else _bytes(part)  # copied before it is sent
        weights = sum(_bytes(parameter) for parameter in there.values())
        # Megatron receives into buffers, and then copies them to their destination.
        ranks = self.grid.gather((dict(received), weights, weights + buffers + sent))
        links = {(source, rank): count for rank, (of, _, _) in enumerate(ranks) for source, count in sorted(of.items())}
        return links, [weights for _, weights, _ in ranks], [peak for _, _, peak in ranks]


class _GlooCopies(CopyService):
    """Send and receive without a GPU; Megatron's own service for this case requires CUDA streams.

    Both ranks of a pair submit in the order of the plan, so messages need no tags.
    """

    def __init__(self) -> None:
        self._sends: list[tuple[Tensor, int]] = []
        self._receives: list[tuple[Tensor, int]] = []

    def submit_send(self, src_tensor: Tensor, dest_rank: int, task_id: int | None = None) -> None:
        self._sends.append((src_tensor, dest_rank))

    def submit_recv(self, dest_tensor: Tensor, src_rank: int, task_id: int | None = None) -> None:
        self._receives.append((dest_tensor, src_rank))

    def run(self) -> None:
        me = dist.get_rank()
        sources = [source for source, peer in self._sends if peer == me]
        targets = [target for target, peer in self._receives if peer == me]
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        works: list[Any] = [dist.isend(tensor, peer) for tensor, peer in self._sends if peer != me]
        works += [dist.irecv(tensor, peer) for tensor, peer in self._receives if peer != me]
        for work in works:
            work.wait()
        self._sends.clear()
        self._receives.clear()


def refuse_what_cannot_be_moved(present: Layout, layout: Layout, *, tied: bool) -> None:
    """Raise for layouts that not every supported megatron-core can copy to, before anything is built."""
    if present.vpp > 1 or layout.vpp > 1:
        raise ConfigError(
            f"rollout.engine.layout={layout} cannot be reached from {present}: megatron-core moves one chunk per "
            "process, and virtual stages have several: set parallel.vpp=null, or rollout.engine.layout=null",
            key="rollout.engine.layout",
            value=layout,
            offers={"parallel.vpp": [None], "rollout.engine.layout": [None]},
        )
    if layout.pp > 1 and tied:
        raise ConfigError(
            f"rollout.engine.layout={layout} has pipeline stages, and the model's output is tied to its embedding: "
            "megatron-core does not find the last stage's copy of it: use a layout of tp alone, or "
            "rollout.engine.layout=null",
            key="rollout.engine.layout",
            value=layout,
            offers={"rollout.engine.layout": [None]},
        )


def _check_shapes(source: Engine, target: Engine) -> None:
    """Raise on all ranks unless every tensor of the second model exists in the first with the same shape."""
    whole: dict[str, tuple[int, ...]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for shapes, engine in ((whole, source), (wanted, target)):
        for name, parameter in engine.parameters():
            shape = list(parameter.shape)
            if is_sharded(parameter):
                shape[partition_dim(parameter)] *= engine.grid.layout.tp
            shapes[name] = tuple(shape)
    ranks = source.grid.gather((whole, wanted))
    found = {name: shape for theirs, _ in ranks for name, shape in theirs.items()}
    for name, shape in (item for _, theirs in ranks for item in theirs.items()):
        if name not in found:
            raise ConfigError(
                f"rollout.engine.layout={target.grid.layout}: {source.name} has no {name} to move there",
                key="rollout.engine.layout",
                value=target.grid.layout,
                where=name,
            )
        if found[name] != shape:
            raise ConfigError(
                f"rollout.engine.layout={target.grid.layout}: {name} is {list(shape)} there and {list(found[name])} in "
                f"{source.grid.layout} (vocabularies are padded to suit tp): use a tp that is a power of 2",
                key="rollout.engine.layout",
                value=target.grid.layout,
                where=name,
            )


def _local_names(engine: Engine) -> dict[str, str]:
    """Return the global name of each parameter of an engine's only chunk by its name there."""
    names = {id(parameter): name for name, parameter in engine.parameters()}
    return {local: names[id(parameter)] for local, parameter in engine.models[0].named_parameters()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
