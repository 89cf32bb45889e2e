"""One Megatron model in a role: its chunks, gradient buffers, optimizer and schedule, and the operations on them.

The engine takes a callable that builds the model, so it does not depend on the model's architecture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megarl.errors import CheckpointError, NumericsError
from megarl.parallel.device import device_settings
from megarl.parallel.digest import digests_of_copies
from megarl.parallel.finite import is_finite
from megarl.parallel.gradients import with_gradient_buffers
from megarl.parallel.grid import Grid
from megarl.parallel.offload import GRADIENTS, OPTIMIZER, WEIGHTS, memory_of
from megarl.parallel.optimizer import (
    OptimSpec,
    build_optimizer,
    build_schedule,
    load_optimizer,
    restore_schedule,
    trains_here,
)
from megarl.parallel.passes import (
    BuildModel,
    CountFn,
    Finish,
    ForwardFn,
    LossFn,
    Outputs,
    Stats,
    StepObserver,
)
from megarl.parallel.rows import Microbatch


class Engine:
    """A model in a role over the ranks of a grid. Without `optim` it only computes forward passes."""

    def __init__(
        self,
        grid: Grid,
        build: BuildModel,
        *,
        name: str = "policy",
        optim: OptimSpec | None = None,
        trainable: Callable[[str], bool] | None = None,
        saved: bool = True,
    ) -> None:
        """`trainable(global name)` selects the trainable parameters, before gradient buffers are made. Checkpoints
        contain the engine if `saved`."""
        self.grid, self.name, self.saved = grid, name, saved
        self.lr_key = "optim.lr" if optim is None else optim.lr_key  # the key that error messages suggest to lower
        self._models = _build_chunks(grid, build)
        self.config = self._models[0].config
        for model in self._models:
            for parameter_name, parameter in _global_names(model):
                parameter.requires_grad_(optim is not None and (trainable is None or trainable(parameter_name)))
        self._optimizer: MegatronOptimizer | None = None
        self.schedule = None
        self._chunks: list[Any] = list(self._models)
        self.has_gradients = False
        self.follows_routes = True  # whether the experts that rows name compute their tokens, or the router chooses
        self.observer: StepObserver | None = None
        self.observed: dict[str, float] = {}  # what it reported of the last training step
        self.loads = 0  # how often weights were loaded that may not train
        self.pins = device_settings().pinned_copies
        self.aside: dict[str, Tensor] | None = None  # host memory for the weights that `with_weights` replaces
        if optim is not None:
            self._chunks = [with_gradient_buffers(model, grid, index) for index, model in enumerate(self._models)]
            self.config.finalize_model_grads_func = finalize_model_grads
            # Without it, an overlapped reduction would run after every microbatch instead of after the last.
            waits = [chunk.no_sync for chunk in self._chunks]
            self.config.no_sync_func = waits[0] if len(waits) == 1 else waits
            self._optimizer = build_optimizer(self._chunks, optim, grid, bf16=self.config.bf16)
            self.schedule = build_schedule(self._optimizer, optim)
            # A schedule's first step is step 0 with lr 0 unless it is advanced to the first.
            self.schedule.step(1)
        self.memory = memory_of(self._models, self._chunks, self._optimizer, grid.device, pins=self.pins)

    # --- device memory: these properties bring tensors back to the device before they are read ------------------------

    @property
    def models(self) -> list[Any]:
        """The chunks without gradient buffers, with their weights on the device."""
        self.memory.need(WEIGHTS)
        return self._models

    @property
    def chunks(self) -> list[Any]:
        """The chunks with their gradient buffers, and their weights on the device; the buffers may be offloaded."""
        self.memory.need(WEIGHTS)
        return self._chunks

    @property
    def has_encoder(self) -> bool:
        """Whether the model is an encoder-decoder, whose encoder reads the prompts of rows."""
        return getattr(self.config, "encoder", None) is not None

    @property
    def optimizer(self) -> MegatronOptimizer | None:
        """Megatron's optimizer, with everything that it reads and writes on the device."""
        if self._optimizer is not None:
            self.memory.need(WEIGHTS, GRADIENTS, OPTIMIZER)
        return self._optimizer

    def offload(self, *, weights: bool = True, optimizer: bool = True) -> None:
        """Move weights, and the optimizer's state with its gradient buffers, to host memory until they are used.

        Gradients that the optimizer has not applied yet are kept; others are dropped.
        """
        if weights:
            self.memory.release(WEIGHTS)
        if optimizer:
            self.memory.release(OPTIMIZER)
            self.memory.release(GRADIENTS, keep=self.has_gradients)

    def onload(self, *, weights: bool = True, optimizer: bool = True) -> None:
        """Start to bring offloaded memory back. On a GPU, copies overlap other work; the first use waits for them."""
        if weights:
            self.memory.restore(WEIGHTS)
        if optimizer:
            self.memory.restore(OPTIMIZER)
            self.memory.restore(GRADIENTS)

    # --- training -------------------------------------------------------------------------------------------------

    def train_step(self, microbatches: Sequence[Microbatch], loss_fn: LossFn, count_fn: CountFn) -> dict[str, float]:
        """Compute the gradients of one optimizer step: forward and backward over microbatches, summed over replicas.

        All microbatches have the same [bins, time]; with virtual stages, their number is a multiple of pp. Returns the
        counts, and the stats summed over microbatches and data-parallel ranks, on every rank; the optimizer is stepped
        by the caller, through Lightning.
        """
        self.train()
        self.memory.need(WEIGHTS, GRADIENTS)
        self.memory.restore(OPTIMIZER)  # overlaps the computation of gradients
        self.zero_gradients()
        counts = self.count(microbatches, count_fn)
        if self.observer is not None:
            self.observer.begin()
        # Megatron divides a loss by the number of microbatches, and its gradient by the data-parallel size.
        undo_averaging = len(microbatches) * self.grid.layout.dp

        def loss_and_stats(model: Any, batch: Microbatch, output: Tensor) -> tuple[Tensor, Stats]:
            loss, stats = loss_fn(model, output, batch, counts)
            return loss * undo_averaging, {key: value.detach() for key, value in stats.items()}

        collected: list[Stats] = self._run(microbatches, loss_and_stats, forward_only=False)
        self.has_gradients = True
        sums = self._summed(collected)
        if self.observer is not None:
            self.observed = self.observer.stats()
        for key, value in (sums | self.observed).items():  # the same on every rank; before the optimizer step
            if "loss" in key:
                self._check_finite(key, value)
        return {**counts, **sums}

    def count(self, microbatches: Sequence[Microbatch], count_fn: CountFn) -> dict[str, float]:
        """Return the sums of `count_fn` over the microbatches of all data-parallel ranks."""
        parts = [count_fn(batch) for batch in microbatches]
        names = sorted(parts[0])
        sums = torch.stack([torch.stack([part[name].double() for part in parts]).sum() for name in names])
        sums = self.grid.sum_over_data(sums.to(self.grid.device))
        return dict(zip(names, sums.tolist(), strict=True))

    def move_schedule_to(self, step: int) -> None:
        """Set the learning-rate schedule to its state after `step` steps."""
        if self.schedule is not None and self.schedule.num_steps != step:
            self.schedule.step(step - self.schedule.num_steps)

    def apply_gradients(self) -> float:
        """Clip gradients, update the weights and advance the schedule. Returns the gradient norm before clipping."""
        optimizer = self.optimizer
        assert optimizer is not None
        assert self.schedule is not None
        _, norm, _ = optimizer.step()
        self.has_gradients = False
        self.schedule.step(1)
        self._check_finite("the gradient norm", float(norm))
        return float(norm)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NumericsError(
                f"{what} of {self.name} is {value}: lower {self.lr_key}, or look for broken records",
                key=what,
                value=value,
                where=self.name,
            )

    def zero_gradients(self) -> None:
        """Clear the gradients; offloaded gradients return as zeros."""
        if self._optimizer is None:
            return
        self.has_gradients = False
        if self.memory.is_away(GRADIENTS):
            self.memory.forget(GRADIENTS)
            return
        self.memory.need(GRADIENTS)
        for chunk in self._chunks:
            chunk.zero_grad_buffer()  # the buffers' hooks consume the parameters' own .grad as soon as it is set

    @property
    def trains(self) -> bool:
        """Whether there is an optimizer."""
        return self._optimizer is not None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        assert self._optimizer is not None
        return float(self._optimizer.param_groups[0]["lr"])

    def gradient_names(self) -> tuple[set[str], set[str]]:
        """Return names of tensors with a nonzero gradient on some rank, and of all that should have one, over ranks.

        A trainable tensor should, unless its result is multiplied by a tensor that is still zero (`multiplied_by`).
        """
        self.memory.need(GRADIENTS)
        local = {
            name: bool(getattr(parameter, "main_grad").any())  # noqa: B009 - Megatron puts it there
            for name, parameter in self.parameters()
            if parameter.requires_grad and bool(getattr(parameter, "multiplied_by", parameter).any())
        }
        ranks = self.grid.gather(local)
        reached = {name for names in ranks for name, has_gradient in names.items() if has_gradient}
        return reached, {name for names in ranks for name in names}

    # --- evaluation -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, microbatches: Sequence[Microbatch], fn: ForwardFn) -> list[Outputs]:
        """Return `fn` of each microbatch's output, without gradients or dropout, on every rank of the replica."""
        self.eval()
        results: list[Outputs] = self._run(
            microbatches, lambda model, batch, output: fn(model, output, batch), forward_only=True
        )
        if self.grid.layout.pp == 1:
            return results
        return self._from_last_stage(results, len(microbatches))

    def evaluate(self, microbatches: Sequence[Microbatch], fn: ForwardFn) -> dict[str, float]:
        """Return the scalars of `fn` for each microbatch, without gradients, summed over microbatches and replicas."""
        self.eval()
        with torch.no_grad():
            collected: list[Stats] = self._run(
                microbatches, lambda model, batch, output: fn(model, output, batch), forward_only=True
            )
        return self._summed(collected)

    def train(self, mode: bool = True) -> None:
        """Set all chunks to training mode, or to evaluation mode if `mode` is False."""
        for chunk in self._chunks:
            if chunk.training != mode:  # chunk.train visits all modules, so skip it where nothing changes
                chunk.train(mode)

    def eval(self) -> None:
        """Set all chunks to evaluation mode, which switches dropout off."""
        self.train(False)

    # --- other weights in the same memory ---------------------------------------------------------------------------

    @torch.no_grad()
    def trainable_copy(self, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return a copy of the trainable parameters in host memory; frozen ones never change and need none.

        Args:
            into: an earlier copy whose memory is reused.
        """
        trainable = {name: parameter for name, parameter in self.parameters() if parameter.requires_grad}
        if into is None:
            into = {name: self._host_memory(parameter) for name, parameter in trainable.items()}
        for name, parameter in trainable.items():
            into[name].copy_(parameter, non_blocking=self.pins)
        self._finish_copies()
        return into

    def _host_memory(self, like: Tensor) -> Tensor:
        pin = self.pins and self.grid.device.type == "cuda"
        return torch.empty_like(like, device="cpu", requires_grad=False, pin_memory=pin)

    def _finish_copies(self) -> None:
        if self.grid.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @contextmanager
    def with_weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Run with other values of the trainable parameters (a reference's), copied in place and back afterwards:
        parameters are views of Megatron's buffers and must not be replaced."""
        present = self.trainable_copy(self.aside)
        if self.pins:  # page-locking takes as long as the copy, so the memory is kept for reuse
            self.aside = present
        self._copy_in(weights)
        try:
            yield
        finally:
            self._copy_in(present)

    @torch.no_grad()
    def _copy_in(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name], non_blocking=self.pins)
        self._finish_copies()

    @torch.no_grad()
    def start_from(self, other: "Engine") -> None:
        """Copy another engine's weights where both have the parameter, and update the optimizer's master weights."""
        theirs = dict(other.parameters())
        self.loads += 1
        for name, parameter in self.parameters():
            if name in theirs:
                parameter.copy_(theirs[name])
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    # --- state ----------------------------------------------------------------------------------------------------

    def refuse_not_finite(self) -> None:
        """Raise on all ranks if a weight on any of them contains NaN or infinity."""
        mine = next((name for name, parameter in self.parameters() if not is_finite(parameter.data)), None)
        found = next((name for name in self.grid.gather(mine) if name is not None), None)
        if found is not None:
            raise NumericsError(
                f"{self.name}.{found} holds NaN or infinity: lower {self.lr_key}, and resume an earlier checkpoint "
                "if there is one",
                key=f"{self.name}.{found}",
            )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (global name, parameter) of this rank."""
        for model in self.models:
            yield from _global_names(model)

    def digests(self, wanted: Callable[[str], bool] | None = None) -> dict[str, int]:
        """Return the checksum of each whole parameter by global name, on every rank: the same in every layout.

        Args:
            wanted: selects parameters by global name; None: all.
        """
        return {name: copies[0] for name, copies in self.digests_of_copies(wanted).items()}

    def digests_of_copies(self, wanted: Callable[[str], bool] | None = None) -> dict[str, list[int]]:
        """Return the checksums of all copies of each parameter that the ranks hold; see `digests`."""
        self.memory.need(WEIGHTS)
        named = ((name, parameter) for name, parameter in self.parameters() if wanted is None or wanted(name))
        return digests_of_copies(named, self.grid)

    def sharded_weights(self) -> dict[str, Any]:
        """Return Megatron's description of this rank's weight shards alone, under this engine's name."""
        state = {"weights": self._sharded_weights(self._sharding())}
        add_prefix_for_sharding(state, f"{self.name}.")
        return state

    def _sharding(self) -> dict[str, Any]:
        return {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "non_homogeneous_layers": True,  # a name per layer, as only trainable layers have optimizer state
            "dp_cp_group": self.grid.groups.dp_cp,
        }

    def _sharded_weights(self, metadata: dict[str, Any]) -> dict[str, Any]:
        return {f"model{index}": model.sharded_state_dict(metadata=metadata) for index, model in enumerate(self.models)}

    def sharded_state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """Return Megatron's description of this rank's shards of weights, optimizer and schedule, under this name."""
        metadata = self._sharding()
        weights = self._sharded_weights(metadata)
        state: dict[str, Any] = {"weights": weights}
        if self.optimizer is not None and self.schedule is not None:
            if trains_here(self.optimizer):
                state["optimizer"] = self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata)
            state["schedule"] = self.schedule.state_dict()
        add_prefix_for_sharding(state, f"{self.name}.")
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that was read into the structure of `sharded_state_dict(loading=True)`."""
        self.loads += 1
        for index, model in enumerate(self.models):
            _load_weights(model, state["weights"][f"model{index}"])
        if self.optimizer is not None and self.schedule is not None:
            load_optimizer(self.optimizer, state.get("optimizer"), self.grid, self.name)
            restore_schedule(self.schedule, state["schedule"], self.name)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _run(self, microbatches: Sequence[Microbatch], finish: Finish, *, forward_only: bool) -> list[Any]:
        """Run Megatron's schedule over the microbatches; the last stage returns each `finish(model, batch, output)`."""
        on_device = [batch.to(self.grid.device) for batch in microbatches]
        if not self.follows_routes:
            on_device = [batch.without_routes() for batch in on_device]
        batch_size, time = len(on_device[0].tokens), on_device[0].time

        def step(batches: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
            batch = next(batches)
            model = chunk.module if isinstance(chunk, DistributedDataParallel) else chunk

            def finished(output: Tensor, non_loss_data: bool = False) -> Any:
                return finish(model, batch, output)

            return chunk(batch), finished

        run = get_forward_backward_func(
            pp_size=self.grid.layout.pp, vp_size=self.grid.layout.vpp if self.grid.layout.vpp > 1 else None
        )
        chunks = self.chunks
        iterators = [iter(on_device) for _ in chunks]
        results: list[Any] = run(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(on_device),
            seq_length=time,
            micro_batch_size=batch_size,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        return results

    def _summed(self, collected: list[Stats]) -> dict[str, float]:
        """Return the stats summed over microbatches and data-parallel ranks, on every rank."""
        sums: dict[str, float] = {}
        if collected:  # the last stage
            names = sorted(collected[0])
            values = torch.stack([torch.stack([stats[name].double() for stats in collected]).sum() for name in names])
            sums = dict(zip(names, self.grid.sum_over_data(values).tolist(), strict=True))
        received = self.grid.object_from_last_stage(sums)
        assert isinstance(received, dict)
        return received

    def _from_last_stage(self, results: list[Outputs], count: int) -> list[Outputs]:
        """Broadcast tensors that only the last stage has to the other stages of the replica."""
        described = self.grid.object_from_last_stage(
            [{key: (tuple(value.shape), value.dtype) for key, value in result.items()} for result in results]
        )
        assert isinstance(described, list)
        assert len(described) == count
        received = []
        for index, shapes in enumerate(described):
            tensors = {}
            for key, (shape, dtype) in shapes.items():
                mine = (
                    results[index][key].contiguous()
                    if results
                    else torch.empty(shape, dtype=dtype, device=self.grid.device)
                )
                tensors[key] = self.grid.broadcast_from_last_stage(mine)
            received.append(tensors)
        return received


def _build_chunks(grid: Grid, build: BuildModel) -> list[Any]:
    """Build this rank's chunks: one, or one per virtual stage."""
    layout = grid.layout
    if layout.vpp == 1:
        return [build(pre_process=grid.is_first_stage, post_process=grid.is_last_stage, vp_stage=None)]
    return [
        build(
            pre_process=grid.is_first_stage and stage == 0,
            post_process=grid.is_last_stage and stage == layout.vpp - 1,
            vp_stage=stage,
        )
        for stage in range(layout.vpp)
    ]


def _load_weights(model: Any, state: dict[str, Any]) -> None:
    """Load a chunk's weights. Extra state of Transformer Engine's layers is empty without FP8 and not saved in
    checkpoints, so each layer keeps its present one."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = model.not_stored()
    wrong = [name for name in (*missing, *unexpected) if name not in absent and not name.endswith("_extra_state")]
    if wrong:
        raise CheckpointError(
            f"the checkpoint and the model do not have the same tensors: {', '.join(wrong[:3])}", key=wrong[0]
        )


def _global_names(model: Any) -> list[tuple[str, nn.Parameter]]:
    named: list[tuple[str, nn.Parameter]] = model.global_names()
    return named


__all__ = ["BuildModel", "CountFn", "Engine", "ForwardFn", "LossFn", "OptimSpec", "Outputs", "Stats"]
