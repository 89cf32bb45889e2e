"""Reward models: a GPT with a score head learns to tell better responses from worse ones."""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import RunningMoments, count_units, leads, mask_out, ranked_pairs, ranking_loss
from megarl.config.cluster import PlanConfig
from megarl.config.rm import RewardModelConfig
from megarl.disk import write_atomically
from megarl.experience.calibration import Calibration
from megarl.experience.rows import at_last, score_rows
from megarl.logging import get_logger
from megarl.models.exchange.pretrained import Sources, adapters
from megarl.models.exchange.source import checked_moments
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.modules.units import UnitModule, named
from megarl.modules.workload import Workload, sequences
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch, Rows

log = get_logger(__name__)
MEASURED = ("loss", "accuracy", "margin", "error", "score")
TRAINING = ("train/loss", "train/accuracy", "train/margin", "train/error", "train/score")
EVALUATION = (
    *("eval/loss", "eval/accuracy", "eval/margin", "eval/error", "eval/score"),
    *("eval/score_std", "eval/calibration_error", "eval/correlation"),
)
SHOWN = 8
"""Number of rows that each evaluation shows."""


class RewardModel(UnitModule):
    """One training step is one optimizer step over a global batch of prompts with ranked responses, or of responses
    with scores.

    The score of a response is read at its last token; that of a step at the last token of the step.
    """

    config: RewardModelConfig
    training_metrics = TRAINING
    read_last = True
    has_output = False

    def prepare(self) -> None:
        """Start an evaluation without scores, and describe the model."""
        if self.card is not None:
            self.card = replace(self.card, reward_kind=self.config.rm.kind)
        self._start_evaluation()
        self.scored_at = -1  # steps that the weights of the last evaluation had made

    @staticmethod
    def roles(config: RewardModelConfig, vocab_size: int, sources: Sources) -> list[Role]:
        """Return one model with a score head."""
        source = sources.at(config.model.path)
        role = Role("policy", config.model, vocab_size, ("score",), optim=config.optim, source=source, about="trains")
        return [replace(role, head_std=config.rm.init_std, **adapters(config, sources, config.model))]

    @staticmethod
    def plan(config: RewardModelConfig, assumed: PlanConfig) -> Workload:
        """Return the size of an optimizer step; no log-probs are computed. Of ranked responses, two are assumed for a
        prompt."""
        sizes = {**sequences(config, assumed), "loss_tokens": 0}
        return Workload(per_unit=2 if config.rm.kind == "ranking" else 1, **sizes)

    @property
    def kind(self) -> str:
        """What each record is read as."""
        rm = self.config.rm
        return "steps_of_any_score" if rm.kind == "steps" and rm.step_loss == "squared" else rm.kind

    # --- the loss ---------------------------------------------------------------------------------------------------

    def measure(self, model: GPT, hidden: Tensor, batch: Microbatch) -> Stats:
        """Return sums over the units of a microbatch."""
        return self._sums(batch.gather_states(model.scores(hidden)), batch.rows)

    def _sums(self, scores: Tensor, rows: Rows) -> Stats:
        """Return sums over the units of rows, from the scores [rows, time] after each token."""
        present = rows.lengths > 0
        if self.config.rm.kind == "steps":
            return self._of_steps(scores, rows)
        last = torch.where(present, at_last(scores, rows), 0)
        measured = {"score": last.detach().sum()}
        if self.config.rm.kind == "regression":
            difference = torch.where(present, last - rows["target"], 0)
            return {"unit_loss": difference.square().sum(), "error": difference.detach().abs().sum(), **measured}
        weights, lead = ranked_pairs(rows["unit"], rows["level"], present), leads(last).detach()
        return {
            "unit_loss": ranking_loss(last, weights, rows["margin"], self.config.rm.center_coef),
            "accuracy": (weights * ((lead > 0).double() + 0.5 * (lead == 0))).sum(),
            "margin": (weights * lead).sum(),
            **measured,
        }

    def _of_steps(self, scores: Tensor, rows: Rows) -> Stats:
        marked = rows.action_mask
        score, target = mask_out(scores, marked), mask_out(rows["target"], marked)
        if self.config.rm.step_loss == "squared":
            losses = (score - target).square()
            found = {"error": (score - target).detach().abs().sum()}
        else:
            losses = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none")
            found = {"accuracy": mask_out(((score > 0) == (target > 0.5)).double(), marked).sum()}
        return {"unit_loss": mask_out(losses, marked).sum(), "score": score.detach().sum(), **found}

    def count(self, batch: Microbatch) -> Stats:
        """Return the numbers of units (of steps, where these have scores) and of scores."""
        return self._counts(batch.rows)

    def _counts(self, rows: Rows) -> Stats:
        present = rows.lengths > 0
        if self.config.rm.kind == "steps":
            steps = rows.action_mask.sum()
            return {"units": steps, "scores": steps}
        return {"units": count_units(rows["unit"], present), "scores": present.sum()}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Return means over units, and of the scores."""
        over = {name: sums["scores" if name == "score" else "units"] for name in MEASURED}
        return {name: sums[name] / over[name] for name in MEASURED[1:] if name in sums}

    # --- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start without scores."""
        self._start_evaluation()

    def validation_step(self, units: Tensor, batch_idx: int) -> None:
        """Score these units, on every rank."""
        with self.clock.part("eval"):
            self._evaluate(units)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and what else is measured, and write what an evaluation leaves in the run folder."""
        sums = self.eval_sums
        metrics = {"loss": self.total_loss(sums, sums), **self.means(sums), "score_std": self._moments.std}
        if self.config.rm.kind == "ranking":
            metrics["calibration_error"] = self.calibration.error
        if self.config.rm.kind == "regression":
            metrics["correlation"] = self._correlation()
        self.log_dict(named(metrics, EVALUATION))
        self.samples = self.table[:SHOWN]
        if self.config.rm.normalise:
            self._describe_moments(self.moments)
        if self.grid.rank == 0:
            self._write()

    def _start_evaluation(self) -> None:
        self.eval_sums: dict[str, float] = {}
        self.table: list[dict[str, Any]] = []  # rows of `scores.jsonl`, on the first rank
        self.scored: list[Tensor] = []  # scores and targets, [2, rows] each
        self.calibration = Calibration()
        self._moments = RunningMoments()  # of all scores
        self._read_moments = RunningMoments()  # of the scores that reward.model reads, one of each response

    def _evaluate(self, units: Tensor) -> None:
        """Score units of the evaluation data, and add them to the sums, the table and the moments."""
        assert self.eval_data is not None
        rows = self.rows_of(self.eval_data, units)
        scores = score_rows(
            self.policy, rows, per_microbatch=self.config.trainer.eval_batch_size, share_bins=self.config.data.pack
        )
        for name, value in {**self._sums(scores, rows), **self._counts(rows)}.items():
            self.eval_sums[name] = self.eval_sums.get(name, 0.0) + float(value)
        last = at_last(scores, rows)
        steps = self.config.rm.kind == "steps"
        self._moments.update(scores[rows.action_mask.bool()] if steps else last)
        self._read_moments.update(at_last_marked(scores, rows) if steps else last)
        if self.config.rm.kind == "ranking":
            weights = ranked_pairs(rows["unit"], rows["level"], rows.lengths > 0)
            self.calibration.add(leads(last)[weights > 0], weights[weights > 0])
        if self.kind == "regression":
            self.scored.append(torch.stack([last, rows["target"]]))
        if self.grid.rank == 0:
            numbers = units[rows["unit"]].tolist()
            self.table += [self._described(rows, row, scores[row], unit) for row, unit in enumerate(numbers)]
        self.scored_at = self.steps_done

    def _described(self, rows: Rows, row: int, scores: Tensor, unit: int) -> dict[str, Any]:
        """Return a row of `scores.jsonl`."""
        length, mask = int(rows.lengths[row]), rows.action_mask[row].bool()
        tokens = rows.tokens[row, :length].tolist()
        start = int(mask.int().argmax())
        if self.config.rm.kind == "steps":
            target = rows["target"][row][mask].tolist()
            return {
                "unit": unit,
                "text": self.tokenizer.decode(tokens),
                "scores": scores[mask].tolist(),
                "labels": target,
            }
        judged = "level" if self.config.rm.kind == "ranking" else "target"
        return {
            "unit": unit,
            "prompt": self.tokenizer.decode(tokens[:start]),
            "response": self.tokenizer.decode(tokens[start:]),
            "score": float(scores[length - 1]),
            judged: float(rows[judged][row]),
        }

    def _correlation(self) -> float:
        """Return the correlation of scores and targets; 0 where either has no spread."""
        both = torch.cat(self.scored, dim=1).double()
        found = torch.corrcoef(both)[0, 1] if both.shape[1] > 1 else torch.zeros(())
        return float(torch.nan_to_num(found))

    def _write(self) -> None:
        """Write the scores of the last evaluation, and how confidence and accuracy agree."""
        lines = [json.dumps({self.unit: self.steps_done, **row}, ensure_ascii=False) + "\n" for row in self.table]
        write_atomically(self.run_dir / "scores.jsonl", lines)
        if self.config.rm.kind == "ranking":
            write_atomically(self.run_dir / "calibration.csv", self.calibration.table())
            write_atomically(self.run_dir / "calibration.svg", self.calibration.plot())

    # --- normalisation ----------------------------------------------------------------------------------------------

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the responses' scores in the last evaluation, of steps the last one's, as
        `reward.model` reads it; 1 for scores that are all the same, so that dividing by it changes nothing."""
        return self._read_moments.mean, self._read_moments.std or 1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the moments of the scores that the present weights give, with the description of the model.

        A run that is stopped early does not wait for them: it keeps those of its last evaluation, if it had one.
        """
        if not self.stops_early:
            self._normalise()
        elif self.config.rm.normalise and self.card is not None and self.card.score_moments is None:
            log.warning(
                "the run stops before its first evaluation: this checkpoint has no mean and deviation of scores "
                "(rm.normalise), and reward.model would read its scores as they are"
            )
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters, and the moments of the last evaluation."""
        super().on_load_checkpoint(checkpoint)
        moments = (checkpoint.get("model") or {}).get("score_moments")
        if self.config.rm.normalise and moments is not None:
            self._describe_moments(checked_moments(moments, checkpoint["folder"]))

    def on_train_end(self) -> None:
        """Take the moments for an export, which a run that is stopped early does not write."""
        if not self.stops_early:
            self._normalise()

    def _normalise(self) -> None:
        """With rm.normalise, put the moments of the present weights' scores into the model's description."""
        if not self.config.rm.normalise:
            return
        if self.scored_at != self.steps_done:
            self._start_evaluation()
            for units in self.val_dataloader():
                self._evaluate(units)
        self._describe_moments(self.moments)

    def _describe_moments(self, moments: tuple[float, float]) -> None:
        assert self.card is not None
        self.card = replace(self.card, score_moments=moments)


def at_last_marked(scores: Tensor, rows: Rows) -> Tensor:
    """Return the scores [rows] at the last token of each row that the action mask marks, from those of all tokens
    [rows, time]."""
    places = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    last = (rows.action_mask.bool() * places).argmax(dim=1, keepdim=True)
    return scores.gather(1, last).squeeze(1)
