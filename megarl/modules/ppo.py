"""Proximal policy optimisation, with or without a critic. One training step is one phase: generate, score, evaluate,
shape, train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.clock import Work
from megarl.config.advantages import critic_kind, needs_of, without_effect
from megarl.config.leaf import or_defaults
from megarl.config.ppo import PPOConfig
from megarl.config.resume import from_plain
from megarl.data.prompts import Prompt
from megarl.experience.action_mask import ActionMask
from megarl.experience.collection import Collected, Scored, collect, mean, no_spread
from megarl.experience.invariants import Invariants
from megarl.experience.orchestrator import build_orchestrator, checked
from megarl.experience.reference import PolicyReference, Reference
from megarl.experience.rows import forward_flops, forward_rows, rollouts_to_rows, training_flops
from megarl.experience.shaping import Greedy, Shaping
from megarl.experience.start_weights import keep, take
from megarl.experience.traces import Tracer
from megarl.experience.watch import Watch
from megarl.logging import get_logger
from megarl.models.exchange.pretrained import adapters
from megarl.models.gpt import GPT, TokenLogprobs
from megarl.models.roles import Role
from megarl.modules.clone import clone_behaviour, clones
from megarl.modules.critics import Critic, NoCritic, SeparateCritic, SharedCritic
from megarl.modules.generative import GenerativeModule
from megarl.modules.ppo_loss import PolicyLoss
from megarl.modules.ppo_models import plan, roles, steps_per_phase
from megarl.parallel.engine import Engine, ForwardFn, Outputs
from megarl.parallel.grid import SEEDS
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows, RowSource
from megarl.rewards.answers import Score
from megarl.rollout.noise import GREEDY, TRAINING

NORMS = {"policy": "train/grad_norm", "critic": "train/critic_grad_norm"}
log = get_logger(__name__)


class PPO(GenerativeModule):
    """The policy, the critic, the reference, and the phase that uses them. `ppo.advantages` sets how advantages are
    computed, and with that whether there is a critic."""

    remedy_of_collapse = "ppo.stop_at_kl=0.05, a lower optim.lr, fewer ppo.inner_epochs or ppo.whiten_advantages=false"

    config: PPOConfig
    invariants: Invariants

    def prepare(self) -> None:
        """Set up the shaping of rewards, the invariants and the counters; read the prompts."""
        super().prepare()
        config = self.config
        self.planned = config.trainer.max_phases
        self.temperature = config.rollout.temperature
        self.needs = needs_of(config.ppo.advantages)
        self.streams = (TRAINING, GREEDY) if self.needs.greedy else (TRAINING,)
        self.shaping = Shaping(config.ppo, config.rollout.max_new_tokens)
        self.invariants = Invariants(
            or_defaults(config, "health").invariants,
            config.trainer.precision,
            lambda: self.steps_done,
            corrected=config.ppo.correction is not None,
        )
        self.reference: Reference | None = None
        self.critic: Critic = NoCritic()
        self.action_mask: ActionMask | None = None
        self.policy_trains = True  # False after the policy passed ppo.stop_at_kl in this phase
        self.minibatches_done = 0  # in this phase
        self.reference_name: str | None = None  # name of its weights in the run folder, after behaviour cloning
        self.row_names: list[str] = []  # names of a phase's rows, for messages
        self.watch = Watch(config.ppo.kl_limit)
        every = config.trainer.eval_every if config.data.eval else None
        self.tracer = Tracer(config.eval.table, self.planned, every)
        self.traces: list[dict[str, Any]] = []  # of the last phase
        self.orchestrator = build_orchestrator(or_defaults(config, "extensions").orchestrator, self)
        self.prepare_prompts(train=True)

    # --- models and data --------------------------------------------------------------------------------------------

    roles = staticmethod(roles)
    plan = staticmethod(plan)

    def configure_model(self) -> None:
        """Build the engines, the critic and the rollout source."""
        if self.engines:
            return
        phases = self.config.trainer.max_phases
        trained = {"policy": phases - self.warmup_phases, "critic": phases}
        config = self.config
        for role in self.roles(config, self.vocab_size, self.sources):
            if role.on_device:
                self.engines[role.name] = self.build(role, trained.get(role.name, 0) * self.steps_per_phase)
        self.policy = self.engines["policy"]
        if "critic" in self.engines:
            self.engines["critic"].follows_routes = False  # its experts are others
        self.critic = self._make_critic()
        self.loss = PolicyLoss(config, self.shaping, self.critic, self.token_logprobs)
        if config.ppo.action_mask is not None:
            self.engines["action_mask"].follows_routes = False  # in generation its own router chose
            self.action_mask = ActionMask(self.engines["action_mask"], config.ppo.action_mask, self.temperature)
            self.masking = self.action_mask.masking
        for setting, ignored in without_effect(config).items():
            log.warning("%s: no effect, because %s does not use it", ", ".join(ignored), setting)
        self.prepare_generation()

    @property
    def _trained(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.trains]

    def _make_critic(self) -> Critic:
        kind, ppo = critic_kind(self.config), self.config.ppo
        if kind == "separate":
            return SeparateCritic(self.engines["critic"], ppo.clip_value)
        return SharedCritic(ppo.clip_value, ppo.vf_coef) if kind == "shared" else NoCritic()

    @property
    def warmup_phases(self) -> int:
        """Number of first phases in which only a separate critic trains."""
        return self.config.critic.settings.warmup_phases if critic_kind(self.config) == "separate" else 0

    @property
    def steps_per_phase(self) -> int:
        """Number of optimizer steps of a whole phase."""
        return steps_per_phase(self.config)

    def on_fit_start(self) -> None:
        """Clone behaviour and make the reference, unless the run resumes: then `on_load_checkpoint` restores them."""
        config = self.config
        if self.resumes:
            return
        if clones(config):
            own_start = self.critic.engine is not None and config.critic.settings.path is not None
            self._clone(config, [self.policy] if own_start else self._trained)
        self._refresh_action_mask()
        if config.ppo.kl_coef > 0:
            self.reference = self._make_reference()
            if clones(config):
                self._keep_reference()

    def _clone(self, config: PPOConfig, engines: Sequence[Engine]) -> None:
        with self.clock.part("clone"):
            clone_behaviour(config, self.tokenizer, self.grid, self.vocab_size, engines, self.sources)

    def _keep_reference(self) -> None:
        assert self.card is not None
        self.reference_name = keep(self.policy, self.card, self.run_dir)

    def _find_reference(self, checkpoint: Path) -> None:
        """Restore a resumed run's reference: the policy takes its weights until the checkpoint's are loaded."""
        started_as: PPOConfig = from_plain(PPOConfig, self.started_as or asdict(self.config))
        started_as.parallel = self.config.parallel
        name = self.reference_name
        kept = name is not None and take(self.policy, name, self.run_dir, checkpoint)
        if clones(started_as) and not kept:
            log.warning(
                "the weights of the reference are neither in %s nor beside the checkpoint: repeating the behaviour "
                "cloning that the run began with",
                self.run_dir,
            )
            self._clone(started_as, [self.policy])
            self._keep_reference()
        elif not kept and self._starts_otherwise(started_as):
            self.policy.start_from(self._start_of(started_as))
        self.reference = self._make_reference()

    def _make_reference(self) -> Reference:
        """Copy the policy's present weights as the reference."""
        return PolicyReference(self.policy, self._logprobs_of)

    def _starts_otherwise(self, started_as: PPOConfig) -> bool:
        """Return whether the run's first weights differ from those that this configuration gives a new run."""
        adapter, began = self.config.adapter, started_as.adapter  # a resume has an adapter if its checkpoint has
        if adapter is not None and began is not None and adapter.path != began.path:
            return True
        ours, theirs = self.config.model, started_as.model
        if theirs.path is None:
            return ours.path is not None or (started_as.seed, theirs.init_std) != (self.config.seed, ours.init_std)
        return ours.path != theirs.path

    def _start_of(self, started_as: PPOConfig) -> Engine:
        source, own = self.sources.at(started_as.model.path), adapters(started_as, self.sources, started_as.model)
        return self.build(Role("start", started_as.model, self.vocab_size, source=source, **own), seed=started_as.seed)

    @property
    def rows_per_step(self) -> int:
        """Number of prompts in a phase."""
        return self.config.ppo.rollouts // self.config.rollout.n

    def train_dataloader(self) -> Iterable[int]:
        """Return an item per phase."""
        return self.phase_loader()

    # --- a phase ----------------------------------------------------------------------------------------------------

    def training_step(self, _: int, batch_idx: int) -> None:
        """Run one phase over the next prompts and log its metrics."""
        self.begin_phase()
        rate = self.policy.learning_rate
        found = self._collect()
        rollouts = found.rollouts
        self.row_names = [f"{found.prompts[one.prompt_id].where}, response {one.sample_id}" for one in rollouts]
        rows, stats = self.evaluate_rows(rollouts_to_rows(rollouts))
        rows, shaped = self.shape_rows(
            rows, found.scores, greedy=found.greedy, all_totals=found.all_scores.totals(), stats=stats
        )
        with self.clock.part("train"):
            trained = self._train(rows)
        self.traces = self._trace(rows, found)
        self.end_phase(rows, shaped, prompts=len(found.prompts))
        self.log_dict({"train/lr": rate, **self._collection_metrics(found), **shaped, **trained})

    def _trace(self, rows: Rows, found: Collected) -> list[dict[str, Any]]:
        """Return what this phase computed for the tokens of a few of its responses; nothing in most phases."""
        if not self.tracer.due(self.steps_done + 1):
            return []
        with self.clock.part("trace"):
            return self.tracer.records(rows, found, lambda taken: self._logprobs_of(self.policy, taken), self.tokenizer)

    def begin_phase(self) -> None:
        """Set learning rates by completed phases, which may have had another number of steps: cut short by
        ppo.stop_at_kl, with dropped responses, or of another length before a resume."""
        self.policy_trains = self.steps_done >= self.warmup_phases
        self.minibatches_done = 0
        self.policy.move_schedule_to(max(0, self.steps_done - self.warmup_phases) * self.steps_per_phase)
        if self.critic.engine is not None:
            self.critic.engine.move_schedule_to(self.steps_done * self.steps_per_phase)

    def end_phase(self, rows: Rows, stats: Mapping[str, float], *, prompts: int) -> None:
        """Adapt the coefficient of the KL, count the phase, and copy the policy for its action mask.

        Args:
            rows: what the phase trained on.
            stats: metrics of these rows.
            prompts: number of prompts that the phase used.
        """
        self.shaping.kl_control.update(stats.get("rollout/kl", 0.0), len(rows))
        self.advance(new_weights=self.steps_done >= self.warmup_phases, rows=prompts)
        self._refresh_action_mask()
        self.work = self._work(rows)

    def _collect(self) -> Collected:
        """Return the scored responses of this phase. With ppo.dynamic_sampling, other prompts replace those whose
        responses have equal scores."""
        wanted, dynamic = self.rows_per_step, self.config.ppo.dynamic_sampling
        found = collect(
            self.draw,
            self._respond,
            wanted,
            most=None if dynamic is None else dynamic.most_prompts(wanted),
            clip_scores=self.config.ppo.clip_scores,
        )
        if not found.rollouts:
            if dynamic is None or found.unscored == len(found.all_scores.values):
                some = found.all_scores.dropped < len(found.all_scores.values)
                raise self.nothing_scored(len(found.all_scores.values), with_greedy=some)
            raise no_spread(len(found.prompts), self.steps_done + 1, dynamic.limit)
        if found.replaced > len(found.prompts) - wanted:
            self.watch.short_phase(len(found.prompts) - found.replaced, wanted)
        return found

    def _respond(self, prompts: Sequence[Prompt], first: int) -> Scored:
        """Have the prompts from index `first` on answered and scored, by megarl's or the user's orchestrator."""
        return checked(
            self.orchestrator.respond(prompts, first), prompts, or_defaults(self.config, "extensions").orchestrator
        )

    def _collection_metrics(self, found: Collected) -> dict[str, float]:
        metrics = self.score_metrics(found.trained_scores, found.unscored)
        if self.config.ppo.dynamic_sampling is not None:
            metrics["rollout/prompts"] = float(len(found.prompts))
            metrics["rollout/replaced"] = float(found.replaced)
            metrics["rollout/score_before_replacing"] = mean(found.all_scores.totals())
        return metrics

    def evaluate_rows(self, rows: Rows) -> tuple[Rows, dict[str, float]]:
        """Return the rows with log-probs and values under the weights that training starts from, and metrics to log.

        The columns are old_logprobs, values (if there is a critic) and ref_logprobs (if there is a reference).
        """
        with self.clock.part("evaluate"):
            return self._evaluate(rows)

    def _evaluate(self, rows: Rows) -> tuple[Rows, dict[str, float]]:
        mask = rows.action_mask
        stats: dict[str, float] = {}
        if self.action_mask is not None:
            micro, pack = self.config.trainer.micro_batch_size, self.config.ppo.pack
            rows, stats = self.action_mask.read(rows, per_microbatch=micro, share_bins=pack)

        def of_policy(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            out = self.token_logprobs(model, hidden, batch, entropy=True)
            assert out.entropy is not None
            return {"old_logprobs": out.logprobs, "entropy": out.entropy, **self.critic.values_beside(model, hidden)}

        columns = self._forward(self.policy, rows, of_policy)
        entropy = columns.pop("entropy")
        columns |= self.critic.values_of(rows, self._forward)
        if self.reference is not None:
            columns["ref_logprobs"] = self.reference.logprobs(rows)
        rows = rows.with_columns(**columns)
        self._refuse_not_finite(rows, *columns)
        if self.reference is not None and self.weights_version == self.minibatches_done == 0:
            gap = (rows["old_logprobs"] - rows["ref_logprobs"]) * mask
            self.invariants.same_weights(float(gap.abs().max()))
        tokens = mask.sum()
        drift = float(((rows["rollout_logprobs"] - rows["old_logprobs"]).abs() * mask).sum() / tokens)
        self.invariants.drift(drift)
        return rows, {
            **stats,
            "rollout/logprob_drift": drift,
            "rollout/entropy": float((entropy * mask).sum() / tokens),
            "rollout/response_tokens": float(tokens / len(rows)),
        }

    def values_of(self, rows: Rows) -> Tensor | None:
        """Return the critic's values [rows, time] of all rows' tokens; None without a critic."""

        def beside(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            return self.critic.values_beside(model, hidden)

        if self.critic.shares_trunk:
            return self._forward(self.policy, rows, beside)["values"]
        return self.critic.values_of(rows, self._forward).get("values")

    def shape_rows(
        self,
        rows: Rows,
        scores: Sequence[Score],
        *,
        greedy: Greedy | None = None,
        all_totals: Sequence[float] | None = None,
        stats: Mapping[str, float],
    ) -> tuple[Rows, dict[str, float]]:
        """Return evaluated rows with advantages (and returns, if there is a critic) made of their scores, and the
        metrics `stats` of the evaluation with those of the shaping. The other arguments are those of `Shaping.shape`.
        """
        with self.clock.part("shape"):
            rows, shaped = self.shaping.shape(rows, scores, greedy, all_totals)
            self._refuse_not_finite(rows, *(name for name in ("advantages", "returns") if name in rows))
        stats = {**stats, **shaped}
        self.watch.kl(stats.get("rollout/kl", 0.0))
        self.watch.scores(stats, groups=len(rows["group"].unique()))
        if self.steps_done >= self.warmup_phases:
            stats |= self.shaping.steer_entropy(stats["rollout/entropy"])
        return rows, stats

    def _logprobs_of(self, engine: Engine, rows: Rows) -> Tensor:
        """Return the log-probs [rows, time] of all rows' tokens under an engine's present weights."""

        def of_tokens(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            return {"logprobs": self.token_logprobs(model, hidden, batch).logprobs}

        return self._forward(engine, rows, of_tokens)["logprobs"]

    def token_logprobs(self, model: GPT, hidden: Tensor, batch: Microbatch, entropy: bool = False) -> TokenLogprobs:
        """Return the log-probs of a microbatch's targets, over the tokens that may be chosen."""
        choices = None if self.action_mask is None else self.action_mask.choices(batch)
        return model.logprobs(hidden, batch.targets, batch.target_mask, self.temperature, entropy, choices)

    def _forward(self, engine: Engine, rows: Rows, fn: ForwardFn) -> dict[str, Tensor]:
        micro, pack = self.config.trainer.micro_batch_size, self.config.ppo.pack
        return forward_rows(engine, rows, fn, per_microbatch=micro, share_bins=pack)

    def _train(self, rows: Rows) -> dict[str, float]:
        """Run the inner epochs over minibatches.

        A policy that moved further than ppo.stop_at_kl stops training in this phase; a separate critic continues.
        """
        expected = float(rows.action_mask.count_nonzero())
        collected: list[dict[str, float]] = []
        for epoch in self.epochs(rows):
            counted = 0.0
            for indices in epoch:
                stats = self.gradients(rows, indices)
                norms = {} if self.is_over() else self.step_optimizers()
                counted += stats.pop("tokens")
                collected.append({**stats, **{NORMS[name]: norm for name, norm in norms.items()}})
                if self.is_over():
                    return self._means(collected)
            self.invariants.tokens(counted, expected)
        return self._means(collected)

    def epochs(self, rows: Rows) -> Iterator[Sequence[Tensor]]:
        """Yield the minibatches of each inner epoch of this phase as indices of rows, in an order that the seed
        determines."""
        shuffle = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.steps_done) % SEEDS)
        for _ in range(self.config.ppo.inner_epochs):
            yield torch.randperm(len(rows), generator=shuffle).split(self.config.trainer.global_batch_size)

    def is_over(self) -> bool:
        """Return whether nothing trains any more in this phase."""
        return not self.policy_trains and self.critic.engine is None

    def _means(self, collected: Sequence[dict[str, float]]) -> dict[str, float]:
        """Return the mean of each statistic over the minibatches that have it, the largest KL, and the number of
        steps."""
        names = dict.fromkeys(name for stats in collected for name in stats)
        columns = {name: [stats[name] for stats in collected if name in stats] for name in names}
        means = {name: sum(column) / len(column) for name, column in columns.items()}
        if "policy/approx_kl" in columns:
            means["policy/approx_kl_max"] = max(columns["policy/approx_kl"])
        steps = len(columns.get(NORMS["policy" if self.critic.engine is None else "critic"], ()))
        return {**means, "train/optimizer_steps": float(steps)}

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of one optimizer step over a minibatch, and return its metrics and its "tokens".

        A policy that has moved past ppo.stop_at_kl takes no part; without a separate critic there is then nothing to
        apply (`is_over`).
        """
        micro, pack = self.config.trainer.micro_batch_size, self.config.ppo.pack
        self.last_batch = make_microbatches(rows, indices, self.policy, per_microbatch=micro, share_bins=pack)
        metrics: dict[str, float] = {}
        if self.policy_trains:
            metrics = self.policy.train_step(self.last_batch, self.loss, self.loss.count)
            metrics |= {"train/loss": metrics["loss"], **self.policy.observed}
            learns = self.policy.learning_rate > 0 and bool(self._signal(rows.take(indices)).any())
            if self.critic.shares_trunk:
                learns = learns and self.config.ppo.vf_coef * metrics["value/loss"] != 0
            self.invariants.gradients(self.policy, learns, fresh=self._is_fresh(self.warmup_phases))
            if self.minibatches_done == 0 and metrics["tokens"] > 0:
                narrowest = min(self.config.ppo.clip_low, self.config.ppo.clip_high)
                self.invariants.on_policy(metrics["policy/ratio"], metrics["policy/clip_fraction"], narrowest)
            limit = self.config.ppo.stop_at_kl
            if limit is not None and metrics["policy/approx_kl"] > limit:
                self.policy_trains = False
                self.policy.zero_gradients()
        metrics |= self.critic.train_step(self.last_batch, self.loss.count)
        if self.critic.engine is not None:
            learns = self.critic.engine.learning_rate > 0 and metrics["value/loss"] != 0
            self.invariants.gradients(self.critic.engine, learns, fresh=self._is_fresh(0))
        self.minibatches_done += 1
        return {**{key: value for key, value in metrics.items() if "/" in key}, "tokens": metrics["tokens"]}

    def _signal(self, rows: Rows) -> Tensor:
        """Return [rows, time], not 0 at the tokens whose loss has a gradient at the start of a phase."""
        signal = rows["advantages"]
        if "weights" in rows:
            signal = signal * rows["weights"]
        if self.action_mask is not None:  # where there is one choice, its probability is 1
            signal = signal * (rows["allowed"] > 1)
        return signal

    def _is_fresh(self, first_phase: int) -> bool:
        """Return whether this is the first phase in which an engine trains, if it trains from `first_phase` on."""
        return self.steps_done == first_phase

    # --- state -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the state of the shaping and the name of the reference's weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["shaping"] = self.shaping.state_dict()
        checkpoint["reference"] = self.reference_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the shaping, without the scores' moments if the scores changed, and the reference."""
        super().on_load_checkpoint(checkpoint)
        other_scores = self.scores_otherwise(checkpoint) or "ppo.clip_scores" in self.changed
        self.shaping.load_state_dict(checkpoint["shaping"], other_scores=other_scores)
        self.reference_name = checkpoint.get("reference")
        if self.config.ppo.kl_coef > 0:
            self._find_reference(Path(checkpoint["folder"]))

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _refresh_action_mask(self) -> None:
        """Copy the policy's present weights to the model that masks its tokens, after the phases that are due."""
        mask = self.action_mask
        if mask is not None and mask.is_due(self.steps_done):
            mask.refresh(self.policy)
            self.invariants.arrived(self.policy, mask.masking.engine, f"before phase {self.steps_done + 1}")

    def _refuse_not_finite(self, rows: Rows, *names: str) -> None:
        self.watch.finite(rows, names, self.row_names, self.steps_done + 1)

    def _work(self, rows: Rows) -> Work:
        """Count generation and evaluation as forward passes, and each inner epoch as a forward and a backward pass."""
        sizes = (self.config.model, self.vocab_size, rows.lengths, self.policy.config.adapter, rows.prompts)
        models = len(self._trained)
        self.training_flops = training_flops(*sizes) * models * self.config.ppo.inner_epochs
        passes = len(self.engines) + 1 + (self.reference is not None)
        return Work(int(rows.lengths.sum()), self.training_flops + forward_flops(*sizes) * passes)
