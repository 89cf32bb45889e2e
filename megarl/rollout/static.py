"""Decode passes over buffers that stay where they are, so that a GPU can record a pass once and replay it: CUDA graphs.

Not for pipelines, whose passes wait for other processes in between.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megarl.models.cache import CacheView, KVCache
from megarl.models.gpt import GPT
from megarl.parallel.rows import ModelInputs

# (last chunk, final hidden states [rows, hidden]) -> this shard's [rows, valid] float32 scores that tokens are drawn by
TokenScorer = Callable[[GPT, Tensor], Tensor]
SHORTEST = 64  # entries of the smallest bucket


class StaticPass:
    """Scores of the next tokens of up to `rows` rows, which may look at the first `length` entries of their slots.

    The same kernels run on the same memory whatever the rows hold: without a GPU as they are called, on a GPU as they
    were recorded. Rows without a response write to the first entry of a slot that nobody has; it is overwritten when
    somebody gets it.
    """

    def __init__(
        self, model: GPT, token_scorer: TokenScorer, cache: KVCache, rows: int, length: int, pool: Any = None
    ) -> None:
        """`pool`: memory that the recordings of several passes share."""
        self.pool = pool
        self.model, self.token_scorer, self.cache, self.length = model, token_scorer, cache, length
        device = cache.store.device
        self.records = device.type == "cuda"
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.slots = torch.arange(rows, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.scores: Tensor | None = None

    def run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[rows in use, valid] scores after `tokens` [rows in use] at `positions`; valid until the next pass."""
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
        # A new view each time: what it derives from the positions has to be part of the recording.
        view = CacheView(self.cache, self.slots, self.positions, self.length)
        hidden = self.model(ModelInputs(tokens=self.tokens, positions=self.positions), cache=view)
        return self.token_scorer(self.model, hidden[0])

    def _record(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are chosen and workspaces made before the recording
            for _ in range(2):
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=self.pool):
            self.scores = self._compute()


@dataclass
class StaticPasses:
    """A pass for every bucket of rows and lengths that has come up, over one cache and with one token scorer.

    Recordings share their memory: scores are read before the next pass, whichever it is, so nothing is lost.
    """

    model: GPT
    token_scorer: TokenScorer
    cache: KVCache
    passes: dict[tuple[int, int], StaticPass] = field(default_factory=dict)
    pool: Any = None

    def scores(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """[rows, valid] scores of the rows in slots 0 ..., of which the longest has `longest` tokens so far."""
        rows = bucket(tokens.shape[0], 1, self.cache.slots)
        length = bucket(longest, SHORTEST, self.cache.length)
        if self.pool is None and self.cache.store.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        if (rows, length) not in self.passes:
            self.passes[rows, length] = StaticPass(self.model, self.token_scorer, self.cache, rows, length, self.pool)
        return self.passes[rows, length].run(tokens, positions)


def bucket(count: int, smallest: int, largest: int) -> int:
    """`count` rounded up to the next power of two times `smallest`, but not past `largest`, which holds it."""
    size = smallest
    while size < count:
        size *= 2
    return min(size, largest)
