"""How a stored tensor is contained in one of ours: as a view, so that reading and writing share one rule.

Every rule takes one of our whole tensors and returns the pieces that the other format stores, in its order. Reading
copies into the views and writing copies out of them, so a round trip preserves every bit.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megarl.config.sections.model import ModelConfig


class Piece(NamedTuple):
    """A view of our tensor, and the shape in which the other format stores its values (in the view's order)."""

    view: Tensor
    shape: tuple[int, ...]


Views = Callable[[Tensor, ModelConfig], list[Piece]]


def same(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Return the whole tensor: it is stored as we have it."""
    return [Piece(whole, tuple(whole.shape))]


def transposed(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Return a linear weight [out, in] as it is stored, [in, out]; a bias is stored as it is."""
    view = whole.t() if whole.dim() == 2 else whole
    return [Piece(view, tuple(view.shape))]


def gate_and_up(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Split the first projection of a gated MLP, [2 * ffn, ...], into the gate and the up projection."""
    return [Piece(half, tuple(half.shape)) for half in whole.chunk(2)]


def key_value(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Split our projection of an encoder's states [rows, ...] (per head the key, then the value) into two tensors."""
    heads = whole.unflatten(0, (model.num_heads, 2, model.head_width))
    return [Piece(part, (part.numel() // _width(whole), *whole.shape[1:])) for part in (heads[:, 0], heads[:, 1])]


def query_key_value(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Split our projection [rows, ...] (per key-value head its queries, the key, the value) into three tensors."""
    heads = _by_kv_head(whole, model)
    parts = heads[:, :-2], heads[:, -2], heads[:, -1]
    return [Piece(part, (part.numel() // _width(whole), *whole.shape[1:])) for part in parts]


def fused_query_key_value_transposed(whole: Tensor, model: ModelConfig) -> list[Piece]:
    """Return one tensor of all queries, all keys, all values, stored [in, out] as GPT-2's Conv1D does."""
    view = _by_kv_head(whole, model).movedim(1, 0)  # [3, heads, head_dim, ...]
    if whole.dim() == 2:
        view = view.movedim(-1, 0)
    return [Piece(view, tuple(whole.shape[::-1]))]


def _by_kv_head(whole: Tensor, model: ModelConfig) -> Tensor:
    """Return [rows, ...] as [kv_heads, queries per kv head + 2, head_dim, ...]."""
    kv_heads = model.kv_heads
    head_dim = model.head_width
    by_head: Tensor = whole.unflatten(0, (kv_heads, model.num_heads // kv_heads + 2, head_dim))
    return by_head


def _width(whole: Tensor) -> int:
    return whole.numel() // whole.shape[0]
