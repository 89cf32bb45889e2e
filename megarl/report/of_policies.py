"""Findings about the policy, its critic and its responses in runs that generate."""

from __future__ import annotations

import math

from megarl.report.data import RunData
from megarl.report.falls import SPREAD
from megarl.report.finding import Finding
from megarl.report.numbers import joined, mean, median, percent, shown, values
from megarl.report.of_scores import FLAT, learned, scores, spread_at_first
from megarl.report.remedies import at_most, remedies

RECENT = 5
"""Phases that a present state is read from: fewer is noise, more notices late."""
FAR = 1.0
"""KL per token, in nats, that is far from the reference: each token is e times as likely as there, on average."""
KL_GROWTH = 3.0
"""Growth of the KL to the reference from the middle to the last third of a run that no score pays for."""
KL_WORTH_MENTION = 0.1
"""KL per token below which growth does not matter."""
STEP_FAR = 1.0
"""KL of a minibatch within a phase, in nats per token. On small tasks good runs pass .5 now and then, one passed 1.5
once; three phases of five above 1 were seen in bad runs only."""
FAR_SHARE = 0.33
"""Share of all phases with such steps after which the policy has been somewhere else, even if it moves less now."""
ENTROPY_LEFT = 0.05
"""Share of the first phases' entropy that is left in a collapse. Good runs on small tasks end at .06 to .3."""
SPREAD_LEFT = 0.7
"""Share of the first phases' spread of scores from which on most prompts are still not solved."""
CLIPPED = 0.4
"""Share of tokens that are clipped. Good runs begin with up to .3 and end below .1."""
VALUES_CLIPPED = 0.6
"""Share of values whose loss is clipped, over the last phases. Good runs begin with up to .35 and end near 0."""
NOT_CLIPPED = 1e-6
"""Share of clipped tokens, at its largest, below which updates do not move the policy at all."""
CRITIC_PHASES = 10
"""Phases in a row without explained variance. Critics of good runs often take 5 to get above 0."""
EXPLAINS_NOTHING = 0.001
"""Share of the returns' variance that is nothing. Rewards in the thousands leave a critic, whose values move by
ppo.clip_value a phase, at .0001; critics of good runs that learn slowly are above .005 by then."""
BEYOND_CLIPPING = 10.0
"""Spread of the scores, in multiples of ppo.clip_value, that a critic cannot follow."""
SPREAD_OF_VALUES = 0.5
"""Share of the first phases' spread of scores below which there is hardly anything left to explain."""
EQUAL_GROUPS = 0.8
"""Share of prompts whose responses all score the same, from which on most of the generated responses are wasted."""
CUT = 0.5
"""Share of truncated responses, over the last phases."""
ALWAYS_CUT = 0.95
"""Share of truncated responses in the first phases that means texts of fixed length, on purpose."""
DRIFT = {"fp32": 1e-3, "bf16": 0.05}
"""Mean difference of log-probs as sampled and recomputed. Float32 gives 1e-7, bf16 .001 to .02."""
DRIFT_GROWTH = 10.0
"""Growth of that difference since the first phases, from a tenth of the bound on."""


def kl_runaway(data: RunData) -> Finding | None:
    """Find a policy that is far from its reference, or moves far in single phases."""
    per_token = [
        (step, kl / tokens)
        for step, kl, tokens in joined(data.series("rollout/kl"), data.series("rollout/response_tokens"))
        if tokens > 0 and math.isfinite(kl / tokens)
    ]
    if len(per_token) >= RECENT:
        late = median(values(per_token[-3:]))
        if late >= FAR:
            said = (
                f"The KL to the reference is {shown(late)} nats per token in the median of the last three {data.unit}s"
            )
            since = min(_since(per_token, FAR), per_token[-3][0])
            return _runaway(
                data, f"{said}; nearly all are above {FAR:g} since {data.unit} {since}.", ("rollout/kl",), since
            )
    if len(per_token) >= 9 and (found := _grown_for_nothing(data, per_token)) is not None:
        return found
    moved = data.series("policy/approx_kl_max")
    for phases, enough, which in (
        (moved[-RECENT:], 3, f"the last {RECENT} {data.unit}s"),
        (moved, max(RECENT, FAR_SHARE * len(moved)), f"{len(moved)} {data.unit}s"),
    ):
        far = [step for step, value in phases if value >= STEP_FAR]
        if len(far) >= enough:
            return _runaway(
                data,
                f"policy/approx_kl_max was {shown(max(values(phases)))} nats per token at most in {which}, and above "
                f"{STEP_FAR:g} in {len(far)} of them.",
                ("policy/approx_kl_max", "policy/approx_kl"),
                far[0],
            )
    return None


