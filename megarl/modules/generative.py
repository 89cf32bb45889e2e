"""What modules that generate responses share: prompts, a rollout source, scorers and evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import repeat
from typing import Any

from torch.utils.data import DataLoader

from megarl.checkpoint import find, step_of
from megarl.config.files import load_chat_template
from megarl.config.reward_terms import FN, MODEL, URL
from megarl.data.agreement import refuse_different_data
from megarl.data.mixture import PromptOrder, prompt_order
from megarl.data.prompts import Prompt, PromptLimits, read_prompts
from megarl.errors import RewardError
from megarl.experience.build_scorers import REWARD, ScorerBuilder, by_metric_name, check_fields_of_functions
from megarl.experience.evaluation import Evaluated, Evaluation, answer_reader
from megarl.experience.invariants import Invariants
from megarl.experience.scorers import Scorer, keep_scored
from megarl.experience.sources import GeneratedRollouts, ReplayedRollouts, RolloutSource
from megarl.logging import get_logger
from megarl.modules.base import Module
from megarl.parallel.engine import Engine
from megarl.parallel.offload import alone
from megarl.rewards.answers import Score
from megarl.rewards.scores import Scores
from megarl.rollout.lane import Masking
from megarl.rollout.noise import EVALUATION, GREEDY, TRAINING
from megarl.rollout.requests import Rollout
from megarl.rollout.stored import require_phases

log = get_logger(__name__)
_CORRECT = {FN: "the function", MODEL: "the reward model", URL: "the servers"}


class GenerativeModule(Module):
    """A module whose policy generates responses to prompts.

    Subclasses call `prepare_prompts` in `prepare`, so that bad prompts are refused before processes start and models
    are built. They call `prepare_generation` after they built their engines.
    """

    order: PromptOrder | None = None  # of the training prompts
    source: RolloutSource
    masking: Masking | None = None  # decides which tokens the policy may choose
    invariants: Invariants | None = None  # what a violation does; None: it is an error
    streams: tuple[int, ...] = (TRAINING,)  # random streams of the responses that a phase collects

    def prepare(self) -> None:
        """Start without prompts, scorers and evaluation; the other two methods of preparation fill these in."""
        self.evaluation: Evaluation | None = None
        self.evaluated = Evaluated()
        self.scorers: dict[str, Scorer] = {}
        self.prompts: list[Prompt] = []
        self.eval_prompts: list[Prompt] = []
        self._latest: tuple[Prompt, Rollout, Score | None] | None = None

    def prepare_prompts(self, *, train: bool) -> None:
        """Read and tokenize the evaluation prompts and, with `train`, the training prompts."""
        data = self.config.data
        if train:
            self.prompts = self._read_prompts("data.train", data.train, data.train_split)
            self.order = prompt_order(self.prompts, data, self.config.seed, self.config.trainer.max_phases)
        if data.eval and self.config.trainer.eval_every is not None:
            self.eval_prompts = self._read_prompts("data.eval", data.eval, data.eval_split)

    @property
    def scorer_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the reward and metric functions, by configuration key."""
        return {key: scorer.fingerprint for key, scorer in self.scorers.items()}

    def _read_prompts(self, name: str, paths: Sequence[str], split: str) -> list[Prompt]:
        rollout = self.config.rollout
        limits = PromptLimits(
            self.config.model.max_positions, rollout.max_new_tokens, self.vocab_size, rollout.too_long
        )
        prompts = read_prompts(paths, split, self.config.data, self.tokenizer, limits, name)
        check_fields_of_functions(prompts, self.config)
        return prompts

    def prepare_generation(self) -> None:
        """Make the rollout source, a scorer for each configured function, and the evaluation."""
        config = self.config
        for prompts, name in ((self.prompts, "data.train"), (self.eval_prompts, "data.eval")):
            texts = [prompt.text for prompt in prompts]
            refuse_different_data(self.grid, (prompt.tokens for prompt in prompts), name, kept=texts)
        self.source = self._make_source()
        self.source.check_prompts([*self.prompts, *self.eval_prompts])
        self.scorers = ScorerBuilder(
            config,
            self.tokenizer,
            self.grid,
            self.engines,
            self.sources,
            self.run_dir,
            alone=self._alone,
            functions=self.functions,
            micro_batch_size=config.trainer.micro_batch_size,
            dump=config.rollout.dump,
            replay=config.rollout.replay,
        ).scorers()
        if self.eval_prompts:
            self.evaluation = Evaluation(
                self.collect,
                self.eval_prompts,
                by_metric_name(self.scorers),
                config.eval,
                self.tokenizer,
                answer_reader(config.eval, self.grid),
            )

    def _make_source(self) -> RolloutSource:
        rollout = self.config.rollout
        if rollout.replay is not None:
            return ReplayedRollouts(rollout.replay, rollout, self.config.model)
        return GeneratedRollouts(
            self.engines["policy"],
            self.tokenizer,
            rollout,
            seed=self.config.seed,
            dump=rollout.dump,
            chat_template=load_chat_template(self.config.data.chat_template),
            unit=self.unit,
            masking=self.masking,
            invariants=self.invariants,
        )

    def phase_loader(self) -> Iterable[int]:
        """Return an item per phase, without end. A phase draws its prompts itself, as their number may not be known."""
        return repeat(0)

    def draw(self, first: int, count: int) -> list[Prompt]:
        """Return the prompts of this phase from number `first` on."""
        assert self.order is not None
        indices = self.order.rows(self.rows_read + first, count, self.steps_done)
        return [self.prompts[index] for index in indices.tolist()]

    def advance(self, *, new_weights: bool = True, rows: int | None = None) -> None:
        """Count a training step and the prompts that it used."""
        phase = self.steps_done
        super().advance(new_weights=new_weights, rows=rows)
        if self.order is not None:
            self.order.end_phase(self.rows_read, phase)

    def generate(
        self, prompts: Sequence[Prompt], first: int = 0, *, n: int | None = None, **changes: Any
    ) -> list[Rollout]:
        """Return responses of this phase to each prompt from number `first` on.

        Args:
            prompts: the prompts of this phase so far.
            first: number of the first prompt to respond to.
            n: number of responses to each prompt (None: `rollout.n`).
            changes: overrides of the run's `Sampling` settings.
        """
        self.last_batch = []  # a failure here must not dump the batch of the phase before
        phase, n = self.steps_done, self.config.rollout.n if n is None else n
        with self.clock.part("generate"), self._policy_alone():
            if first == 0:
                self.source.publish(self.weights_version)
            within = range(first, len(prompts))
            return self.collect(prompts, n, stream=TRAINING, phase=phase, within=within, **changes)

    def collect(self, prompts: Sequence[Prompt], n: int, *, stream: int, phase: int, **changes: Any) -> list[Rollout]:
        """Return `n` responses to each prompt from the rollout source, whose arguments these are. A subclass may guide
        the choice of tokens."""
        return self.source.collect(prompts, n, stream=stream, phase=phase, **changes)

    def generate_greedy(self, prompts: Sequence[Prompt], first: int = 0) -> list[Rollout]:
        """Return the greedy response to each prompt from number `first` on, from the weights that `generate` used."""
        phase = self.steps_done
        with self.clock.part("generate_greedy"), self._policy_alone():
            rollouts = self.source.collect(
                prompts, 1, stream=GREEDY, phase=phase, within=range(first, len(prompts)), temperature=0.0
            )
        # Their sample_id follows those of the sampled responses, so that the journal keeps their scores apart.
        return [replace(rollout, sample_id=self.config.rollout.n) for rollout in rollouts]

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Scores:
        """Return the scores of this phase's responses."""
        with self.clock.part("score"):
            scores = self.scorers[REWARD].score(prompts, rollouts, stream=TRAINING, phase=self.steps_done)
        if rollouts:
            self._latest = (prompts[rollouts[0].prompt_id], rollouts[0], scores.values[0])
        return scores

    def latest_response(self) -> dict[str, Any] | None:
        """Return the prompt, the response and the score of the first response of the last phase; None before it."""
        if self._latest is None:
            return None
        prompt, rollout, score = self._latest
        text = self.tokenizer.decode(rollout.response_without_eos)
        return {"prompt": prompt.text, "response": text, "score": score}

    def keep_scored(self, rollouts: Sequence[Rollout], scores: Scores) -> tuple[list[Rollout], list[Score]]:
        """Return this phase's responses that have a score, and their scores; refuse a phase that has none left."""
        kept, values, _ = keep_scored(rollouts, scores)
        if not kept:
            raise self.nothing_scored(len(rollouts))
        return kept, values

    def nothing_scored(self, responses: int, *, with_greedy: bool = False) -> RewardError:
        """Return the error for a phase in which no response has a score.

        Args:
            responses: number of responses of the phase.
            with_greedy: whether some have one, but not the greedy responses to their prompts.
        """
        what = "responses or the greedy responses to their prompts" if with_greedy else "responses"
        terms = self.config.reward.sources
        named = " and ".join(f"{term.key}={term.value}" for term in terms)
        return RewardError(
            f"{named} left all {responses} {what} of phase {self.steps_done + 1} without a score: correct "
            f"{' or '.join(dict.fromkeys(_CORRECT[term.kind] for term in terms))}, or set "
            "reward.calls.on_error=error to see what goes wrong",
            key=terms[0].key,
            value=terms[0].value,
            offers={"reward.calls.on_error": ["error"]},
        )

    def score_metrics(self, scores: Scores, dropped: int) -> dict[str, float]:
        """Return the metrics of scoring a phase, of which `dropped` responses have no score."""
        return {
            "rollout/dropped": float(dropped),
            "rollout/failed_calls": float(scores.failed_calls),
            "rollout/repeated_calls": float(scores.repeated_calls),
            **({"rollout/reencoded": float(scores.reencoded)} if self._has_reward_model else {}),
            **{f"rollout/score/{name}": mean for name, mean in scores.means().items()},
        }

    @property
    def _has_reward_model(self) -> bool:
        return any(term.kind == MODEL for term in self.config.reward.sources)

    def _policy_alone(self) -> AbstractContextManager[None]:
        """Return a context in which, with parallel.offload, only the policy's weights are on the device."""
        return self._alone(self.engines["policy"])

    def _alone(self, engine: Engine) -> AbstractContextManager[None]:
        """Return a context in which, with parallel.offload, only this engine's weights are on the device."""
        if not self.config.parallel.offload:
            return nullcontext()
        engines = list(self.engines.values())
        return alone(engine, engines, frozen=[one for one in engines if not one.saved])

    def evaluate(self) -> Evaluated:
        """Generate responses to the evaluation prompts with the present weights, and score them."""
        assert self.evaluation is not None
        with self.clock.part("eval"), self._policy_alone():
            self.source.publish(self.weights_version)
            return self.evaluation.run(self.steps_done)

    def on_train_start(self) -> None:
        """Check that a replayed dump has every phase that is still to come."""
        super().on_train_start()
        folder, every = self.config.rollout.replay, self.config.trainer.eval_every
        if folder is None:
            return
        last = self.planned or self.config.trainer.max_steps
        phases = {stream: range(self.steps_done, last) for stream in self.streams} if self.prompts else {}
        if self.evaluation is not None:
            evaluated = range(self.steps_done - self.steps_done % every + every, last + 1, every)
            phases |= {EVALUATION + index: evaluated for index in range(len(self.evaluation.changes))}
        require_phases(folder, phases)

    def val_dataloader(self) -> Iterable[int]:
        """Return a single batch that represents all prompts, as the generator does its own batching."""
        return DataLoader([0], batch_size=None) if self.evaluation is not None else []  # type: ignore[arg-type]

    def validation_step(self, _: int, batch_idx: int) -> None:
        """Run the evaluation; keep its metrics, and its samples for the callbacks."""
        self.evaluated = self.evaluate()
        self.samples = self.evaluated.samples

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the evaluation."""
        self.log_dict(self.evaluated.metrics)

    def close(self) -> None:
        """Stop the functions' processes and free the KV cache. Also runs after a failure during setup."""
        super().close()
        if hasattr(self, "source"):  # a run may fail before the source is made
            self.source.close()
        for scorer in self.scorers.values():
            scorer.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the position in the prompts, and discard the scores of phases before the oldest checkpoint."""
        super().on_save_checkpoint(checkpoint)
        if self.order is not None:
            checkpoint["prompt_order"] = self.order.state_dict()
        # No resume starts before the oldest checkpoint.
        checkpoints = find(self.run_dir / "checkpoints")
        for scorer in self.scorers.values() if checkpoints else ():
            scorer.forget(before=step_of(checkpoints[0]))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the position in the prompts."""
        super().on_load_checkpoint(checkpoint)
        if self.order is not None:
            self.order.load_state_dict(checkpoint.get("prompt_order", {}), self.rows_read)

    def scores_otherwise(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether something else scores responses than in the run that wrote a checkpoint, and log it."""
        if "scorers" in checkpoint:
            changed = bool(checkpoint["scorers"].get(REWARD) != self.scorer_fingerprints.get(REWARD))
        else:  # a checkpoint of an older version
            changed = not self.changed.isdisjoint(("reward.fn", "reward.options"))
        if changed:
            log.warning(
                "what scores responses changed (reward.fn, its file or options, reward.model, reward.url or "
                "reward.terms): the moments of the scores start again"
            )
        return changed
