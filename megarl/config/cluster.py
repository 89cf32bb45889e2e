"""The keys of `python -m megarl.plan`. All other keys on its command line are those of the run that it plans."""

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
        None, "Number of GPUs of the whole run (null: trainer.devices * trainer.num_nodes).", at_least=1, at_most=2**20
    )
    gpu: str = leaf("h100", "Kind of GPU: A100 with 80 GB, H100 with 80 GB or H200 with 141 GB, all SXM.", GPUS)
    gpus_per_node: int = leaf(
        8, "Number of GPUs per machine, which share its fast links and its host memory.", at_least=1, at_most=1024
    )
    memory_gib: float | None = leaf(None, "Memory of one GPU in GiB (null: the memory of its kind).", above=0)
    host_memory_gib: float = leaf(1800.0, "Host memory of one machine in GiB.", above=0)
    reserve_gib: float = leaf(3.0, "Memory of each GPU in GiB that CUDA and NCCL use themselves.", at_least=0)
    fragmentation: float = leaf(
        0.05, "Fraction of the remaining GPU memory that the allocator loses to fragmentation.", at_least=0, below=1
    )


@dataclass
class PlanConfig:
    """The keys of `python -m megarl.plan` besides those of the run."""

    algorithm: str = leaf(
        "ppo",
        "Algorithm of the run that is planned, as in python -m megarl.train_ALGORITHM or megarl train ALGORITHM.",
        tuple(ALGORITHMS),
        or_named="package.module:NAME",
    )
    suggest: bool = leaf(False, "List the layouts of the same GPUs that fit, fastest first.")
    json: bool = leaf(False, "Print the plan as JSON; --json does the same.")
    html: str | None = leaf(
        None,
        "Also draw the plan (memory by phase, the pipeline's schedule) into this file, one page that needs no network. "
        "An earlier page of megarl plan is replaced, no other file.",
    )
    debug: bool = leaf(False, "Show tracebacks of errors.")
    prompt_tokens: int | None = leaf(
        None,
        "Number of tokens per prompt (null: rollout.max_new_tokens, or the rest of the context if that is less). For an"
        " encoder-decoder that learns from given sequences, how many tokens of each the encoder reads (null: half).",
        at_least=1,
        at_most=2**31 - 1,
    )
    response_tokens: int | None = leaf(
        None,
        "Mean number of tokens per response, at most rollout.max_new_tokens (null: rollout.max_new_tokens).",
        at_least=1,
        at_most=2**31 - 1,
    )
    mfu: float | None = leaf(
        None,
        "Fraction of peak FLOP/s that matrix products reach (null: the value in docs/planning.md for the kind of GPU).",
        above=0,
        at_most=1,
    )
    host_us_per_layer: float = leaf(
        100.0,
        "Microseconds that Python and CUDA take to launch one layer of a decoding pass. The plan does not account for"
        " rollout.engine.cuda_graphs: set a smaller value with it.",
        at_least=0,
    )
    cluster: ClusterConfig = section(ClusterConfig)
