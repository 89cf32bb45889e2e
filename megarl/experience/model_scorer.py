"""A scorer that is a reward model: its own engine on the run's processes, beside the policy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megarl.data.prompts import Prompt
from megarl.errors import DataError, NumericsError
from megarl.experience.rows import at_last, score_rows
from megarl.logging import get_logger
from megarl.models.exchange.source import Source
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows
from megarl.rewards.reader import KEY, ReadTokens, RewardReader
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout, text_without_end, tokens_without_end
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)
Alone = Callable[[Engine], AbstractContextManager[None]]
"""A context in which only this engine's weights need to be on the device."""


class ModelScorer:
    """Scores responses with a reward model.

    Token ids pass unchanged if the reward model's tokenizer gives the same ones. Otherwise both meet in text: prompt
    and response are encoded anew. Nothing is stored, as the same weights give the same scores again.
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
        stop: Sequence[str] = (),
        drops: bool = False,
        key: str = KEY,
    ) -> None:
        """
        Args:
            engine: the reward model.
            source: the stored model that its weights come from.
            tokenizer: the policy's.
            chat_template: the policy's, None for the tokenizer's own.
            per_microbatch: rows of full length in a forward pass of a replica.
            alone: what runs around the forward passes; None for nothing.
            stop: texts that end a response, which the reward model does not read.
            drops: whether a response that it cannot read gets no score; otherwise that is an error.
            key: the configuration key that names the reward model.
        """
        self.engine, self.policy_tokenizer, self.stop, self.drops, self.key = engine, tokenizer, stop, drops, key
        self.per_microbatch = per_microbatch
        self.alone: Alone = alone or (lambda engine: nullcontext())
        self.mean, self.std = source.score_moments or (0.0, 1.0)
        self.reader = RewardReader(source, tokenizer, key=key)
        self.template = chat_template
        self.reads_ids: dict[bool, bool] = {}  # whether ids pass unchanged, of texts and of conversations
        decides = repr((weights_digest(engine), self.mean, self.std, self.reader.fingerprint))
        self.fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:16]

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the scores of rollouts in their order, by forward passes of all ranks."""
        scores = Scores([None] * len(rollouts))
        sequences: dict[int, ReadTokens] = {}  # by index of the rollout
        refusals: list[DataError] = []
        for index, rollout in enumerate(rollouts):
            try:
                tokens, changed = self._sequence(prompts[rollout.prompt_id], rollout)
            except DataError as problem:
                if not self.drops:
                    raise _with_remedy(problem) from None
                refusals.append(problem)
                continue
            sequences[index] = tokens
            scores.reencoded += changed
        if refusals:
            scores.failed_calls = 1
            log.warning(
                "%s: %d responses are dropped (reward.calls.on_error=drop), the first: %s",
                self.key,
                len(refusals),
                refusals[0],
            )
        if not sequences:
            return scores
        found = self.score_tokens(list(sequences.values()))
        for index, score in zip(sequences, found.tolist(), strict=True):
            if not math.isfinite(score):
                where = prompts[rollouts[index].prompt_id].where
                raise NumericsError(
                    f"{where}: {self.key} gives a response the score {score}: check its weights",
                    key=self.key,
                    where=where,
                )
            scores.values[index] = score
        return scores

    def score_tokens(self, sequences: Sequence[ReadTokens]) -> Tensor:
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

    def _sequence(self, prompt: Prompt, rollout: Rollout) -> tuple[ReadTokens, bool]:
        """Return the tokens that the reward model reads, and whether they differ from the policy's."""
        talks, where = bool(prompt.messages), prompt.where
        response = tokens_without_end(rollout, self.stop, self.policy_tokenizer)
        if self._passes_ids(talks) and self.reader.knows([*rollout.prompt, *response]):
            return self.reader.of_ids(rollout.prompt, response, talks, where), False
        output = text_without_end(rollout, self.stop, self.policy_tokenizer)
        if talks:
            tokens = self.reader.of_messages(prompt.messages, output, where)
        else:
            tokens = self.reader.of_text(prompt.text, output, where)
        return tokens, tokens[: len(rollout.prompt) + len(response)] != [*rollout.prompt, *response]

    def _passes_ids(self, talks: bool) -> bool:
        """Return whether the reward model would encode texts, or conversations, as the policy does."""
        if talks not in self.reads_ids:
            self.reads_ids[talks] = self.reader.reads_ids(self.policy_tokenizer, self.template, talks)
            if not self.reads_ids[talks]:
                what = "conversations" if talks else "texts"
                log.info("%s encodes %s otherwise than the policy, and gets them as text", self.key, what)
        return self.reads_ids[talks]


def _with_remedy(problem: DataError) -> DataError:
    """Return the error for a response that cannot be read, with the key that leaves such responses out."""
    return DataError(
        f"{problem}; or set reward.calls.on_error=drop to leave out such responses",
        key=problem.key,
        value=problem.value,
        where=problem.where,
        offers={**problem.offers, "reward.calls.on_error": ["drop"]},
    )


def _rows(sequences: Sequence[ReadTokens]) -> Rows:
    """Return one row per sequence; every token counts. An encoder reads the prompts."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens = torch.zeros((len(sequences), int(lengths.max())), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
    return Rows(tokens, lengths, mask).with_columns(prompt_tokens=torch.tensor([one.prompt for one in sequences]))
