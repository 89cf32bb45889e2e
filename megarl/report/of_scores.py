"""Findings about scores: whether they rise, fall back, and for what reason.

Each function returns a finding or None, from the data of a run alone. The constants are the thresholds; on the runs in
tests/report/real they separate good runs from those that were made bad on purpose.
"""

from __future__ import annotations

from megarl.config.metric_names import is_lower_better
from megarl.report.data import Point, RunData, as_number
from megarl.report.falls import SCORE, SCORE_NOISE, SPREAD, Fall, standard_error
from megarl.report.finding import Finding
from megarl.report.numbers import correlation, first_and_last_third, joined, mean, median, shown, values
from megarl.report.remedies import at_most, remedies

LEARNED = 0.4
"""Gain since the first phase, in standard deviations of its scores, from which a run counts as one that learned. Runs
that start at .8 of 1 and solve their task gain about .6."""
SMALL_GAIN = 0.2
"""Noise of an evaluated metric, as a share of its best: a smaller gain may be lost again by chance, as evaluations of
20 prompts and a policy that does not change show. Three standard errors of eval/score may be more, and count then."""
FLAT = 0.1
"""Gain from the first to the last third of a run, in standard deviations of the scores, below which nothing was
learned. The mean of a third with 4 phases of 128 responses is off by .04 by chance."""
ENOUGH_PHASES = 10
"""Fewer phases or readings say nothing about whether a run learns."""
LOSS_FLAT = 0.002
"""Share of its size by which a loss must fall from the first to the last third. Preference losses fall slowly."""
HIGH_RATE = 0.01
"""Learning rate of an adaptive optimizer that ruins a model more often than it is too low."""
MORE_RIGHT = 0.05
"""Rise of the accuracy that is learning although the loss hardly falls, as with preferences and a small beta."""
LENGTH_GROWTH = 1.3
"""Growth of the responses from the first three readings to the last three. Less changes no score by itself."""
LENGTH_CORRELATION = 0.9
"""Correlation of score and length over the phases. Two series that rise independently reach .7 to .8."""
SAMPLE_CORRELATION = 0.6
"""Correlation of score and length over samples of the last half of a run; 8 unrelated samples reach it 1 time in 10."""
FEWEST_SAMPLES = 8
HACKED_RISE = 0.5
"""Gain of the score, in standard deviations of the phases' scores, before a falling metric is suspicious."""
HACKED_LOSS = 0.2
"""Share of its best that another metric of the evaluations lost: more than evaluations of 20 prompts differ by."""
HACKED_CORRELATION = -0.5
"""Correlation of the score and the other metric over the evaluations: they must part, not only wander."""

_DERIVED = ("best@", "pass@", "vote", "score", "loss", "response_tokens", "perplexity")
_SCORES = (SCORE, "eval/score")


def scores(data: RunData) -> list[Point]:
    """Return the mean score of every phase, of all responses where `ppo.dynamic_sampling` leaves some out."""
    return data.series("rollout/score_before_replacing") or data.series(SCORE)


def spread_at_first(data: RunData) -> float:
    """Return the standard deviation of the first phases' scores."""
    return median(values(data.series(SPREAD)[:3]))


def gain(data: RunData) -> float | None:
    """Return the gain of the mean score since the first phase, in standard deviations of its scores. None: unknown."""
    points, spread = values(scores(data)), spread_at_first(data)
    if len(points) < 2 or spread <= 0:
        return None
    return (mean(points[-5:]) - points[0]) / spread


def learned(data: RunData) -> bool:
    """Return whether the score has risen since the first phase by more than chance."""
    found = gain(data)
    return found is not None and found >= LEARNED


def score_collapsed(data: RunData) -> Finding | None:
    """Find a score, or the metric that ranks checkpoints, that fell from its best and stayed down."""
    spread = dict(data.series(SPREAD))
    of_phases = Fall()
    for step, value in data.series(SCORE):
        of_phases.add(step, value, SCORE_NOISE * spread.get(step, 0.0))
    if of_phases.collapsed:
        return _collapsed(data, SCORE, of_phases)
    metric = data.setting("checkpoint.best.metric")
    evaluated = [metric] if isinstance(metric, str) and metric else ["eval/score", "eval/accuracy"]
    for name in evaluated:
        if is_lower_better(name, data.setting("checkpoint.best.mode", "auto")):
            continue  # loss_diverges and evaluation_gap are about these
        fall, score, error = Fall(), dict(data.series("eval/score")), dict(data.series("eval/score_se"))
        for step, value in data.series(name):
            fall.add(step, value, error=standard_error(value, score.get(step), error.get(step)))
        if fall.collapsed:
            return _collapsed(data, name, fall)
    return None


