"""A plan as plain values: the answer of `megarl plan --json`, and what a run writes about itself into plan.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megarl.config.cluster import ClusterConfig, PlanConfig
from megarl.config.sections.model import ExpertsConfig
from megarl.models.adapter_spec import AdapterSpec
from megarl.models.exchange.pretrained import Sources
from megarl.models.flops import expert_layers
from megarl.modules.base import Module
from megarl.planning.hardware import KINDS, Cluster, kind_of
from megarl.planning.memory import PARTS, RankPlan, plan_ranks
from megarl.planning.plan import Plan, Remedy, make_plan
from megarl.planning.times import Rates
from megarl.planning.work import Work, work_of


def as_json(plan: Plan, helps: Sequence[Remedy], layouts: Sequence[Plan] | None) -> dict[str, Any]:
    """Return the content of all tables, in bytes and seconds."""
    work, cluster = plan.work, plan.cluster
    return {
        "algorithm": work.algorithm,
        "layout": str(work.layout),
        "roles": {role.name: role.about for role in work.roles},
        "notes": dict(work.notes),
        "adapter": None if work.adapter is None else _adapter(work.adapter),
        "encoder": None if work.model.encoder is None else _encoder(work),
        "parameters": dict(zip(("total", "active"), plan.parameters, strict=True)),
        "experts": None if work.model.experts is None else _experts(work, work.model.experts),
        "cluster": {"gpu": cluster.gpu.name, "gpus": cluster.gpus, "gpus_per_node": cluster.per_node},
        "fits": plan.fits,
        "peak": {"stage": plan.fullest.stage, "phase": plan.fullest.peak, "bytes": round(plan.peak_bytes)},
        "usable_bytes": cluster.usable,
        "host_bytes_per_node": round(plan.host_bytes),
        "host_usable_bytes_per_node": cluster.host,
        "ranks": [rank_as_json(rank) for rank in plan.ranks],
        "phases": {
            phase.name: {
                "seconds": phase.seconds,
                "tokens_per_second": phase.tokens_per_second,
                "bytes_sent_per_gpu": {link: round(sent) for link, sent in phase.sent.items()},
                "mostly": phase.bound,
            }
            for phase in plan.phases
        },
        "seconds": plan.seconds,
        "mfu": plan.mfu,
        "assumed_share_of_peak": plan.rates.products,
        "microbatch": {
            "per_optimizer_step": work.accumulation,
            "forward_seconds": plan.passes[0],
            "backward_seconds": plan.passes[1],
        },
        "remedies": [{"change": it.change, "bytes": round(it.peak_bytes), "fits": it.fits} for it in helps],
        **({} if layouts is None else {"layouts": [_layout(other) for other in layouts]}),
    }


def rank_as_json(rank: RankPlan, *, host: bool = True) -> dict[str, Any]:
    """Return the sizes of a pipeline stage's ranks: models, and bytes by phase, role and part. Without `host`, host
    memory is left out: without a GPU it is no other memory."""
    parts = (*PARTS, "host") if host else PARTS
    return {
        "stage": rank.stage,
        "parameters": {name: shard.parameters for name, shard in rank.shards.items()},
        "trained": {name: shard.trainable for name, shard in rank.shards.items()},
        "phases": {
            phase: {
                "bytes": round(rank.total(phase)),
                **({"host_bytes": round(rank.host(phase))} if host else {}),
                "roles": {use.role: {part: round(getattr(use, part)) for part in parts} for use in uses},
            }
            for phase, uses in rank.uses.items()
        },
    }


def prediction(
    module: type[Module],
    algorithm: str,
    config: Any,
    world: int,
    vocab_size: int,
    sources: Sources | None = None,
    gpu: str | None = None,
) -> dict[str, Any]:
    """Return what the plan predicts for a run as it is configured, on the machine that it runs on.

    Args:
        module: class of the run's module.
        algorithm: name of the algorithm.
        config: configuration tree of the run.
        world: number of processes.
        vocab_size: size of the vocabulary.
        sources: the stored models that were opened for the run.
        gpu: name of the GPU of this process; None: it computes on a CPU.
    """
    kind = None if gpu is None else kind_of(gpu)
    nodes = max(1, int(config.trainer.num_nodes))
    cluster = ClusterConfig(gpus=world, gpus_per_node=max(1, world // nodes))
    assumed = PlanConfig(algorithm=algorithm, cluster=cluster if kind is None else replace(cluster, gpu=kind))
    work = work_of(module, config, assumed, world, vocab_size, sources)
    machine = Cluster.of(assumed.cluster, world)
    rates = Rates(machine.gpu.products, assumed.host_us_per_layer * 1e-6)
    plan = make_plan(work, machine, rates, exact=False)
    # What a run counts as a unit's tokens: each response once, and without forward passes over all, what trains.
    sequences = work.rollouts if work.rescored else work.steps * work.global_batch
    length = work.prompt + work.response if work.rollouts else work.length
    return {
        "algorithm": algorithm,
        "layout": str(work.layout),
        "unit": "phase" if work.rollouts else "step",
        "device": "cpu" if gpu is None else "gpu",
        "seconds_for": None if kind is None else machine.gpu.name,
        "known_gpus": [one.name for one in KINDS.values()],
        "assumed": {
            "sequences": sequences,
            "tokens_per_sequence": length,
            **({"prompt_tokens": work.prompt, "response_tokens": work.response} if work.rollouts else {}),
            "optimizer_steps": work.steps,
        },
        "tokens": sequences * length,
        "roles": {role.name: role.about for role in work.roles},
        "notes": dict(work.notes),
        "ranks": [
            {
                **rank_as_json(rank, host=gpu is not None),
                "ranks": _ranks_of(work.layout.world_size, work.layout.pp, rank.stage),
            }
            for rank in plan_ranks(work, on_cpu=gpu is None, every_stage=True, exact=False)
        ],
        "phases": {
            phase.name: {"seconds": None if kind is None else phase.seconds, "tokens": phase.tokens}
            for phase in plan.phases
        },
    }


def overrides(plan: Plan) -> str:
    """Return the keys of a plan's layout as command-line overrides."""
    work = plan.work
    words = [
        f"parallel.tp={work.layout.tp}",
        f"parallel.pp={work.layout.pp}",
        *([f"parallel.cp={work.layout.cp}"] if work.model.encoder is None else []),
        *([f"parallel.ep={work.layout.ep}"] if work.model.experts is not None else []),
        f"parallel.sequence_parallel={str(work.layout.sequence_parallel).lower()}",
        f"parallel.recompute={work.parallel.recompute}",
        f"trainer.micro_batch_size={work.micro}",
    ]
    return " ".join(words)


