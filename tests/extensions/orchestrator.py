"""An orchestrator of one's own: a response's score is its rank among the responses to its prompt."""

from collections.abc import Sequence
from dataclasses import replace

from megarl.data.prompts import Prompt
from megarl.experience.orchestrator import Orchestrator
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout


class Ranked(Orchestrator):
    """Scores become 0, 1, 2, ... within each prompt, best last: only the order of the rewards counts."""

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Scores:
        scores = super().score(prompts, rollouts)
        ranks: list[float | None] = [None] * len(rollouts)
        for prompt in {rollout.prompt_id for rollout in rollouts}:
            rows = [row for row, rollout in enumerate(rollouts) if rollout.prompt_id == prompt]
            for rank, row in enumerate(sorted(rows, key=lambda row: (scores.values[row], row))):
                ranks[row] = float(rank)
        return replace(scores, values=ranks)
