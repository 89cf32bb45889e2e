"""Advantages from several responses to one prompt, each relative to the others in its group.

A group with one member keeps its score. A group whose scores are all equal has no learning signal, and its advantages
are exactly 0.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from megarl.algorithms.advantages import whiten
from megarl.algorithms.aggregate import mask_out

STD_EPS = 1e-6

Groups = Tensor | Sequence[Hashable]


def group_index(groups: Groups, device: torch.device) -> Tensor:
    """Map group ids to the integers 0, 1, ...

    Args:
        groups: [batch], ids of any kind: a tensor, or one hashable per row.
        device: device of the result.

    Returns:
        [batch], integers below the number of groups.
    """
    if isinstance(groups, Tensor):
        index: Tensor = torch.unique(groups.to(device), return_inverse=True)[1]
        return index
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], device=device)


def group_sums(x: Tensor, index: Tensor) -> Tensor:
    """Return for each row the sum of `x` over its group: [batch] -> [batch]."""
    return torch.zeros_like(x).index_add(0, index, x)[index]


def centre_by_group(scores: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return scores minus the weighted mean of their group; a single member keeps its score.

    The mean is computed from the distances to the group's lowest score, so that equal scores cancel exactly. A mean
    rounded in float32 and divided by a tiny standard deviation would leave noise.

    Args:
        scores, index, weights: [batch].

    Returns:
        [batch].
    """
    lowest = torch.zeros_like(scores).scatter_reduce(0, index, scores, "amin", include_self=False)[index]
    above = scores - lowest
    total_weight = group_sums(weights, index)
    mean = group_sums(weights * above, index) / torch.where(total_weight > 0, total_weight, 1)
    return torch.where(group_sizes(scores, index) == 1, scores, above - mean)


def group_sizes(scores: Tensor, index: Tensor) -> Tensor:
    """Return for each row the number of members of its group, in the dtype of `scores`: [batch]."""
    return group_sums(torch.ones_like(scores), index)


def grpo_advantages(scores: Tensor, groups: Groups, normalize: bool = True) -> Tensor:
    """GRPO (Shao et al., 2024, arXiv 2402.03300): score minus group mean, over the group's std (ddof 1) + 1e-6.

    Args:
        scores: [batch].
        groups: [batch], which prompt each response belongs to.
        normalize: False omits the division (Dr. GRPO; Liu et al., 2025, arXiv 2503.20783).

    Returns:
        [batch]. A group of one is treated as mean 0 and standard deviation 1.
    """
    index = group_index(groups, scores.device)
    centred = centre_by_group(scores, index, torch.ones_like(scores))
    if not normalize:
        return centred
    sizes = group_sizes(scores, index)
    variance = group_sums(centred.square(), index) / (sizes - 1).clamp(min=1)
    # Use a constant variance where all scores are equal: sqrt has an infinite slope at 0.
    spread = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
    return centred / (torch.where(sizes == 1, 1, spread) + STD_EPS)


def rloo_advantages(scores: Tensor, groups: Groups) -> Tensor:
    """RLOO (Ahmadian et al., 2024, arXiv 2402.14740): score minus the others' mean; a group of one keeps its score.

    Args:
        scores: [batch].
        groups: [batch], which prompt each response belongs to.

    Returns:
        [batch].
    """
    index = group_index(groups, scores.device)
    sizes = group_sizes(scores, index)
    # s - (sum - s)/(n - 1) is the distance from the mean of all, times n/(n - 1); 1 for a singleton.
    return sizes / (sizes - 1).clamp(min=1) * centre_by_group(scores, index, torch.ones_like(scores))


def opo_advantages(scores: Tensor, groups: Groups, lengths: Tensor) -> Tensor:
    """OPO (Hao et al., 2025): score minus the group's mean weighted by length; a group of one keeps its score.

    Args:
        scores: [batch].
        groups: [batch], which prompt each response belongs to.
        lengths: [batch], response lengths in tokens.

    Returns:
        [batch].
    """
    index = group_index(groups, scores.device)
    return centre_by_group(scores, index, lengths.to(scores.dtype))


def reinforce_pp_baseline_advantages(scores: Tensor, groups: Groups, mask: Tensor) -> Tensor:
    """REINFORCE++-baseline (Hu, 2025): score minus group mean on every token, whitened over the batch.

    Args:
        scores: [batch].
        groups: [batch], which prompt each response belongs to.
        mask: [batch, time], 0/1.

    Returns:
        [batch, time], 0 where masked out.
    """
    centred = grpo_advantages(scores, groups, normalize=False)
    return whiten(mask_out(centred.unsqueeze(-1), mask), mask)
