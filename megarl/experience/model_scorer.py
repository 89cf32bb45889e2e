"""A scorer that is a reward model: its own engine on the run's processes, beside the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megarl.data.prompts import Prompt
from megarl.errors import NumericsError
from megarl.experience.rows import at_last, score_rows
from megarl.logging import get_logger
from megarl.models.exchange.source import Source
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows
from megarl.rewards.reader import KEY, RewardReader
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)
Alone = Callable[[Engine], AbstractContextManager[None]]
"""A context in which only this engine's weights need to be on the device."""


class ModelScorer:
    """Scores responses with a reward model.

    Token ids pass unchanged if policy and reward model have the same tokenizer. Otherwise both meet in text: prompt and
    response are encoded anew. Nothing is stored, as the same weights give the same scores again.
    """

    name = "reward_model"

    def __init__(
        self,
        engine: Engine,
        source: Source,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        *,
        per_microbatch: int,
        alone: Alone | None = None,
    ) -> None:
        """
        Args:
            engine: the reward model.
            source: the stored model that its weights come from.
            tokenizer: the policy's.
            chat_template: the policy's, None for the tokenizer's own.
            per_microbatch: rows of full length in a forward pass of a replica.
            alone: what runs around the forward passes; None for nothing.
        """
        self.engine, self.policy_tokenizer, self.template = engine, tokenizer, chat_template
        self.per_microbatch = per_microbatch
        self.alone: Alone = alone or (lambda engine: nullcontext())
        self.mean, self.std = source.score_moments or (0.0, 1.0)
        self.reader = RewardReader(source, tokenizer)
        self.same_tokenizer = self.reader.tokenizer.fingerprint() == tokenizer.fingerprint()
        decides = repr((weights_digest(engine), self.mean, self.std, self.reader.fingerprint))
        self.fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:16]
        if not self.same_tokenizer:
            log.info("%s has another tokenizer than the policy: prompts and responses reach it as text", KEY)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the scores of rollouts in their order, by forward passes of all ranks."""
        sequences = [self._sequence(prompts[rollout.prompt_id], rollout) for rollout in rollouts]
        scores = self.score_tokens(sequences)
        wrong = (~torch.isfinite(scores)).nonzero()
        if len(wrong):
            first = int(wrong[0])
            where = prompts[rollouts[first].prompt_id].where
            raise NumericsError(
                f"{where}: {KEY} gives a response the score {float(scores[first])}: check its weights",
                key=KEY,
                where=where,
            )
        reencoded = 0
        if not self.same_tokenizer:
            reencoded = sum(ids != rollout.tokens for ids, rollout in zip(sequences, rollouts, strict=True))
        return Scores(scores.tolist(), reencoded=reencoded)

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the score of each sequence of tokens, [sequences] float64 on the host, on every rank."""
        rows = _rows(sequences)
        with self.alone(self.engine):
            found = score_rows(self.engine, rows, per_microbatch=self.per_microbatch, share_bins=True)
        return (at_last(found, rows).double() - self.mean) / self.std

    def forget(self, before: int) -> None:
        """Do nothing: no scores are stored."""

    def close(self) -> None:
        """Do nothing: the engine belongs to the module."""

    # --- inside -----------------------------------------------------------------------------------------------------

    def _sequence(self, prompt: Prompt, rollout: Rollout) -> list[int]:
        """Return the tokens that the reward model reads: the prompt, the response and its end."""
        if self.same_tokenizer:
            end = [] if rollout.finish_reason == "eos" else [self._end(prompt)]
            return self.reader.fitting([*rollout.tokens, *end], prompt.where)
        output = self.policy_tokenizer.decode(rollout.response_without_eos)
        if prompt.messages:
            return self.reader.of_messages(prompt.messages, output, prompt.where)
        return self.reader.of_text(prompt.text, output, prompt.where)

    def _end(self, prompt: Prompt) -> int:
        """Return the token that ends an answer: that of the chat template, or EOS."""
        tokenizer = self.reader.tokenizer
        return tokenizer.stop_ids(self.template)[-1] if prompt.messages else tokenizer.eos_id


def _rows(sequences: Sequence[Sequence[int]]) -> Rows:
    """Return one row per sequence; every token counts."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens = torch.zeros((len(sequences), int(lengths.max())), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
    return Rows(tokens, lengths, mask)
