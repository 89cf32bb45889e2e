"""The page of a plan: memory by phase, seconds, the pipeline's schedule, and what would change them."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.parallel.layout import Layout
from megarl.planning.plain import overrides, rank_as_json
from megarl.planning.plan import Plan, Remedy, gib
from megarl.planning.schedule import Timed, most_in_flight, schedule, span
from megarl.planning.show import about, assumptions
from megarl.report.bars import Span, gantt, legend
from megarl.report.markup import escape, number, seconds, table
from megarl.report.memory import BINARY, memory_figure
from megarl.report.shell import PLAN, shell

MOST_PASSES = 3000
"""Maximum number of passes in a drawing of the schedule; with more, fewer microbatches are drawn."""
_GB = 1e9
_FORWARD, _BACKWARD = 0, 1  # styles
_SCALES = ((1.0, 1.0, "seconds"), (1e-3, 1e3, "milliseconds"), (0.0, 1e6, "microseconds"))
"""Shortest step in seconds, factor and name of the units of the axis."""


def page(plan: Plan, helps: Sequence[Remedy], layouts: Sequence[Plan] | None) -> str:
    """Return the page of a plan, with the same numbers as its tables and its JSON."""
    first, *others = about(plan)
    sections = [
        ("plan", "Plan", "".join(f"<p>{escape(line)}</p>" for line in [*others, assumptions(plan)])),
        ("memory", "Memory", _memory(plan)),
        ("time", "Time", _time(plan)),
        ("schedule", "Schedule of the pipeline", _schedule(plan)),
        ("changes", "What would lower the peak", _changes(helps)),
        ("layouts", "Layouts that fit", "" if layouts is None else _layouts(layouts)),
    ]
    return shell(PLAN, f"Plan of {plan.work.algorithm}, {plan.work.layout}", f"<p>{escape(first)}</p>", sections)


def drawn_microbatches(layout: Layout, microbatches: int) -> int:
    """Return how many microbatches a drawing of the schedule shows: all, or as many whole rounds of the pipeline as
    have few enough passes, and two at least."""
    most = MOST_PASSES // (2 * layout.pp * layout.vpp)
    return microbatches if microbatches <= most else max(most // layout.pp, 2) * layout.pp


def _memory(plan: Plan) -> str:
    usable = f"usable on {plan.cluster.gpu.name}"
    figures = [
        memory_figure(
            f"memory-{rank.stage}",
            f"Memory of a GPU of pipeline stage {rank.stage}" if plan.work.layout.pp > 1 else "Memory of a GPU",
            rank_as_json(rank),
            {usable: plan.cluster.usable},
            BINARY,
        )
        for rank in plan.ranks
    ]
    middle = (
        "<p>The drawing shows the first and the last stage, and one of each kind in the middle; the others in the middle are like it.</p>"
        if plan.work.layout.pp > len(plan.ranks)
        else ""
    )
    return f'{middle}<div class="figures">{"".join(figures)}</div>'


def _time(plan: Plan) -> str:
    unit = "phase" if plan.work.rollouts else "step"
    rows = []
    for phase in plan.phases:
        counted = phase.name != "save"
        share = phase.seconds / plan.seconds if counted and plan.seconds else 0.0
        bar = f'<span class="bar" style="width:{min(share, 1) * 100:.1f}%" aria-hidden="true"></span>'
        rows.append(
            [
                escape(phase.name),
                seconds(phase.seconds),
                f"{share:.0%}{bar}" if counted else f"not in every {unit}",
                number(phase.tokens_per_second) if phase.tokens else "",
                ", ".join(f"{number(sent / _GB)} GB over {escape(link)}" for link, sent in phase.sent.items() if sent),
                escape(phase.bound),
            ]
        )
    header = ["part", "time", f"share of a {unit}", "tokens/s", "sent by a GPU", "mostly"]
    train = f"Training reaches {plan.mfu:.1%} of the peak FLOP/s (model FLOPs utilisation)."
    whole = f"A {unit} takes {seconds(plan.seconds)} without a checkpoint. {train}"
    return f"<p>{whole}</p>" + table(f"Seconds of one {unit}", header, rows, roomy=True)


def _schedule(plan: Plan) -> str:
    layout, microbatches = plan.work.layout, plan.work.accumulation
    if layout.pp == 1:
        return (
            f"<p>There is one pipeline stage. It runs the {microbatches} microbatches of an optimizer step one after "
            "the other, each forward and backward, and never waits.</p>"
        )
    drawn = drawn_microbatches(layout, microbatches)
    timed = schedule(layout, drawn, *plan.passes)
    whole = plan.passes[0] + plan.passes[1]
    waiting = whole * (layout.pp - 1) / layout.vpp
    said = (
        f"An optimizer step runs {microbatches} microbatches through {layout.pp} stages, each in {seconds(whole)} a "
        f"stage. A stage waits {seconds(waiting)} of a step, {waiting / (waiting + whole * microbatches):.1%} of its "
        "time: that is the pipeline's bubble."
    )
    if plan.work.model.encoder is not None:
        said += " One stage is the encoder and the other the decoder; the seconds are those of the slower one."
    fewer = (
        f" The drawing shows {drawn} of the {microbatches} microbatches; more of them lengthen the middle, where "
        "forward and backward passes alternate, and not the bubble."
        if drawn < microbatches
        else ""
    )
    letters = " Letters tell the virtual stages of a stage apart." if layout.vpp > 1 else ""
    _, factor, unit = next(scale for scale in _SCALES if span(timed) >= scale[0])
    lanes = [(f"stage {stage}", [_span(one, layout) for one in passes]) for stage, passes in enumerate(timed)]
    names = ["forward pass", "backward pass (less high)"]
    title = f"Passes of {drawn} microbatches through {layout.pp} stages"
    figure = (
        f'<figure class="curve" id="pipeline"><figcaption><h4>{escape(title)}</h4>{legend(names)}'
        f'<p class="definition">Numbers are microbatches, counted from 0.{letters}</p></figcaption>'
        f"{gantt('pipeline', title, _told(timed, layout), lanes, (factor, unit))}</figure>"
    )
    return f"<p>{said}{fewer}</p>{figure}{_stages(timed, layout)}"


def _span(one: Timed, layout: Layout) -> Span:
    made = one.of
    chunk = f", virtual stage {_letter(made.chunk)}" if layout.vpp > 1 else ""
    kind = "backward" if made.backward else "forward"
    return Span(
        one.start,
        one.end,
        _BACKWARD if made.backward else _FORWARD,
        f"{made.microbatch}{_letter(made.chunk) if layout.vpp > 1 else ''}",
        f"microbatch {made.microbatch} {kind}{chunk}: {seconds(one.start)} to {seconds(one.end)}",
        low=made.backward,
    )


def _letter(chunk: int) -> str:
    return chr(ord("a") + chunk) if chunk < 26 else f".{chunk}"


def _told(timed: Sequence[Sequence[Timed]], layout: Layout) -> str:
    parts = []
    for stage, passes in enumerate(timed):
        back = next(one.start for one in passes if one.of.backward)
        parts.append(
            f"Stage {stage} begins at {seconds(passes[0].start)}, runs its first backward pass at {seconds(back)} and "
            f"ends at {seconds(passes[-1].end)}."
        )
    return " ".join(parts)


def _stages(timed: Sequence[Sequence[Timed]], layout: Layout) -> str:
    whole, rows = span(timed), []
    for stage, passes in enumerate(timed):
        busy = sum(one.end - one.start for one in passes)
        back = next(one.start for one in passes if one.of.backward)
        begins, ends = passes[0].start, passes[-1].end
        held = number(most_in_flight(passes, layout.vpp))
        rows.append([f"stage {stage}", *map(seconds, (begins, back, ends, whole - busy)), held])
    header = ["stage", "begins", "first backward pass", "ends", "waits", "microbatches kept at most"]
    return table("The drawn schedule by stage", header, rows, roomy=True)


def _changes(helps: Sequence[Remedy]) -> str:
    if not helps:
        return "<p>No change of a single key would lower it.</p>"
    rows = [
        [f"<code>{escape(one.change)}</code>", f"{gib(one.peak_bytes)} GiB", "yes" if one.fits else "no"]
        for one in helps
    ]
    return table("Changes of one key", ["change", "peak", "fits"], rows)


def _layouts(layouts: Sequence[Plan]) -> str:
    if not layouts:
        return "<p>None: more GPUs, GPUs with more memory, or shorter sequences are needed.</p>"
    rows = [
        [
            escape(str(one.work.layout)),
            seconds(one.seconds),
            f"{one.mfu:.1%}",
            f"{gib(one.peak_bytes)} GiB",
            escape(one.fullest.peak),
            f"<code>{escape(overrides(one))}</code>",
        ]
        for one in layouts
    ]
    header = ["layout", "time", "MFU", "peak", "in", "keys"]
    return table("Layouts of the same GPUs that fit, fastest first", header, rows, roomy=True)
