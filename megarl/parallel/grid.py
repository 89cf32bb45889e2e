"""The process groups of the live layout, and this rank's coordinates in it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from torch import Tensor

from megarl.command import local_process_number
from megarl.config.trees import Tree
from megarl.errors import ConfigError, MegarlError
from megarl.parallel import cpu
from megarl.parallel.layout import Layout
from megarl.parallel.meeting import Seat, join
from megarl.parallel.megatron_versions import check_newer

SEEDS = 2**63
"""Torch's generators take all seeds below this. Seeds derived from the run's are reduced modulo it."""


def start_world(timeout_s: float = 1800.0) -> torch.device:
    """Join the process group that the environment describes (else a world of one). Returns this rank's device."""
    check_newer()
    if cpu.needed():
        cpu.install()
        device = torch.device("cpu")
    else:
        number, count = local_process_number(), torch.cuda.device_count()
        if number >= count:
            raise ConfigError(
                f"process {number} of this machine has no GPU of its own: there are {count}; start as many processes "
                "as GPUs (trainer.devices, --nproc-per-node), or use trainer.accelerator=cpu",
                key="trainer.devices",
                offers={"trainer.accelerator": ["cpu"]},
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    seat = Seat.alone() if alone else Seat.launched()
    if seat is None:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but not all of RANK, MASTER_ADDR and MASTER_PORT are set: unset "
            "it, or start with torchrun",
            key="WORLD_SIZE",
            value=os.environ["WORLD_SIZE"],
        )
    if device.type == "cpu":
        join("gloo", seat, timeout_s)
    else:  # with a device, NCCL connects all ranks at once instead of pair by pair during the first sends
        join("nccl", seat, timeout_s, device)
    return device


class Grid:
    """Process groups and coordinates of this rank. A process has one live grid: `close` it before making another.

    `groups` is Megatron's collection of process groups; it is passed explicitly wherever Megatron accepts it.
    """

    def __init__(self, layout: Layout, device: torch.device, seed: int = 1, timeout_s: float = 1800.0) -> None:
        world = dist.get_world_size()
        if world != layout.world_size:
            raise ConfigError(
                f"the layout {layout} needs {layout.world_size} processes but the world has {world}: "
                f"set trainer.devices x trainer.num_nodes to {layout.world_size}",
                key="trainer.devices",
            )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.tp,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
            create_gloo_process_groups=False,
        )
        self.layout = layout
        self.device = device
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.tp_rank: int = self.groups.tp.rank()
        self.pp_rank: int = self.groups.pp.rank()
        self.dp_rank: int = self.groups.dp.rank()
        self.ep_rank: int = self.groups.ep.rank()
        self.tp_expt_dp = self._ranks_of_same_experts()
        self.seed_dropout(seed)

    def _ranks_of_same_experts(self) -> dist.ProcessGroup:
        """Return the group of the ranks of a stage that hold slices of the same experts, tensor-parallel ranks varying
        fastest. Megatron makes none."""
        layout = self.layout
        whole: dist.ProcessGroup = self.groups.tp_dp_cp
        if layout.ep == 1:
            return whole
        replicas = layout.copies // layout.ep
        order = RankGenerator(tp=layout.tp, ep=layout.ep, dp=replicas, pp=layout.pp, cp=1, order="tp-cp-ep-dp-pp")
        made: dist.ProcessGroup = dist.new_subgroups_by_enumeration(order.get_ranks("tp-dp"))[0]
        return made

    @property
    def rank(self) -> int:
        """Rank of this process in the world."""
        return dist.get_rank()

    @property
    def copy_rank(self) -> int:
        """Number of this rank's copy of the weights, of the layout's `copies`: the order of the group dp_cp."""
        return int(self.groups.dp_cp.rank())

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank is on the first pipeline stage."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage."""
        return self.pp_rank == self.layout.pp - 1

    def seed_dropout(self, seed: int) -> None:
        """Seed dropout's generators: one per stage and copy of the weights; Megatron splits them over tensor ranks."""
        base = (seed + 100 * self.pp_rank + 10_000 * self.copy_rank) % SEEDS
        torch.manual_seed(base)
        model_parallel_cuda_manual_seed(base, force_reset_rng=True)

    def random_state(self) -> dict[str, Any]:
        """Return the states of the generators that dropout uses, as plain tensors."""
        state: dict[str, Any] = {"default": torch.get_rng_state(), "tracked": get_cuda_rng_tracker().get_states()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Restore the generator states that `random_state` returned."""
        torch.set_rng_state(state["default"])
        get_cuda_rng_tracker().set_states(state["tracked"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's (small, picklable) value, in rank order, on every rank."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def run_on_rank0(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and broadcast its (small, picklable) result, or the error that it raised."""
        if dist.get_world_size() == 1:
            return work()
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = work()
            except Exception as problem:  # every rank must receive it, or the others wait forever
                failure = problem
                travels = isinstance(problem, MegarlError)
                box[1] = problem if travels else RuntimeError(f"rank 0: {type(problem).__name__}: {problem}")
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            if isinstance(box[1], MegarlError) and failure is None:
                box[1].said = True  # printed by rank 0, which raises it too
            raise failure or box[1]
        return box[0]

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Sum over the data-parallel ranks, in place. With one replica nothing is sent."""
        if self.layout.dp > 1:
            dist.all_reduce(values, group=self.groups.dp)
        return values

    def broadcast_from_last_stage(self, values: Tensor) -> Tensor:
        """Broadcast the last stage's `values` to every stage, in place; shapes must agree on all stages."""
        if self.layout.pp > 1:
            dist.broadcast(values, src=self._last_stage, group=self.groups.pp)
        return values

    def object_from_last_stage(self, value: object) -> object:
        """Return the last stage's (small, picklable) object on every stage."""
        if self.layout.pp == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=self._last_stage, group=self.groups.pp, device=self.device)
        return box[0]

    def any_rank(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is True on any rank."""
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        dist.barrier()

    def close(self) -> None:
        """Destroy the groups, so that another grid can be made."""
        if self.layout.ep > 1:
            dist.destroy_process_group(self.tp_expt_dp)
        parallel_state.destroy_model_parallel()

    @property
    def _last_stage(self) -> int:
        ranks: list[int] = dist.get_process_group_ranks(self.groups.pp)
        return ranks[-1]


@contextmanager
def grid_of_world(config: Tree) -> Iterator[Grid]:
    """Yield a grid over all processes of the world, in the layout of `config.parallel`; close it afterwards.

    A world that has not started yet is started, and ended again.
    """
    parallel = config.parallel
    starts_world = not dist.is_initialized()
    device = start_world(parallel.timeout_s)
    try:
        grid = Grid(Layout.of(parallel, dist.get_world_size()), device, config.seed, parallel.timeout_s)
        try:
            yield grid
        finally:
            grid.close()
    finally:
        if starts_world:
            dist.destroy_process_group()