def _ranks_of(world: int, stages: int, stage: int) -> list[int]:
    """Return the first and the last rank of a stage: stages vary slowest."""
    return [stage * world // stages, (stage + 1) * world // stages - 1]


def _adapter(adapter: AdapterSpec) -> dict[str, Any]:
    return {
        "kind": adapter.kind,
        "rank": adapter.rank,
        "base_bits": adapter.base_bits,
        "linears": list(adapter.parts),
        "first_layer": adapter.first_layer,
    }


def _encoder(work: Work) -> dict[str, int]:
    """Return the layers of an encoder-decoder and the positions of a training sequence in both parts."""
    encoder, decoder = work.read
    layers = {"layers": work.model.encoder_layers, "decoder_layers": work.model.num_layers}
    return {**layers, "positions": encoder, "decoder_positions": decoder}


def _experts(work: Work, experts: ExpertsConfig) -> dict[str, int]:
    """Return the experts of a layer and how many of them compute a token, the layers that have experts, and the experts
    of a layer that a rank holds."""
    count = int(experts.count or 0)
    layers = expert_layers(work.model)
    return {"count": count, "chosen": experts.chosen, "layers": layers, "on_a_rank": count // work.layout.ep}


def _layout(plan: Plan) -> dict[str, Any]:
    return {
        "overrides": overrides(plan),
        "seconds": plan.seconds,
        "mfu": plan.mfu,
        "bytes": round(plan.peak_bytes),
        "phase": plan.fullest.peak,
    }
