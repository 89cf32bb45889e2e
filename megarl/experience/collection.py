"""The scored responses of a phase. With dynamic sampling, prompts whose responses give no signal are replaced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megarl.data.prompts import Prompt
from megarl.errors import NothingToLearnError
from megarl.experience.scorers import keep_scored
from megarl.experience.shaping import Greedy
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores, joined, total
from megarl.rollout.requests import Rollout


@dataclass(frozen=True)
class Scored:
    """Responses to some prompts, with their scores.

    Attributes:
        rollouts: the sampled responses.
        scores: their scores, None for a response without one.
        greedy: the greedy response to each prompt, where advantages need it.
        greedy_scores: their scores.
    """

    rollouts: list[Rollout]
    scores: Scores
    greedy: list[Rollout] = field(default_factory=list)
    greedy_scores: list[Score | None] = field(default_factory=list)


@dataclass(frozen=True)
class Collected:
    """The responses that a phase trains on.

    Attributes:
        prompts: all prompts that the phase used; a rollout's prompt_id is the index of its prompt.
        rollouts: the responses that have a score and whose prompt was not replaced.
        scores: their scores.
        greedy: the greedy responses that they are compared with.
        trained_scores: the same scores with their components.
        all_scores: scores of all responses, also of those that are left out.
        unscored: number of responses without a score, their prompts' greedy responses included.
        replaced: number of prompts that do not train because their responses have fewer than two different scores.
    """

    prompts: list[Prompt]
    rollouts: list[Rollout]
    scores: list[Score]
    greedy: Greedy | None
    trained_scores: Scores
    all_scores: Scores
    unscored: int
    replaced: int


def collect(
    next_prompts: Callable[[int, int], Sequence[Prompt]],
    respond: Callable[[Sequence[Prompt], int], Scored],
    wanted: int,
    *,
    most: int | None = None,
    clip_scores: float | None = None,
) -> Collected:
    """Return the scored responses to `wanted` prompts.

    Args:
        next_prompts: next_prompts(first, count) returns the phase's prompts from index `first` on.
        respond: respond(prompts, first) returns responses to the prompts from index `first` on. It is given all prompts
            so far.
        wanted: number of prompts.
        most: number of prompts that may be used to replace those whose responses have equal scores; None: none is
            replaced.
        clip_scores: bound at which scores are clipped before they are compared.
    """
    prompts: list[Prompt] = []
    rounds: list[Scored] = []
    useful: set[int] = set()
    while len(useful) < wanted and len(prompts) < (most or wanted):
        first = len(prompts)
        count = min(wanted - len(useful), (most or wanted) - first)
        prompts += next_prompts(first, count)
        rounds.append(respond(prompts, first))
        present = range(first, first + count)
        useful.update(present if most is None else with_spread(rounds[-1], clip_scores))
    rollouts = [rollout for one in rounds for rollout in one.rollouts]
    scores = joined([one.scores for one in rounds])
    greedy = {rollout.prompt_id: rollout for one in rounds for rollout in one.greedy}
    baselines = None
    if greedy:
        answers = [score for one in rounds for score in one.greedy_scores]
        baselines = dict(zip(greedy, answers, strict=True))
    kept, values, compared = keep_scored(rollouts, scores, baselines)
    unscored = len(rollouts) - len(kept)
    trained = [row for row, rollout in enumerate(kept) if rollout.prompt_id in useful]
    kept, values = [kept[row] for row in trained], [values[row] for row in trained]
    against = None
    if compared is not None:
        theirs = [greedy[rollout.prompt_id] for rollout in kept]
        against = Greedy(
            [compared[row] for row in trained],
            [one.finish_reason == "length" for one in theirs],
            [len(one.response) for one in theirs],
        )
    ids = {(rollout.prompt_id, rollout.sample_id) for rollout in kept}
    rows = [row for row, rollout in enumerate(rollouts) if (rollout.prompt_id, rollout.sample_id) in ids]
    return Collected(prompts, kept, values, against, scores.of(rows), scores, unscored, len(prompts) - len(useful))


def with_spread(scored: Scored, clip: float | None = None) -> set[int]:
    """Return the ids of the prompts with at least two responses of different score. Scores are clipped to plus or minus
    `clip` first, and compared in float32, as training computes with them."""
    values: dict[int, set[np.float32]] = {}
    for rollout, score in zip(scored.rollouts, scored.scores.values, strict=True):
        if score is not None:
            values.setdefault(rollout.prompt_id, set()).add(np.float32(total(_clipped(score, clip))))
    return {prompt for prompt, different in values.items() if len(different) > 1}


def _clipped(score: Score, clip: float | None) -> Score:
    if clip is None:
        return score
    return [_clip(reward, clip) for reward in score] if isinstance(score, list) else _clip(score, clip)


def _clip(value: float, bound: float) -> float:
    return min(max(value, -bound), bound)


def no_spread(prompts: int, phase: int, limit: float) -> NothingToLearnError:
    """Return the error for a phase in which no prompt has responses of different score."""
    return NothingToLearnError(
        f"phase {phase} has nothing to learn from: the responses to each of its {prompts} prompts have equal scores, "
        f"and ppo.dynamic_sampling.limit={limit:g} is reached: check reward.fn (rollout.dump writes the responses to "
        "a folder), use prompts that are neither too easy nor too hard, or raise rollout.n or the limit",
        key="ppo.dynamic_sampling.limit",
        value=limit,
    )


def mean(scores: Sequence[float]) -> float:
    """Return the mean; 0 without scores."""
    return sum(scores) / len(scores) if scores else 0.0
