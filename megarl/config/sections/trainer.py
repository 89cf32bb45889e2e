"""Devices, batch sizes, length of a run, and how often it evaluates and logs."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import device_count, wall_clock_time
from megarl.config.leaf import Section, leaf


@dataclass
class ProcessesConfig(Section):
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


@dataclass
class DevicesConfig(ProcessesConfig):
    """What a program that builds a model runs on, and how it displays its progress."""

    progress: str = leaf(
        "auto",
        "Progress display. rich: a panel that is updated in its place. plain: a line every trainer.log_every steps. "
        "auto: rich in a terminal and in a notebook, plain elsewhere.",
        ("auto", "rich", "plain", "none"),
    )


@dataclass
class ScoringProcessesConfig(ProcessesConfig):
    """What a program that also scores responses runs on."""

    micro_batch_size: int = leaf(
        8,
        "Responses per forward pass of one replica of a reward model (reward.model).",
        at_least=1,
        at_most=2**24,
    )


@dataclass
class LoopConfig(DevicesConfig):
    """What every training loop has, whatever one of its steps does."""

    global_batch_size: int = leaf(
        16,
        "Sequences per optimizer step, over all processes. A multiple of trainer.micro_batch_size * data-parallel "
        "size.",
        at_least=1,
        at_most=2**24,
    )
    micro_batch_size: int = leaf(
        8,
        "Sequences per forward pass of one replica of the model. Where short sequences are packed, it counts packed "
        "ones.",
        at_least=1,
        at_most=2**24,
    )
    max_time: str | None = leaf(
        None,
        'Wall-clock time, "HH:MM:SS", after which the run writes a checkpoint and ends (null: no limit). It is '
        "checked after each training step; a resume has the whole time again.",
        form=wall_clock_time,
    )


@dataclass
class TrainerConfig(LoopConfig):
    """Length of a run in optimizer steps, batches, devices, evaluations and logging."""

    max_steps: int = leaf(200, "Number of training steps, each one step of the optimizer.", at_least=1)
    eval_every: int | None = leaf(
        50,
        "Training steps between evaluations (null: no evaluation). Runs that generate also evaluate before the first "
        "step.",
        at_least=1,
    )
    eval_batch_size: int = leaf(
        16,
        "Sequences per forward pass of one replica in evaluations that compute a loss. Evaluations that generate use "
        "rollout.engine.slots.",
        at_least=1,
        at_most=2**24,
    )
    log_every: int = leaf(10, "Training steps between logged metrics.", at_least=1)


@dataclass
class PhaseTrainerConfig(LoopConfig):
    """Length of a run whose steps are phases, which generate responses and then train on them; batches and devices."""

    max_phases: int = leaf(100, "Number of phases.", at_least=1)
    global_batch_size: int = leaf(
        64,
        "Sequences per optimizer step, over all processes. A multiple of trainer.micro_batch_size * data-parallel "
        "size.",
        at_least=1,
        at_most=2**24,
    )
    eval_every: int | None = leaf(
        5, "Phases between evaluations, and before the first phase (null: no evaluation).", at_least=1
    )
    log_every: int = leaf(1, "Phases between logged metrics.", at_least=1)