def _grown_for_nothing(data: RunData, per_token: list[tuple[int, float]]) -> Finding | None:
    third = len(per_token) // 3
    middle, late = mean(values(per_token[third:-third])), mean(values(per_token[-third:]))
    score = values(scores(data))
    if late < max(KL_GROWTH * middle, KL_WORTH_MENTION) or len(score) < len(per_token):
        return None
    before, after = mean(score[third:-third]), mean(score[-third:])
    if after - before > FLAT * spread_at_first(data):
        return None
    return _runaway(
        data,
        f"The KL to the reference grew from {shown(middle)} to {shown(late)} nats per token from the middle to the "
        f"last third of the run, and the score went from {shown(before)} to {shown(after)}.",
        ("rollout/kl", "rollout/score"),
        per_token[-third][0],
    )


def _runaway(data: RunData, evidence: str, metrics: tuple[str, ...], since: int) -> Finding:
    return Finding(
        name="kl_runaway",
        severity="problem",
        title="The policy runs away from where it started",
        evidence=evidence,
        cause="Updates that are too large, or a KL penalty that is too weak for this reward.",
        remedy=remedies(
            data,
            "a lower optim.lr",
            *at_most(data, "ppo.stop_at_kl", 0.05),
            "a higher ppo.kl_coef, or ppo.adaptive_kl.target=6",
            "ppo.kl_limit ends a run that goes too far",
        ),
        metrics=metrics,
        steps=(since, data.series(metrics[0])[-1][0]),
    )


def _since(points: list[tuple[int, float]], bound: float) -> int:
    """Return the first step from which on all values are at or above a bound; else the last step."""
    found = points[-1][0]
    for step, value in reversed(points):
        if value < bound:
            break
        found = step
    return found


def entropy_collapsed(data: RunData) -> Finding | None:
    """Find a policy that hardly chooses any more, although its task is not solved."""
    entropy = data.series("rollout/entropy")
    if len(entropy) < 8:
        return None
    first, last = mean(values(entropy[:2])), median(values(entropy[-RECENT:]))
    if first <= 0 or last >= ENTROPY_LEFT * first or (learned(data) and not _stuck(data)):
        return None
    score = scores(data)
    return Finding(
        name="entropy_collapsed",
        severity="warning" if learned(data) else "problem",
        title="The policy has almost stopped choosing between tokens",
        evidence=f"rollout/entropy fell from {shown(first)} to {shown(last)} nats, {percent(last / first)} of what it "
        f"was; the score was {shown(score[0][1])} in the first {data.unit} and is {shown(score[-1][1])}."
        if score
        else f"rollout/entropy fell from {shown(first)} to {shown(last)} nats.",
        cause="Without alternatives in its responses the policy cannot find better ones. A high learning rate, many "
        "epochs per phase or a low temperature lead there.",
        remedy=remedies(
            data,
            "ppo.entropy_coef=0.01, or ppo.adaptive_entropy.target",
            "a lower optim.lr",
            "a higher ppo.clip_high, such as 0.28 of DAPO",
            "fewer ppo.inner_epochs",
            "rollout.temperature=1",
        ),
        metrics=("rollout/entropy", "rollout/score"),
        steps=(_since([(step, -value) for step, value in entropy], -ENTROPY_LEFT * first), entropy[-1][0]),
    )


def _stuck(data: RunData) -> bool:
    """Return whether the score stands still although prompts score as differently as at first."""
    score, spread = values(scores(data)), spread_at_first(data)
    quarter = len(score) // 4
    if quarter < 2 or data.series("rollout/replaced") or spread <= 0:
        return False
    risen = mean(score[-quarter:]) - mean(score[-2 * quarter : -quarter])
    return risen < FLAT * spread and median(values(data.series(SPREAD)[-RECENT:])) >= SPREAD_LEFT * spread


