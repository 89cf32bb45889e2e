"""A softmax over some of the tokens, with other tokens at each position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.parallel.choices import FORBIDDEN, Choices, TokenLists
from megarl.parallel.vocab import VocabShard, vocab_stats

ROWS, VOCAB, HIDDEN = 7, 11, 5
SHARD = VocabShard(start=0, valid=VOCAB, rows=VOCAB, group=None)


def made(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, output weights, targets, and which tokens may be chosen; targets always, in row 0 nothing else."""
    torch.manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB + 5, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,))
    allowed = torch.rand(ROWS, VOCAB) < 0.4
    allowed[0] = False
    allowed[torch.arange(ROWS), targets] = True
    return hidden, weight, targets, allowed


def lists_of(allowed: Tensor, order: Tensor) -> Choices:
    """The choices of rows in two parts, whose lists are numbered in another order."""
    parts = []
    for rows in (slice(0, 3), slice(3, ROWS)):
        parts.append((order[rows], allowed[rows].sum(1), allowed[rows].nonzero()[:, 1].to(torch.int32)))
    number, count, ids = zip(*parts, strict=True)
    return Choices(TokenLists.of(number, count, ids, ROWS), order)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_entropy_and_gradients_are_those_of_the_restricted_softmax(temperature: float) -> None:
    hidden, weight, targets, allowed = made()
    choices = lists_of(allowed, torch.tensor([4, 0, 6, 2, 1, 5, 3]))
    stats = vocab_stats(hidden, weight, targets, SHARD, temperature=temperature, entropy=True, choices=choices)
    assert stats.entropy is not None
    (stats.logprobs.sum() * 2 + (stats.entropy * torch.arange(ROWS)).sum()).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None

    logits = (hidden @ weight[:VOCAB].t() / temperature).masked_fill(~allowed, -torch.inf)
    logprobs = logits.log_softmax(1)
    finite = torch.where(allowed, logprobs, 0)
    entropy = -(finite.exp() * finite * allowed).sum(1)
    wanted = logprobs.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(stats.logprobs, wanted)
    torch.testing.assert_close(stats.entropy, entropy)
    assert stats.logprobs[0].item() == 0.0
    (wanted.sum() * 2 + (entropy * torch.arange(ROWS)).sum()).backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_lists_may_be_of_all_tokens_or_of_none() -> None:
    every = lists_of(torch.ones(ROWS, VOCAB, dtype=torch.bool), torch.arange(ROWS))
    logits = torch.randn(ROWS, VOCAB)
    assert torch.equal(every.restrict(logits.clone(), slice(0, ROWS)), logits)
    none = lists_of(torch.zeros(ROWS, VOCAB, dtype=torch.bool), torch.arange(ROWS))
    assert (none.restrict(logits.clone(), slice(2, 4))[:2] == FORBIDDEN).all()
