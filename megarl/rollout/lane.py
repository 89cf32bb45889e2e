"""A group of slots of the generator on its way through the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megarl.models.cache import CacheView, KVCache
from megarl.models.config import GPTConfig
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.rows import ModelInputs
from megarl.rollout.lockstep import Lockstep
from megarl.rollout.noise import sequence_key
from megarl.rollout.requests import Request
from megarl.rollout.sampling import Drawn, RowSettings, draw, nucleus
from megarl.rollout.schedule import Schedule
from megarl.rollout.static import StaticPasses, TokenScorer

CPU_PADDING = 64
"""Largest number of padding tokens of a pass over prompts on a CPU, where more take longer than one more pass."""
OnTokens = Callable[[list[tuple[Request, int]]], bool]
"""Called with what a turn sampled: the running requests, each with its new token. Returns whether all running responses
should end with their next token, which every rank of a replica must decide alike."""


@dataclass
class Masking:
    """A model in the policy's shape and layout that decides which tokens the policy may choose: its most likely ones,
    whose probabilities add up to `top_p`."""

    engine: Engine
    top_p: float
    cache: KVCache | None = None

    @property
    def held_cache(self) -> KVCache:
        """Its cache, while there is one."""
        assert self.cache is not None
        return self.cache


@dataclass(frozen=True)
class Passes:
    """What the lanes of one call run their forward passes with.

    Attributes:
        grid: the processes.
        config: shape of the model.
        models: this stage's chunks of the model.
        cache: their key-value cache.
        token_scorer: computes the scores to sample from.
        prefill_tokens: padded tokens of a pass over prompts.
        masking: decides which tokens may be chosen; None: all.
        static: recorded decoding steps; None: decoding steps are not recorded.
        tokens_group: this replica's stages, to exchange sampled tokens; None with one stage.
        lockstep: keeps passes in step with replicas that share this model's experts; None: there are none.
        masking_lockstep: the same for the model that masks.
    """

    grid: Grid
    config: GPTConfig
    models: list[GPT]
    cache: KVCache
    token_scorer: TokenScorer
    prefill_tokens: int
    masking: Masking | None = None
    static: StaticPasses | None = None
    tokens_group: dist.ProcessGroup | None = None
    lockstep: Lockstep | None = None
    masking_lockstep: Lockstep | None = None


class Lane:
    """One group of slots on its way through the pipeline, one turn at a time.

    In a turn, every stage runs its forward passes, and the last stage sends the sampled tokens to the others, which
    receive them at the start of the lane's next turn. While one lane is on a later stage, this stage works on another
    lane.

        two stages, lanes a and b, turns 1 and 2:

        stage 0:  a1  b1  a2  b2
        stage 1:      a1  b1  a2  b2
    """

    def __init__(self, passes: Passes, schedule: Schedule, first_slot: int, name: tuple[int, int, int]) -> None:
        """
        Args:
            passes: what the lane runs its forward passes with.
            schedule: the responses of the lane.
            first_slot: the lane's first slot in the cache.
            name: seed, stream and phase of the samples.
        """
        self.passes, self.schedule, self.first, self.name = passes, schedule, first_slot, name
        self.grid, masking = passes.grid, passes.masking
        self.caches = [passes.cache] if masking is None else [passes.cache, masking.held_cache]
        self.under_way = False
        self.sends: list[tuple[Any, Tensor]] = []  # with the tensor that must stay alive until the send is done
        self.settings: RowSettings | None = None
        self.seen: Tensor | None = None
        penalised = [*schedule.running, *schedule.queue]
        if self.grid.is_last_stage and any(r.sampling.repetition_penalty != 1.0 for r in penalised):
            valid = passes.models[-1].shard.valid
            self.seen = torch.zeros(len(schedule.running), valid, dtype=torch.bool, device=self.grid.device)

    @property
    def busy(self) -> bool:
        """Whether a turn is under way or requests are unfinished."""
        return self.under_way or not self.schedule.done

    def begin_turn(self) -> None:
        """Run the forward passes of a turn, if there is anything left to sample."""
        if self.schedule.done:
            return
        self.under_way = True
        padding = CPU_PADDING if self.grid.device.type == "cpu" else None
        for slots in self.schedule.prefill(self.passes.prefill_tokens, padding):
            self._prefill(slots)
        for target, source in self.schedule.shared().items():
            for cache in self.caches:
                cache.copy_encoded(self.first + source, self.first + target)
        drawn = self._decode()
        if drawn is not None:
            self._send_drawn(drawn)

    def finish_turn(self, on_tokens: OnTokens | None = None) -> bool:
        """Receive the tokens that were sampled in the lane's last turn, and add them to the schedule. Return what
        `on_tokens` returns for them: whether the running responses should end."""
        if not self.under_way:
            return False
        self.under_way = False
        tokens, logprobs = self._receive_drawn(self.schedule.rows)
        for work, _ in self.sends:
            work.wait()
        self.sends.clear()
        rows = self.schedule.rows
        sampled = [] if on_tokens is None else list(zip(self.schedule.running, tokens.tolist(), strict=True))
        if self.seen is not None:
            self._see_drawn(self.seen, tokens)
        moves = self.schedule.accept(tokens, logprobs)
        self._keep_routes()
        for source, target, entries in moves:
            for cache in self.caches:
                cache.move(self.first + source, self.first + target, entries)
            if self.seen is not None:
                self.seen[target] = self.seen[source]
        if self.schedule.fresh or self.schedule.rows != rows:
            self.settings = None
        return on_tokens is not None and on_tokens(sampled)

    def _keep_routes(self) -> None:
        """Give the responses that have just finished the experts of this stage's layers, before their slots are used
        again."""
        cache, retired, finished = self.passes.cache, self.schedule.retired, self.schedule.finished
        if not cache.records_routes:
            return
        for place, slot in enumerate(retired, len(finished) - len(retired)):
            routes = cache.of_experts[:, self.first + slot, : len(finished[place].tokens) - 1].transpose(0, 1)
            finished[place] = replace(finished[place], routes=routes.cpu().numpy().copy())

    # --- passes -----------------------------------------------------------------------------------------------------

    def _prefill(self, slots: list[int]) -> None:
        """Read prompts into the cache, for an encoder-decoder by its encoder, else without their last token. A prompt
        longer than a pass is read in pieces."""
        if self.schedule.start_id is not None:
            self._encode(slots)
            return
        prompts = [self.schedule.to_read(slot) for slot in slots]
        longest, step = max(len(prompt) for prompt in prompts), self.passes.prefill_tokens
        padded = np.zeros((len(slots), longest), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        where = torch.tensor([self.first + slot for slot in slots], device=self.grid.device)
        for start in range(0, longest, step if len(slots) == 1 else longest):
            tokens = padded[:, start : start + step] if len(slots) == 1 else padded
            stop = start + tokens.shape[1]
            positions = torch.arange(start, stop, device=self.grid.device).expand(len(slots), -1)
            for models, cache in self._models():
                view = CacheView(cache, where, positions, stop if start else None, self.first + slots[0], even=True)
                self._through_stage(models, tokens, view)

    def _encode(self, slots: list[int]) -> None:
        """Read the prompts of slots with the encoder, and store the keys and values of its states in the cache."""
        device, prompts = self.grid.device, [self.schedule.to_read(slot) for slot in slots]
        longest = max(map(len, prompts))
        padded, ids = np.zeros((2, len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)], ids[row, : len(prompt)] = prompt, 1
        where = torch.tensor([self.first + slot for slot in slots], device=device)
        positions = torch.arange(longest, device=device).expand(len(prompts), -1)
        segments = torch.tensor(ids, device=device)
        encoder = ModelInputs(tokens=torch.tensor(padded, device=device), positions=positions, segment_ids=segments)
        for models, cache in self._models():
            cache.encoded_lengths[where] = segments.sum(dim=1)
            self._through_stage(models, padded[:, :0], CacheView(cache, where, positions[:, :0], None), encoder)

    def _models(self) -> list[tuple[list[GPT], KVCache]]:
        """Return the chunks of the policy, and of the model that masks its tokens if there is one, with their
        caches."""
        masking = self.passes.masking
        models = [self.passes.models] if masking is None else [self.passes.models, masking.engine.models]
        return list(zip(models, self.caches, strict=True))

    def _decode(self) -> Drawn | None:
        """Return the next token of every row on the last stage; None on the others."""
        schedule, device = self.schedule, self.grid.device
        lengths = torch.tensor(schedule.lengths, device=device)
        scores, allowed = self._scores(lengths, int(schedule.lengths.max()))
        if scores is None:
            return None
        if self.seen is not None:
            self._see_prompts(self.seen)
        model = self.passes.models[-1]
        seen = None if self.seen is None else self.seen[: schedule.rows]
        return draw(scores, lengths, self._settings(), model.shard, seen, allowed)

    def _scores(self, lengths: Tensor, longest: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the scores [rows, valid] of the next tokens on the last stage, and which of them may be chosen.

        Args:
            lengths: [rows], tokens of the sequences so far.
            longest: the largest of them.
        """
        schedule, passes = self.schedule, self.passes
        static = passes.static
        if static is not None:
            tokens = torch.tensor(schedule.last_tokens, device=lengths.device)
            return static.scores(tokens, lengths - 1, longest, self._longest_encoded()), None
        where = torch.arange(self.first, self.first + schedule.rows, device=lengths.device)
        even = longest == int(schedule.lengths.min())
        states = []
        for models, cache in self._models():
            view = CacheView(cache, where, lengths[:, None] - 1, longest, self.first, even, self._longest_encoded())
            states.append(self._through_stage(models, schedule.last_tokens[:, None], view))
        if states[0] is None:
            return None, None
        scores = passes.token_scorer(passes.models[-1], states[0][0])
        return scores, None if passes.masking is None else self._allowed(states[1])

    def _longest_encoded(self) -> int:
        """Return the length of the longest prompt that the encoder read for the present rows."""
        if self.schedule.start_id is None:
            return 0
        return max(len(request.prompt) for request in self.schedule.running)

    def _allowed(self, hidden: Tensor | None) -> Tensor:
        """Return the tokens [rows, valid] that the masking model allows, from its final states [1, rows, hidden]."""
        masking = self.passes.masking
        assert masking is not None
        assert hidden is not None
        model, temperature = masking.engine.models[-1], self._settings().temperature
        return nucleus(model.logits(hidden[0]), masking.top_p, 1.0 if temperature is None else temperature, model.shard)

    def _through_stage(
        self, chunks: list[GPT], tokens: NDArray[np.int64], view: CacheView, encoder: ModelInputs | None = None
    ) -> Tensor | None:
        """Run `tokens` [rows, time], or those of the encoder, through this stage's chunks of a model. Return the final
        hidden states [time, rows, hidden] on the last stage."""
        inputs = ModelInputs(
            tokens=torch.tensor(tokens, device=self.grid.device), positions=view.positions, encoder=encoder
        )
        hidden: Tensor | None = None
        lockstep = self.passes.lockstep if chunks is self.passes.models else self.passes.masking_lockstep
        if lockstep is not None:
            lockstep.begin_pass()
        for index, model in enumerate(chunks):
            if not model.pre_process:
                hidden = self._receive_hidden(len(tokens), inputs.time)
                model.set_input_tensor(hidden)
            hidden = model(inputs, cache=view)
            if self.grid.is_last_stage and index == len(chunks) - 1:
                return hidden
            self._send_hidden(hidden)
        return None

    # --- sampling settings ------------------------------------------------------------------------------------------

    def _settings(self) -> RowSettings:
        """Return the settings of the present rows, kept while the slots have the same responses."""
        if self.settings is None:
            running = self.schedule.running
            keys = [sequence_key(*self.name, request.prompt_id, request.sample_id) for request in running]
            shard = self.passes.models[-1].shard
            self.settings = RowSettings.of([r.sampling for r in running], keys, shard, self.grid.device)
        return self.settings

    def _see_prompts(self, seen: Tensor) -> None:
        """Mark the tokens of fresh prompts in `seen` [rows, valid], to which the repetition penalty applies."""
        shard = self.passes.models[-1].shard
        start = self.schedule.start_id
        for slot in self.schedule.fresh:
            read = self.schedule.running[slot].prompt if start is None else (start,)
            tokens = torch.tensor(read, device=seen.device) - shard.start
            seen[slot] = False
            seen[slot, tokens[(tokens >= 0) & (tokens < shard.valid)]] = True

    def _see_drawn(self, seen: Tensor, tokens: NDArray[np.int64]) -> None:
        """Mark the sampled `tokens` [rows] in `seen` [rows, valid], to which the repetition penalty applies."""
        shard = self.passes.models[-1].shard
        local = torch.tensor(tokens, device=seen.device) - shard.start
        rows = torch.arange(len(tokens), device=seen.device)
        mine = (local >= 0) & (local < shard.valid)
        seen[rows[mine], local[mine]] = True

    # --- between stages ---------------------------------------------------------------------------------------------

    def _neighbour(self, step: int) -> int:
        ranks: list[int] = dist.get_process_group_ranks(self.grid.groups.pp)
        return ranks[(self.grid.pp_rank + step) % len(ranks)]

    def _send_hidden(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        self.sends.append((dist.isend(hidden, self._neighbour(1), group=self.grid.groups.pp), hidden))

    def _receive_hidden(self, rows: int, time: int) -> Tensor:
        config = self.passes.config
        hidden = torch.empty((time, rows, config.hidden_size), dtype=config.params_dtype, device=self.grid.device)
        dist.recv(hidden, self._neighbour(-1), group=self.grid.groups.pp)
        return hidden

    def _send_drawn(self, drawn: Drawn) -> None:
        """Send tokens and log-probs [2, rows] from the last stage to every other, in float64, which represents ids
        exactly."""
        self.result = torch.stack([drawn.tokens.double(), drawn.logprobs.double()])
        for step in range(1, self.grid.layout.pp):
            work = dist.isend(self.result, self._neighbour(step), group=self.passes.tokens_group)
            self.sends.append((work, self.result))

    def _receive_drawn(self, rows: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self.grid.is_last_stage:
            result = self.result
        else:
            result = torch.empty(2, rows, dtype=torch.float64, device=self.grid.device)
            dist.recv(result, self._neighbour(-1 - self.grid.pp_rank), group=self.passes.tokens_group)
        tokens, logprobs = result.cpu().numpy()
        return tokens.astype(np.int64), logprobs.astype(np.float32)