def clipping_always(data: RunData) -> Finding | None:
    """Find updates of which most is clipped away."""
    for metric, bound, what, wider in (
        ("policy/clip_fraction", CLIPPED, "tokens", "larger ppo.clip_low and ppo.clip_high (0.2 is usual)"),
        ("value/clip_fraction", VALUES_CLIPPED, "values", "a larger ppo.clip_value (null: no limit)"),
    ):
        points = data.series(metric)
        late = median(values(points[-RECENT:]))
        if what == "tokens" and data.setting("ppo.ratio") == "sequence":
            continue  # GSPO's narrow range clips most sequences, on purpose
        if len(points) >= RECENT and late >= bound:
            return Finding(
                name="clipping_always",
                severity="warning",
                title=f"Most {what} are clipped",
                evidence=f"{metric} was {shown(late)} in the median of the last {RECENT} {data.unit}s.",
                cause="The policy moves much further in a phase than the clip range allows, or the range is too narrow "
                "for any movement. Clipped tokens teach nothing."
                if what == "tokens"
                else "Returns are larger than a value may move in a phase, so the critic follows them slowly.",
                remedy=remedies(data, "a lower optim.lr", "fewer ppo.inner_epochs", f"else a wider range: {wider}"),
                metrics=(metric, "policy/approx_kl"),
                steps=(_since(points, bound), points[-1][0]),
            )
    return None


def clipping_never(data: RunData) -> Finding | None:
    """Find updates so small that no token is ever clipped."""
    clipped, updates = data.series("policy/clip_fraction"), values(data.series("train/optimizer_steps"))
    if len(clipped) < RECENT or data.setting("ppo.objective", "clipped") == "plain" or min(updates, default=1) < 2:
        return None  # with one update per phase, every ratio is 1
    most = max(values(clipped))
    if most > NOT_CLIPPED:
        return None
    return Finding(
        name="clipping_never",
        severity="warning",
        title="No token is ever clipped: the policy hardly moves",
        evidence=f"policy/clip_fraction is {shown(most)} at most over {len(clipped)} {data.unit}s with "
        f"{updates[-1]:.0f} updates each.",
        cause="A learning rate that is too low for the number of updates, or a clip range that is too wide to bind.",
        remedy=remedies(
            data,
            "a higher optim.lr",
            "more ppo.inner_epochs",
            "check ppo.clip_low and ppo.clip_high (0.2 is usual)",
        ),
        metrics=("policy/clip_fraction", "policy/approx_kl"),
        steps=(clipped[0][0], clipped[-1][0]),
    )


def value_explains_nothing(data: RunData) -> Finding | None:
    """Find a critic that is no better than a constant although scores differ."""
    explained, spread = data.series("value/explained_variance"), spread_at_first(data)
    if len(explained) < CRITIC_PHASES:
        return None
    late = values(explained[-CRITIC_PHASES:])
    left = median(values(data.series(SPREAD)[-RECENT:]))
    if max(median(late), median(late[-3:])) > EXPLAINS_NOTHING or left < SPREAD_OF_VALUES * spread or left <= 0:
        return None
    return Finding(
        name="value_explains_nothing",
        severity="warning",
        title="The critic is no better than a constant",
        evidence=f"value/explained_variance was {shown(median(late))} in the median of the last {CRITIC_PHASES} "
        f"{data.unit}s ({shown(max(late))} at most), and scores still differ by {shown(left)}.",
        cause="The critic learns too slowly, or starts from values that are far off. Its error then acts as noise in "
        "the advantages.",
        remedy=remedies(
            data,
            *(
                (f"ppo.scale_scores=running, as scores differ by much more than ppo.clip_value ({limit:g})",)
                if (limit := data.number("ppo.clip_value")) and spread > BEYOND_CLIPPING * limit
                else ()
            ),
            *(
                ("a higher critic.separate.lr", "critic.separate.warmup_phases=5")
                if data.setting("critic.kind") == "separate"
                else ("a higher optim.lr",)
                if clipping_never(data) is not None
                else ("a higher ppo.vf_coef", "critic.kind=separate with its own critic.separate.lr")
            ),
            "ppo.clip_value=null",
            "megarl grpo, which needs no critic",
        ),
        metrics=("value/explained_variance", "value/error"),
        steps=(explained[-CRITIC_PHASES][0], explained[-1][0]),
    )


