"""Print a plan as tables for a terminal."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megarl.models.flops import expert_layers
from megarl.planning.hardware import GIB
from megarl.planning.memory import PARTS, RankPlan
from megarl.planning.plain import overrides
from megarl.planning.plan import Plan, Remedy, gib
from megarl.planning.work import Work

KINDS = {"lora": "LoRA", "dora": "DoRA"}
_LINKS = {"NVLink": "sent, NVLink", "network": "sent, network"}


def write(plan: Plan, helps: list[Remedy], layouts: list[Plan] | None, console: Console) -> None:
    """Print the plan as tables."""
    parts: list[RenderableType] = [Text("\n".join(about(plan))), _memory(plan), _seconds(plan), Text(assumptions(plan))]
    if helps:
        parts.append(_remedies(plan, helps))
    if layouts is not None:
        parts.append(_layouts(layouts))
    console.print(Group(*parts))


def about(plan: Plan) -> list[str]:
    """Return what is planned, and whether it fits, as lines."""
    work, cluster = plan.work, plan.cluster
    policy = work.engines[0].name
    largest = plan.fullest.shards[policy].parameters
    parts = [f"{role.name}: {role.about}" for role in work.roles]
    parts += [f"{name}: {note}" for name, note in work.notes.items()]
    verdict = "fits" if plan.fits else "does not fit"
    return [
        f"{work.algorithm} on {cluster.gpus} x {cluster.gpu.name} ({cluster.per_node} to a node), {work.layout}, "
        f"micro batch {work.micro} x {work.accumulation} accumulated, {work.precision}, "
        f"recompute {work.parallel.recompute}",
        "; ".join(parts),
        *_experts(plan),
        f"{largest:,} of the policy's parameters{_layers(plan)} on the fullest rank{_trained(plan)}",
        f"{verdict}: the peak is {gib(plan.peak_bytes)} of {gib(cluster.usable)} usable GiB, in {plan.fullest.peak} "
        f"on pipeline stage {plan.fullest.stage}; host memory {gib(plan.host_bytes)} of {gib(cluster.host)} GiB a node",
    ]


def _layers(plan: Plan) -> str:
    """Return the layers of both parts of an encoder-decoder; nothing for other models."""
    model = plan.work.model
    if model.encoder is None:
        return ""
    return f" (an encoder of {model.encoder_layers} layers and a decoder of {model.num_layers})"


def _experts(plan: Plan) -> list[str]:
    """Return the line about a mixture of experts; none for other models."""
    work = plan.work
    experts = work.model.experts
    if experts is None:
        return []
    total, active = plan.parameters
    shared = "" if experts.shared_ffn_size is None else " and a shared one"
    return [
        f"{total:,} parameters, of which {active:,} are active in a token: {experts.chosen} of {experts.count} "
        f"experts{shared} in each of {expert_layers(work.model)} layers, "
        f"{int(experts.count or 0) // work.layout.ep} of a layer on a GPU; tokens are assumed to choose all experts "
        "equally often"
    ]


def _trained(plan: Plan) -> str:
    """Return what trains of the policy, if it has adapters."""
    work = plan.work
    adapter = work.adapter
    if adapter is None:
        return ""
    trained = plan.fullest.shards[work.engines[0].name].trainable
    bits = 8 * work.element if adapter.base_bits == 16 else adapter.base_bits
    return (
        f", of which {trained:,} train: {KINDS[adapter.kind]} of rank {adapter.rank} beside frozen linear layers in "
        f"{bits} bits"
    )


def _memory(plan: Plan) -> Table:
    """Return the GiB of the fullest rank, by role and phase, without empty rows."""
    rank: RankPlan = plan.fullest
    parts = [part for part in PARTS if any(rank.part(phase, part) for phase in rank.uses)]
    table = Table(title=f"GiB on a GPU of pipeline stage {rank.stage}", title_justify="left")
    table.add_column("phase")
    table.add_column("role")
    for part in (*parts, "total", "host"):
        table.add_column(part, justify="right")
    for phase, uses in rank.uses.items():
        for use in uses:
            if use.total or use.host:
                cells = [_cell(getattr(use, part)) for part in parts]
                table.add_row(phase, use.role, *cells, _cell(use.total), _cell(use.host))
        sums = [_cell(rank.part(phase, part)) for part in parts]
        style = "bold" if phase == rank.peak else None
        table.add_row(phase, "all", *sums, _cell(rank.total(phase)), _cell(rank.host(phase)), style=style)
        table.add_section()
    return table


def _cell(size: float) -> str:
    if size == 0:
        return ""
    return f"{size / GIB:.2f}" if size >= 0.005 * GIB else "<0.01"


def _seconds(plan: Plan) -> Table:
    unit = "phase" if plan.work.rollouts else "step"
    table = Table(title=f"One {unit}", title_justify="left")
    table.add_column("part")
    for name in ("seconds", "tokens/s", "MFU", *(f"GB a GPU {link}" for link in _LINKS.values())):
        table.add_column(name, justify="right")
    table.add_column("mostly")
    peak = plan.cluster.gpus * plan.cluster.gpu.flops
    for phase in plan.phases:
        mfu = phase.flops / phase.seconds / peak if phase.seconds else 0.0
        table.add_row(
            phase.name + (" (a checkpoint)" if phase.name == "save" else ""),
            f"{phase.seconds:,.2f}",
            f"{phase.tokens_per_second:,.0f}" if phase.tokens else "",
            f"{mfu:.1%}" if mfu else "",
            *(f"{phase.sent[link] / 1e9:,.1f}" if phase.sent[link] else "" for link in _LINKS),
            phase.bound,
        )
    table.add_section()
    table.add_row(f"a {unit}, no checkpoint", f"{plan.seconds:,.2f}", "", "", "", "", "")
    return table


def assumptions(plan: Plan) -> str:
    """Return what the estimate of seconds assumes."""
    work, rates = plan.work, plan.rates
    encoder, decoder = work.read
    lengths = f"{work.length} tokens a sequence" + (
        f", {encoder} of the encoder and {decoder} of the decoder" * bool(encoder)
    )
    if work.rollouts:
        lengths = (
            f"{work.rollouts} responses a phase, {work.response} tokens each, to prompts of {work.prompt}"
            f"{_read_once(work)}; {work.steps} optimizer steps"
        )
    return (
        f"Assumed: {lengths}; matrix products at {rates.products:.0%} of peak; "
        f"{rates.host_s_per_layer * 1e6:.0f} us to launch a layer of a decode pass. docs/planning.md says the rest."
    )


def _read_once(work: Work) -> str:
    """Return how often an encoder reads a prompt; nothing for other models."""
    if work.model.encoder is None:
        return ""
    samples = "" if work.per_prompt == 1 else f" for the {work.per_prompt} responses to it on a replica"
    return f", each of which the encoder reads once{samples}"


def _remedies(plan: Plan, helps: list[Remedy]) -> Table:
    table = Table(title="What would lower the peak", title_justify="left")
    for name in ("change", "peak GiB", "fits"):
        table.add_column(name)
    for remedy in helps:
        table.add_row(remedy.change, gib(remedy.peak_bytes), "yes" if remedy.fits else "no")
    return table


def _layouts(layouts: list[Plan]) -> Table:
    table = Table(title="Layouts that fit, fastest first", title_justify="left")
    for name in ("layout", "seconds", "MFU", "peak GiB", "in", "keys"):
        table.add_column(name, overflow="fold")
    for plan in layouts:
        table.add_row(
            str(plan.work.layout),
            f"{plan.seconds:,.2f}",
            f"{plan.mfu:.1%}",
            gib(plan.peak_bytes),
            plan.fullest.peak,
            overrides(plan),
        )
    if not layouts:
        table.add_row("none", "", "", "", "", "more GPUs, GPUs with more memory, or shorter sequences")
    return table
