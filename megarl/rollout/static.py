"""Decoding steps over buffers at fixed addresses, which a GPU can record once as a CUDA graph and replay.

Pipelines cannot use this, as their forward passes wait for other processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megarl.models.cache import CacheView, KVCache
from megarl.models.gpt import GPT
from megarl.parallel.rows import ModelInputs

# (last chunk, final hidden states [rows, hidden]) -> float32 scores [rows, valid] of this shard, to sample from
TokenScorer = Callable[[GPT, Tensor], Tensor]
SHORTEST = 64  # cache entries of the smallest bucket


class StaticPass:
    """Computes the scores of the next tokens of up to `rows` rows, which attend to the first `length` entries of their
    slots, and to the first `encoded` tokens that an encoder read for them.

    The same kernels run on the same memory for any content: called directly on a CPU, replayed from a recording on a
    GPU. Rows without a response write to the first entry of an unused slot; the next response in that slot overwrites
    it.
    """

    def __init__(
        self,
        model: GPT,
        token_scorer: TokenScorer,
        cache: KVCache,
        rows: int,
        length: int,
        encoded: int,
        pool: Any = None,
    ) -> None:
        """`pool` is the memory that the recordings of several passes share."""
        self.pool = pool
        self.model, self.token_scorer, self.cache = model, token_scorer, cache
        self.length, self.encoded = length, encoded
        device = cache.store.device
        self.records = device.type == "cuda"
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slots = torch.arange(rows, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.scores: Tensor | None = None

    def run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return the scores [rows in use, valid] after `tokens` [rows in use] at `positions`, valid until the next
        pass."""
        count = tokens.shape[0]
        self.tokens[:count, 0] = tokens
        self.positions[:count, 0] = positions
        self.positions[count:] = 0
        if not self.records:
            self.scores = self._compute()
        elif self.graph is None:
            self._record()
        if self.graph is not None:
            self.graph.replay()
        assert self.scores is not None
        return self.scores[:count]

    def _compute(self) -> Tensor:
        # A new view each time, so that what it derives from the positions is part of the recording.
        view = CacheView(self.cache, self.slots, self.positions, self.length, longest_encoded=self.encoded)
        hidden = self.model(ModelInputs(tokens=self.tokens, positions=self.positions), cache=view)
        return self.token_scorer(self.model, hidden[0])

    def _record(self) -> None:
        warmup = torch.cuda.Stream()
        warmup.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warmup):  # selects kernels and allocates workspaces before the recording
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(warmup)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool):
            self.scores = self._compute()


@dataclass
class StaticPasses:
    """The static passes for every bucket of rows and lengths used so far, over one cache and with one token scorer: by
    numbers of rows, of cache entries, and of an encoder's tokens.

    Recordings share their memory. That is safe because scores are read before the next pass runs.
    """

    model: GPT
    token_scorer: TokenScorer
    cache: KVCache
    passes: dict[tuple[int, int, int], StaticPass] = field(default_factory=dict)
    pool: Any = None

    def scores(self, tokens: Tensor, positions: Tensor, longest: int, encoded: int = 0) -> Tensor:
        """Return the scores [rows, valid] of the rows in slots 0 ..., the longest of which has `longest` tokens so far.
        An encoder read at most `encoded` tokens for them."""
        shape = (
            bucket(tokens.shape[0], 1, self.cache.slots),
            bucket(longest, SHORTEST, self.cache.length),
            bucket(encoded, SHORTEST, self.cache.longest_encoded),
        )
        if self.pool is None and self.cache.store.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        if shape not in self.passes:
            self.passes[shape] = StaticPass(self.model, self.token_scorer, self.cache, *shape, self.pool)
        return self.passes[shape].run(tokens, positions)


def bucket(count: int, smallest: int, largest: int) -> int:
    """Round `count` up to the next power of two times `smallest`, but at most to `largest`."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)
