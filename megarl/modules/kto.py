"""Kahneman-Tversky optimisation."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from megarl.algorithms import kto_loss, mask_out
from megarl.config.preference import KTOConfig
from megarl.data.order import EvalLoader
from megarl.data.pairs import mismatched
from megarl.errors import CheckpointError, DataError
from megarl.experience.response_reference import ResidentReference
from megarl.modules.preference import Preference, Responses
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch, Rows


class KTO(Preference):
    """Kahneman-Tversky optimisation: each response is compared with the policy's KL to the reference.

    The KL is estimated from the responses to other prompts: each prompt of the global batch is joined with the response
    to the next one, the last with that to the first.
    """

    config: KTOConfig
    labelled = True

    def prepare(self) -> None:
        """Start without an estimate of the KL."""
        super().prepare()
        self.gaps = torch.zeros(0)

    def before_step(self, rows: Rows) -> None:
        """Compute the policy's log-probs minus the reference's for the mismatched rows of the batch."""
        if len(rows) < 2:
            raise DataError(
                "data.eval has one response, and the KL estimate of KTO needs two: give more, or data.eval=[]",
                key="data.eval",
                value=self.config.data.eval,
                offers={"data.eval": [[]]},
            )
        other = mismatched(rows, self.config.data.seq_length)
        policy = ResidentReference(self.policy, self._rows_per_microbatch).totals(other)
        self.gaps = (policy - self.reference.totals(other)).to(self.grid.device)

    def val_dataloader(self) -> Iterable[Tensor]:
        """Return batches of the evaluation units, in one random order: in their own, a pair's two responses would stand
        side by side, and a prompt would be joined with its own. At least trainer.global_batch_size of them estimate the
        KL, whatever the layout."""
        return [] if self.eval_data is None else EvalLoader(len(self.eval_data), self.rows_per_step, mixed=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters; refuse another batch size where the mismatched rows of the run are already computed."""
        super().on_load_checkpoint(checkpoint)
        if self.config.kto.reference == "cached" and self.rows_read != self.steps_done * self.rows_per_step:
            key, before = "trainer.global_batch_size", checkpoint["run"]["config"]["trainer"]["global_batch_size"]
            raise CheckpointError(
                f"{key}={self.rows_per_step} is not that of all steps so far, so that other prompts and responses are "
                f"joined than those whose log-probs under the reference are known: use kto.reference=resident, or "
                f"{key}={before} if it was never changed before",
                key=key,
                value=self.rows_per_step,
                offers={"kto.reference": ["resident"], key: [before]},
            )

    def further_rows(self) -> Iterator[Rows]:
        """Iterate over the mismatched rows of all steps and evaluations."""
        longest = self.config.data.seq_length
        batches = self.batches()
        for step in range(self.config.trainer.max_steps):
            yield mismatched(self.train_data.take(torch.as_tensor(batches.batch(step))), longest)
        for units in self.val_dataloader() if self.eval_data is not None else ():
            assert self.eval_data is not None
            yield mismatched(self.eval_data.take(units), longest)

    def measure_responses(self, responses: Responses) -> Stats:
        """Return sums over the responses of a microbatch."""
        settings = self.config.kto
        assert responses.desirable is not None
        good, bad = responses.present & responses.desirable, responses.present & ~responses.desirable
        gaps = self.gaps.to(responses.logprobs.dtype)
        # Each response is taken as desirable and as undesirable, and one of the two losses is used: a selection by the
        # labels would make a GPU wait for their number.
        as_desirable, as_undesirable = kto_loss(
            responses.logprobs,
            responses.logprobs,
            gaps,
            responses.reference,
            responses.reference,
            torch.zeros_like(gaps),
            settings.beta,
            settings.desirable_weight,
            settings.undesirable_weight,
        ).chunk(2)
        losses = torch.where(good, as_desirable, torch.where(bad, as_undesirable, 0))
        rewards = settings.beta * responses.gains.detach()
        threshold = settings.beta * gaps.mean().clamp(min=0)
        above = (rewards > threshold).double() + 0.5 * (rewards == threshold)
        right = torch.where(good, above, 1 - above)
        return {
            "unit_loss": losses.sum(),
            "accuracy": torch.where(responses.present, right, 0).sum(),
            "reward_chosen": mask_out(rewards, good).sum(),
            "reward_rejected": mask_out(rewards, bad).sum(),
            "logprob_chosen": mask_out(responses.logprobs, good).sum(),
            "logprob_rejected": mask_out(responses.logprobs, bad).sum(),
            "kl": threshold / settings.beta * responses.present.sum(),
        }

    def count(self, batch: Microbatch) -> Stats:
        """Return the numbers of responses, and of desirable and undesirable ones."""
        present = batch.rows.lengths > 0
        good = (present & batch.rows["desirable"]).sum()
        return {"units": present.sum(), "desirable": good, "undesirable": present.sum() - good}

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Return means over responses, over desirable ("chosen") ones, and over undesirable ("rejected") ones."""
        found = {"accuracy": sums["accuracy"] / sums["units"], "kl": sums["kl"] / sums["units"]}
        for name in ("reward", "logprob"):
            for which, count in (("chosen", "desirable"), ("rejected", "undesirable")):
                found[f"{name}_{which}"] = sums[f"{name}_{which}"] / max(sums[count], 1.0)
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
        return found
