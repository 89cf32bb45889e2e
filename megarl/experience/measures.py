"""Measures of an evaluation with several responses per prompt: standard errors, best of k, pass@k, majority votes.

Prompts are the unit of every standard error, as the responses to one prompt are not independent of each other. A
response without a score counts in no measure. `measures` gives the names under which evaluations log them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

SCORE_ERROR, VOTE, VOTE_ERROR = "eval/score_se", "eval/vote", "eval/vote_se"
Answer = Hashable | None
"""What a response answers, for a vote; None where it has no answer."""


def measures(groups: Sequence[Sequence[float]], answers: Sequence[Sequence[Answer]] | None = None) -> dict[str, float]:
    """Return the measures of an evaluation by logged name.

    A standard error needs two prompts, and is missing with fewer. `best@k` and `pass@k` are means over the prompts with
    at least k scores. `pass@k` exists if every score is 0 or 1.

    Args:
        groups: the scores of the responses to each prompt; of those that have one.
        answers: the answer in each of these responses, for a majority vote; None for no vote.
    """
    found: dict[str, float] = {}
    error = clustered_error(groups)
    if error is not None:
        found[SCORE_ERROR] = error
    largest = max((len(group) for group in groups), default=0)
    if largest < 2:
        return found
    binary = all(score in (0.0, 1.0) for group in groups for score in group)
    for k in powers_of_two(largest):
        enough = [group for group in groups if len(group) >= k]
        found |= _mean_and_error(f"eval/best@{k}", [best_of(group, k) for group in enough])
        if binary:
            values = [pass_at(len(group), sum(score == 1.0 for score in group), k) for group in enough]
            found |= _mean_and_error(f"eval/pass@{k}", values)
    if answers is not None:
        votes = [vote(group, given) for group, given in zip(groups, answers, strict=True) if group]
        found[VOTE] = math.fsum(votes) / len(votes)
        error = clustered_error([[score] for score in votes])
        if error is not None:
            found[VOTE_ERROR] = error
    return found


def clustered_error(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean of all scores, or None with fewer than two prompts.

    With G prompts, N scores and mean m it is sqrt(G / (G - 1) * sum over prompts of (sum of score - m)^2) / N (Liang
    and Zeger 1986). With equally many scores per prompt this is the standard deviation of the prompts' means (ddof 1)
    divided by sqrt(G).
    """
    given = [group for group in groups if group]
    if len(given) < 2:
        return None
    count = sum(map(len, given))
    mean = math.fsum(score for group in given for score in group) / count
    squares = math.fsum(math.fsum(score - mean for score in group) ** 2 for group in given)
    return math.sqrt(len(given) / (len(given) - 1) * squares) / count


def best_of(scores: Sequence[float], k: int) -> float:
    """Return the expected maximum of `k` of the scores, drawn without replacement.

    With scores x_1 <= ... <= x_n it is the sum of x_i * C(i - 1, k - 1) / C(n, k), as x_i is the maximum of that many
    subsets. Each weight follows from the one above it, so that no binomial coefficient is computed.
    """
    ordered = sorted(scores)
    weight, terms = k / len(ordered), []
    for i in range(len(ordered), k - 1, -1):
        terms.append(weight * ordered[i - 1])
        weight *= (i - k) / (i - 1) if i > 1 else 0.0
    return math.fsum(terms)


def pass_at(n: int, right: int, k: int) -> float:
    """Return the probability that at least one of `k` responses, drawn without replacement from `n`, is among the
    `right` ones: 1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374), as a product."""
    if n - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - right + 1, n + 1)))


def vote(scores: Sequence[float], answers: Sequence[Answer]) -> float:
    """Return the mean score of the responses with the most frequent answer; of equally frequent ones, with the first.

    Responses without an answer do not vote. If none has an answer, it is the mean of all scores.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    winner = counts.most_common(1)[0][0] if counts else None  # of equal counts, the one seen first
    chosen = [score for score, answer in zip(scores, answers, strict=True) if answer == winner]
    return math.fsum(chosen) / len(chosen)


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4, ... up to `largest`, and `largest` itself."""
    return [*(2**exponent for exponent in range((largest - 1).bit_length())), largest]


def _mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    found = {name: math.fsum(values) / len(values)}
    error = clustered_error([[value] for value in values])
    return found if error is None else {**found, f"{name}_se": error}
