"""KV cache: keys and values of earlier tokens in slots, for attention when a pass does not have the whole sequence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarl.models.config import GPTConfig


class KVCache:
    """Keys and values of this rank's layers, one tensor [2 x layers, slots, local kv heads, length, head_dim]. Of an
    encoder-decoder, those of the decoder, and in a second tensor those of the encoder's states for each of its layers.
    """

    def __init__(
        self,
        config: GPTConfig,
        layers: Sequence[int],
        tp: int,
        slots: int,
        length: int,
        device: torch.device,
        encoded: int = 0,
        *,
        records_routes: bool = False,
    ) -> None:
        """`encoded` is the largest number of tokens that an encoder reads. With `records_routes`, there are the experts
        of each token too: `routes`, for each layer that has some, [slots, length, chosen]."""
        heads = max(1, config.num_kv_heads // tp)
        layers = [layer for layer in layers if layer > config.encoder_layers]
        self.slots, self.length = slots, length
        self.of_encoder = torch.zeros(
            (2 * len(layers), slots, heads, encoded, config.head_dim), dtype=config.params_dtype, device=device
        )
        self.encoded_keys = dict(zip(layers, self.of_encoder[: len(layers)], strict=True))
        self.encoded_values = dict(zip(layers, self.of_encoder[len(layers) :], strict=True))
        # Ones: a row without a response attends to an entry of zeros, as no softmax may be over an empty set.
        self.encoded_lengths = torch.ones(slots, dtype=torch.long, device=device)
        self.longest_encoded = encoded
        # Zeros: masked entries are still multiplied by weight 0, and uninitialised memory may contain NaN.
        self.store = torch.zeros(
            (2 * len(layers), slots, heads, length, config.head_dim), dtype=config.params_dtype, device=device
        )
        self.keys = dict(zip(layers, self.store[: len(layers)], strict=True))
        self.values = dict(zip(layers, self.store[len(layers) :], strict=True))
        mixed = [layer for layer in layers if records_routes and config.has_experts(layer)]
        chosen = 0 if config.experts is None else config.experts.chosen
        self.of_experts = torch.zeros((len(mixed), slots, length, chosen), dtype=torch.int16, device=device)
        self.routes = dict(zip(mixed, self.of_experts, strict=True))
        self.records_routes = records_routes

    @staticmethod
    def most_layers(config: GPTConfig, pp: int) -> int:
        """Return the largest number of layers that have a cache on a rank: equal shares of the stages, but of an
        encoder-decoder the whole decoder, which is one stage."""
        layers: int = config.num_layers
        return layers // pp if config.encoder is None else layers - config.encoder_layers

    @staticmethod
    def slot_bytes(config: GPTConfig, layers: int, tp: int, length: int, *, records_routes: bool = False) -> int:
        """Return the bytes that one slot takes on a rank with `layers` layers that have a cache, or, where routes are
        recorded and some layers have no experts, at most takes. `length` is that of keys' and values' tensors
        together."""
        element = torch.empty((), dtype=config.params_dtype).element_size()
        routes = 0 if config.experts is None or not records_routes else 2 * config.experts.chosen
        return layers * length * (2 * max(1, config.num_kv_heads // tp) * config.head_dim * element + routes)

    @property
    def nbytes(self) -> int:
        """Size of the cache on this rank in bytes."""
        return sum(tensor.nbytes for tensor in (self.store, self.of_encoder, self.of_experts))

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        self.store[:, target, :, :length] = self.store[:, source, :, :length]
        self.of_experts[:, target, :length] = self.of_experts[:, source, :length]
        if self.longest_encoded:
            self.copy_encoded(source, target)

    def copy_encoded(self, source: int, target: int) -> None:
        """Copy the encoder's keys and values of one slot to another."""
        self.of_encoder[:, target] = self.of_encoder[:, source]
        self.encoded_lengths[target] = self.encoded_lengths[source]

    def free(self) -> None:
        """Release the cache's memory; the cache cannot be used afterwards."""
        self.keys.clear()
        self.values.clear()
        self.encoded_keys.clear()
        self.encoded_values.clear()
        self.routes.clear()
        self.store = self.of_encoder = self.store.new_empty(0)
        self.of_experts = self.of_experts.new_empty(0)


@dataclass
class CacheView:
    """The cache for one forward pass.

    For the first tokens of prompts, `slots` are arbitrary and `length` is None: the pass attends to its own tokens only
    and stores their keys and values. For later tokens, slots are consecutive and the pass attends to the first `length`
    entries of each, including its own. `even` means that every row's tokens are the last of these `length`: they are
    then stored as one block, and single tokens need no mask. `longest_encoded` is the length of the longest prompt that
    the encoder read for these rows.
    """

    cache: KVCache
    slots: Tensor  # [rows]
    positions: Tensor  # [rows, time]
    length: int | None
    first: int = 0  # first of the consecutive slots, as an int: reading it from the tensor would wait for the device
    even: bool = False
    longest_encoded: int = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [time, rows, heads, head_dim]; return those to attend to, heads second."""
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

    def record(self, layer: int, experts: Tensor) -> None:
        """Store the experts of this pass's tokens in a layer [time, rows, chosen], where the cache records them."""
        if layer in self.cache.routes:
            routes = experts.transpose(0, 1).to(torch.int16)
            self.cache.routes[layer][self.slots[:, None], self.positions] = routes

    def store_encoded(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the encoder's keys and values [rows, heads, time, head_dim] of a layer in the slots of this pass."""
        time = key.shape[2]
        self.cache.encoded_keys[layer][self.slots, :, :time] = key
        self.cache.encoded_values[layer][self.slots, :, :time] = value

    def encoded(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the encoder's keys and values of a layer for the rows of this pass."""
        held, cache = slice(self.first, self.first + self.slots.shape[0]), self.cache
        longest = self.longest_encoded
        return cache.encoded_keys[layer][held, :, :longest], cache.encoded_values[layer][held, :, :longest]

    def encoded_mask(self) -> Tensor:
        """Return [rows, 1, 1, encoder's time] to add to scores: 0 at the tokens of each row's prompt."""
        held = slice(self.first, self.first + self.slots.shape[0])
        entries = torch.arange(self.longest_encoded, device=self.slots.device)
        hidden = entries >= self.cache.encoded_lengths[held][:, None]
        mask = torch.zeros(hidden.shape, dtype=self.cache.store.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]

    @cached_property
    def _entries(self) -> Tensor:
        """Return [rows x heads x time], the indices in a layer's store of this pass's key and value vectors."""
        _, _, heads, length, _ = self.cache.store.shape
        head = torch.arange(heads, device=self.positions.device)
        first = (self.slots[:, None] * heads + head) * length
        return (first[:, :, None] + self.positions[:, None, :]).flatten()

    def mask(self, window: int | None) -> Tensor | None:
        """Return [rows, 1, time, length] to add to the scores: 0 where a token may attend, else minus infinity.

        None if the pass attends to its own tokens only, or if every token attends to all entries.
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
