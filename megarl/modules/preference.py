"""The base class of algorithms that learn from preferred and rejected, or from labelled, responses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megarl.config.cluster import PlanConfig
from megarl.config.offers import read
from megarl.config.preference import PreferenceTree
from megarl.config.sections.data import LabelledDataConfig
from megarl.data.pairs import ResponseData
from megarl.errors import CheckpointError, ConfigError
from megarl.experience.reference import FirstWeights
from megarl.experience.response_reference import (
    TOLERANCES,
    CachedReference,
    NoReference,
    ResidentReference,
    ResponseReference,
    reference_name,
)
from megarl.models.exchange.load import no_output_layer
from megarl.models.exchange.pretrained import Sources, adapters, second_model
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.modules.units import UnitModule, named
from megarl.modules.workload import Workload, sequences
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch, Rows

LOOKED_UP = 256
"""Number of units whose rows are looked up in a reference at a time."""

TRAINING = (
    *("train/loss", "train/nll", "train/kl", "train/accuracy", "train/margin"),
    *("train/reward_chosen", "train/reward_rejected", "train/logprob_chosen", "train/logprob_rejected"),
)
EVALUATION = (
    *("eval/loss", "eval/nll", "eval/kl", "eval/accuracy", "eval/margin"),
    *("eval/reward_chosen", "eval/reward_rejected", "eval/logprob_chosen", "eval/logprob_rejected"),
)


@dataclass(frozen=True, eq=False)
class Responses:
    """The responses of a microbatch, as losses see them. Filler rows have no tokens.

    Attributes:
        logprobs: [rows] sum of the log-probs of each response under the policy.
        reference: [rows] the same under the reference.
        lengths: [rows] number of tokens of each response, at least 1.
        present: [rows] False for filler rows.
        cross_entropy: [rows] negative log-prob of all tokens of the row that the algorithm's cross entropy is over.
        desirable: [rows] the labels, where responses have labels.
    """

    logprobs: Tensor
    reference: Tensor
    lengths: Tensor
    present: Tensor
    cross_entropy: Tensor
    desirable: Tensor | None = None

    @property
    def gains(self) -> Tensor:
        """How much more likely each response is under the policy than under the reference, as log-probs."""
        return self.logprobs - self.reference


class Preference(UnitModule):
    """One training step is one optimizer step over a global batch of units: pairs, or single labelled responses.

    A subclass defines `measure_responses`, `count` and `means`.
    """

    config: PreferenceTree
    training_metrics = TRAINING
    labelled = False  # units are single responses
    with_prompt = False  # the cross entropy of a preferred response includes its prompt

    def prepare(self) -> None:
        """Start the sums of an evaluation at zero."""
        self.eval_sums: dict[str, float] = {}
        self.reference: ResponseReference = NoReference()
        self.reference_digest: str | None = None  # of its weights

    # --- what a subclass defines ------------------------------------------------------------------------------------

    def measure_responses(self, responses: Responses) -> Stats:
        """Return sums over the units of a microbatch: unit_loss, which trains, and what metrics are made of."""
        raise NotImplementedError

    def further_rows(self) -> Iterator[Rows]:
        """Iterate over rows besides the data's own whose reference log-probs the run needs."""
        return iter(())

    # --- models and data --------------------------------------------------------------------------------------------

    @staticmethod
    def roles(config: PreferenceTree, vocab_size: int, sources: Sources) -> list[Role]:
        """Return the policy, and the reference if it stays on the device."""
        source = sources.at(config.model.path)
        own = adapters(config, sources, config.model)
        roles = [Role("policy", config.model, vocab_size, optim=config.optim, source=source, about="trains", **own)]
        if config.reference.reference == "resident" and not is_policys_own(config):
            roles.append(reference_role(config, vocab_size, sources))
        return roles

    @staticmethod
    def plan(config: PreferenceTree, assumed: PlanConfig) -> Workload:
        """Return the size of an optimizer step. The two sequences of a pair share a forward pass."""
        notes = {"reference": "log-probs on disk, no model"} if config.reference.reference == "cached" else {}
        per_unit = 1 if isinstance(config.data, LabelledDataConfig) else 2
        return Workload(per_unit=per_unit, notes=notes, **sequences(config, assumed))

    @property
    def kind(self) -> str:
        """What each record is read as."""
        return "labelled" if self.labelled else "pairs"

    def with_models(self) -> None:
        """Prepare the reference while the policy has its first weights."""
        self.reference = self._make_reference()

    def _make_reference(self) -> ResponseReference:
        settings, per_microbatch = self.config.reference, self._rows_per_microbatch
        if is_policys_own(self.config):
            first = FirstWeights(self.policy)
            self.reference_digest = first.digest
            if settings.reference == "resident":
                return ResidentReference(self.policy, per_microbatch, first.restored)
        elif settings.reference == "resident":
            self.reference_digest = weights_digest(self.engines["reference"])
            return ResidentReference(self.engines["reference"], per_microbatch)
        if settings.reference == "none":
            return NoReference()
        engine, model = self.policy, self.config.model
        if settings.reference_path is not None:
            role = reference_role(self.config, self.vocab_size, self.sources)
            engine, model = self.build(role), role.model
        self.reference_digest = self.reference_digest or weights_digest(engine)
        name = reference_name(self.reference_digest, model, self.config.trainer.precision)
        tolerance = TOLERANCES[self.config.trainer.precision]
        cached = CachedReference(engine, settings.cache, name, per_microbatch, tolerance, f"{self.config.own}.cache")
        with self.clock.part("reference"):
            cached.fill(self._rows_of_the_run())
        return cached

    def _rows_of_the_run(self) -> Iterator[Rows]:
        for data in (self.train_data, self.eval_data):
            if data is not None:
                yield from (data.take(units) for units in torch.arange(len(data)).split(LOOKED_UP))
        yield from self.further_rows()

    @property
    def _rows_per_microbatch(self) -> int:
        return self.config.trainer.micro_batch_size * self.train_data.per_unit

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which weights the reference has."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference"] = [self.config.trainer.precision, self.reference_digest]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse a resume that would compare with another reference."""
        super().on_load_checkpoint(checkpoint)
        settings, before = self.config.reference, checkpoint.get("reference")
        now = [self.config.trainer.precision, self.reference_digest]
        comparable = before is not None and None not in (before[1], now[1]) and before[0] == now[0]
        if self.started_as is None or not comparable or before == now:
            return
        key = f"{self.config.own}.reference_path"
        first = self.started_as["model"]["path"]
        if settings.reference_path is not None:
            changed, wanted = key, self.started_as[self.config.own]["reference_path"]
        elif first is None and self.config.model.path is None:
            changed, wanted = "seed", self.started_as["seed"]
        else:
            changed, wanted = "model.path", first
        setting = f"{changed}={'null' if wanted is None else wanted}"
        raise CheckpointError(
            f"the run compares with the weights of {setting} as they were when it started, and its reference has "
            f"others now: set {setting} with those weights, or name them with {key}",
            key=changed,
            value=read(self.config, changed),
            offers={changed: [wanted]},
        )

    # --- training ---------------------------------------------------------------------------------------------------

    def rows_of(self, data: ResponseData, units: Tensor) -> Rows:
        """Return the rows of units with the log-probs of the reference, and the responses' own mask."""
        rows = super().rows_of(data, units)
        columns = {"reference": self.reference.totals(rows), "responses": rows.action_mask}
        if self.with_prompt:
            return with_prompts(rows, columns)
        return rows.with_columns(**columns)

    def measure(self, model: GPT, hidden: Tensor, batch: Microbatch) -> Stats:
        """Return `measure_responses` of the microbatch's responses."""
        return self.measure_responses(responses_of(model, hidden, batch))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self.eval_sums = {}

    def validation_step(self, units: Tensor, batch_idx: int) -> None:
        """Add what is measured on these units to the sums."""
        assert self.eval_data is not None
        with self.clock.part("eval"):
            rows = self.rows_of(self.eval_data, units)
            self.before_step(rows)
            batches = self.microbatches(rows, self.config.trainer.eval_batch_size)
            sums = self.policy.evaluate(batches, self.measure)
            sums |= self.policy.count(batches, self.count)
        self.eval_sums = {name: self.eval_sums.get(name, 0.0) + value for name, value in sums.items()}

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss and what else is measured."""
        sums = self.eval_sums
        metrics = {"loss": self.total_loss(sums, sums), **self.means(sums)}
        self.log_dict(named(metrics, EVALUATION))


class PairPreference(Preference):
    """An algorithm whose units are pairs. A subclass defines `pair_losses` and `rewards`."""

    nll_coef = 0.0
    """Weight of the cross entropy of the preferred responses, a mean over their tokens."""

    def pair_losses(self, responses: Responses) -> Tensor:
        """Return the loss of each pair, [pairs]."""
        raise NotImplementedError

    def rewards(self, responses: Responses) -> Tensor:
        """Return the implicit reward of each response, [rows]."""
        raise NotImplementedError

    def count(self, batch: Microbatch) -> Stats:
        """Return the number of pairs, and of the tokens that the cross entropy is over."""
        return {"units": (batch.rows.lengths[0::2] > 0).sum(), "tokens": batch.rows.action_mask[0::2].sum()}

    def total_loss(self, sums: Mapping[str, Any], counts: Mapping[str, float]) -> Any:
        """Return the mean loss of the pairs, with the cross entropy if it has a weight."""
        loss = super().total_loss(sums, counts)
        return loss + self.nll_coef * sums["nll"] / counts["tokens"] if self.nll_coef else loss

    def measure_responses(self, responses: Responses) -> Stats:
        """Return sums over the pairs of a microbatch."""
        present = responses.present[0::2]
        rewards = self.rewards(responses).detach()
        margin = rewards[0::2] - rewards[1::2]
        right = (margin > 0).double() + 0.5 * (margin == 0)
        measured = {
            "unit_loss": self.pair_losses(responses),
            "nll": responses.cross_entropy[0::2],
            "accuracy": right,
            "margin": margin,
            "reward_chosen": rewards[0::2],
            "reward_rejected": rewards[1::2],
            "logprob_chosen": responses.logprobs[0::2],
            "logprob_rejected": responses.logprobs[1::2],
        }
        return {name: torch.where(present, value, 0).sum() for name, value in measured.items()}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Return means over pairs; of the cross entropy, over the tokens of the preferred responses."""
        names = ("accuracy", "margin", "reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected")
        return {"nll": sums["nll"] / max(sums["tokens"], 1.0), **{name: sums[name] / sums["units"] for name in names}}


