"""Proof that a generator with its own parallel layout has the weights that training has, before it samples."""

from __future__ import annotations

from torch import Tensor

from megarl.experience.invariants import Invariants
from megarl.experience.rows import forward_rows, rollouts_to_rows
from megarl.models.gpt import GPT
from megarl.parallel.engine import Outputs
from megarl.parallel.reshard import Reshard
from megarl.parallel.rows import Microbatch
from megarl.rollout.generator import Generator
from megarl.rollout.requests import Request, Sampling

REMEDIES = {"rollout.engine.layout": [None]}
PROMPT_TOKENS, NEW_TOKENS = 64, 2  # at most, of the sequence whose log-probs are compared; each new one costs a pass
OF_FEW = 3.0  # the mean over so few tokens may differ by this many times the bound for a phase


class Arrival:
    """Compares the weights of both layouts, and the log-probs that they give to the tokens of one sequence.

    Checksums prove that every value is in its place. The log-probs prove that the second layout computes the same
    model from them.
    """

    def __init__(self, reshard: Reshard, generator: Generator, invariants: Invariants | None = None) -> None:
        """
        Args:
            reshard: copies the weights.
            generator: samples from the copy.
            invariants: what a difference does; None: it is an error.
        """
        self.reshard, self.generator = reshard, generator
        precision = "bf16" if reshard.source.config.bf16 else "fp32"
        self.invariants = invariants or Invariants("strict", precision, lambda: 0, has_key=False)

    def check(self, first: Request, when: str, where: str) -> None:
        """Check the weights and the log-probs. Call on all ranks.

        Args:
            first: a request of the phase, the same on every rank.
            when: the phase, for messages.
            where: the prompt and the phase, for messages.
        """
        source, copy = self.reshard.source, self.reshard.engine
        self.invariants.arrived(source, copy, when, REMEDIES)
        if self.invariants.corrected:
            return
        # Greedy: the log-probs of likely tokens have the smallest rounding errors.
        sampling = Sampling(temperature=0.0, max_new_tokens=min(NEW_TOKENS, first.sampling.max_new_tokens))
        prompt = first.prompt[:PROMPT_TOKENS]
        requests = [Request(first.prompt_id, replica, prompt, sampling) for replica in range(copy.grid.layout.copies)]
        self.generator.token_scorer = GPT.logits
        rollouts = self.generator.generate(requests, place=lambda _: where)
        rows = rollouts_to_rows(rollouts)

        def of_tokens(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
            return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

        recomputed = forward_rows(source, rows, of_tokens, per_microbatch=1, share_bins=False)["logprobs"]
        mask = rows.action_mask
        mean = float(((rows["rollout_logprobs"] - recomputed).abs() * mask).sum() / mask.sum())
        layouts = f"{source.grid.layout} and {copy.grid.layout}"
        what = f"log-probs of {int(mask.sum())} tokens after the first prompt, computed at {layouts},"
        self.invariants.drift(mean, what, when=when, remedies=REMEDIES, slack=OF_FEW)
