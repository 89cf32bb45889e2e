"""How one model is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import A_YEAR_S, Section, leaf


@dataclass
class ParallelConfig(Section):
    """The grid of processes that one model is spread over; the other processes hold further replicas."""

    tp: int = leaf(
        1,
        "Tensor-parallel size: number of processes that each layer is split over.",
        at_least=1,
        at_most=2**20,
    )
    pp: int = leaf(
        1,
        "Pipeline-parallel size: number of stages that the layers are split over.",
        at_least=1,
        at_most=2**20,
    )
    cp: int = leaf(
        1,
        "Context-parallel size: number of processes that each sequence is split over while models train and score, for "
        "sequences whose activations do not fit one. While responses are generated, each process generates its own. "
        "Not for encoder-decoders.",
        at_least=1,
        at_most=2**20,
    )
    ep: int = leaf(
        1,
        "Expert-parallel size: number of replicas that share the experts of each layer, so that each process holds "
        "1/parallel.ep of them. Must divide model.experts.count, and the number of replicas, in which each of the "
        "parallel.cp processes of a sequence counts.",
        at_least=1,
        at_most=2**20,
    )
    vpp: int | None = leaf(
        None,
        "Model chunks per pipeline stage, for the interleaved 1F1B schedule (null: 1F1B). Requires parallel.pp of 2 "
        "or more, parallel.pp * parallel.vpp that divides model.num_layers, and a multiple of parallel.pp "
        "microbatches per replica. Excludes rollout.engine.layout.",
        at_least=1,
        at_most=2**20,
    )
    sequence_parallel: bool = leaf(
        False,
        "Split the activations between tensor-parallel layers along the sequence, which saves memory. Where "
        "data.seq_length exists, it must be a multiple of parallel.tp. No effect with parallel.tp=1.",
    )
    recompute: str = leaf(
        "none",
        "Activations that are recomputed in the backward pass to save memory: none, those of the attention's core, or "
        "those of whole layers.",
        ("none", "selective", "full"),
    )
    timeout_s: int = leaf(
        600,
        "Seconds that a process waits for the others in a collective operation before the run fails. With several "
        "processes and a reward function it must exceed (reward.calls.retries + 1) * (reward.calls.timeout + 120).",
        at_least=1,
        at_most=A_YEAR_S,
    )
    kernels: str = leaf(
        "auto",
        "Implementation of linear layers and norms: PyTorch and Megatron (torch), Transformer Engine (te) or Apex "
        "(apex, LayerNorm only). auto: the first of te, apex and torch that can be imported; torch on a CPU. "
        "Attention is always PyTorch's.",
        ("auto", "torch", "te", "apex"),
    )
    offload: bool = leaf(
        False,
        "Move the optimizer's state, the gradients and idle models to host memory while responses are generated, also"
        " in evaluations, and back when they are needed. No effect in runs that do not generate.",
    )
