"""Generation on an engine's own model: prefill, decode, refill, at any TP x PP x DP."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.errors import ConfigError
from megarl.models.cache import CacheView, KVCache
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.rollout.noise import TRAINING, sequence_key
from megarl.rollout.requests import Request, Rollout
from megarl.rollout.sampling import Drawn, RowSettings, draw
from megarl.rollout.schedule import Plan, Schedule, deal

PREFILL_TOKENS = 16_384  # of one prefill pass: enough to fill a device, little beside the cache


@dataclass(frozen=True)
class Limits:
    """How much of a device generation may take."""

    slots: int = 128  # responses in flight on a replica
    cache_bytes: int | None = None  # of keys and values on a rank; None: what `slots` need


class Generator:
    """Draws responses with an engine's present weights. `close` frees the cache; the next call makes it again."""

    def __init__(self, engine: Engine, eos_id: int, *, seed: int, limits: Limits | None = None) -> None:
        self.engine, self.grid, self.config = engine, engine.grid, engine.config
        self.eos_id, self.seed = eos_id, seed
        self.limits = limits or Limits()
        self.models: list[GPT] = list(engine.models)
        self.cache: KVCache | None = None
        self.stats: dict[str, int] = {}

    def generate(
        self,
        requests: Sequence[Request],
        *,
        stream: int = TRAINING,
        phase: int = 0,
        weights_version: int = 0,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """Every request's response, sorted by (prompt_id, sample_id), on every rank of the world.

        `on_finished` hears how many more responses of this replica are done.
        """
        mine = deal(requests, self.grid.layout.dp)[self.grid.dp_rank]
        with torch.no_grad(), _generating(self.engine, self.models):
            finished = self._replica(mine, stream, phase, weights_version, on_finished)
        everything = [finished]
        if self.grid.layout.dp > 1:
            everything = [None] * self.grid.layout.dp  # type: ignore[list-item]
            dist.all_gather_object(everything, finished, group=self.grid.groups.dp)
        rollouts = [rollout for share in everything for rollout in share]
        return sorted(rollouts, key=lambda r: (r.prompt_id, r.sample_id))

    def close(self) -> None:
        if self.cache is not None:
            self.cache.free()
            self.cache = None

    def _replica(
        self,
        requests: list[Request],
        stream: int,
        phase: int,
        weights_version: int,
        on_finished: Callable[[int], None] | None,
    ) -> list[Rollout]:
        if not requests:
            return []
        length = max(len(r.prompt) + r.sampling.max_new_tokens for r in requests)
        if length > self.config.max_positions and self.config.position != "none":
            raise ConfigError(
                f"a prompt and rollout.max_new_tokens make {length} tokens, but the model's context is "
                f"{self.config.max_positions}: shorten the prompts or lower rollout.max_new_tokens"
            )
        group_slots = self._make_cache(length, len(requests))
        # One group of slots per pipeline stage, so that every stage has a pass to work on.
        groups = self.grid.layout.pp
        shares = [requests[group::groups] for group in range(groups)]
        schedules = [Schedule(share, group_slots, self.eos_id, weights_version) for share in shares]
        lanes = [
            _Lane(self, schedule, group * group_slots, stream, phase) for group, schedule in enumerate(schedules)
        ]
        reported = 0
        while any(not lane.schedule.done or lane.plan is not None for lane in lanes):
            for lane in lanes:
                lane.finish_turn()
                lane.begin_turn()
            done = sum(len(schedule.finished) for schedule in schedules)
            if on_finished is not None and done > reported:
                on_finished(done - reported)
            reported = done
        self.stats = {
            "decode_passes": sum(schedule.decode_passes for schedule in schedules),
            "decoded_rows": sum(schedule.decoded_rows for schedule in schedules),
        }
        return [rollout for schedule in schedules for rollout in schedule.finished]

    def _make_cache(self, length: int, requests: int) -> int:
        """A cache for this call's longest sequence; slots per group."""
        groups, tp = self.grid.layout.pp, self.grid.layout.tp
        layers = [layer.layer_number for model in self.models for layer in model.decoder.layers]
        slot = KVCache.slot_bytes(self.config, len(layers), tp, length)
        slots = min(self.limits.slots, requests)
        if self.limits.cache_bytes is not None:
            slots = min(slots, self.limits.cache_bytes // slot)
            if slots < groups:
                raise ConfigError(
                    f"rollout.cache_bytes={self.limits.cache_bytes} holds {slots} sequences of {length} tokens, and "
                    f"{groups} are needed at once: {groups * slot} bytes are the least"
                )
        per_group = max(1, -(-slots // groups) if self.limits.cache_bytes is None else slots // groups)
        fits = self.cache is not None and self.cache.length >= length and self.cache.slots >= per_group * groups
        if not fits:
            self.close()
            self.cache = KVCache(self.config, layers, tp, per_group * groups, length, self.grid.device)
        return per_group


class _Lane:
    """One group of slots on its way through the pipeline, a turn at a time.

    A turn runs its passes on this stage, and the last stage sends what it drew to the others, which take it when they
    come to the lane's next turn. So while one lane is on a later stage, this stage works on another.
    """

    def __init__(self, generator: Generator, schedule: Schedule, first_slot: int, stream: int, phase: int) -> None:
        self.generator, self.schedule, self.first = generator, schedule, first_slot
        self.grid: Grid = generator.grid
        self.name = (generator.seed, stream, phase)
        self.plan: Plan | None = None
        self.drawn: list[Drawn] = []
        self.sends: list[Any] = []
        self.settings: tuple[list[int], RowSettings] | None = None

    def begin_turn(self) -> None:
        """Run the passes of a turn, if there is anything left to draw."""
        if self.schedule.done:
            return
        self.plan = self.schedule.plan()
        self.drawn = []
        for slots in self._prefill_chunks(self.plan.prefill):
            self._pass(slots, prefill=True)
        # Slots that are new in this turn lie among those that go on; decoding covers runs of consecutive slots.
        for slots in _runs(self.plan.decode):
            self._pass(slots, prefill=False)
        if self.plan.decode:
            self.schedule.decode_passes += 1
            self.schedule.decoded_rows += len(self.plan.decode)
        if self.grid.is_last_stage:
            self._send_drawn()

    def finish_turn(self) -> None:
        """Take what was drawn in the lane's turn before, and move on."""
        if self.plan is None:
            return
        slots = [slot for chunk in self._prefill_chunks(self.plan.prefill) for slot in chunk]
        slots += [slot for run in _runs(self.plan.decode) for slot in run]
        tokens, logprobs = self._receive_drawn(len(slots))
        for request in self.sends:
            request.wait()
        self.sends = []
        assert self.generator.cache is not None
        before = [id(running) for running in self.schedule.running]
        for source, target, entries in self.schedule.accept(slots, tokens, logprobs):
            self.generator.cache.move(self.first + source, self.first + target, entries)
        if before != [id(running) for running in self.schedule.running]:
            self.settings = None
        self.plan = None

    # --- one pass ---------------------------------------------------------------------------------------------------

    def _pass(self, slots: Sequence[int], *, prefill: bool) -> None:
        batch, view, last = self._inputs(slots, prefill)
        hidden: Tensor | None = None
        chunks = self.generator.models
        for index, model in enumerate(chunks):
            if not model.pre_process:
                hidden = self._receive_hidden(batch["tokens"].shape)
                model.set_input_tensor(hidden)
            hidden = model(batch, cache=view)
            if not (self.grid.is_last_stage and index == len(chunks) - 1):
                self._send_hidden(hidden)
        if self.grid.is_last_stage:
            assert hidden is not None
            states = hidden[last, torch.arange(len(slots), device=hidden.device)]
            model = chunks[-1]
            rows = self._rows(slots)
            self.drawn.append(draw(model.logits(states), view.positions.gather(1, last[:, None])[:, 0] + 1, rows, model.shard, self._seen(slots, model)))

    def _inputs(self, slots: Sequence[int], prefill: bool) -> tuple[dict[str, Tensor], CacheView, Tensor]:
        """The batch, its view of the cache, and where in time each row's last token stands."""
        device, cache = self.grid.device, self.generator.cache
        assert cache is not None
        running = [self.schedule.running[slot] for slot in slots]
        where = torch.tensor([self.first + slot for slot in slots], device=device)
        if prefill:
            longest = max(len(r.request.prompt) for r in running)
            tokens = torch.tensor([[*r.request.prompt, *[0] * (longest - len(r.request.prompt))] for r in running])
            positions = torch.arange(longest).expand(len(slots), -1)
            last = torch.tensor([len(r.request.prompt) - 1 for r in running])
            length = None
        else:
            tokens = torch.tensor([[r.response[-1]] for r in running])
            positions = torch.tensor([[r.length - 1] for r in running])
            last = torch.zeros(len(slots), dtype=torch.long)
            length = max(r.length for r in running)
        batch = {"tokens": tokens.to(device), "positions": positions.to(device)}
        view = CacheView(cache, where, batch["positions"], length, self.first + slots[0])
        return batch, view, last.to(device)

    def _rows(self, slots: Sequence[int]) -> RowSettings:
        """Sampling settings of these rows; kept while the slots hold the same responses."""
        wanted = list(slots)
        if self.settings is None or self.settings[0] != wanted:
            requests = [self.schedule.running[slot].request for slot in slots]
            keys = [sequence_key(*self.name, r.prompt_id, r.sample_id) for r in requests]
            shard = self.generator.models[-1].shard
            self.settings = (wanted, RowSettings.of([r.sampling for r in requests], keys, shard, self.grid.device))
        return self.settings[1]

    def _seen(self, slots: Sequence[int], model: GPT) -> Tensor | None:
        """[rows, valid] tokens of prompt and response, for rows with a repetition penalty."""
        running = [self.schedule.running[slot] for slot in slots]
        if all(r.request.sampling.repetition_penalty == 1.0 for r in running):
            return None
        seen = torch.zeros(len(slots), model.shard.valid, dtype=torch.bool)
        for row, r in enumerate(running):
            tokens = torch.tensor([*r.request.prompt, *r.response]) - model.shard.start
            seen[row, tokens[(tokens >= 0) & (tokens < model.shard.valid)]] = True
        return seen.to(self.grid.device)

    def _prefill_chunks(self, slots: Sequence[int]) -> Iterator[list[int]]:
        """Slots in passes of bounded size; sorted by length, so that a pass pads little."""
        chunk: list[int] = []
        for slot in slots:
            length = len(self.schedule.running[slot].request.prompt)  # the longest so far
            if chunk and (len(chunk) + 1) * length > PREFILL_TOKENS:
                yield chunk
                chunk = []
            chunk.append(slot)
        if chunk:
            yield chunk

    # --- between stages ---------------------------------------------------------------------------------------------

    def _neighbour(self, step: int) -> int:
        ranks: list[int] = dist.get_process_group_ranks(self.grid.groups.pp)
        return ranks[(self.grid.pp_rank + step) % len(ranks)]

    def _send_hidden(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, self._neighbour(1), group=self.grid.groups.pp)
        self.sends.append(_Kept(work, hidden))

    def _receive_hidden(self, shape: torch.Size) -> Tensor:
        config = self.generator.config
        hidden = torch.empty((shape[1], shape[0], config.hidden_size), dtype=config.params_dtype, device=self.grid.device)
        dist.recv(hidden, self._neighbour(-1), group=self.grid.groups.pp)
        return hidden

    def _send_drawn(self) -> None:
        """From the last stage to every other: tokens and log-probs [2, rows] in float64, which holds ids exactly."""
        self.result = torch.stack(
            [torch.cat([d.tokens for d in self.drawn]).double(), torch.cat([d.logprobs for d in self.drawn]).double()]
        )
        for step in range(1, self.grid.layout.pp):
            work = dist.isend(self.result, self._neighbour(step), group=self.grid.groups.pp)
            self.sends.append(_Kept(work, self.result))

    def _receive_drawn(self, rows: int) -> tuple[list[int], list[float]]:
        if self.grid.is_last_stage:
            result = self.result
        else:
            result = torch.empty(2, rows, dtype=torch.float64, device=self.grid.device)
            source = dist.get_process_group_ranks(self.grid.groups.pp)[-1]
            dist.recv(result, source, group=self.grid.groups.pp)
        tokens, logprobs = result.tolist()
        return [int(token) for token in tokens], logprobs


@dataclass
class _Kept:
    """A send under way, and the tensor that must live until it is done."""

    work: Any
    tensor: Tensor

    def wait(self) -> None:
        self.work.wait()


def _runs(slots: Sequence[int]) -> Iterator[list[int]]:
    """Maximal runs of consecutive slots."""
    run: list[int] = []
    for slot in slots:
        if run and slot != run[-1] + 1:
            yield run
            run = []
        run.append(slot)
    if run:
        yield run


@contextmanager
def _generating(engine: Engine, models: Sequence[GPT]) -> Iterator[None]:
    """Evaluation mode without sequence parallelism (a decode pass has one token to split); as before afterwards."""
    was_training = [model.training for model in models]
    engine.eval()
    switched: list[tuple[Any, str, Any]] = []

    def switch(owner: Any, name: str, value: Any) -> None:
        if hasattr(owner, name):
            switched.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

    if engine.config.sequence_parallel:
        switch(engine.config, "sequence_parallel", False)
        for model in models:
            for module in model.modules():
                switch(module, "sequence_parallel", False)
                switch(module, "reduce_scatter_embeddings", False)
                switch(module, "scatter_to_sequence_parallel", False)
    try:
        yield
    finally:
        for owner, name, value in reversed(switched):
            setattr(owner, name, value)
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
