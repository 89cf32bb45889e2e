"""Rejection-sampling fine-tuning: sample many responses to each prompt, keep the best, fine-tune on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from megarl.clock import Work
from megarl.config.cluster import PlanConfig
from megarl.config.rft import RFTConfig
from megarl.errors import ConfigError
from megarl.experience.build_scorers import reward_roles
from megarl.experience.rows import rollouts_to_rows, training_flops
from megarl.models.exchange.pretrained import Sources, adapters
from megarl.models.roles import Role
from megarl.modules.clone import clone_behaviour, clones
from megarl.modules.generative import GenerativeModule
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.workload import Workload, responses, reward_note
from megarl.parallel.grid import SEEDS
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Rows, RowSource
from megarl.rewards.answers import Score
from megarl.rewards.scores import total
from megarl.rollout.requests import Rollout


class RFT(GenerativeModule):
    """Rejection-sampling fine-tuning. One training step is one phase: generate, score, then several improvement steps,
    each on a smaller share of the best responses."""

    config: RFTConfig

    def prepare(self) -> None:
        """Read the prompts and set the number of phases."""
        super().prepare()
        self.planned = self.config.trainer.max_phases
        self.prepare_prompts(train=True)

    @staticmethod
    def roles(config: RFTConfig, vocab_size: int, sources: Sources) -> list[Role]:
        """Return the policy, and the reward model if there is one."""
        source = sources.at(config.model.path)
        about = "trains and generates"
        own = adapters(config, sources, config.model)
        policy = Role("policy", config.model, vocab_size, optim=config.optim, source=source, about=about, **own)
        return [policy, *reward_roles(config, sources)]

    @staticmethod
    def plan(config: RFTConfig, assumed: PlanConfig) -> Workload:
        """Return the size of a phase, with the mean number of responses that improvement steps keep."""
        rft = config.rft
        if rft.prompts is None:
            raise ConfigError(
                "rft.prompts=null means all prompts of a file, which a plan does not read: set their number",
                key="rft.prompts",
            )
        rollouts = rft.prompts * config.rollout.n
        kept = (
            1 - (rft.start_percentile + rft.end_percentile) / 2
        )  # share of responses, averaged over improvement steps
        return Workload(
            steps=rft.improve_steps * max(1, math.ceil(rollouts * kept / config.trainer.global_batch_size)),
            rollouts=rollouts,
            notes=reward_note(config),
            **responses(config, assumed),
        )

    def configure_model(self) -> None:
        """Build the policy and the rollout source."""
        if self.engines:
            return
        config = self.config
        improvements = config.trainer.max_phases * config.rft.improve_steps
        for role in self.roles(config, self.vocab_size, self.sources):
            self.engines[role.name] = self.build(role, improvements * self._most_minibatches())
        self.policy = self.engines["policy"]
        self.prepare_generation()

    def _most_minibatches(self) -> int:
        """Return the minibatches of an improvement step that keeps all responses: an upper bound for the learning-rate
        schedule."""
        responses = self.rows_per_step * self.config.rollout.n
        return -(-responses // self.config.trainer.global_batch_size)

    def on_fit_start(self) -> None:
        """Clone behaviour at the start of a run that is configured to; a resumed run has it in its weights."""
        if clones(self.config) and not self.resumes:
            with self.clock.part("clone"):
                clone_behaviour(self.config, self.tokenizer, self.grid, self.vocab_size, [self.policy], self.sources)

    @property
    def rows_per_step(self) -> int:
        """Number of prompts in a phase."""
        return self.config.rft.prompts or len(self.prompts)

    def train_dataloader(self) -> Iterable[int]:
        """Return an item per phase."""
        return self.phase_loader()

    def training_step(self, _: int, batch_idx: int) -> None:
        """Run one phase over the next prompts and log its metrics."""
        prompts = self.draw(0, self.rows_per_step)
        rate = self.policy.learning_rate
        responses = self.generate(prompts)
        scores = self.score(prompts, responses)
        rollouts, scored = self.keep_scored(responses, scores)
        answers = drop_duplicates(rollouts, scored)
        rows = rollouts_to_rows([rollout for rollout, _ in answers])
        with self.clock.part("train"):
            stats = self._improve(rows, answers)
        self.advance()
        self.work = self._work(rows, stats["train/optimizer_steps"])
        totals = scores.totals()
        self.log_dict(
            {
                "train/lr": rate,
                "rollout/score": sum(totals) / len(totals),
                "rollout/distinct": len(answers) / len(rollouts),
                **self.score_metrics(scores, len(responses) - len(rollouts)),
                "rollout/response_tokens": sum(len(rollout.response) for rollout in rollouts) / len(rollouts),
                **stats,
            }
        )

    def _improve(self, rows: Rows, answers: Sequence[tuple[Rollout, float]]) -> dict[str, float]:
        """Train on the responses above a percentile of their prompt's scores. The percentile rises with each
        improvement step."""
        config, rft = self.config, self.config.rft
        shuffle = torch.Generator().manual_seed((config.seed * 1_000_003 + self.steps_done) % SEEDS)
        collected: list[dict[str, float]] = []
        kept = 0
        for percentile in np.linspace(rft.start_percentile, rft.end_percentile, rft.improve_steps):
            best = torch.tensor(rows_above_percentile(answers, float(percentile)))
            kept += len(best)
            for indices in best[torch.randperm(len(best), generator=shuffle)].split(config.trainer.global_batch_size):
                metrics = self.gradients(rows, indices)
                norms = self.step_optimizers()
                measured = {"train/loss": metrics["loss"], "train/grad_norm": norms["policy"]}
                collected.append({**measured, **self.policy.observed})
        means = {key: sum(stats[key] for stats in collected) / len(collected) for key in collected[0]}
        return {
            **means,
            "train/kept": kept / (len(answers) * rft.improve_steps),
            "train/optimizer_steps": float(len(collected)),
        }

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of the cross entropy over the responses at these indices."""
        micro = self.config.trainer.micro_batch_size
        self.last_batch = make_microbatches(rows, indices, self.policy, per_microbatch=micro, share_bins=True)
        return self.policy.train_step(self.last_batch, cross_entropy, count_targets)

    def _work(self, rows: Rows, steps: float) -> Work:
        lengths = rows.lengths
        passes = self.config.trainer.global_batch_size * steps / len(lengths)
        adapter = self.policy.config.adapter
        flops = training_flops(self.config.model, self.vocab_size, lengths, adapter, rows.prompts)
        return Work(int(lengths.sum() * passes), flops * passes)


