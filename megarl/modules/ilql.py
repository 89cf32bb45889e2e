"""Implicit language Q-learning: a policy, V and Q heads on one trunk learn from scored samples. The values guide
generation."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import ilql_loss, next_state_values
from megarl.clock import Work
from megarl.config.cluster import PlanConfig
from megarl.config.ilql import ILQLConfig
from megarl.data.agreement import refuse_different_data
from megarl.data.offline import build_offline_loader, open_store
from megarl.data.prompts import Prompt
from megarl.experience.build_scorers import reward_roles
from megarl.experience.rows import training_flops
from megarl.models.exchange.pretrained import Sources, adapters
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.modules.generative import GenerativeModule
from megarl.modules.losses import count_targets
from megarl.modules.workload import Workload, generation, sequences
from megarl.parallel.engine import Stats
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows, RowSource
from megarl.parallel.shards import refused_once
from megarl.rollout.guided import guided
from megarl.rollout.requests import Rollout

TERMS = (
    *("train/loss", "train/loss_q", "train/loss_v", "train/loss_cql", "train/loss_awac"),
    *("train/q", "train/v"),
)


class ILQL(GenerativeModule):
    """Implicit language Q-learning. One training step is one optimizer step over a global batch of samples."""

    config: ILQLConfig

    def prepare(self) -> None:
        """Read the evaluation prompts."""
        super().prepare()
        self.prepare_prompts(train=False)

    @staticmethod
    def roles(config: ILQLConfig, vocab_size: int, sources: Sources) -> list[Role]:
        """Return the policy with a value head and the Q heads, and the reward model of evaluations if there is one."""
        policy = Role(
            "policy",
            config.model,
            vocab_size,
            heads=("lm", "value", *["q"] * config.ilql.q_heads),
            optim=config.optim,
            source=sources.at(config.model.path),
            about="trains, with Q heads, their targets and V",
            **adapters(config, sources, config.model),
        )
        return [policy, *reward_roles(config, sources)]

    @staticmethod
    def plan(config: ILQLConfig, assumed: PlanConfig) -> Workload:
        """Return the size of an optimizer step over samples, and of the generation in evaluations."""
        sizes = sequences(config, assumed)
        if not config.data.eval or config.trainer.eval_every is None:
            return Workload(**sizes)
        return Workload(evaluates=True, **sizes, **generation(config, assumed))

    def configure_model(self) -> None:
        """Open the store of samples and build the policy."""
        if self.engines:
            return
        self.store = refused_once(self.grid, lambda: open_store(self.config.data, self.tokenizer))
        arrays = [self.store.arrays[name] for name in ("starts", "tokens", "action_mask")]
        refuse_different_data(self.grid, arrays, "data.train", kept=self.store.returns.tobytes())
        for role in self.roles(self.config, self.vocab_size, self.sources):
            self.engines[role.name] = self.build(role, self.config.trainer.max_steps)
        self.policy = self.engines["policy"]
        self.prepare_generation()

    @property
    def rows_per_step(self) -> int:
        """Number of samples in a global batch."""
        return self.config.trainer.global_batch_size

    @property
    def rows_there(self) -> int:
        """Number of samples of the training data."""
        return len(self.store.lengths)

    def train_dataloader(self) -> Iterable[Tensor]:
        """Return the loader of sample indices, from the first sample that the run did not use yet."""
        return build_offline_loader(self.config, self.store, start=self.steps_done, rows=self.rows_read)

    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        """Take one optimizer step, update the target Q heads when they are due, and log the terms of the loss."""
        with self.clock.part("train"):
            rate = self.policy.learning_rate
            rows = self.rows_at(indices)
            metrics = self.gradients(rows, torch.arange(len(rows)))
            norms = self.step_optimizers()
            self.advance()
        sizes = (self.config.model, self.vocab_size, rows.lengths, self.policy.config.adapter, rows.prompts)
        self.work = Work(int(rows.lengths.sum()), training_flops(*sizes))
        self.log_dict({name: metrics[name.removeprefix("train/")] for name in TERMS})
        self.log_dict({"train/grad_norm": norms["policy"], "train/lr": rate, **self.policy.observed})

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of the loss over the samples at these indices."""
        micro, pack = self.config.trainer.micro_batch_size, self.config.ilql.pack
        self.last_batch = make_microbatches(rows, indices, self.policy, per_microbatch=micro, share_bins=pack)
        return self.policy.train_step(self.last_batch, self.loss, count_targets)

    def rows_at(self, indices: Tensor) -> Rows:
        """Return samples of the training data."""
        return self.store.take(indices)

    def advance(self, *, new_weights: bool = True, rows: int | None = None) -> None:
        """Count a training step, and update the target Q heads when they are due."""
        super().advance(new_weights=new_weights, rows=rows)
        settings = self.config.ilql
        if self.steps_done % settings.target_every == 0:  # counted over the whole run, resumes included
            for model in self.policy.models:
                model.move_targets(settings.target_alpha)

    def loss(self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Stats]:
        """Return the ILQL loss and its terms, averaged over the actions (response tokens) of the global batch."""
        settings, mask, to_rows = self.config.ilql, batch.rows.action_mask, batch.gather_rows
        v = to_rows(model.values(hidden))
        next_v, not_done = next_state_values(v, mask)
        heads = model.token_q(hidden, batch.targets, batch.target_mask)
        q, target_q, q_nll = ([to_rows(one) for one in each] for each in (heads.q, heads.target_q, heads.nll))
        loss, parts = ilql_loss(
            q=q,
            target_q=target_q,
            v=v,
            next_v=next_v,
            q_nll=q_nll,
            policy_nll=-to_rows(model.logprobs(hidden, batch.targets, batch.target_mask).logprobs),
            rewards=batch.rows["rewards"],
            not_done=not_done,
            mask=mask,
            tau=settings.tau,
            gamma=settings.gamma,
            cql_scale=settings.cql_scale,
            awac_scale=settings.awac_scale,
            awac_beta=settings.awac_beta,
            denominator=counts["tokens"],
        )
        means = {name: (value * mask).sum() / counts["tokens"] for name, value in (("q", sum(q) / len(q)), ("v", v))}
        return loss, {"loss": loss, **parts, **means}

    # --- evaluation -----------------------------------------------------------------------------------------------

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        beta: float | None = None,
        **changes: Any,
    ) -> list[Rollout]:
        """Return responses whose tokens the Q and V heads guide. `beta` and `changes` override settings of
        `rollout`."""
        token_scorer = guided(self.config.rollout.ilql_beta if beta is None else beta)
        return self.source.collect(prompts, n, stream=stream, phase=phase, token_scorer=token_scorer, **changes)
