"""A run's plan: bytes of every kind of rank in every phase, whether they fit, possible remedies, and seconds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megarl.config.offers import divisors
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.shape import possible_stages, shape_problem
from megarl.models.exchange.parameters import parameters
from megarl.models.flops import (
    cross_weights,
    expert_layers,
    expert_weights,
    idle_weights,
    layer_weights,
    layers_with_gradients,
    weights_of_layers,
)
from megarl.parallel.context import slices_of
from megarl.parallel.layout import Layout
from megarl.planning.hardware import GIB, Cluster
from megarl.planning.memory import RankPlan, plan_ranks
from megarl.planning.times import Clock, Phase, Rates
from megarl.planning.work import Work
from megarl.progress import waiting

MOST_STAGES = 16
MICRO_BATCHES = (1, 2, 4, 8)
SHORTEST_SLICE = 512
"""Fewest positions of a slice in suggested layouts with `parallel.cp`."""
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """The estimated memory and time of a run on a cluster. `passes` are the seconds of a microbatch's forward and
    backward pass through one stage."""

    work: Work
    cluster: Cluster
    rates: Rates
    ranks: list[RankPlan]
    phases: list[Phase]
    passes: tuple[float, float]

    @property
    def fullest(self) -> RankPlan:
        """The rank with the highest peak memory."""
        return max(self.ranks, key=lambda rank: rank.total(rank.peak))

    @property
    def peak_bytes(self) -> float:
        """Device memory of the fullest rank in its worst phase, in bytes."""
        return self.fullest.total(self.fullest.peak)

    @property
    def host_bytes(self) -> float:
        """Host memory of the fullest machine in its worst phase, in bytes."""
        worst = max(rank.host(phase) for rank in self.ranks for phase in rank.uses)
        return worst * self.cluster.per_node

    @property
    def fits(self) -> bool:
        """Whether device and host memory suffice."""
        return self.peak_bytes <= self.cluster.usable and self.host_bytes <= self.cluster.host

    @property
    def seconds(self) -> float:
        """Seconds of a unit of work, without checkpoints, which are not written in every unit."""
        return sum(phase.seconds for phase in self.phases if phase.name != "save")

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the policy's whole model, and how many of them are active: all but the experts that a token is
        not sent to. Padding of the vocabulary and heads are not counted."""
        work = self.work
        total = sum(math.prod(shape) for shape in parameters(work.model, work.vocab_size).values())
        return total, total - idle_weights(work.model)

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation of training alone."""
        train = next(phase for phase in self.phases if phase.name == "train")
        return train.flops / (train.seconds * self.cluster.gpus * self.cluster.gpu.flops)


def make_plan(work: Work, cluster: Cluster, rates: Rates, *, exact: bool = True) -> Plan:
    """Estimate memory and time of a run on a cluster. Not `exact`: quickly, where a rank has many experts (`shard`)."""
    ranks = plan_ranks(work, exact=exact)
    shards = [rank.shards[work.engines[0].name] for rank in ranks]
    clock = Clock(work, cluster, rates, shards)
    return Plan(work, cluster, rates, ranks, clock.phases(), clock.passes())


@dataclass(frozen=True)
class Remedy:
    """A change of one key, and the resulting peak."""

    change: str
    peak_bytes: float
    fits: bool


def remedies(plan: Plan) -> list[Remedy]:
    """Return changes of one key that lower the peak: first those that make the run fit, then by effect."""
    found = []
    for change, work in _changes(plan.work, plan.cluster):
        other = make_plan(work, plan.cluster, plan.rates, exact=False)
        if other.peak_bytes < 0.99 * plan.peak_bytes or (not plan.fits and other.fits):
            found.append(Remedy(change, other.peak_bytes, other.fits))
    return sorted(found, key=lambda remedy: (not remedy.fits, remedy.peak_bytes))


def _changes(work: Work, cluster: Cluster) -> Iterator[tuple[str, Work]]:
    """Yield variants of this run that differ in one key."""
    layout, parallel = work.layout, work.parallel
    if layout.tp > 1 and not layout.sequence_parallel:
        yield (
            "parallel.sequence_parallel=true",
            work.on(replace(layout, sequence_parallel=True), micro=work.micro, recompute=parallel.recompute),
        )
    if parallel.recompute != "full":
        yield "parallel.recompute=full", work.on(layout, micro=work.micro, recompute="full")
    if work.micro > 1:
        yield (
            f"trainer.micro_batch_size={work.micro // 2}",
            work.on(layout, micro=work.micro // 2, recompute=parallel.recompute),
        )
    for name in ("tp", "pp", "cp", "ep"):
        sizes = {axis: getattr(layout, axis) * (2 if axis == name else 1) for axis in ("tp", "pp", "cp", "ep")}
        other = _layout(work, cluster, **sizes)
        if other is not None:
            yield (
                f"parallel.{name}={getattr(other, name)}",
                work.on(other, micro=work.micro, recompute=parallel.recompute),
            )
    if (work.rollouts or work.evaluates) and work.slots > 1:
        yield f"rollout.engine.slots={work.slots // 2}", replace(work, slots=work.slots // 2)
    if work.adapter is not None and work.adapter.base_bits > 4 and work.model.experts is None:
        roles = [
            role if role.adapter is None else replace(role, adapter=replace(role.adapter, base_bits=4))
            for role in work.roles
        ]
        yield "adapter.base_bits=4", replace(work, roles=tuple(roles), adapter=roles[0].adapter)
    if any(role.name == "critic" for role in work.roles):
        policy, *others = work.roles
        roles = [replace(policy, heads=("lm", "value")), *(role for role in others if role.name != "critic")]
        yield "critic.kind=shared", replace(work, roles=tuple(roles))


def suggest(plan: Plan, most: int = 8) -> list[Plan]:
    """Return fitting layouts of the same GPUs, fastest first: one per TP x PP, with its fastest sizes of context
    and expert parallelism and of a microbatch, and recomputation."""
    layouts = [
        each for each in possible_layouts(plan.work, plan.cluster) if _least(plan.work, each) <= plan.cluster.usable
    ]
    found: dict[tuple[int, int], Plan] = {}
    with waiting("planning other layouts", len(layouts)) as layout_done:
        for layout in layouts:
            at = (layout.tp, layout.pp)
            fitting = [found[at]] if at in found else []
            for recompute in RECOMPUTE:
                for micro in MICRO_BATCHES:
                    if plan.work.global_batch % (micro * layout.dp):
                        continue
                    work = plan.work.on(layout, micro=micro, recompute=recompute)
                    other = make_plan(work, plan.cluster, plan.rates, exact=False)
                    if other.fits:
                        fitting.append(other)
            if fitting:
                found[at] = min(fitting, key=lambda plan: plan.seconds)
            layout_done()
    return sorted(found.values(), key=lambda plan: plan.seconds)[:most]


def possible_layouts(work: Work, cluster: Cluster) -> Iterator[Layout]:
    """Yield the layouts of a cluster that split the models and batches of a run."""
    for tp in divisors(cluster.per_node):
        for pp in possible_stages(work.model.encoder_layers, work.model.num_layers):
            for cp in _splits(work, cluster.gpus // (tp * pp)):
                for ep in _shares(work.model, cluster.gpus // (tp * pp)):
                    layout = _layout(work, cluster, tp, pp, cp, ep)
                    if layout is not None and pp <= MOST_STAGES:
                        yield layout


def _splits(work: Work, copies: int) -> list[int]:
    """Return over how many of the ranks that hold the same weights a sequence may be split: slices are long, as short
    ones take no less time."""
    most = work.length // SHORTEST_SLICE
    return [1, *(cp for cp in divisors(max(1, copies)) if cp > 1 and slices_of(cp) <= most)]


def _shares(model: ModelConfig, replicas: int) -> list[int]:
    """Return among how many replicas the experts of a model can be shared; only 1 without experts."""
    if model.experts is None or replicas == 0:
        return [1]
    return divisors(math.gcd(int(model.experts.count or 1), replicas))


def _layout(work: Work, cluster: Cluster, tp: int, pp: int, cp: int, ep: int) -> Layout | None:
    """Return the layout with TP within a machine and the rest data-parallel; None if model or batch cannot be split."""
    if tp > cluster.per_node or cluster.gpus % (tp * pp * cp) or cluster.gpus % (tp * pp * ep):
        return None
    if not all(_divides(role.model, tp, pp, cp, ep) for role in work.engines) or slices_of(cp) > work.length:
        return None
    if ep > 1 and work.rollout_layout is not None:
        return None
    if work.cuda_graphs and pp > 1 and work.rollout_layout is None:
        return None
    dp = cluster.gpus // (tp * pp * cp)
    layout = Layout(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, sequence_parallel=tp > 1)
    divides = work.global_batch % layout.dp == 0 and all(time % tp == 0 for time in work.read)
    return layout if divides else None


def _divides(model: ModelConfig, tp: int, pp: int, cp: int, ep: int) -> bool:
    return shape_problem(model, ParallelConfig(tp=tp, pp=pp, cp=cp, ep=ep)) is None


def _least(work: Work, layout: Layout) -> float:
    """Return the minimum bytes of weights, gradients and optimizer, to skip layouts that cannot fit."""
    model = work.model
    master = 12 if work.precision == "bf16" else 8
    trained = 0 if work.adapter is not None else layers_with_gradients(model)
    bits = 16 if work.adapter is None else work.adapter.base_bits
    element = work.element if bits == 16 else bits / 8
    if model.experts is not None:
        return _least_with_experts(work, layout, model.num_layers - trained, element, master)
    weights = model.layers * layer_weights(model) + model.num_layers * 2 * cross_weights(model)
    least = weights * element
    least += trained * layer_weights(model) * (4 + master / layout.copies)
    return least / layout.tp / layout.pp


def _least_with_experts(work: Work, layout: Layout, frozen: int, element: float, master: int) -> float:
    """Return what `_least` does for a model with experts, of which a rank has an ep-th. The first `frozen` layers do
    not train."""
    model, experts = work.model, work.model.experts
    assert experts is not None

    def held(first: int, per_weight: float, divided: float) -> float:
        """Bytes of the layers from number `first` on; `divided` are those of a weight that its holders divide."""
        in_experts = expert_layers(model, first) * expert_weights(model)
        others = weights_of_layers(model, first) - in_experts * experts.chosen
        mine = in_experts * int(experts.count or 0) / layout.ep
        of_rank = divided / layout.copies
        return others * (per_weight + of_rank) + mine * (per_weight + of_rank * layout.ep)

    return (held(0, element, 0) + held(frozen, 4, master)) / layout.tp / layout.pp


def gib(size: float) -> str:
    """Return a number of bytes as GiB with one decimal."""
    return f"{size / GIB:.1f}"
