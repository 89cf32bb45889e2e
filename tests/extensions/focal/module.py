"""The module: supervised fine-tuning's data and evaluation, with another loss."""

from torch import Tensor

from megarl.algorithms import aggregate
from megarl.clock import Work
from megarl.models.gpt import GPT
from megarl.modules.sft import SFT, count
from megarl.parallel.engine import Stats
from megarl.parallel.rows import Microbatch


class Focal(SFT):
    """One training step is one optimizer step over a global batch of records."""

    def training_step(self, indices: Tensor, batch_idx: int) -> None:
        with self.clock.part("train"):
            self.last_batch = self._microbatches(self.train_data, indices, self.config.trainer.micro_batch_size)
            metrics = self.policy.train_step(self.last_batch, self.focal_loss, count)
            norms = self.step_optimizers()
        self.advance()
        self.work = Work(int(metrics["all_tokens"]), 0.0)
        self.log_dict({"train/loss": metrics["loss"], "train/grad_norm": norms["policy"]})

    def focal_loss(
        self, model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]
    ) -> tuple[Tensor, Stats]:
        """Return the mean of -(1 - p) ** gamma * log p over the target tokens of the global batch."""
        logprobs = model.logprobs(hidden, batch.targets, batch.target_mask).logprobs
        weights = (1 - logprobs.exp()) ** self.config.focal.gamma
        loss = aggregate(-weights * logprobs, batch.target_mask, "token_mean", denominator=counts["tokens"])
        return loss, {"loss": loss}
