"""Sampling of tokens over a sharded vocabulary. Filters are thresholds and the sample is one maximum, so logits stay
local."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.vocab import VocabShard
from megarl.rollout.noise import add_gumbel
from megarl.rollout.requests import Sampling

_NO_LIMIT = 2**31  # a top_k that keeps everything
_CANDIDATES = 256  # highest scores of each shard, among which a nucleus is searched first
_BISECTIONS = 40  # steps; the remaining interval is far below float32 resolution


class Drawn(NamedTuple):
    """The sampled token of each row [rows], and its log-prob under softmax(logits / temperature) over the whole
    vocabulary."""

    tokens: Tensor
    logprobs: Tensor


@dataclass
class RowSettings:
    """The sampling settings of the rows of a batch as tensors, rebuilt only when the rows change.

    A setting that no row uses is None and costs nothing.
    """

    keys: Tensor  # [rows] of `sequence_key`
    all_greedy: bool
    greedy: Tensor | None  # [rows] bool; None where no row or every row is
    temperature: Tensor | None  # [rows]; 1 where greedy
    top_k: Tensor | None  # [rows] int64
    largest_k: int  # maximum over the rows that have one
    top_p: Tensor | None
    min_p: Tensor | None
    penalty: Tensor | None
    blocked: Tensor | None  # [rows, valid] True where a token of this shard is forbidden or not allowed

    @classmethod
    def of(
        cls, settings: Sequence[Sampling], keys: Sequence[int], shard: VocabShard, device: torch.device
    ) -> "RowSettings":
        """Convert the settings and the `sequence_key` of each row to tensors on a device."""

        def column(values: Sequence[float | None], neutral: float) -> Tensor | None:
            """None where every row has the neutral value."""
            if all(value is None or value == neutral for value in values):
                return None
            return torch.tensor([neutral if value is None else float(value) for value in values], device=device)

        greedy = [s.temperature == 0 for s in settings]
        limits = [s.top_k for s in settings if s.top_k is not None]
        return cls(
            keys=torch.tensor(keys, dtype=torch.int64, device=device),
            all_greedy=all(greedy),
            greedy=torch.tensor(greedy, device=device) if any(greedy) and not all(greedy) else None,
            temperature=column([s.temperature or 1.0 for s in settings], 1.0),
            top_k=torch.tensor([s.top_k or _NO_LIMIT for s in settings], device=device) if limits else None,
            largest_k=max(limits, default=0),
            top_p=column([s.top_p for s in settings], 1.0),
            min_p=column([s.min_p for s in settings], 0.0),
            penalty=column([s.repetition_penalty for s in settings], 1.0),
            blocked=_blocked(settings, shard, device),
        )


def draw(
    logits: Tensor,
    positions: Tensor,
    rows: RowSettings,
    shard: VocabShard,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Drawn:
    """Sample one token per row with the Gumbel-max trick.

    Args:
        logits: [rows, valid] float32 logits of this shard at temperature 1.
        positions: [rows] positions of the tokens to sample.
        rows: settings of the rows.
        shard: this shard of the vocabulary.
        seen: [rows, valid] True for tokens that the repetition penalty applies to.
        allowed: [rows, valid] True for the tokens that the distribution is over; None for all.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    scaled = logits if rows.temperature is None else logits / rows.temperature[:, None]
    scores = scaled
    if rows.penalty is not None and seen is not None:
        # Usually applied before the temperature; the order does not matter, as dividing by a positive number commutes.
        penalty = rows.penalty[:, None]
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if rows.blocked is not None:
        scores = scores.masked_fill(rows.blocked, -torch.inf)
    if not rows.all_greedy:
        threshold = _threshold(scores, rows, shard)
        if threshold is not None:
            scores = scores.masked_fill(scores < threshold[:, None], -torch.inf)
        noisy = add_gumbel(scores, rows.keys, positions, shard.start)
        scores = noisy if rows.greedy is None else torch.where(rows.greedy[:, None], scores, noisy)
    return _winner(scores, scaled, shard)


def _winner(scores: Tensor, scaled: Tensor, shard: VocabShard) -> Drawn:
    """Return the best token of all shards (the lowest id among equals) and its log-prob, with one gather of [4,
    rows]."""
    count = scores.shape[0]
    if not shard.valid:
        local = scores.new_full((4, count), -torch.inf, dtype=torch.float64)
    else:
        best, index = scores.max(dim=1)
        own, lse = scaled.gather(1, index[:, None])[:, 0], torch.logsumexp(scaled, dim=1)
        if shard.group is None:
            return Drawn(index, own - lse)
        # float64 holds token ids exactly.
        local = torch.stack([best.double(), (index + shard.start).double(), own.double(), lse.double()])
    parts = _gather(local, shard)
    lse = torch.logsumexp(parts[:, 3], dim=0)
    winner = parts[:, 0].argmax(dim=0)  # among equals, argmax takes the shard with the lower ids
    picked = parts.gather(0, winner[None, None, :].expand(1, 4, count))[0]
    return Drawn(picked[1].long(), (picked[2] - lse).float())


