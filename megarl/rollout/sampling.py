"""Drawing tokens over a sharded vocabulary: filters are thresholds, the draw is one maximum, no logits are gathered."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.vocab import VocabShard
from megarl.rollout.noise import gumbel
from megarl.rollout.requests import Sampling

_BISECTIONS = 40  # of the probability that separates a nucleus from the rest: far below float32 resolution


class Drawn(NamedTuple):
    """Per row [rows]: the token, and its log-prob under softmax(logits / temperature) over the whole vocabulary."""

    tokens: Tensor
    logprobs: Tensor


@dataclass
class RowSettings:
    """The sampling settings of the rows of a batch as tensors, made anew only when the rows change."""

    temperature: Tensor  # [rows]; 1 where greedy
    greedy: Tensor  # [rows] bool
    keys: Tensor  # [rows] of `sequence_key`
    top_k: Tensor | None  # [rows]; None where no row has one
    top_p: Tensor | None
    min_p: Tensor | None
    penalty: Tensor | None
    blocked: Tensor | None  # [rows, valid] True where a token of this shard is forbidden or not allowed

    @classmethod
    def of(cls, settings: Sequence[Sampling], keys: Sequence[int], shard: VocabShard, device: torch.device) -> "RowSettings":
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)

        def optional(values: list[float | None], neutral: float) -> Tensor | None:
            if all(value is None for value in values):
                return None
            return column([neutral if value is None else float(value) for value in values])

        top_k = optional([s.top_k for s in settings], float(2**31))
        return cls(
            temperature=column([s.temperature or 1.0 for s in settings]),
            greedy=torch.tensor([s.temperature == 0 for s in settings], device=device),
            keys=torch.tensor(keys, dtype=torch.int64, device=device),
            top_k=None if top_k is None else top_k.long(),
            top_p=optional([s.top_p for s in settings], 1.0),
            min_p=optional([s.min_p for s in settings], 0.0),
            penalty=optional([None if s.repetition_penalty == 1.0 else s.repetition_penalty for s in settings], 1.0),
            blocked=_blocked(settings, shard, device),
        )


def draw(logits: Tensor, positions: Tensor, rows: RowSettings, shard: VocabShard, seen: Tensor | None = None) -> Drawn:
    """One token per row by Gumbel-max.

    logits: [rows, valid], this shard's, float32, at temperature 1; positions: [rows] of the tokens to be drawn.
    seen: [rows, valid] True for tokens that the repetition penalty applies to.
    """
    scaled = logits / rows.temperature[:, None]
    scores = logits
    if rows.penalty is not None and seen is not None:
        penalised = torch.where(scores > 0, scores / rows.penalty[:, None], scores * rows.penalty[:, None])
        scores = torch.where(seen, penalised, scores)
    if rows.blocked is not None:
        scores = scores.masked_fill(rows.blocked, -torch.inf)
    scores = scores / rows.temperature[:, None]
    threshold = _threshold(scores, rows, shard)
    if threshold is not None:
        scores = scores.masked_fill(scores < threshold[:, None], -torch.inf)
    ids = torch.arange(shard.start, shard.start + shard.valid, device=logits.device)
    if not bool(rows.greedy.all()):
        noise = gumbel(rows.keys, positions, ids)
        scores = scores + noise.masked_fill_(rows.greedy[:, None], 0.0)
    return _winner(scores, scaled, shard)


def _winner(scores: Tensor, scaled: Tensor, shard: VocabShard) -> Drawn:
    """The best token of all shards (the lowest id among equals), and its log-prob: one gather of [4, rows]."""
    count = scores.shape[0]
    if shard.valid:
        best, index = scores.max(dim=1)
        own = scaled.gather(1, index[:, None])[:, 0]
        local = torch.stack([best, (index + shard.start).to(best.dtype), own, torch.logsumexp(scaled, dim=1)])
    else:
        local = scores.new_full((4, count), -torch.inf)
    local = local.double()  # token ids stay exact
    if shard.group is None:
        return Drawn(local[1].long(), (local[2] - local[3]).float())
    parts = _gather(local, shard)
    lse = torch.logsumexp(parts[:, 3], dim=0)
    winner = parts[:, 0].argmax(dim=0)  # the first among equals is the shard with the lower ids
    picked = parts.gather(0, winner[None, None, :].expand(1, 4, count))[0]
    return Drawn(picked[1].long(), (picked[2] - lse).float())


def _threshold(scores: Tensor, rows: RowSettings, shard: VocabShard) -> Tensor | None:
    """[rows] the score below which a token is filtered out, or None where nothing is filtered."""
    if rows.top_k is None and rows.top_p is None and rows.min_p is None:
        return None
    threshold = scores.new_full((scores.shape[0],), -torch.inf)
    if rows.top_k is not None:
        threshold = _kth_largest(scores, rows.top_k, shard)
    if rows.top_p is not None:
        threshold = torch.maximum(threshold, _nucleus(scores, threshold, rows.top_p, shard))
    if rows.min_p is not None:
        largest = _all_max(_local_max(scores), shard)
        threshold = torch.maximum(threshold, largest + torch.log(rows.min_p))
    return threshold


def _kth_largest(scores: Tensor, k: Tensor, shard: VocabShard) -> Tensor:
    """[rows] the k-th largest score of the whole vocabulary; -inf where k is more than there are."""
    limited = k < 2**31
    most = int(k[limited].max()) if bool(limited.any()) else 1
    local = torch.topk(scores, min(most, shard.valid), dim=1).values
    missing = most - local.shape[1]
    if missing:
        local = torch.cat([local, local.new_full((local.shape[0], missing), -torch.inf)], dim=1)
    if shard.group is not None:
        gathered = _gather(local, shard).transpose(0, 1).flatten(1)  # [rows, tp * most]
        local = torch.topk(gathered, most, dim=1).values
    kth = local.gather(1, (k.clamp(max=most) - 1)[:, None])[:, 0]
    return kth.masked_fill(~limited, -torch.inf)


def _nucleus(scores: Tensor, floor: Tensor, top_p: Tensor, shard: VocabShard) -> Tensor:
    """[rows] the highest score whose tokens and all above it hold at least `top_p` of the mass at or above `floor`.

    Found by bisection on the score, so that a step costs one reduction of [rows] and nothing is sorted.
    """
    kept = scores.masked_fill(scores < floor[:, None], -torch.inf)
    largest = _all_max(_local_max(kept), shard)
    mass = torch.exp(kept.double() - largest.double()[:, None])
    total = _all_sum(mass.sum(1), shard)
    wanted = top_p.double() * total
    # Invariant: the mass at or above `low` is enough, above `high` it is not. Scores this far down weigh nothing.
    high, low = largest.double() + 1e-6, largest.double() - 60.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = _all_sum(mass.masked_fill(kept.double() < middle[:, None], 0.0).sum(1), shard) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(top_p >= 1.0, floor, low.to(scores.dtype))


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


def _local_max(scores: Tensor) -> Tensor:
    return scores.amax(1) if scores.shape[1] else scores.new_full((scores.shape[0],), -torch.inf)


def _gather(local: Tensor, shard: VocabShard) -> Tensor:
    """[tp, ...]"""
    parts = [torch.empty_like(local) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(parts, local.contiguous(), group=shard.group)
    return torch.stack(parts)


def _all_max(value: Tensor, shard: VocabShard) -> Tensor:
    return value if shard.group is None else _gather(value, shard).amax(0)


def _all_sum(value: Tensor, shard: VocabShard) -> Tensor:
    return value if shard.group is None else _gather(value, shard).sum(0)
