"""How the experience of a phase is made: responses to its prompts, and their scores. A class of the user can replace
it (`extensions.orchestrator`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.data.prompts import Prompt
from megarl.errors import ConfigError
from megarl.experience.collection import Scored
from megarl.functions.extensions import failed, load, wrong_kind
from megarl.functions.named import resolve
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout

KEY = "extensions.orchestrator"


class Orchestrator:
    """Generates with the policy and scores with what `reward` names. Every process calls every method in the same
    order, and all get the same results; a subclass overrides what it does otherwise.

    Attributes:
        module: the module that trains: its configuration, tokenizer, grid and number of completed phases.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def generate(self, prompts: Sequence[Prompt], first: int) -> list[Rollout]:
        """Return `rollout.n` responses to each prompt from index `first` on. A rollout's prompt_id is the index of its
        prompt."""
        responses: list[Rollout] = self.module.generate(prompts, first)
        return responses

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Scores:
        """Return the scores of responses, None for one without a score."""
        scores: Scores = self.module.score(prompts, rollouts)
        return scores

    def respond(self, prompts: Sequence[Prompt], first: int) -> Scored:
        """Return scored responses to the prompts from index `first` on, with greedy ones where advantages need them;
        one call scores both."""
        sampled = self.generate(prompts, first)
        greedy = self.module.generate_greedy(prompts, first) if self.module.needs.greedy else []
        scores = self.score(prompts, [*sampled, *greedy])
        of_greedy = scores.part(slice(len(sampled), None)).values
        return Scored(sampled, scores.part(slice(len(sampled))), greedy, of_greedy)

    def texts(self, rollouts: Sequence[Rollout]) -> list[str]:
        """Return the responses as text."""
        return [self.module.tokenizer.decode(rollout.response_without_eos) for rollout in rollouts]


def build_orchestrator(name: str | None, module: Any) -> Orchestrator:
    """Return the orchestrator of a module: megarl's own, or an object of the class that `extensions.orchestrator`
    names."""
    if name is None:
        return Orchestrator(module)
    kind = load(KEY, name, "class")
    if not (isinstance(kind, type) and issubclass(kind, Orchestrator)):
        raise wrong_kind(KEY, name, "a subclass of megarl.experience.orchestrator.Orchestrator", kind)
    try:
        return kind(module)
    except Exception as error:  # the user's code raises anything
        raise failed(KEY, name, "cannot be made with the module", error, resolve(name, KEY, "class").file) from error


def checked(found: Any, prompts: Sequence[Prompt], name: str | None) -> Scored:
    """Return what an orchestrator's `respond` returned; refuse what a phase cannot train on."""
    if not isinstance(found, Scored):
        raise ConfigError(
            f"{KEY}={name}: respond() returned a {type(found).__name__}: return a megarl.experience.collection.Scored",
            key=KEY,
            value=name,
        )
    problem = None
    if len(found.scores.values) != len(found.rollouts):
        problem = f"returned {len(found.rollouts)} responses and {len(found.scores.values)} scores: return one for each"
    elif any(not 0 <= rollout.prompt_id < len(prompts) for rollout in found.rollouts):
        problem = f"returned a response whose prompt_id is not the index of one of {len(prompts)} prompts"
    if problem is not None:
        raise ConfigError(f"{KEY}={name}: respond() {problem}", key=KEY, value=name)
    return found