def groups_without_spread(data: RunData) -> Finding | None:
    """Find prompts whose responses all score the same, in a run that has not solved them."""
    equal = data.series("rollout/zero_spread_groups")
    if len(equal) < RECENT or learned(data):
        return None
    rollouts, n = data.number("ppo.rollouts"), data.number("rollout.n")
    of_phase = dict(data.series("rollout/prompts"))
    usual = rollouts / n if rollouts and n else 0.0
    shares = [(step, value / prompts) for step, value in equal if (prompts := of_phase.get(step, usual)) > 0]
    late = median(values(shares[-RECENT:]))
    if not shares or late < EQUAL_GROUPS:
        return None
    return Finding(
        name="groups_without_spread",
        severity="problem" if late >= 1 else "warning",
        title="The responses to most prompts all score the same",
        evidence=f"{percent(late)} of the prompts were so in the median of the last {RECENT} {data.unit}s; the score "
        f"was {shown(data.series('rollout/score')[-1][1]) if data.series('rollout/score') else 'not logged'}.",
        cause="Responses are compared within a prompt, so such prompts teach nothing: they are too hard or too easy, "
        "or the reward is too coarse.",
        remedy=remedies(
            data,
            "prompts that are sometimes solved",
            "a reward with more levels",
            "a larger rollout.n",
            "ppo.dynamic_sampling={}",
            "rollout.temperature=1",
        ),
        metrics=("rollout/zero_spread_groups", SPREAD),
        steps=(_since(shares, EQUAL_GROUPS), shares[-1][0]),
    )


def responses_cut(data: RunData) -> Finding | None:
    """Find responses that are truncated, unless they all are from the beginning on."""
    cut = data.series("rollout/cut")
    if len(cut) < RECENT:
        return None
    first, last = mean(values(cut[:3])), mean(values(cut[-RECENT:]))
    if last < CUT or first >= ALWAYS_CUT:
        return None
    most = data.setting("rollout.max_new_tokens")
    return Finding(
        name="responses_cut",
        severity="warning",
        title="Most responses are truncated",
        evidence=f"{percent(last)} of the responses in the last {RECENT} {data.unit}s ended at rollout.max_new_tokens"
        f"{'' if most is None else f'={most}'}; at first it was {percent(first)}.",
        cause="The policy does not learn to end: the reward does not ask for it, or there is not enough room.",
        remedy=remedies(
            data,
            "a larger rollout.max_new_tokens",
            "ppo.overlong.missing_eos_penalty=1 or ppo.overlong.penalty",
            "ppo.overlong.mask=true, so that they do not train",
        ),
        metrics=("rollout/cut", "rollout/response_tokens"),
        steps=(_since(cut, CUT), cut[-1][0]),
    )


def logprob_drift(data: RunData) -> Finding | None:
    """Find log-probs that differ between sampling and training."""
    drift = data.series("rollout/logprob_drift")
    if len(drift) < 3 or data.setting("rollout.replay") or data.setting("ppo.correction") is not None:
        return None  # responses of an earlier run are of other weights, and a correction is there for such
    bound = DRIFT["fp32" if data.setting("trainer.precision", "fp32") == "fp32" else "bf16"]
    first, last = median(values(drift[:3])), median(values(drift[-3:]))
    grown = last >= bound / 10 and last >= DRIFT_GROWTH * first
    if last < bound and not grown:
        return None
    return Finding(
        name="logprob_drift",
        severity="warning",
        title="Sampling and training disagree about probabilities",
        evidence=f"rollout/logprob_drift is {shown(last)} nats per token in the last three {data.unit}s; it was "
        f"{shown(first)} at first.",
        cause="Different precision or programs in sampling and training, or responses of older weights.",
        remedy=remedies(
            data,
            "trainer.precision=fp32 for a comparison",
            "ppo.correction={} weights tokens by how far the two are apart",
            "look at where responses come from (extensions.orchestrator, rollout.engine.layout)",
        ),
        metrics=("rollout/logprob_drift", "correction/ess"),
        steps=(drift[0][0], drift[-1][0]),
    )
