"""A scorer that is a reward model: its own engine on the run's processes, beside the policy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from megarl.data.prompts import Prompt
from megarl.errors import DataError, NumericsError
from megarl.experience.rows import at_last, score_rows
from megarl.logging import get_logger
from megarl.models.exchange.source import Source
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Engine
from megarl.parallel.rows import Rows
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout
from megarl.tokenizers import Tokenizer, build_tokenizer

log = get_logger(__name__)
KEY = "reward.model"
Alone = Callable[[Engine], AbstractContextManager[None]]
"""A context in which only this engine's weights need to be on the device."""


class ModelScorer:
    """Scores responses with a reward model, which reads a prompt and a response that ends with EOS.

    Token ids pass unchanged if policy and reward model have the same tokenizer. Otherwise both meet in text: prompt and
    response are encoded anew. Nothing is stored, as the same weights give the same scores again.
    """

    name = "reward_model"

    def __init__(
        self,
        engine: Engine,
        source: Source,
        tokenizer: Tokenizer,
        chat_template: str | None,
        *,
        per_microbatch: int,
        alone: Alone,
    ) -> None:
        """
        Args:
            engine: the reward model.
            source: the stored model that its weights come from.
            tokenizer: the policy's.
            chat_template: the policy's, None for the tokenizer's own.
            per_microbatch: rows of full length in a forward pass of a replica.
            alone: what runs around the forward passes.
        """
        self.engine, self.policy_tokenizer, self.template = engine, tokenizer, chat_template
        self.per_microbatch, self.alone = per_microbatch, alone
        self.mean, self.std = source.score_moments or (0.0, 1.0)
        self.longest = source.model.max_positions
        own = tokenizer if source.tokenizer is None else build_tokenizer(*source.tokenizer)
        self.same_tokenizer = own.fingerprint() == tokenizer.fingerprint()
        self.tokenizer = tokenizer if self.same_tokenizer else own
        self.own_template = source.chat_template
        ids = source.token_ids
        # Transformers reads a score at the last token that is not padding: where EOS is the padding, before it.
        self.reads_eos = source.kind != "huggingface" or ids.get("pad_token_id") != ids.get("eos_token_id")
        decides = repr((weights_digest(engine), self.mean, self.std, self.tokenizer.fingerprint(), self.reads_eos))
        self.fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:16]
        if not self.same_tokenizer:
            log.info("%s has another tokenizer than the policy: prompts and responses reach it as text", KEY)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, stream: int, phase: int) -> Scores:
        """Return the scores of rollouts in their order, by forward passes of all ranks."""
        sequences = [self.sequence(prompts[rollout.prompt_id], rollout) for rollout in rollouts]
        rows = _rows(sequences)
        with self.alone(self.engine):
            raw = at_last(
                score_rows(self.engine, rows, per_microbatch=self.per_microbatch, share_bins=True), rows
            ).double()
        wrong = (~torch.isfinite(raw)).nonzero()
        if len(wrong):
            where = prompts[rollouts[int(wrong[0])].prompt_id].where
            raise NumericsError(
                f"{where}: {KEY} gives a response the score {float(raw[wrong[0]])}: check its weights",
                key=KEY,
                where=where,
            )
        changed = (
            sum(ids != rollout.tokens[: len(ids)] for ids, rollout in zip(sequences, rollouts, strict=True))
            if not self.same_tokenizer
            else 0
        )
        return Scores(((raw - self.mean) / self.std).tolist(), reencoded=changed)

    def sequence(self, prompt: Prompt, rollout: Rollout) -> list[int]:
        """Return the tokens that the reward model reads: the prompt, the response and its end."""
        if self.same_tokenizer:
            start, response = list(rollout.prompt), list(rollout.response)
            if rollout.finish_reason != "eos":
                response.append(self._end(prompt))
        else:
            start, response = self._encoded(prompt, self.policy_tokenizer.decode(rollout.response_without_eos))
        tokens = [*start, *response]
        if tokens[-1] == self.tokenizer.eos_id and (not self.reads_eos or len(tokens) > self.longest):
            tokens.pop()  # beyond its context there is no place for the end of a response that was cut off
        if len(tokens) > self.longest:
            raise DataError(
                f"{prompt.where}: prompt and response have {len(tokens)} tokens of the reward model, whose context has "
                f"{self.longest}: lower rollout.max_new_tokens, shorten the prompt, or use another {KEY}",
                key=KEY,
                value=len(tokens),
                where=prompt.where,
            )
        return tokens

    def forget(self, before: int) -> None:
        """Do nothing: no scores are stored."""

    def close(self) -> None:
        """Do nothing: the engine belongs to the module."""

    # --- inside -----------------------------------------------------------------------------------------------------

    def _end(self, prompt: Prompt) -> int:
        """Return the token that ends an answer: that of the chat template, or EOS."""
        return self.tokenizer.stop_ids(self.template)[-1] if prompt.messages else self.tokenizer.eos_id

    def _encoded(self, prompt: Prompt, output: str) -> tuple[list[int], list[int]]:
        """Return prompt and response in the reward model's tokens; of a conversation, in its own chat template."""
        if prompt.messages:
            turns = [*prompt.messages, {"role": "assistant", "content": output}]
            start = self.tokenizer.encode_chat_prompt(list(prompt.messages), self.own_template)
            return start, self.tokenizer.encode_chat(turns, self.own_template)[0][len(start) :]
        return self.tokenizer.encode_prompt(prompt.text), [*self.tokenizer.encode(output), self.tokenizer.eos_id]


def _rows(sequences: Sequence[Sequence[int]]) -> Rows:
    """Return one row per sequence; every token counts."""
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    tokens = torch.zeros((len(sequences), int(lengths.max())), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
    return Rows(tokens, lengths, mask)
