"""Generation with an engine's model: prompts are read into the KV cache, then all slots get a token per step, at any TP
x PP x DP."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megarl.config.mixtures import refuse_graphs_and_routes
from megarl.errors import ConfigError, NumericsError
from megarl.models.adapters import for_sampling
from megarl.models.cache import KVCache
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.parallel.layout import Layout
from megarl.rollout.lane import Lane, Masking, OnTokens, Passes
from megarl.rollout.lockstep import lockstep_of, serve_until_done
from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Request, Rollout, check_requests
from megarl.rollout.routes import with_all_layers
from megarl.rollout.schedule import Decode, Schedule, deal
from megarl.rollout.static import StaticPasses, TokenScorer


@dataclass(frozen=True)
class Limits:
    """How much of a device generation may use."""

    slots: int = 128  # responses that a replica generates at once
    cache_bytes: int | None = None  # KV cache of a rank; None: as much as `slots` need
    prefill_tokens: int = 4096  # padded tokens of a pass over prompts: enough to keep a device busy
    graphs: bool = False  # decoding steps of fixed shapes, as CUDA graphs on a GPU; not with pipeline stages
    routes: bool = False  # responses with the experts that computed them

    def check(self, layout: Layout, *, has_experts: bool = False) -> None:
        """Refuse CUDA graphs with pipeline stages or experts, and routes without experts."""
        refuse_graphs_and_routes(has_experts=has_experts, graphs=self.graphs, routes=self.routes)
        if self.graphs and layout.pp > 1:
            raise ConfigError(
                f"rollout.engine.cuda_graphs=true at {layout}: a pipeline's passes wait for other processes, so use "
                "rollout.engine.cuda_graphs=false, or a rollout.engine.layout of tp alone",
                key="rollout.engine.cuda_graphs",
                value=True,
                offers={"rollout.engine.cuda_graphs": [False]},
            )


@dataclass(frozen=True)
class Stats:
    """Counts of the last call on this replica, over all groups of slots."""

    responses: int = 0
    response_tokens: int = 0
    prefilled_tokens: int = 0
    decode_passes: int = 0
    decoded_rows: int = 0  # sum over decode passes; rows per pass shows how full they were


class Generator:
    """Samples responses with an engine's present weights. `close` frees the KV cache; the next call allocates it
    again."""

    def __init__(
        self,
        engine: Engine,
        eos_id: int,
        *,
        seed: int,
        also_eos: Sequence[int] = (),
        limits: Limits | None = None,
        decode: Decode | None = None,
        token_scorer: TokenScorer = GPT.logits,
        masking: Masking | None = None,
    ) -> None:
        """
        Args:
            engine: engine of the model.
            eos_id: token that ends a response.
            seed: seed of the samples.
            also_eos: other tokens that end a response like EOS, such as the chat template's end marker.
            limits: how much of the device to use.
            decode: converts tokens to text; needed where a request has stop texts.
            token_scorer: computes the scores to sample from, if not the model's logits.
            masking: decides which tokens may be chosen; None: all. Not with CUDA graphs.
        """
        self.masking = masking
        self.engine, self.grid, self.config = engine, engine.grid, engine.config
        self.eos_id, self.also_eos, self.seed, self.decode = eos_id, also_eos, seed, decode
        self.token_scorer = token_scorer
        self.limits = limits or Limits()
        self.limits.check(self.grid.layout, has_experts=self.config.experts is not None)
        self.cache: KVCache | None = None
        self.static: StaticPasses | None = None
        self.recorded_over = 0  # value of `engine.memory.returns` when `static` was made
        self.stats = Stats()
        self.tokens_group: dist.ProcessGroup | None = None

    def generate(
        self,
        requests: Sequence[Request],
        *,
        stream: int = TRAINING,
        phase: int = 0,
        weights_version: int = 0,
        on_finished: Callable[[list[Rollout]], None] | None = None,
        on_tokens: OnTokens | None = None,
        place: Callable[[int], str] = "prompt {}".format,
    ) -> list[Rollout]:
        """Return the response to every request, sorted by (prompt_id, sample_id), on every rank of the world.

        Scores that are not finite are an error on all ranks.

        Args:
            requests: the requests, the same on every rank.
            stream: random stream.
            phase: phase, which seeds the samples with the stream.
            weights_version: version to store in the rollouts.
            on_finished: called with this replica's responses as they finish.
            on_tokens: called with this replica's tokens as they are sampled. If it returns True, the running responses
                end with their next token (with finish_reason "length", if with no other) and no other is started.
            place: returns what messages call a prompt, from its prompt_id.
        """
        # Every rank checks all requests, so that all of them refuse or none does.
        check_requests(requests, self.config.vocab_size, self.config.max_positions, can_decode=self.decode is not None)
        mine = deal(requests, self.grid.layout.copies)[self.grid.copy_rank]
        if self.tokens_group is None and self.grid.layout.pp > 1:
            self.tokens_group = self._make_tokens_group()
        slots = self._make_cache(requests)
        other = nullcontext() if self.masking is None else _generating(self.masking.engine)
        with torch.no_grad(), _generating(self.engine), other:
            finished = self._replica(mine, slots, (self.seed, stream, phase), weights_version, on_finished, on_tokens)
        shares: list[Any] = [finished]
        if self.grid.layout.copies > 1:
            shares = [None] * self.grid.layout.copies
            dist.all_gather_object(shares, finished, group=self.grid.groups.dp_cp)
        rollouts = [rollout for share in shares for rollout in share]
        rollouts.sort(key=lambda r: (r.prompt_id, r.sample_id))
        refuse_not_finite(rollouts, place)
        return rollouts

    def check_length(self, length: int) -> None:
        """Refuse a `rollout.engine.cache_bytes` that has no space for sequences of `length` tokens."""
        groups, limit = self.grid.layout.pp, self.limits.cache_bytes
        needed = groups * self._slot_bytes(length)
        if limit is not None and limit < needed:
            raise ConfigError(
                f"rollout.engine.cache_bytes={limit} is too small: a sequence of {length} tokens needs "
                f"{needed // groups} bytes on each process"
                + (f", and {groups} are generated at once" if groups > 1 else "")
                + f", so use rollout.engine.cache_bytes={needed} or more, or shorter sequences",
                key="rollout.engine.cache_bytes",
                value=limit,
                offers={"rollout.engine.cache_bytes": [needed]},
            )

    @property
    def models(self) -> list[GPT]:
        """The engine's model chunks, whose weights are moved to the device if they are not there."""
        return self.engine.models

    @property
    def _layers(self) -> list[int]:
        """Numbers of the layers whose keys and values this process caches."""
        numbers = [layer.layer_number for model in self.models for layer in model.decoder.layers]
        return [number for number in numbers if number > self.config.encoder_layers]

    @property
    def _start_id(self) -> int | None:
        """The start token of an encoder-decoder's sequences; None for other models."""
        return None if self.config.encoder is None else self.config.encoder.start_id

    def _slot_bytes(self, length: int) -> int:
        """Return the bytes of a slot on the ranks where it takes most, so that all have as many slots."""
        layout = self.grid.layout
        sizes = (self.config, KVCache.most_layers(self.config, layout.pp), layout.tp, length)
        masking = 0 if self.masking is None else KVCache.slot_bytes(*sizes)
        return KVCache.slot_bytes(*sizes, records_routes=self.limits.routes) + masking

    def close(self) -> None:
        """Free the KV cache and the CUDA graphs recorded over it."""
        self.static = None  # was recorded over this cache
        if self.cache is not None:
            self.cache.free()
            self.cache = None
        if self.masking is not None and self.masking.cache is not None:
            self.masking.cache.free()
            self.masking.cache = None

    def static_passes(self) -> StaticPasses | None:
        """Return decoding steps of fixed shapes over the present cache and token scorer; None without
        rollout.engine.cuda_graphs."""
        if not self.limits.graphs:
            return None
        returns = self.engine.memory.returns  # each return moves the weights to other addresses than a recording reads
        if self.static is None or self.static.token_scorer is not self.token_scorer or self.recorded_over != returns:
            assert self.cache is not None
            self.recorded_over = returns
            self.static = StaticPasses(self.models[0], self.token_scorer, self.cache)
        return self.static

    def _make_tokens_group(self) -> dist.ProcessGroup:
        """Create a second group of this replica's stages, for sampled tokens: in the group of the hidden states, they
        would be received out of order."""
        mine = tuple(dist.get_process_group_ranks(self.grid.groups.pp))
        every = sorted(set(self.grid.gather(mine)))  # every rank must take part in creating every group
        groups: dict[Any, dist.ProcessGroup] = {ranks: dist.new_group(list(ranks)) for ranks in every}
        return groups[mine]

    def _replica(
        self,
        requests: list[Request],
        slots: int,
        name: tuple[int, int, int],
        weights_version: int,
        on_finished: Callable[[list[Rollout]], None] | None,
        on_tokens: OnTokens | None,
    ) -> list[Rollout]:
        # One group of slots per pipeline stage, so that every stage has work.
        groups = self.grid.layout.pp
        shares = [requests[group::groups] for group in range(groups)]
        schedules = [
            Schedule(share, slots, self.eos_id, weights_version, self.decode, self.also_eos, self._start_id)
            for share in shares
        ]
        assert self.cache is not None
        masking = None if self.masking is None else self.masking.engine
        passes = Passes(
            self.grid,
            self.config,
            self.models,
            self.cache,
            self.token_scorer,
            prefill_tokens=self.limits.prefill_tokens,
            masking=self.masking,
            static=self.static_passes(),
            tokens_group=self.tokens_group,
            lockstep=lockstep_of(self.models, self.config, self.grid),
            masking_lockstep=None if masking is None else lockstep_of(masking.models, masking.config, self.grid),
        )
        lanes = [Lane(passes, schedule, group * slots, name) for group, schedule in enumerate(schedules)]
        reported = [0] * groups
        while any(lane.busy for lane in lanes):
            for group, lane in enumerate(lanes):
                if lane.finish_turn(on_tokens):
                    for other in schedules:
                        other.end_soon()
                lane.begin_turn()
                new = lane.schedule.finished[reported[group] :]
                reported[group] += len(new)
                good = [rollout for rollout in new if is_finite(rollout)]
                if len(good) < len(new):  # the call fails once running responses end, so that no rank waits forever
                    for other in schedules:
                        other.queue.clear()
                if good and on_finished is not None:
                    on_finished(good)
        serve_until_done([passes.lockstep, passes.masking_lockstep])
        finished = [rollout for schedule in schedules for rollout in schedule.finished]
        if self.limits.routes:
            finished = with_all_layers(finished, self.config, self.grid)
        self.stats = Stats(
            responses=len(finished),
            response_tokens=sum(len(rollout.response) for rollout in finished),
            prefilled_tokens=sum(schedule.prefilled_tokens for schedule in schedules),
            decode_passes=sum(schedule.decode_passes for schedule in schedules),
            decoded_rows=sum(schedule.decoded_rows for schedule in schedules),
        )
        return finished

    def _make_cache(self, requests: Sequence[Request]) -> int:
        """Make sure that the cache fits this call's longest sequence. Return the number of slots per group."""
        groups, tp, copies = self.grid.layout.pp, self.grid.layout.tp, self.grid.layout.copies
        longest = max((len(r.prompt) + r.sampling.max_new_tokens for r in requests), default=1)
        length, encoded = longest, 0
        if self._start_id is not None:
            length = max((r.sampling.max_new_tokens for r in requests), default=1)  # the start token, not the last one
            encoded = max((len(r.prompt) for r in requests), default=1)
            longest = length + encoded
        per_group = max(1, -(-min(self.limits.slots, -(-len(requests) // copies)) // groups))
        if self.limits.cache_bytes is not None:
            self.check_length(longest)
            per_group = min(per_group, self.limits.cache_bytes // self._slot_bytes(longest) // groups)
        needed = per_group * groups
        fits = (
            self.cache is not None
            and self.cache.length >= length
            and self.cache.longest_encoded >= encoded
            and self.cache.slots >= needed
        )
        caches = [self.cache, None if self.masking is None else self.masking.cache]
        held = sum(cache.nbytes for cache in caches if cache is not None)
        over = self.limits.cache_bytes is not None and held > self.limits.cache_bytes
        if not fits or over:
            self.close()
            self.cache = KVCache(
                self.config,
                self._layers,
                tp,
                needed,
                length,
                self.grid.device,
                encoded,
                records_routes=self.limits.routes,
            )
            if self.masking is not None:
                self.masking.cache = KVCache(self.config, self._layers, tp, needed, length, self.grid.device, encoded)
        return per_group


def is_finite(rollout: Rollout) -> bool:
    """Return whether every token was sampled from finite scores: NaN or infinity gives a log-prob that is not
    finite."""
    return all(map(math.isfinite, rollout.logprobs))


def refuse_not_finite(rollouts: Sequence[Rollout], place: Callable[[int], str]) -> None:
    """Refuse a response that was sampled from scores with NaN or infinity. `place(prompt_id)` names a prompt."""
    for rollout in rollouts:
        if not is_finite(rollout):
            token = next(i for i, logprob in enumerate(rollout.logprobs, 1) if not math.isfinite(logprob))
            where = place(rollout.prompt_id)
            raise NumericsError(
                f"{where}: the model's scores for token {token} of response {rollout.sample_id} are "
                "NaN or infinite: check the weights (megarl.convert names a bad tensor), or resume from an earlier "
                "checkpoint with a lower learning rate",
                key="scores",
                where=where,
            )


@contextmanager
def _generating(engine: Engine) -> Iterator[None]:
    """Switch the engine to evaluation mode without sequence parallelism, as a decoding step has one token, and prepare
    its adapters for single tokens; restore all afterwards."""
    with _in_evaluation(engine), for_sampling(engine.models):
        yield


@contextmanager
def _in_evaluation(engine: Engine) -> Iterator[None]:
    modules = [module for chunk in engine.chunks for module in chunk.modules()]
    training = [module.training for module in modules]
    switched: list[tuple[Any, str, Any]] = []

    def switch(owner: Any, name: str) -> None:
        if hasattr(owner, name):
            switched.append((owner, name, getattr(owner, name)))
            setattr(owner, name, False)

    engine.eval()
    try:
        if engine.config.sequence_parallel:
            switch(engine.config, "sequence_parallel")
            for module in modules:
                for name in ("sequence_parallel", "reduce_scatter_embeddings", "scatter_to_sequence_parallel"):
                    switch(module, name)
        yield
    finally:
        for owner, name, value in reversed(switched):
            setattr(owner, name, value)
        for module, was in zip(modules, training, strict=True):
            module.training = was


__all__ = ["Generator", "Limits", "TokenScorer", "Stats"]
