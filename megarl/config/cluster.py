"""The keys of `python -m megarl.plan`; all others that it is given are those of the run that it plans."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.algorithms import ALGORITHMS
from megarl.config.leaf import leaf, section

GPUS = ("a100", "h100", "h200")


@dataclass
class ClusterConfig:
    """The machines that a run is planned for."""

    gpus: int | None = leaf(
        None, "GPUs of the whole run (null: trainer.devices * trainer.num_nodes)", at_least=1, at_most=2**20
    )
    gpu: str = leaf("h100", "kind of GPU: A100 of 80 GB, H100 of 80 GB or H200 of 141 GB, all SXM", GPUS)
    gpus_per_node: int = leaf(
        8, "GPUs that share a machine, its fast links and its host memory", at_least=1, at_most=1024
    )
    memory_gib: float | None = leaf(None, "memory of a GPU in GiB (null: what its kind has)", above=0)
    host_memory_gib: float = leaf(1800.0, "memory of a machine in GiB", above=0)
    reserve_gib: float = leaf(3.0, "of a GPU's memory, what CUDA and NCCL take for themselves", at_least=0)
    fragmentation: float = leaf(0.05, "share that the allocator holds beyond what is in use", at_least=0, below=1)


@dataclass
class PlanConfig:
    """What `python -m megarl.plan` can be told besides the keys of the run."""

    algorithm: str = leaf("ppo", "the run that is planned: python -m megarl.train_ALGORITHM", tuple(ALGORITHMS))
    suggest: bool = leaf(False, "list layouts that fit, fastest first")
    json: bool = leaf(False, "print the plan as JSON (also: --json)")
    debug: bool = leaf(False, "show tracebacks")
    prompt_tokens: int | None = leaf(
        None,
        "tokens of a prompt (null: as many as a response, where the context has room)",
        at_least=1,
        at_most=2**31 - 1,
    )
    response_tokens: int | None = leaf(
        None, "mean tokens of a response (null: rollout.max_new_tokens)", at_least=1, at_most=2**31 - 1
    )
    mfu: float | None = leaf(
        None, "share of peak FLOP/s that matrix products reach (null: what the kind of GPU does)", above=0, at_most=1
    )
    host_us_per_layer: float = leaf(
        100.0, "microseconds in which Python and CUDA launch one layer of a decode pass", at_least=0
    )
    cluster: ClusterConfig = section(ClusterConfig)
