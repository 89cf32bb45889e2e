"""Keys and values of earlier tokens, in slots: what attention reads when it is not given a whole sequence at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarl.models.config import GPTConfig


class KVCache:
    """Keys and values of this rank's layers: one tensor [2 x layers, slots, kv heads here, length, head_dim]."""

    def __init__(
        self, config: GPTConfig, layers: Sequence[int], tp: int, slots: int, length: int, device: torch.device
    ) -> None:
        heads = max(1, config.num_kv_heads // tp)
        self.slots, self.length = slots, length
        # Zeros: what a mask hides is still multiplied by its weight 0, which a NaN in fresh memory would survive.
        self.store = torch.zeros(
            (2 * len(layers), slots, heads, length, config.head_dim), dtype=config.params_dtype, device=device
        )
        self.keys = dict(zip(layers, self.store[: len(layers)], strict=True))
        self.values = dict(zip(layers, self.store[len(layers) :], strict=True))

    @staticmethod
    def slot_bytes(config: GPTConfig, layers: int, tp: int, length: int) -> int:
        """Bytes that one slot takes on a rank with so many layers."""
        element = torch.empty((), dtype=config.params_dtype).element_size()
        return 2 * layers * max(1, config.num_kv_heads // tp) * length * config.head_dim * element

    @property
    def nbytes(self) -> int:
        return self.store.numel() * self.store.element_size()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot over another's."""
        self.store[:, target, :, :length] = self.store[:, source, :, :length]

    def free(self) -> None:
        self.keys.clear()
        self.values.clear()
        self.store = self.store.new_empty(0)


@dataclass
class CacheView:
    """The cache as one forward pass sees it.

    First tokens of prompts: `slots` are any, `length` is None; the pass attends to itself and leaves its keys and
    values in the cache. Later tokens: consecutive slots; the pass attends to the first `length` entries of each, its
    own included. They are `even` where every row's tokens are the last of these `length`: then they are stored as one
    block, and single tokens need no mask.
    """

    cache: KVCache
    slots: Tensor  # [rows]
    positions: Tensor  # [rows, time]
    length: int | None
    first: int = 0  # of the consecutive slots, as a plain number: asking the tensor would wait for the device
    even: bool = False

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values [time, rows, heads, head_dim]; return those to attend to, heads second."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.length is None:
            key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            keys[self.slots, :, : key.shape[2]] = key
            values[self.slots, :, : key.shape[2]] = value
            return key, value
        held = slice(self.first, self.first + self.slots.shape[0])
        for store, new in ((keys, key), (values, value)):
            if self.even:
                store[held, :, self.length - new.shape[0] : self.length] = new.permute(1, 2, 0, 3)
            else:
                store.view(-1, store.shape[-1]).index_copy_(0, self._entries, new.permute(1, 2, 0, 3).flatten(0, 2))
        return keys[held, :, : self.length], values[held, :, : self.length]

    @cached_property
    def _entries(self) -> Tensor:
        """[rows x heads x time] where this pass's keys and values go in a layer's store, as numbers of its vectors."""
        _, _, heads, length, _ = self.cache.store.shape
        head = torch.arange(heads, device=self.positions.device)
        first = (self.slots[:, None] * heads + head) * length
        return (first[:, :, None] + self.positions[:, None, :]).flatten()

    def mask(self, window: int | None) -> Tensor | None:
        """[rows, 1, time, length] 0 where a token may look and minus infinity elsewhere, to be added to scores.

        None where the pass attends to itself alone, or every token to all that is there.
        """
        if self.length is None:
            return None
        if window is not None and window >= self.length:
            window = None
        if self.even and self.positions.shape[1] == 1 and window is None:
            return None
        entries = torch.arange(self.length, device=self.positions.device)
        at = self.positions[:, :, None]  # [rows, time, 1]
        hidden = entries > at
        if window is not None:
            hidden = hidden | (entries <= at - window)
        mask = torch.zeros(hidden.shape, dtype=self.cache.store.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None]