def _penalty(data: RunData) -> str | None:
    """Return a sentence about a KL penalty that outweighs the differences of scores; None if it does not."""
    coefficient, spread = data.number("ppo.kl_coef"), spread_at_first(data)
    kl = max(values(data.series("rollout/kl")), default=0.0)
    if not coefficient or spread <= 0 or coefficient * kl <= spread:
        return None
    return (
        f"The KL penalty outweighs the score: a KL of {shown(kl)} nats a response costs {shown(coefficient * kl)}, and "
        f"scores differ by {shown(spread)}."
    )


def _collapsed(data: RunData, metric: str, fall: Fall) -> Finding:
    penalty = _penalty(data)
    return Finding(
        name="score_collapsed",
        severity="problem",
        title=f"{'The score' if metric in _SCORES else 'The metric that ranks checkpoints'} fell from its best and "
        "stayed there",
        evidence=f"{metric} was {shown(fall.best or 0.0)} at its best, in {data.unit} {fall.best_step}, and is "
        f"{shown(fall.last)} now; it has been down since {data.unit} {fall.since}.",
        cause=penalty
        or (
            "Updates that are too large. With a critic, whitening divides its error by the small spread of good "
            "scores, and several epochs then remove moves that were right."
            if data.series("value/loss")
            else "Updates that are too large, or training for too long on the same data."
        ),
        remedy=remedies(
            data,
            *(("a lower ppo.kl_coef",) if penalty else ()),
            "continue from the best checkpoint (run.resume=PATH) with a lower optim.lr",
            *at_most(data, "ppo.stop_at_kl", 0.05),
            "fewer ppo.inner_epochs",
            "ppo.whiten_advantages=false",
        ),
        metrics=(metric,),
        steps=(fall.best_step, fall.since),
    )


def no_learning(data: RunData) -> Finding | None:
    """Find a score or a loss that is the same at the end as at the beginning."""
    points = scores(data)
    if points:
        return _flat_score(data, points)
    losses = data.series("train/loss")
    if len(losses) < ENOUGH_PHASES:
        return None
    first, last = (mean(part) for part in first_and_last_third(values(losses)))
    if abs(first - last) > LOSS_FLAT * abs(first):  # a loss that rises is another finding
        return None
    accuracy = [mean(part) for part in first_and_last_third(values(data.series("train/accuracy")))]
    if accuracy[1] - accuracy[0] >= MORE_RIGHT:
        return None
    return Finding(
        name="no_learning",
        severity="warning",
        title="The loss does not fall",
        evidence=f"train/loss was {first:.4g} in the first third of the run and {last:.4g} in the last.",
        cause="A learning rate that is too low or far too high, too few steps, or data that contradicts itself or "
        "teaches nothing.",
        remedy=remedies(
            data,
            _other_rate(data),
            "read some records of data.train",
            "a shorter optim.warmup_steps",
            "a larger trainer.max_steps",
        ),
        metrics=("train/loss", "train/lr"),
    )


def _other_rate(data: RunData) -> str:
    """Return which learning rate to try where nothing is learned."""
    rate = data.number("optim.lr")
    if rate is not None and rate >= HIGH_RATE and data.setting("optim.kind") != "sgd":
        return f"a lower optim.lr, as {rate:g} is high and may have undone what the model could do"
    return "a higher optim.lr (ten times as much is a fair second try)"


def _flat_score(data: RunData, points: list[Point]) -> Finding | None:
    if len(points) < ENOUGH_PHASES:
        return None
    first, last = (mean(part) for part in first_and_last_third(values(points)))
    spread = spread_at_first(data)
    constant = spread == 0 and max(values(points)) == min(values(points))
    risen = learned(data) or spread <= 0 or last - first >= FLAT * spread
    if not constant and (risen or score_collapsed(data) is not None):
        return None
    if constant:
        evidence = f"Every response of every phase scored {shown(first)}."
        cause = "A reward that is the same for all responses gives no signal."
        remedy = ("check reward.fn on a few responses by hand (rollout.dump=FOLDER writes them)",)
    else:
        evidence = (
            f"The mean score was {shown(first)} in the first third of the run and {shown(last)} in the last; single "
            f"scores differ by {shown(spread)}."
        )
        penalty = _penalty(data)
        cause = penalty or "Updates that are too small or too noisy, or a reward that the policy cannot influence."
        remedy = (
            *(("a lower ppo.kl_coef",) if penalty else ()),
            _other_rate(data),
            "prompts that are sometimes solved",
            "more ppo.rollouts",
            "a larger rollout.n",
        )
    return Finding(
        name="no_learning",
        severity="problem" if constant else "warning",
        title="All responses score the same" if constant else "The score does not rise",
        evidence=evidence,
        cause=cause,
        remedy=remedies(data, *remedy),
        metrics=(SCORE, SPREAD, "train/lr"),
        steps=(points[0][0], points[-1][0]),
    )


