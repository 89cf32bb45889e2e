"""Findings about losses, gradients, the learning rate, the data, and the time and calls that rewards take."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from typing import Any

from megarl.report.data import RunData, as_number
from megarl.report.falls import SPREAD, Fall
from megarl.report.finding import Finding
from megarl.report.numbers import mean, median, percent, shown, values
from megarl.report.remedies import remedies

RECENT = 5
"""Readings that a present state is read from."""
NO_GRADIENT = 1e-9
"""Norm of the gradient below which nothing is learned: float32 rounding alone gives more."""
VANISHED = 1e-4
"""Share of the gradient norm of a run's first half (its median) that is left when gradients have vanished. Solved tasks
keep .01 and more."""
EXPLODED = 30.0
"""Growth of the gradient norm from the median of the first half of the readings so far to that of five in a row. Good
runs stay within a factor of 10; single readings are not looked at."""
ABOVE_CLIPPING = 10.0
"""Gradient norm as a multiple of optim.clip_grad. With sparse rewards, gradients begin near 0 and stay far below."""
LOSS_NOISE = 0.1
"""Noise of a loss, as a share of its first readings: the rows of a batch differ by that much."""
LOSS_RISE = 1.5
"""Growth of a loss over its first readings that is divergence, for a loss that never fell."""
VALUE_LOSS_RISE = 10.0
"""Growth of the critic's loss over its first readings. On good runs it doubles before it falls."""
WORSE_THAN_CONSTANT = 2.0
"""The critic's loss as a multiple of the scores' variance, of which a constant has .5. Where all scores are 0 at first,
the loss grows with them without diverging."""
GAP = 0.05
"""Rise of the evaluation loss over its best, as a share of it, that is overfitting and not noise."""
GAP_OF_GAIN = 0.2
"""Share of what the evaluation loss had gained that must be lost again."""
EARLY = 0.2
"""Share of the run that is left when the learning rate has reached its end."""
ENDED = 0.5
"""Share of the peak below which a constant learning rate is its end, and not its plan."""
PASSES = 4.0
"""Passes over the data after which more of them help little (Muennighoff et al. 2023, arXiv 2305.16264)."""
DROPPED = 0.05
"""Share of responses without a score, or of failed calls per response, that is more than a stray failure."""
WAITED = 0.4
"""Share of a phase's time that is spent on scoring, while all devices wait."""
WORTH_WAITING_FOR = 60.0
"""Seconds of scoring below which nothing is worth changing."""
_ASIDE = ("clone", "eval", "save", "reference")  # sections of a run that are no part of a phase


