"""The module of a run, one verb at a time: what `megarl.Session` does in each process of a run.

The world, the models, the optimizers and a restored checkpoint are set up as for training, by a Trainer that trains
nothing; after that the caller calls the module's own steps. Every process calls the same verbs with the same values.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from megarl.checkpoint import ShardedCheckpointIO, step_folder
from megarl.config.algorithms import find_algorithm
from megarl.data.formats import RecordFormat
from megarl.data.prompts import Prompt, PromptLimits, encode_prompt, fit_prompts
from megarl.data.sources import Record
from megarl.errors import ConfigError, DataError
from megarl.experience.build_scorers import REWARD
from megarl.experience.rows import forward_rows, rollouts_to_rows
from megarl.models.gpt import GPT, TokenLogprobs
from megarl.modules.generative import GenerativeModule
from megarl.modules.ppo import PPO
from megarl.modules.ppo_loss import TokenLogprobsOf
from megarl.parallel.all_optimizers import set_learning_rate
from megarl.parallel.engine import Outputs, Stats
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows
from megarl.parallel.strategy import MegatronStrategy
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout, Sampling
from megarl.run.runner import RUN_DIR, Build, damage_told, opened_run, resume_from
from megarl.run.trainer import idle_trainer

NO_REWARD = "megarl.session:no_reward"
"""The reward function of a session without one."""
Given = str | Sequence[int] | Prompt
"""A prompt: a text, tokens, or one that `prompts` returned."""
OwnLoss = Callable[[Tensor, Rows, dict[str, float]], Any]
"""loss(logprobs, rows, counts): the log-probs [rows, time] of a microbatch's tokens, its rows, and the number of
"tokens" (response tokens) and "rows" of the whole batch. It returns the loss, or the loss and statistics."""


class Steps:
    """One process's part of a session.

    A phase is what lies between two changes of the policy: prompts that are drawn or sampled from after an optimizer
    step begin the next one.
    """

    def __init__(self, entry: str, config: Any, build: Build) -> None:
        """Build the models, or restore the checkpoint that `run.resume` names. The arguments are those of
        `run_training`."""
        self.algorithm = find_algorithm(entry)
        self._open, self._resources = ExitStack(), ExitStack()
        try:
            self._set_up(entry, config, build)
        except BaseException:
            self._open.close()
            raise
        self.asked: list[Prompt] = []  # prompts of this phase
        self.drawn = 0  # how many of them are from data.train
        self.changed = False  # whether an optimizer step was taken in this phase
        self.rows: Rows | None = None  # rows of this phase that have advantages
        self.metrics: dict[str, float] = {}  # of this phase
        self._batches: Iterator[Tensor] | None = None
        self._begin_phase()

    def _set_up(self, entry: str, config: Any, build: Build) -> None:
        run = self._open.enter_context(opened_run(entry, config, build))
        self.config, self.module, self.run_dir = run.config, run.module, run.folder.path
        self.trainer: Trainer = idle_trainer(run.config, self.run_dir)
        assert isinstance(self.trainer.strategy, MegatronStrategy)
        self.strategy = self.trainer.strategy
        io = self.strategy.checkpoint_io
        assert isinstance(io, ShardedCheckpointIO)
        self.io = io
        self._open.callback(self.strategy.release)
        with damage_told(io):
            restored = resume_from(run.config.run.resume, self.run_dir)
            self.module.resumes = restored is not None
            self.trainer.fit(self.module, ckpt_path=restored)
        io.restoring = None
        os.environ.pop(RUN_DIR, None)  # the processes of this run have it by now
        self.module.sources.close()

    def ends_with(self, resources: ExitStack) -> None:
        """Release these resources at `close`, after everything else."""
        self._resources = resources

    def close(self) -> None:
        """Release the models, the world and the run's folder."""
        self._open.close()
        self._resources.close()

    def describe(self) -> dict[str, Any]:
        """Return what the caller knows of the run: folder, configuration, parallel layout."""
        return {"run_dir": self.run_dir, "config": self.config, "layout": str(self.module.grid.layout)}

    # --- experience -------------------------------------------------------------------------------------------------

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """Return the next prompts of data.train: `count`, or as many as a phase has."""
        module = self._generative("prompts")
        if module.order is None:
            raise ConfigError(f"train_{self.algorithm.name} does not train on prompts: pass your own", key="prompts")
        self._end_changed_phase()
        found = module.draw(self.drawn, module.rows_per_step if count is None else count)
        self.drawn += len(found)
        return found

    def sample(self, prompts: Sequence[Given], n: int | None = None, **changes: Any) -> list[Rollout]:
        """Return `n` responses to each prompt, by the policy's present weights (None: rollout.n, or 1 where there is no
        such key)."""
        module = self._generative("sample")
        self._end_changed_phase()
        _check_names(changes)
        first = len(self.asked)
        self.asked += self._as_prompts(prompts, changes.get("max_new_tokens", self.config.rollout.max_new_tokens))
        return module.generate(self.asked, first, n=getattr(self.config.rollout, "n", 1) if n is None else n, **changes)

    def responses(self, prompts: Sequence[Given], outputs: Sequence[str | Sequence[int]]) -> list[Rollout]:
        """Return responses that were made elsewhere, one to each prompt, as `sample` returns its own. The log-probs
        under which they were sampled are taken to be the present policy's."""
        if len(prompts) != len(outputs):
            raise DataError(
                f"{len(prompts)} prompts have {len(outputs)} responses: give one for each",
                key="outputs",
                value=len(outputs),
            )
        self._end_changed_phase()
        first = len(self.asked)
        asked = self._as_prompts(prompts, 1)
        tokens = [self._response(one, where.where) for one, where in zip(outputs, asked, strict=True)]
        self.asked += asked
        eos = self.module.tokenizer.eos_id
        return [
            Rollout(
                first + index,
                0,
                list(prompt.tokens),
                one,
                [float("nan")] * len(one),
                "eos" if one[-1] == eos else "length",
                self.module.weights_version,
            )
            for index, (prompt, one) in enumerate(zip(asked, tokens, strict=True))
        ]

    def score(self, responses: Sequence[Rollout]) -> Scores:
        """Return the scores of responses of this phase, by the configured reward."""
        module = self._generative("score")
        if REWARD not in module.scorers or self.config.reward.fn == NO_REWARD:
            raise ConfigError("this session has no reward: give Session(reward_fn=...) or reward.*", key="reward.fn")
        return module.score(self.asked, responses)

    def forward(self, data: Sequence[Rollout] | Rows) -> Rows:
        """Return rows with what the present weights compute of them."""
        rows = data if isinstance(data, Rows) else rollouts_to_rows(data)
        if "rollout_logprobs" in rows and bool(rows["rollout_logprobs"].isnan().any()):
            rows = rows.with_columns(rollout_logprobs=self._logprobs(rows))
        if isinstance(self.module, PPO):
            rows, stats = self.module.evaluate_rows(rows)
            self.metrics |= stats
            return rows
        return rows.with_columns(logprobs=self._logprobs(rows))

    def values(self, rows: Rows) -> Tensor:
        """Return the critic's values [rows, time], at the tokens that they precede."""
        module = self._ppo("values")
        if "values" in rows:
            return rows["values"]
        found = module.values_of(rows)
        if found is None:
            raise ConfigError(
                f"ppo.advantages={self.config.ppo.advantages} has no critic, so there are no values: use gae",
                key="ppo.advantages",
                value=self.config.ppo.advantages,
                offers={"ppo.advantages": ["gae"]},
            )
        return found

    def advantages(self, rows: Rows, scores: Scores | Sequence[Score]) -> Rows:
        """Return rows of `forward` with advantages (and returns, if there is a critic) made of their scores."""
        module = self._ppo("advantages")
        given = scores.values if isinstance(scores, Scores) else scores
        values = [score for score in given if score is not None]
        if not len(values) == len(given) == len(rows):
            raise DataError(
                f"{len(rows)} responses have {len(values)} scores: give each one, and leave out responses without a "
                "score before forward()",
                key="scores",
                value=len(values),
            )
        for index, score in enumerate(values):
            if not np.isfinite(score).all():
                raise DataError(
                    f"scores[{index}] is {score}: give finite numbers, or leave that response out before forward()",
                    key=f"scores[{index}]",
                    value=score,
                )
        if module.needs.greedy:
            kind = self.config.ppo.advantages
            raise ConfigError(
                f"ppo.advantages={kind} compares with greedy responses, which a session lacks: use rloo or grpo",
                key="ppo.advantages",
                value=kind,
                offers={"ppo.advantages": ["rloo", "grpo"]},
            )
        if "old_logprobs" not in rows:
            raise DataError("rows have no log-probs: call forward() before advantages()", key="rows")
        self.rows, self.metrics = module.shape_rows(rows, values, stats=self.metrics)
        return self.rows

    # --- training ---------------------------------------------------------------------------------------------------

    def batch(self) -> Rows:
        """Return the next global batch of data.train, of an algorithm that learns from data."""
        if self.algorithm.unit == "phase":
            raise ConfigError(
                f"train_{self.algorithm.name} learns from its own responses: use prompts() and sample()", key="batch"
            )
        if self._batches is None:
            self._batches = iter(self.module.train_dataloader())  # type: ignore[arg-type]
        indices = next(self._batches, None)
        if indices is None:
            raise DataError(
                f"trainer.max_steps={self.config.trainer.max_steps} batches were used: set a larger one",
                key="trainer.max_steps",
                value=self.config.trainer.max_steps,
            )
        return self.module.rows_at(indices)

    def minibatches(self, rows: Rows) -> list[Tensor]:
        """Return the indices of the minibatches of all inner epochs, in this phase's order."""
        return [indices for epoch in self._ppo("minibatches").epochs(rows) for indices in epoch]

    def is_over(self) -> bool:
        """Return whether the policy has moved past ppo.stop_at_kl, and nothing else trains in this phase."""
        return isinstance(self.module, PPO) and self.module.is_over()

    def forward_backward(self, rows: Rows, loss: OwnLoss | None = None) -> dict[str, float]:
        """Compute the gradients of one optimizer step over the rows: of the algorithm's loss, or of `loss`."""
        if loss is None and isinstance(self.module, PPO) and "advantages" not in rows:
            raise DataError("rows have no advantages: call advantages() before forward_backward()", key="rows")
        everything = torch.arange(len(rows))
        with self.module.clock.part("train"):
            if loss is None:
                return self.module.gradients(rows, everything)
            batch = make_microbatches(
                rows,
                everything,
                self.module.engines["policy"],
                per_microbatch=self.config.trainer.micro_batch_size,
                share_bins=self._packs,
            )
            return self.module.engines["policy"].train_step(
                batch, partial(_own_loss, loss, self._token_logprobs), _count
            )

    def optim_step(self, lr: float | None = None) -> dict[str, float]:
        """Apply the gradients. Return the gradient norm and the learning rate, or nothing if there are no gradients.

        Args:
            lr: learning rate of this step; None: the schedule's.
        """
        engines = [engine for engine in self.module.engines.values() if engine.has_gradients]
        if not engines:
            if self.is_over():
                return {}
            raise DataError(
                "there are no gradients to apply: call forward_backward() before optim_step()", key="forward_backward"
            )
        if lr is not None:
            for engine in engines:
                set_learning_rate(engine, lr)
        rate = engines[0].learning_rate
        with self.module.clock.part("train"):
            norms = self.module.step_optimizers()
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        self.changed = True
        if self.algorithm.unit != "phase":
            self.module.advance()
            self.changed = False
        return {"train/lr": rate, **{f"train/grad_norm/{name}": norm for name, norm in norms.items()}}

    def end_phase(self) -> dict[str, float]:
        """Count the phase, if it has begun, and return its metrics. Sampling after an optimizer step does this by
        itself."""
        metrics, module = self.metrics, self.module
        if not (self.asked or self.drawn or self.changed):
            return {}
        if isinstance(module, PPO) and self.rows is not None:
            module.end_phase(self.rows, metrics, prompts=self.drawn)
        else:
            module.advance(rows=self.drawn)
        self.asked, self.drawn, self.changed, self.rows, self.metrics = [], 0, False, None, {}
        self._begin_phase()
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the evaluation prompts' responses, by the present weights."""
        module = self._generative("evaluate")
        if module.evaluation is None:
            raise ConfigError("there are no evaluation prompts: set data.eval and trainer.eval_every", key="data.eval")
        return module.evaluate().metrics

    # --- state ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint, from which sessions and runs go on, and return its folder."""
        self._end_changed_phase()
        folder = Path(path) if path is not None else self._next_checkpoint()
        self.trainer.save_checkpoint(folder)
        self.io.wait()
        return folder

    def load(self, path: str | Path) -> None:
        """Restore weights, optimizers and counters of a checkpoint; a phase that has begun is forgotten."""
        with damage_told(self.io):
            checkpoint = self.strategy.load_checkpoint(Path(path))
            self.module.on_load_checkpoint(checkpoint)
            self.strategy.load_model_state_dict(checkpoint)
        self.io.restoring = None
        self.asked, self.drawn, self.changed, self.rows, self.metrics = [], 0, False, None, {}
        self._batches = None
        self._begin_phase()

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _begin_phase(self) -> None:
        if isinstance(self.module, PPO):
            self.module.begin_phase()

    def _end_changed_phase(self) -> None:
        if self.changed:
            self.end_phase()

    def _next_checkpoint(self) -> Path:
        return step_folder(self.run_dir / "checkpoints", self.module.steps_done)

    @property
    def _packs(self) -> bool:
        return bool(getattr(getattr(self.config, "ppo", None), "pack", False))

    def _generative(self, verb: str) -> GenerativeModule:
        if not isinstance(self.module, GenerativeModule):
            raise ConfigError(
                f"{verb}() is for algorithms that generate, and this is {self.algorithm.name}: use ppo, grpo, rft or "
                "ilql",
                key=verb,
            )
        return self.module

    def _ppo(self, verb: str) -> PPO:
        if not isinstance(self.module, PPO):
            raise ConfigError(f"{verb}() is for ppo and grpo, and this is {self.algorithm.name}", key=verb)
        return self.module

    def _as_prompts(self, prompts: Sequence[Given], room: int) -> list[Prompt]:
        """Return the prompts of a call, if each leaves `room` tokens for a response."""
        limits = PromptLimits(
            self.config.model.max_positions, room, self.module.vocab_size, self.config.rollout.too_long
        )
        first = len(self.asked)
        made = [self._as_prompt(one, f"prompts[{first + index}]") for index, one in enumerate(prompts)]
        return fit_prompts(made, limits, "prompts")

    def _as_prompt(self, asked: Given, where: str) -> Prompt:
        if isinstance(asked, Prompt):
            return asked
        tokenizer = self.module.tokenizer
        if isinstance(asked, str):
            return encode_prompt(Record({"prompt": asked}, where), tokenizer, RecordFormat(section="", settable=()))
        tokens = tuple(int(token) for token in asked)
        if not tokens:
            raise DataError(f"{where} has no tokens: start it with the tokenizer's bos", key="prompts", where=where)
        return Prompt(tokenizer.decode(list(tokens)), tokens, {}, where)

    def _response(self, output: str | Sequence[int], where: str) -> list[int]:
        tokenizer = self.module.tokenizer
        if isinstance(output, str):
            tokens = [*tokenizer.encode(output), *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        else:
            tokens = [int(token) for token in output]
        if not tokens or min(tokens) < 0 or max(tokens) >= self.module.vocab_size:
            raise DataError(
                f"the response to {where} has no tokens, or one that the model's vocabulary of "
                f"{self.module.vocab_size} lacks",
                key="outputs",
                where=where,
            )
        return tokens

    @property
    def _token_logprobs(self) -> TokenLogprobsOf:
        """What computes the log-probs of a microbatch's targets: with PPO, at the temperature of its rollouts."""
        return self.module.token_logprobs if isinstance(self.module, PPO) else _plain_logprobs

    def _logprobs(self, rows: Rows) -> Tensor:
        def of_tokens(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            return {"logprobs": self._token_logprobs(model, hidden, batch).logprobs}

        policy, micro = self.module.engines["policy"], self.config.trainer.micro_batch_size
        return forward_rows(policy, rows, of_tokens, per_microbatch=micro, share_bins=self._packs)["logprobs"]


def _check_names(changes: Mapping[str, Any]) -> None:
    """Refuse changes to settings that sampling does not have."""
    known = [each.name for each in fields(Sampling)]
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known
            raise ConfigError(
                f"sample() has no setting {name}: did you mean {' or '.join(near)}?",
                key=name,
                value=value,
                offers={name: near},
            )


def _plain_logprobs(model: GPT, hidden: Tensor, batch: Microbatch, entropy: bool = False) -> TokenLogprobs:
    return model.logprobs(hidden, batch.targets, batch.target_mask, entropy=entropy)


def _own_loss(
    own: OwnLoss,
    token_logprobs: TokenLogprobsOf,
    model: GPT,
    hidden: Tensor,
    batch: Microbatch,
    counts: dict[str, float],
) -> tuple[Tensor, Stats]:
    logprobs = batch.gather_rows(token_logprobs(model, hidden, batch).logprobs)
    answer = own(logprobs, batch.rows, counts)
    loss, stats = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not isinstance(stats, Mapping):
        raise DataError(
            f"loss(logprobs, rows, counts) returned a {type(answer).__name__}: return a tensor with one number, or it "
            "and a mapping of statistics",
            key="loss",
        )
    return loss, {**{name: torch.as_tensor(value).detach() for name, value in stats.items()}, "loss": loss}


def _count(batch: Microbatch) -> Stats:
    return {"tokens": batch.rows.action_mask.sum(), "rows": (batch.rows.lengths > 0).sum()}
