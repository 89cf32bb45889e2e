"""Keys and values of earlier tokens, in slots: what attention reads when it is given one token at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megarl.models.config import GPTConfig


class KVCache:
    """Per layer of this rank, keys and values [slots, kv heads of this rank, length, head_dim]."""

    def __init__(
        self, config: GPTConfig, layers: Iterable[int], tp: int, slots: int, length: int, device: torch.device
    ) -> None:
        shape = (slots, max(1, config.num_kv_heads // tp), length, config.head_dim)
        self.slots, self.length = slots, length
        self.keys = {layer: torch.zeros(shape, dtype=config.params_dtype, device=device) for layer in layers}
        self.values = {layer: torch.zeros_like(keys) for layer, keys in self.keys.items()}

    @staticmethod
    def slot_bytes(config: GPTConfig, layers: int, tp: int, length: int) -> int:
        """Bytes that one slot takes on a rank with so many layers."""
        element = torch.empty((), dtype=config.params_dtype).element_size()
        return 2 * layers * max(1, config.num_kv_heads // tp) * length * config.head_dim * element

    @property
    def nbytes(self) -> int:
        return sum(2 * keys.numel() * keys.element_size() for keys in self.keys.values())

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot over another's."""
        for store in (self.keys, self.values):
            for tensor in store.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def free(self) -> None:
        self.keys.clear()
        self.values.clear()


@dataclass
class CacheView:
    """The cache as one forward pass sees it.

    Prefill: `slots` are any, `length` is None; the pass attends to its own tokens and leaves them in the cache.
    Decode: one token per row, in consecutive slots; the pass attends to the first `length` entries of each.
    """

    cache: KVCache
    slots: Tensor  # [rows]
    positions: Tensor  # [rows, time]
    length: int | None
    first: int = 0  # of the consecutive slots, as a plain number: asking the tensor would wait for the device

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this pass's keys and values [time, rows, heads, head_dim]; return those to attend to, heads second."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.length is None:
            key, value = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
            keys[self.slots, :, : key.shape[2]] = key
            values[self.slots, :, : key.shape[2]] = value
            return key, value
        at = self.positions[:, 0]
        keys[self.slots, :, at] = key[0]
        values[self.slots, :, at] = value[0]
        first, rows = self.first, self.slots.shape[0]
        return keys[first : first + rows, :, : self.length], values[first : first + rows, :, : self.length]

    def mask(self, window: int | None) -> Tensor | None:
        """[rows, 1, 1, length] True where a decoded token may look; None in prefill, which is plain causal."""
        if self.length is None:
            return None
        entries = torch.arange(self.length, device=self.positions.device)
        at = self.positions[:, :, None]  # [rows, 1, 1]
        allowed = entries <= at
        if window is not None:
            allowed = allowed & (entries > at - window)
        return allowed[:, None]
