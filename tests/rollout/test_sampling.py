"""Draws follow the distribution that the settings describe, exactly filtered, whatever the shards and the company."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.vocab import VocabShard
from megarl.rollout.noise import sequence_key
from megarl.rollout.requests import Sampling
from megarl.rollout.sampling import Drawn, RowSettings, _threshold, draw
from tests.worlds import Worlds

CPU = torch.device("cpu")
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 4},
    "top_k of all": {"top_k": 1000},
    "top_p": {"top_p": 0.7},
    "top_p, tiny": {"top_p": 1e-9},
    "top_p of all": {"top_p": 1.0},
    "min_p": {"min_p": 0.15},
    "penalty": {"repetition_penalty": 1.8},
    "forbidden": {"forbidden": (2, 5, 6)},
    "allowed": {"allowed": (1, 3, 4, 9, 11)},
    "top_k and top_p": {"top_k": 6, "top_p": 0.8, "temperature": 1.3},
    "all of them": {
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.05,
        "temperature": 1.5,
        "repetition_penalty": 1.3,
        "forbidden": (0,),
        "allowed": tuple(range(11)),
    },
}
SEEN = (3, 7, 8)


def plain_probabilities(logits: Tensor, sampling: Sampling, seen: tuple[int, ...]) -> Tensor:
    """[vocab] what one row is drawn from, written token by token in float64."""
    scores = logits.double().tolist()
    for token in seen:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    allowed = set(range(len(scores)) if sampling.allowed is None else sampling.allowed) - set(sampling.forbidden)
    weights = {token: math.exp(scores[token] / (sampling.temperature or 1.0)) for token in allowed}
    if sampling.temperature == 0:
        weights = {max(sorted(weights), key=lambda token: weights[token]): 1.0}
    ranked = sorted(weights, key=lambda token: -weights[token])
    if sampling.top_k is not None and sampling.top_k < len(ranked):
        last = weights[ranked[sampling.top_k - 1]]
        ranked = [token for token in ranked if weights[token] >= last]
    if sampling.top_p is not None and sampling.top_p < 1:
        wanted, mass, last = sampling.top_p * sum(weights[token] for token in ranked), 0.0, 0.0
        for token in ranked:
            mass, last = mass + weights[token], weights[token]
            if mass >= wanted:
                break
        ranked = [token for token in ranked if weights[token] >= last]
    if sampling.min_p is not None:
        ranked = [token for token in ranked if weights[token] >= sampling.min_p * weights[ranked[0]]]
    probabilities = torch.zeros(len(scores), dtype=torch.float64)
    for token in ranked:
        probabilities[token] = weights[token]
    return probabilities / probabilities.sum()


def whole(vocab: int) -> VocabShard:
    return VocabShard.of(vocab, 0, 1, None)


def seen_mask(rows: int, vocab: int, seen: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(rows, vocab, dtype=torch.bool)
    mask[:, list(seen)] = True
    return mask


def keys(rows: int) -> list[int]:
    return [sequence_key(7, 0, 0, row, 0) for row in range(rows)]


def draws(logits: Tensor, settings: list[Sampling], seen: tuple[int, ...] = ()) -> Drawn:
    """One draw per row [rows, vocab], all at position 5."""
    rows, vocab = logits.shape
    shard = whole(vocab)
    made = RowSettings.of(settings, keys(rows), shard, CPU)
    return draw(logits, torch.full((rows,), 5), made, shard, seen_mask(rows, vocab, seen))


@pytest.mark.parametrize("name", FILTERS)
def test_frequencies_follow_the_filtered_distribution(name: str) -> None:
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    sampling, count = Sampling(**FILTERS[name]), 8000
    expected = count * plain_probabilities(logits, sampling, SEEN)
    tokens = draws(logits.expand(count, -1), [sampling] * count, SEEN).tokens
    observed = torch.bincount(tokens, minlength=12).double()
    kept = expected > 0
    assert float(observed[~kept].sum()) == 0
    freedom = int(kept.sum()) - 1
    chi_square = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < freedom + 3.3 * (2 * max(freedom, 1)) ** 0.5 + 3  # about one in ten thousand


def test_a_wrong_distribution_is_seen() -> None:
    """The chi-square test has teeth: draws at temperature 1 do not pass for draws at 1.1."""
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    expected = 8000 * plain_probabilities(logits, Sampling(temperature=1.1), ())
    observed = torch.bincount(draws(logits.expand(8000, -1), [Sampling()] * 8000).tokens, minlength=12).double()
    assert float(((observed - expected) ** 2 / expected).sum()) > 40


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("vocab", [5, 300, 3000])
def test_filters_keep_exactly_the_tokens_of_the_plain_definition(vocab: int, spread: float) -> None:
    """Every row has other settings; a flat distribution of 3000 has a nucleus that is no handful of candidates."""
    generator = torch.Generator().manual_seed(vocab)
    settings = [
        Sampling(top_k=top_k, top_p=top_p, min_p=min_p)
        for top_k in (None, 1, 3, 50)
        for top_p in (None, 0.05, 0.5, 0.93, 1.0)
        for min_p in (None, 0.3)
    ]
    logits = spread * torch.randn(len(settings), vocab, generator=generator)
    shard = whole(vocab)
    threshold = _threshold(logits, RowSettings.of(settings, keys(len(settings)), shard, CPU), shard)
    assert threshold is not None
    for row, sampling in enumerate(settings):
        wanted = plain_probabilities(logits[row], sampling, ()) > 0
        kept = logits[row] >= threshold[row]
        assert torch.equal(kept, wanted), sampling


def test_equal_scores_stay_or_go_together_and_greedy_takes_the_lowest_id() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, -1.0])
    rows = logits.expand(500, -1)
    assert set(draws(rows, [Sampling(top_k=2)] * 500).tokens.tolist()) == {1, 2, 3, 4}
    # softmax: .42 for token 1, .15 for each of the three
    assert set(draws(rows, [Sampling(top_p=0.45)] * 500).tokens.tolist()) == {1, 2, 3, 4}
    assert set(draws(rows, [Sampling(top_p=0.40)] * 500).tokens.tolist()) == {1}
    tied = torch.tensor([[0.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    assert draws(tied, [Sampling(temperature=0.0)] * 2).tokens.tolist() == [1, 0]


def test_logprobs_are_of_the_whole_distribution_at_the_temperature() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    settings = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=0.0),
        Sampling(temperature=2.0, top_k=1),
        Sampling(top_p=0.3, repetition_penalty=2.0),
        Sampling(allowed=(4,)),
    ]
    drawn = draws(logits, settings, (1, 2, 3))
    for row, sampling in enumerate(settings):
        token = int(drawn.tokens[row])
        wanted = torch.log_softmax(logits[row].double() / (sampling.temperature or 1.0), 0)[token]
        assert float(drawn.logprobs[row]) == pytest.approx(float(wanted), abs=2e-6)
    assert int(drawn.tokens[5]) == 4
    assert int(drawn.tokens[2]) == int(logits[2].argmax())


def test_a_row_draws_the_same_alone_and_among_rows_with_other_settings() -> None:
    logits = torch.randn(len(FILTERS), 12, generator=torch.Generator().manual_seed(1))
    settings = [Sampling(**filters) for filters in FILTERS.values()] + [Sampling(temperature=0.0)]
    logits = torch.cat([logits, logits[:1]])
    together = draws(logits, settings, SEEN)
    shard = whole(12)
    for row, sampling in enumerate(settings):
        made = RowSettings.of([sampling], [keys(len(settings))[row]], shard, CPU)
        alone = draw(logits[row : row + 1], torch.tensor([5]), made, shard, seen_mask(1, 12, SEEN))
        assert int(alone.tokens[0]) == int(together.tokens[row])


def sharded_draws(vocab: int, rows: int) -> tuple[list[int], list[float]]:
    """What this rank draws when each of the world's ranks has a shard; every filter, row by row."""
    rank, tp = dist.get_rank(), dist.get_world_size()
    shard = VocabShard.of(vocab, rank, tp, dist.group.WORLD)
    every = [
        {**filters, "forbidden": (), "allowed": None} if "allowed" in filters else filters
        for filters in FILTERS.values()
    ]
    settings = [Sampling(**every[row % len(every)]) for row in range(rows)]
    logits = 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3))
    mine = slice(shard.start, shard.start + shard.valid)
    made = RowSettings.of(settings, keys(rows), shard, CPU)
    seen = seen_mask(rows, vocab, (0, vocab - 1))
    drawn = draw(logits[:, mine], torch.arange(rows), made, shard, seen[:, mine])
    return drawn.tokens.tolist(), drawn.logprobs.tolist()


@pytest.mark.parametrize("vocab", [5, 101, 2000])
def test_shards_of_the_vocabulary_draw_as_one(vocab: int, worlds: Worlds) -> None:
    """With 5 tokens on 4 ranks, the last rank has none."""
    rows = 140
    ((tokens, logprobs),) = worlds.run(1, sharded_draws, vocab, rows)
    assert len(set(tokens)) > 3
    for tp in (2, 4):
        for theirs, their_logprobs in worlds.run(tp, sharded_draws, vocab, rows):
            assert theirs == tokens
            assert their_logprobs == pytest.approx(logprobs, abs=2e-6)
