"""TRL's PPOTrainer: a step over queries, responses and scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from megarl.compat.trl.config import PPOConfig
from megarl.compat.trl.model import AutoModelForCausalLMWithValueHead, Reference, drawing
from megarl.errors import ConfigError, DataError

_NAMES = {
    "objective/kl": "rollout/kl",
    "objective/kl_coef": "rollout/kl_coef",
    "objective/entropy": "rollout/entropy",
    "ppo/mean_scores": "rollout/score",
    "ppo/std_scores": "rollout/score_std",
    "ppo/loss/policy": "policy/loss",
    "ppo/loss/value": "value/loss",
    "ppo/loss/total": "train/loss",
    "ppo/policy/approxkl": "policy/approx_kl",
    "ppo/policy/clipfrac": "policy/clip_fraction",
    "ppo/policy/ratio": "policy/ratio",
    "ppo/val/clipfrac": "value/clip_fraction",
    "ppo/val/error": "value/error",
    "ppo/val/var_explained": "value/explained_variance",
    "ppo/learning_rate": "train/lr",
}
"""TRL's names of statistics, and the metrics that they are (docs/metrics.md)."""


class PPOTrainer:
    """Trains a model with PPO on responses whose scores the caller knows."""

    def __init__(
        self,
        config: PPOConfig,
        model: AutoModelForCausalLMWithValueHead,
        ref_model: Reference | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        *,
        data_collator: Callable[[list[Any]], Any] | None = None,
        **others: Any,
    ) -> None:
        """Build the model with the settings of `config`.

        Args:
            config: the settings.
            model: the policy with its value head.
            ref_model: what `create_reference_model` returned for it (None: the same).
            tokenizer: the tokenizer of the caller; megarl reads its own from the model's folder.
            dataset: what `dataloader` gives batches of; None: there is no `dataloader`.
            data_collator: makes a batch of a list of the dataset's entries.
            others: refused.
        """
        if ref_model is not None and (not isinstance(ref_model, Reference) or ref_model.model is not model):
            raise ConfigError(
                "ref_model is of another model: the reference is the policy before its first step, so give "
                "create_reference_model(model), or None",
                key="ref_model",
            )
        for name, value in others.items():
            raise ConfigError(
                f"PPOTrainer has no argument {name}: optimizers and schedules are keys of optim.*, which "
                "PPOConfig(overrides=(...)) sets",
                key=name,
                value=value,
            )
        self.config, self.model, self.ref_model, self.tokenizer = config, model, ref_model, tokenizer
        self.session = model.open(config, trains=True)
        self.dataset = dataset
        self.dataloader: Any = None
        if dataset is not None:
            shuffle = torch.Generator().manual_seed(config.seed)
            self.dataloader = DataLoader(
                dataset, config.batch_size, shuffle=True, drop_last=True, collate_fn=data_collator, generator=shuffle
            )

    def generate(
        self,
        query_tensor: Tensor | Sequence[Tensor],
        length_sampler: Callable[[], int] | None = None,
        *,
        batch_size: int | None = None,
        return_prompt: bool = True,
        **settings: Any,
    ) -> Tensor | list[Tensor]:
        """Return responses to one query [time], as [1, time], or to a list of them, as a list.

        Args:
            query_tensor: the queries.
            length_sampler: returns the maximum number of new tokens of a response.
            batch_size: accepted, as the generator fills its own batches.
            return_prompt: whether responses begin with their queries. Those of an encoder-decoder never do.
            settings: as of the model's `generate`.
        """
        drawn = drawing(settings)
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        if any(query.dim() != 1 for query in queries):
            raise DataError("generate takes one query [time] or a list of them", key="query_tensor")
        if length_sampler is None:
            rollouts = self.model.sample(queries, **drawn)
        else:
            lengths = [int(length_sampler()) for _ in queries]
            rollouts = [
                self.model.sample([query], **{**drawn, "max_new_tokens": length})[0]
                for query, length in zip(queries, lengths, strict=True)
            ]
        found = self.model.as_tensors(rollouts, with_query=return_prompt)
        return found[0].unsqueeze(0) if isinstance(query_tensor, Tensor) else found

    def step(
        self,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        scores: Sequence[Tensor | float],
        response_masks: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Train on responses with PPO, and return statistics by TRL's names and by megarl's.

        Args:
            queries: token ids of each query.
            responses: token ids of each response, without its query. Those of an encoder-decoder may begin with the
                start token, as `generate` returns them.
            scores: a number for each.
            response_masks: refused.
        """
        if response_masks is not None:
            raise ConfigError("response_masks are not available: leave them out", key="response_masks")
        for name, given in (("queries", queries), ("responses", responses), ("scores", scores)):
            if len(given) != self.config.batch_size:
                raise DataError(
                    f"step() got {len(given)} {name}, and batch_size={self.config.batch_size}: give one for each, or "
                    "change PPOConfig(batch_size=...)",
                    key=name,
                    value=len(given),
                )
        session = self.session
        answers = [self.model.without_start(one.tolist()) for one in responses]
        made = session.responses([query.tolist() for query in queries], answers)
        rows = session.advantages(session.forward(made), [_number(score) for score in scores])
        collected: list[dict[str, float]] = []
        for minibatch in session.minibatches(rows):
            losses = session.forward_backward(minibatch)
            collected.append({**losses, **session.optim_step()})
        return _named({**session.end_phase(), **_means(collected)})

    def log_stats(self, stats: Mapping[str, Any], batch: Any, rewards: Any, **_: Any) -> None:
        """Do nothing: there is no tracker; `step` returned the statistics."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy as a folder that transformers loads."""
        self.model.save_pretrained(folder)

    def close(self) -> None:
        """Release the model and its processes."""
        self.model.close()


def _number(score: Tensor | float) -> float:
    return float(score.item() if isinstance(score, Tensor) else score)


def _means(collected: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each statistic over the minibatches that have it."""
    found: dict[str, list[float]] = {}
    for one in collected:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items() if name != "tokens"}


def _named(stats: Mapping[str, float]) -> dict[str, Any]:
    return {**stats, **{theirs: stats[ours] for theirs, ours in _NAMES.items() if ours in stats}}