def responses_of(model: GPT, hidden: Tensor, batch: Microbatch) -> Responses:
    """Return the log-probs of a microbatch's responses."""
    rows = batch.rows
    logprobs = batch.gather_rows(model.logprobs(hidden, batch.targets, batch.target_mask).logprobs)
    mask = rows["responses"]
    return Responses(
        logprobs=(logprobs * mask).sum(dim=1),
        reference=rows["reference"].to(logprobs.dtype),
        lengths=mask.sum(dim=1).clamp(min=1),
        present=rows.lengths > 0,
        cross_entropy=-(logprobs * rows.action_mask).sum(dim=1),
        desirable=rows.per_row.get("desirable"),
    )


def with_prompts(rows: Rows, columns: dict[str, Tensor]) -> Rows:
    """Return pairs whose preferred rows have an action mask over all of their tokens but the first."""
    mask = rows.action_mask.clone()
    time = torch.arange(mask.shape[1])
    mask[0::2] = ((time > 0) & (time < rows.lengths[0::2, None])).to(mask.dtype)
    return replace(rows, action_mask=mask).with_columns(**columns)


def is_policys_own(config: PreferenceTree) -> bool:
    """Return whether the reference is the policy as it started, whose weights beside its adapters never change."""
    settings = config.reference
    return config.adapter is not None and settings.reference != "none" and settings.reference_path is None


def reference_role(config: PreferenceTree, vocab_size: int, sources: Sources) -> Role:
    """Return the role of the reference: the model at its path, or the weights that the policy starts from."""
    path, key = config.reference.reference_path, f"{config.own}.reference_path"
    model = second_model(config, key, path, vocab_size, sources)
    if path is not None and model.vocab_size != vocab_size:
        raise ConfigError(
            f"{key}={path} has a vocabulary of {model.vocab_size} tokens, and the policy {vocab_size}: name a model "
            f"with the policy's tokenizer, or {key}=null for the policy's first weights",
            key=key,
            value=path,
            offers={key: [None]},
        )
    source: Any = sources.at(config.model.path if path is None else path)
    if path is not None and not source.has_output:
        raise no_output_layer(key, path)
    return Role("reference", model, vocab_size, source=source, about="does not train")
