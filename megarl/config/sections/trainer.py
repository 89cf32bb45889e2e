"""What a run is computed on, how long it lasts, and how often it is looked at."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.forms import device_count, wall_clock_time
from megarl.config.leaf import Section, leaf


@dataclass
class DevicesConfig(Section):
    """What a program that builds a model runs on."""

    devices: int | str = leaf(
        1,
        "Number of processes per machine when megarl starts them itself; under torchrun or SLURM the launcher decides. "
        "auto: one for each visible GPU, or one on a CPU.",
        form=device_count,
    )
    num_nodes: int = leaf(1, "Number of machines.", at_least=1, at_most=2**20)
    accelerator: str = leaf(
        "auto", "Kind of device. auto: GPUs if there are any, otherwise the CPU.", ("auto", "cpu", "gpu")
    )
    precision: str = leaf("fp32", "Precision of the model's weights and activations.", ("fp32", "bf16"))
    progress: str = leaf(
        "auto",
        "Progress display. auto: rich in a terminal, plain lines elsewhere.",
        ("auto", "rich", "plain", "none"),
    )


@dataclass
class LoopConfig(DevicesConfig):
    """What every training loop has, whatever one of its steps does."""

    global_batch_size: int = leaf(16, "Sequences per optimizer step, over all processes.", at_least=1, at_most=2**24)
    micro_batch_size: int = leaf(
        8, "Sequences per forward pass of one replica of the model.", at_least=1, at_most=2**24
    )
    max_time: str | None = leaf(
        None,
        'Wall-clock time, "HH:MM:SS", after which the run writes a checkpoint and ends (null: no limit).',
        form=wall_clock_time,
    )
    peak_tflops: float | None = leaf(
        None,
        "Peak TFLOP/s of one device, from which the model FLOPs utilisation is computed and logged (null: not logged).",
        above=0,
    )
    exp_manager: str = leaf(
        "none",
        "Whether NeMo's exp_manager prepares the Trainer too; choose it as a group, trainer/exp_manager=nemo.",
        ("none", "nemo"),
    )
    exp_manager_options: dict[str, Any] = leaf(
        {},
        "Keys of NeMo's exp_manager. Those of checkpoints, resuming and stopping are refused, as megarl does these.",
    )


@dataclass
class TrainerConfig(LoopConfig):
    """How long a run lasts, how large its batches are, on which devices, and how often it evaluates and logs."""

    max_steps: int = leaf(200, "Number of training steps, each one step of the optimizer.", at_least=1)
    eval_every: int | None = leaf(50, "Training steps between evaluations (null: no evaluation).", at_least=1)
    eval_batch_size: int = leaf(
        16, "Sequences per forward pass of one replica in evaluations.", at_least=1, at_most=2**24
    )
    log_every: int = leaf(10, "Training steps between logged metrics.", at_least=1)


@dataclass
class PhaseTrainerConfig(LoopConfig):
    """The same for a run whose steps are phases: each generates responses, then trains on them."""

    max_phases: int = leaf(100, "Number of phases.", at_least=1)
    global_batch_size: int = leaf(64, "Sequences per optimizer step, over all processes.", at_least=1, at_most=2**24)
    eval_every: int | None = leaf(5, "Phases between evaluations (null: no evaluation).", at_least=1)
    log_every: int = leaf(1, "Phases between logged metrics.", at_least=1)
