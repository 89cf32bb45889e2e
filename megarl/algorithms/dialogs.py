"""Dialogues as ILQL sees them: the positions of states and actions, and the position of the return.

Action i chooses the token after position actions_ixs[i]. The states are the positions from which actions are taken,
plus the last token of the row, which is terminal.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megarl.errors import DataError

Dialog = Sequence[tuple[bool, Sequence[int]]]


class ILQLBatch(NamedTuple):
    """Dialogues as right-padded tensors (pad 0), all integers except the rewards."""

    input_ids: Tensor
    """[batch, time]"""
    attention_mask: Tensor
    """[batch, time]"""
    rewards: Tensor
    """[batch, actions]"""
    states_ixs: Tensor
    """[batch, actions + 1]"""
    actions_ixs: Tensor
    """[batch, actions]"""
    dones: Tensor
    """[batch, actions + 1], 1 for a state that is NOT terminal, 0 for the terminal one and padding."""


def standardize_returns(returns: Tensor) -> Tensor:
    """Return z-scores over the data set, with ddof 1; returns that are all equal become 0.

    Args:
        returns: [dialogues].

    Returns:
        [dialogues].
    """
    if returns.numel() == 0 or bool(returns.min() == returns.max()):  # rounding may make their mean differ from them
        return torch.zeros_like(returns)
    centred = returns - returns.mean()
    return centred / (centred.square().sum() / (returns.numel() - 1)).sqrt()


def collate_dialogs(dialogs: Sequence[Dialog], returns: Tensor) -> ILQLBatch:
    """Collate dialogues into one batch, each with its return on its last action.

    Args:
        dialogs: per row its turns in order: (whether the policy wrote the turn, token ids).
        returns: [batch], copied unchanged into the rewards.
    """
    rows = [_positions(dialog, number) for number, dialog in enumerate(dialogs)]
    ids = [torch.tensor([token for _, tokens in dialog for token in tokens]) for dialog in dialogs]
    actions = [torch.tensor(row) for row in rows]
    rewards = [returns.new_zeros(len(row)) for row in rows]
    for row_rewards, value in zip(rewards, returns, strict=True):
        row_rewards[-1] = value
    states = [
        torch.cat([row_actions, row_ids.new_tensor([len(row_ids) - 1])])
        for row_actions, row_ids in zip(actions, ids, strict=True)
    ]
    not_terminal = [torch.cat([torch.ones_like(row), row.new_zeros(1)]) for row in actions]
    return ILQLBatch(
        input_ids=pad_sequence(ids, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        rewards=pad_sequence(rewards, batch_first=True),
        states_ixs=pad_sequence(states, batch_first=True),
        actions_ixs=pad_sequence(actions, batch_first=True),
        dones=pad_sequence(not_terminal, batch_first=True),
    )


def ilql_batch(dialogs: Sequence[Dialog], rewards: Tensor) -> ILQLBatch:
    """Collate a whole data set into one batch: returns are standardised over it, each on its last action.

    Args:
        dialogs: per dialogue its turns in order: (whether the policy wrote the turn, token ids).
        rewards: [dialogues], one return each.
    """
    return collate_dialogs(dialogs, standardize_returns(rewards))


def _positions(dialog: Dialog, number: int) -> list[int]:
    """Return the positions from which actions are taken: each output token is chosen at the position before it."""
    positions: list[int] = []
    start = 0
    for is_output, tokens in dialog:
        if is_output:
            positions.extend(range(start - 1, start - 1 + len(tokens)))
        start += len(tokens)
    if not positions:
        raise DataError(f"dialogue {number} has no output tokens to learn from: drop it", where=f"dialogue {number}")
    if positions[0] < 0:
        raise DataError(
            f"dialogue {number} starts with an output: put a prompt before it (BOS is enough)",
            where=f"dialogue {number}",
        )
    return positions