def score_follows_length(data: RunData) -> Finding | None:
    """Find a score that rises with the length of the responses."""
    both = joined(data.series(SCORE), data.series("rollout/response_tokens"))
    if len(both) < FEWEST_SAMPLES:
        return None
    score, length = [value for _, value, _ in both], [value for _, _, value in both]
    before, after = mean(length[:3]), mean(length[-3:])
    over_phases = correlation(score, length)
    if after < LENGTH_GROWTH * before or over_phases < LENGTH_CORRELATION:
        return None
    over_samples = _length_of_samples(data)
    if over_samples is not None and over_samples < SAMPLE_CORRELATION:
        return None  # longer responses score no higher than shorter ones
    also = "" if over_samples is None else f", and over samples of the last half of the run {shown(over_samples)}"
    return Finding(
        name="score_follows_length",
        severity="warning",
        title="The score rises with the length of the responses",
        evidence=f"Responses grew from {shown(before)} to {shown(after)} tokens; the correlation of length and score "
        f"is {shown(over_phases)} over the {data.unit}s{also}.",
        cause="The reward may pay for length itself, so that the policy writes more rather than better.",
        remedy=remedies(
            data,
            "compare responses of equal length by hand",
            "let reward.fn divide by the length or cap what length earns",
            "ppo.overlong.penalty with ppo.overlong.buffer",
            "a smaller rollout.max_new_tokens",
        ),
        metrics=("rollout/response_tokens", SCORE),
        steps=(both[0][0], both[-1][0]),
    )


def _length_of_samples(data: RunData) -> float | None:
    """Return the correlation of length and score over the samples of the last half of a run; None if there are too
    few."""
    rows = [
        (len(row["response"]), score)
        for row in data.samples[len(data.samples) // 2 :]
        if isinstance(row.get("response"), str) and (score := as_number(row.get("score"))) is not None
    ]
    if len(rows) < FEWEST_SAMPLES or len({length for length, _ in rows}) < 3 or len({score for _, score in rows}) < 2:
        return None
    return correlation([length for length, _ in rows], [score for _, score in rows])


def reward_hacking(data: RunData) -> Finding | None:
    """Find a score that rises in evaluations while another metric of the same evaluations falls."""
    score = data.series("eval/score")
    if len(score) < 5:
        return None
    before, after = mean(values(score)[:2]), mean(values(score)[-2:])
    spread = spread_at_first(data) or max(values(score)) - min(values(score))
    if after - before < HACKED_RISE * spread or spread <= 0:
        return None
    for name in data.metrics():
        own = name.removeprefix("eval/")
        if own == name or own.split("/")[0].startswith(_DERIVED) or is_lower_better(own) or "@" in own:
            continue
        both = joined(score, data.series(name))
        other = [value for _, _, value in both]
        if len(both) < 5:
            continue
        start, end = mean(other[:2]), mean(other[-2:])
        apart = correlation([value for _, value, _ in both], other)
        if (
            start > end
            and start - end >= HACKED_LOSS * max(abs(start), abs(max(other)))
            and apart <= HACKED_CORRELATION
        ):
            return Finding(
                name="reward_hacking",
                severity="warning",
                title="The score rises while another measure of the same responses falls",
                evidence=f"eval/score rose from {shown(before)} to {shown(after)}, and {name} fell from {shown(start)} "
                f"to {shown(end)}; their correlation is {shown(apart)}.",
                cause="The policy may satisfy the reward without doing what it stands for (reward hacking).",
                remedy=remedies(
                    data,
                    "read samples.jsonl",
                    "add what the second metric measures to reward.terms",
                    "a higher ppo.kl_coef",
                    "stop at the checkpoint where both are good (checkpoint.best.metric)",
                ),
                metrics=("eval/score", name),
                steps=(both[0][0], both[-1][0]),
            )
    return None
