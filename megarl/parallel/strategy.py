"""Lightning's strategy for Megatron: the world, the grid, and sharded checkpoints. It uses public hooks only."""

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import psutil
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from megarl.config.sections.parallel import ParallelConfig
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.parallel import cpu
from megarl.parallel.all_optimizers import save_bytes, warn_of_save_memory
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.meeting import Seat, interruptible, join

log = get_logger(__name__)


class MegatronStrategy(DDPStrategy):
    """Run a Lightning module whose models are `Engine`s.

    `checkpoint_io` is called on every rank. Its `load_checkpoint` returns Lightning's section of a checkpoint, in
    which `state_dict` is a function from a template to this rank's shards.
    """

    def __init__(
        self, parallel: ParallelConfig, *, seed: int, checkpoint_io: CheckpointIO, stays: bool = False
    ) -> None:
        """
        Args:
            parallel: the section `parallel`.
            seed: seed of dropout and of random weights.
            checkpoint_io: writes and reads checkpoints.
            stays: whether models and process groups outlive `fit`, until `release`.
        """
        super().__init__(checkpoint_io=checkpoint_io, timeout=timedelta(seconds=parallel.timeout_s))
        self.parallel, self.seed, self.stays = parallel, seed, stays
        self.grid: Grid | None = None

    @property
    def launcher(self) -> Any:
        """What starts the other processes of this machine. Where code is typed in (a notebook, Python's prompt), there
        is no script to start, and Lightning refuses whatever might start one: a run there is one process."""
        if not hasattr(sys, "ps1"):
            return super().launcher
        if self.num_processes > 1:
            raise ConfigError(
                f"trainer.devices={self.num_processes} starts this script once more for each further process, and a "
                f"notebook is none: pass processes={self.num_processes} instead",
                key="trainer.devices",
                value=self.num_processes,
                offers={"processes": [self.num_processes]},
            )
        return None

    def setup_environment(self) -> None:
        """Install the CPU adapter if it is needed, join the world and create the grid."""
        if cpu.needed():
            cpu.install()
        with interruptible():
            super().setup_environment()
        layout = Layout.of(self.parallel, self.world_size)
        self.grid = Grid(layout, self.root_device, seed=self.seed, timeout_s=self.parallel.timeout_s)
        self.checkpoint_io.grid = self.grid  # type: ignore[attr-defined]

    def setup_distributed(self) -> None:
        """Create the process group before Lightning does: Lightning's would listen on every interface of a machine."""
        self.set_world_ranks()
        environment = self.cluster_environment
        assert environment is not None
        seat = Seat.launched()
        if seat is None:  # a process that Lightning started for `trainer.devices`
            one_machine = self.num_nodes == 1
            address, port = environment.main_address, environment.main_port
            seat = Seat(environment.global_rank(), self.world_size, address, port, one_machine)
        cuda = self.root_device.type == "cuda"
        join("nccl" if cuda else "gloo", seat, self.parallel.timeout_s, self.root_device if cuda else None)
        super().setup_distributed()

    def setup(self, trainer: Any) -> None:
        """Reject Trainer options that have no effect here, and warn if a save needs more memory than is free."""
        for value, default, theirs, ours in (
            (trainer.gradient_clip_val, None, "gradient_clip_val", "optim.clip_grad"),
            (trainer.accumulate_grad_batches, 1, "accumulate_grad_batches", "trainer.global_batch_size"),
            (trainer.precision, "32-true", "precision", "trainer.precision"),
        ):
            if value != default:
                raise ConfigError(
                    f"Lightning's Trainer({theirs}={value!r}) has no effect on Megatron: set {ours} instead",
                    key=theirs,
                    value=value,
                )
        super().setup(trainer)
        free = psutil.virtual_memory().available
        warn_of_save_memory(save_bytes(list(self.engines.values())), self.num_processes, free)

    def configure_ddp(self) -> None:
        """Do not wrap the module in torch's DDP: Megatron's buffers inside each engine reduce gradients."""

    @property
    def engines(self) -> dict[str, Engine]:
        """All engines of the module, by name."""
        engines: dict[str, Engine] = self.lightning_module.engines  # type: ignore[union-attr,assignment]
        return engines

    @property
    def saved_engines(self) -> dict[str, Engine]:
        """The engines that checkpoints contain; frozen engines are rebuilt from their source instead."""
        return {name: engine for name, engine in self.engines.items() if engine.saved}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Distribute data over replicas, not over ranks."""
        assert self.grid is not None
        return {"num_replicas": self.grid.layout.dp, "rank": self.grid.dp_rank}

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce metrics over replicas: the ranks of one replica have the same value."""
        if not isinstance(tensor, Tensor) or self.grid is None:
            return tensor
        return super().reduce(tensor, group or self.grid.groups.dp, reduce_op)

    # --- checkpoints: saved and loaded by all ranks together --------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Restore after setup, because shards are loaded into engines that exist only then."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Describe the shards of all saved engines, by engine name."""
        return {name: engine.sharded_state_dict() for name, engine in self.saved_engines.items()}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the layout and every rank's random states, and save. Call on all ranks."""
        assert self.grid is not None
        checkpoint["layout"] = str(self.grid.layout)
        checkpoint["random_states"] = self.grid.gather(self.grid.random_state())
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Free cached GPU memory and read a checkpoint. Call on all ranks."""
        torch.cuda.empty_cache()
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the shards of all saved engines; dropout states are restored only in the same layout."""
        assert self.grid is not None
        engines = self.saved_engines
        template = {name: engine.sharded_state_dict(loading=True) for name, engine in engines.items()}
        state = checkpoint["state_dict"](template)
        for name, engine in engines.items():
            engine.load_state_dict(state[name])
        if checkpoint["layout"] == str(self.grid.layout):
            self.grid.set_random_state(checkpoint["random_states"][self.grid.rank])
        else:  # another layout samples other dropout masks, so its states cannot be restored
            log.info("layout %s resumes as %s: dropout is reseeded", checkpoint["layout"], self.grid.layout)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, on the first rank only."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(filepath)

    def teardown(self) -> None:
        """Close the grid after Lightning's own teardown, unless it stays."""
        if not self.stays:
            self.release()

    def release(self) -> None:
        """Tear down what Lightning set up, and close the grid."""
        if self.lightning_module is not None:
            super().teardown()
        if self.grid is not None:
            self.grid.close()
            self.grid = None