def drop_duplicates(rollouts: Sequence[Rollout], scores: Sequence[Score]) -> list[tuple[Rollout, float]]:
    """Return the responses with their scores. Of responses to one prompt with the same tokens, only the first is
    kept."""
    unique: dict[tuple[int, tuple[int, ...]], tuple[Rollout, float]] = {}
    for rollout, score in zip(rollouts, scores, strict=True):
        unique.setdefault((rollout.prompt_id, tuple(rollout.response)), (rollout, total(score)))
    return list(unique.values())


def rows_above_percentile(answers: Sequence[tuple[Rollout, float]], percentile: float) -> list[int]:
    """Return the indices of the responses that score at least their prompt's percentile (0 to 1).

    The lowest score of a prompt is not kept. Only where all responses to a prompt score the same are they kept, if they
    score at least the mean of all responses.
    """
    by_prompt: dict[int, list[int]] = {}
    for index, (rollout, _) in enumerate(answers):
        by_prompt.setdefault(rollout.prompt_id, []).append(index)
    all_scores = [score for _, score in answers]
    mean = min(
        math.fsum(all_scores) / len(all_scores), max(all_scores)
    )  # rounding must not raise it above equal scores
    kept: list[int] = []
    for indices in by_prompt.values():
        scores = [answers[index][1] for index in indices]
        better = [score for score in scores if score > min(scores)]
        bound = max(float(np.quantile(scores, percentile)), min(better)) if better else mean
        kept += [index for index, score in zip(indices, scores, strict=True) if score >= bound]
    return sorted(kept)