def _threshold(scores: Tensor, rows: RowSettings, shard: VocabShard) -> Tensor | None:
    """Return the score [rows] below which tokens are filtered out; None if nothing is filtered.

    Tokens with equal scores are kept or filtered together, so the result does not depend on how they are sorted.
    """
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    wanted = max(1, rows.largest_k, 0 if rows.top_p is None else _CANDIDATES)
    best = _best(scores, wanted, shard)
    threshold = scores.new_full((scores.shape[0],), -torch.inf)
    if rows.top_k is not None:
        kth = best.gather(1, (rows.top_k.clamp(max=best.shape[1]) - 1)[:, None])[:, 0]
        threshold = kth.masked_fill(rows.top_k >= _NO_LIMIT, -torch.inf)
    if rows.top_p is not None:
        threshold = torch.maximum(threshold, _nucleus(scores, best, threshold, rows.top_p, shard))
    if rows.min_p is not None:
        threshold = torch.maximum(threshold, best[:, 0] + torch.log(rows.min_p))
    return threshold


def nucleus(logits: Tensor, top_p: float, temperature: Tensor | float, shard: VocabShard) -> Tensor:
    """Return [rows, valid], True for the most likely tokens whose probabilities add up to `top_p`.

    Args:
        logits: [rows, valid] float32 logits of this shard at temperature 1.
        top_p: above 0; from 1 on, all tokens.
        temperature: one for all rows, or [rows].
        shard: this shard of the vocabulary.
    """
    if top_p >= 1:
        return torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
    scores = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    floor = scores.new_full((len(scores),), -torch.inf)
    wanted = torch.full_like(floor, top_p)
    return scores >= _nucleus(scores, _best(scores, _CANDIDATES, shard), floor, wanted, shard)[:, None]


def _best(scores: Tensor, count: int, shard: VocabShard) -> Tensor:
    """Return the highest scores [rows, at least `count` or the vocabulary] in descending order."""
    local = torch.topk(scores, min(count, shard.valid), dim=1).values
    if shard.group is None:
        return local
    missing = count - local.shape[1]
    if missing:
        local = torch.cat([local, local.new_full((local.shape[0], missing), -torch.inf)], dim=1)
    gathered = _gather(local, shard).transpose(0, 1).flatten(1)  # [rows, tp * count]
    return torch.sort(gathered, dim=1, descending=True).values


def _nucleus(scores: Tensor, best: Tensor, floor: Tensor, top_p: Tensor, shard: VocabShard) -> Tensor:
    """Return the highest score [rows] such that tokens at or above it have at least `top_p` of the mass at or above
    `floor`.

    `best` [rows, n] has the highest scores in descending order; they nearly always contain the nucleus.
    """
    largest = best[:, :1]
    mass = torch.exp(scores - largest).masked_fill_(scores < floor[:, None], 0.0)
    wanted = top_p.double() * _all_sum(mass.sum(1, dtype=torch.float64), shard)
    cumulative = torch.exp(best - largest).masked_fill_(best < floor[:, None], 0.0).cumsum(1, dtype=torch.float64)
    enough = cumulative >= wanted[:, None] * (1 - 1e-12)  # the two sums differ in order, and so in rounding
    threshold = best.gather(1, enough.int().argmax(1, keepdim=True))[:, 0]
    unfiltered = top_p >= 1.0
    if not bool((enough[:, -1] | unfiltered).all()):
        threshold = torch.where(enough[:, -1], threshold, _bisect(scores, mass, largest[:, 0], wanted, shard))
    return torch.where(unfiltered, floor, threshold)


def _bisect(scores: Tensor, mass: Tensor, largest: Tensor, wanted: Tensor, shard: VocabShard) -> Tensor:
    """Find the same score [rows] by bisection, for flat distributions. A step costs one reduction of [rows] and no
    sort."""
    # Invariant: the mass at or above `low` is enough, above `high` it is not. Lower scores have negligible mass.
    high, low = largest.double() + 1e-6, largest.double() - 60.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = mass.masked_fill(scores < middle[:, None], 0.0).sum(1, dtype=torch.float64)
        enough = _all_sum(above, shard) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.to(scores.dtype)


def _blocked(settings: Sequence[Sampling], shard: VocabShard, device: torch.device) -> Tensor | None:
    if all(not s.forbidden and s.allowed is None for s in settings):
        return None
    blocked = torch.zeros(len(settings), shard.valid, dtype=torch.bool)
    for row, setting in enumerate(settings):
        if setting.allowed is not None:
            blocked[row] = True
            blocked[row, _mine(setting.allowed, shard)] = False
        blocked[row, _mine(setting.forbidden, shard)] = True
    return blocked.to(device)


def _mine(tokens: Sequence[int], shard: VocabShard) -> list[int]:
    return [token - shard.start for token in tokens if shard.start <= token < shard.start + shard.valid]


def _gather(local: Tensor, shard: VocabShard) -> Tensor:
    """Return the tensors of all shards [tp, ...]."""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, local.contiguous(), group=shard.group)
    return torch.stack(parts)


def _all_sum(value: Tensor, shard: VocabShard) -> Tensor:
    return value if shard.group is None else _gather(value, shard).sum(0)
