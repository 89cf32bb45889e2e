"""Advantages of one's own: the score of a response minus the median of its group, on all of its tokens."""

import torch


def above_median(scores: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return [rows]: a response that is better than the median of its prompt's responses gets a positive number."""
    medians = torch.stack([scores[groups == group].median() for group in groups])
    return scores - medians


def discounted(rewards, mask, gamma):
    later, found = torch.zeros(len(rewards)), []
    for time in reversed(range(rewards.shape[1])):
        later = (rewards * mask)[:, time] + gamma * later
        found.append(later)
    return torch.stack(found[::-1], dim=1)