def gradients_dead(data: RunData) -> Finding | None:
    """Find gradients that are zero or have vanished."""
    norms = data.series("train/grad_norm")
    late = median(values(norms[-RECENT:]))
    if len(norms) < RECENT or (late > NO_GRADIENT and late > VANISHED * median(values(norms[: len(norms) // 2]))):
        return None
    return Finding(
        name="gradients_dead",
        severity="problem",
        title="There is no gradient to learn from",
        evidence=f"train/grad_norm was {shown(late)} in the median of the last {RECENT} readings, and "
        f"{shown(max(values(norms)))} at its largest.",
        cause="All scores are equal, everything that could be learned is clipped or masked, the loss is 0, or updates "
        "that were too large have saturated the model.",
        remedy=remedies(
            data,
            *(("a lower optim.lr, from an earlier checkpoint (run.resume=PATH)",) if _worse(data) else ()),
            "look at rollout/score_std and policy/clip_fraction, then at ppo.clip_low, ppo.clip_high and reward.fn",
            *(() if data.has_phases or _worse(data) else ("stop here if the loss is as small as it should be",)),
            "check the records of data.train",
            "check data.loss_on",
            "check model.num_layers_unfrozen",
        ),
        metrics=("train/grad_norm", "train/loss"),
        steps=(norms[-RECENT][0], norms[-1][0]),
    )


def _worse(data: RunData) -> bool:
    """Return whether the loss, of runs without phases, is larger than it was at first."""
    losses = values(data.series("train/loss"))
    return not data.has_phases and median(losses[-RECENT:]) > median(losses[:RECENT])


def gradients_explode(data: RunData) -> Finding | None:
    """Find gradients that have grown by orders of magnitude, and have not come back to their usual size."""
    for metric in ("train/grad_norm", "train/critic_grad_norm"):
        norms = data.series(metric)
        enough = ABOVE_CLIPPING * (data.number("optim.clip_grad") or 1.0)
        grown = _first_growth(values(norms), enough)
        if grown is None:
            continue
        end, usual, then = grown
        last = median(values(norms[-RECENT:]))
        if usual / EXPLODED <= last <= EXPLODED * usual:
            continue
        return Finding(
            name="gradients_explode",
            severity="problem",
            title="Gradients have grown by orders of magnitude",
            evidence=f"{metric} was {shown(usual)} in the median of the first {end // 2} readings, {shown(then)} in "
            f"that of the {RECENT} up to {data.unit} {norms[end - 1][0]}, and {shown(last)} in that of the last "
            f"{RECENT}.",
            cause="A learning rate that is too high, rewards of very different size, or a few broken records.",
            remedy=remedies(
                data,
                "a lower optim.lr",
                "ppo.clip_scores or ppo.scale_scores=running",
                "a longer optim.warmup_steps",
                "optim.clip_grad=1",
            ),
            metrics=(metric, "train/loss"),
            steps=(norms[end - RECENT][0], norms[-1][0]),
        )
    return None


def _first_growth(norms: list[float], enough: float) -> tuple[int, float, float] | None:
    """Return where the median of a few norms is first much larger than that of the first half of all up to there: the
    number of norms up to there, and both medians."""
    half: list[float] = []  # sorted
    for end in range(1, len(norms) + 1):
        if end % 2 == 0:
            insort(half, norms[end // 2 - 1])
        if end < 2 * RECENT:
            continue
        usual, late = (half[(len(half) - 1) // 2] + half[len(half) // 2]) / 2, median(norms[end - RECENT : end])
        if usual > 0 and late >= max(EXPLODED * usual, enough):
            return end, usual, late
    return None


def loss_diverges(data: RunData) -> Finding | None:
    """Find a loss that rises again, or from the beginning; in runs with a critic, that of the critic."""
    metric = "value/loss" if data.series("value/loss") else "train/loss"
    losses = data.series(metric)
    if len(losses) < 2 * RECENT or (metric == "train/loss" and data.series("rollout/score")):
        return None  # the loss of a policy without a critic is not meant to fall
    smooth = [(losses[index][0], median(values(losses[index - 2 : index + 1]))) for index in range(2, len(losses))]
    first, last, lowest = smooth[0][1], smooth[-1][1], min(values(smooth))
    if metric == "value/loss":
        spread = max(values(data.series(SPREAD)), default=0.0)
        diverged = first > 0 and last >= max(VALUE_LOSS_RISE * first, WORSE_THAN_CONSTANT * spread * spread)
    else:
        fall = Fall()
        for step, value in smooth:
            fall.add(step, -value, LOSS_NOISE * abs(first))
        # Below 0 there is no factor to speak of, but half of the gain can be lost.
        diverged = (first > 0 and last >= LOSS_RISE * first) or (fall.collapsed and first - lowest > 0)
    if not diverged:
        return None
    return Finding(
        name="loss_diverges",
        severity="problem",
        title="The loss rises instead of falling",
        evidence=f"{metric} was {shown(first)} at first, {shown(lowest)} at its lowest and {shown(last)} at last "
        "(medians of three readings).",
        cause="A learning rate that is too high, or too short a warm-up.",
        remedy=remedies(
            data,
            "a lower optim.lr",
            "ppo.clip_scores or ppo.scale_scores=running",
            "a longer optim.warmup_steps",
            "optim.schedule=cosine",
            "a lower critic.separate.lr",
        ),
        metrics=(metric, "train/grad_norm", "train/lr"),
        steps=(min(smooth, key=lambda point: point[1])[0], smooth[-1][0]),
    )


def evaluation_gap(data: RunData) -> Finding | None:
    """Find a loss that falls in training and rises in evaluations."""
    evaluated, trained = data.series("eval/loss"), data.series("train/loss")
    if len(evaluated) < 4 or not trained or data.series("rollout/score"):
        return None
    best = min(range(len(evaluated)), key=lambda index: evaluated[index][1])
    step, lowest = evaluated[best]
    last = mean(values(evaluated[-2:]))
    if len(evaluated) - 1 - best < 2 or last - lowest < max(
        GAP * abs(lowest), GAP_OF_GAIN * (evaluated[0][1] - lowest)
    ):
        return None
    then = mean([value for at, value in trained if at <= step][-3:])
    now = mean(values(trained[-3:]))
    if now >= then:
        return None
    return Finding(
        name="evaluation_gap",
        severity="warning",
        title="The loss falls in training and rises in evaluations",
        evidence=f"eval/loss was {shown(lowest)} at {data.unit} {step} and is {shown(last)} now; train/loss went from "
        f"{shown(then)} to {shown(now)} meanwhile.",
        cause="The model learns its training data by heart (overfitting).",
        remedy=remedies(
            data,
            f"use the checkpoint of {data.unit} {step} (checkpoint.best keeps the best)",
            "fewer trainer.max_steps",
            "more data",
            "a lower optim.lr",
            "adapter.rank=16",
            "optim.weight_decay=0.1",
        ),
        metrics=("eval/loss", "train/loss"),
        steps=(step, evaluated[-1][0]),
    )


def learning_rate_ended(data: RunData) -> Finding | None:
    """Find a learning rate that is 0, or at its smallest value long before the end of the run."""
    rates = data.series("train/lr")
    if len(rates) < 2 * RECENT:
        return None
    peak, last = max(values(rates)), rates[-1][1]
    begin = len(rates) - 1
    while begin > 0 and rates[begin - 1][1] == last:
        begin -= 1
    still = len(rates) - begin
    if last > ENDED * peak or still < max(RECENT, EARLY * len(rates)):
        return None
    nothing = peak == 0
    return Finding(
        name="learning_rate_ended",
        severity="problem" if nothing else "warning",
        title="The learning rate is 0" if nothing else "The learning rate reached its end long before the run",
        evidence=f"train/lr is {shown(last)} from {data.unit} {rates[begin][0]} to {rates[-1][0]}"
        f"{'' if nothing else f', and was {shown(peak)} at its peak'}.",
        cause="Nothing is learned with a learning rate of 0."
        if nothing
        else "The schedule is planned for fewer steps than the run takes.",
        remedy=remedies(data, "set optim.lr above 0")
        if nothing
        else remedies(data, "optim.schedule=constant", "a higher optim.min_lr_ratio"),
        metrics=("train/lr", "train/loss"),
        steps=(rates[begin][0], rates[-1][0]),
    )


def data_repeated(data: RunData) -> Finding | None:
    """Find data that a run without falling evaluations has gone through many times."""
    used = data.summary.get("rows")
    if not isinstance(used, Mapping) or data.has_phases:
        return None  # prompts are repeated in reinforcement learning, and answered anew each time
    read, there = as_number(used.get("read")), as_number(used.get("there"))
    if not read or not there or read / there < PASSES:
        return None
    evaluated = values(data.series("eval/loss"))
    if evaluated and evaluated[-1] <= min(evaluated) + GAP * abs(min(evaluated)):
        return None
    if not evaluated and any(name.startswith("eval/") for name in data.metrics()):
        return None  # other measures than a loss tell whether it helps
    return Finding(
        name="data_repeated",
        severity="warning",
        title="The data was seen many times, and nothing shows that it still helped",
        evidence=f"{read:.0f} rows were read of data that has {there:.0f}: {read / there:.1f} passes"
        + ("; there was no evaluation." if not evaluated else f"; eval/loss is {shown(evaluated[-1])} now."),
        cause="trainer.max_steps is long for this amount of data; later passes teach it by heart.",
        remedy=remedies(
            data,
            "fewer trainer.max_steps",
            "more data",
            *(() if evaluated else ("data.eval with trainer.eval_every, which keeps the best checkpoint",)),
        ),
        metrics=("train/loss", "eval/loss"),
    )


def reward_calls_failed(data: RunData) -> Finding | None:
    """Find responses that got no score because calls failed."""
    responses = _responses(data)
    if not responses:
        return None
    for metric, what in (("rollout/dropped", "had no score"), ("rollout/failed_calls", "had a failed call")):
        points = data.series(metric)
        share = mean(values(points[-RECENT:])) / responses
        if len(points) >= 2 and share >= DROPPED:
            return Finding(
                name="reward_calls_failed",
                severity="warning",
                title="Many responses lost their score",
                evidence=f"{percent(share)} of the responses in the last {min(RECENT, len(points))} {data.unit}s "
                f"{what} ({metric}).",
                cause="The reward function or server fails or times out for some responses. If these are of one kind, "
                "the policy learns from the others only.",
                remedy=remedies(
                    data,
                    "read RUN/logs for the reasons",
                    "let reward.fn score what it cannot judge",
                    "a larger reward.calls.timeout or reward.calls.retries",
                    "a smaller reward.calls.batch_size",
                ),
                metrics=(metric, "rollout/repeated_calls"),
                steps=(points[-min(RECENT, len(points))][0], points[-1][0]),
            )
    return None


def _responses(data: RunData) -> float | None:
    """Return the number of responses of a phase; None if the configuration does not tell."""
    rollouts = data.number("ppo.rollouts")
    if rollouts is None and (prompts := data.number("rft.prompts")) is not None:
        rollouts = prompts * (data.number("rollout.n") or 1.0)
    return rollouts if rollouts is not None and rollouts > 0 else None


def waiting_for_rewards(data: RunData) -> Finding | None:
    """Find phases of which scoring takes a large part."""
    parts = data.summary.get("seconds")
    if not isinstance(parts, Mapping):
        return None
    seconds = {name: _wall(part) for name, part in parts.items() if name not in _ASIDE}
    scoring, whole = seconds.get("score", 0.0), sum(seconds.values())
    if scoring < max(WORTH_WAITING_FOR, WAITED * whole):
        return None
    return Finding(
        name="waiting_for_rewards",
        severity="warning",
        title="Much of the time passes waiting for rewards",
        evidence=f"Scoring took {scoring:.0f} of {whole:.0f} seconds, {percent(scoring / whole)}, evaluations and "
        "checkpoints aside.",
        cause="The reward function or server is slow compared with the model, and nothing else runs meanwhile.",
        remedy=remedies(
            data,
            "let reward.fn do once what it does for each response",
            "more copies of the server in reward.url",
            "a larger reward.calls.batch_size",
        ),
        metrics=("perf/step_seconds",),
    )


def _wall(part: Any) -> float:
    return as_number(part.get("wall_s") if isinstance(part, Mapping) else part) or 0.0
