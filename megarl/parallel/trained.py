"""The tensors that one of Megatron's distributed optimizers trains, and which rank updates which part of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from megarl.parallel.initialise import is_sharded, partition_dim

_MATRICES = (".weight", ".adapter.down", ".adapter.up")


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained tensor of this pipeline stage.

    Attributes:
        name: its name in the whole model.
        parameter: this tensor-parallel rank's slice of it.
        spans: for each data-parallel rank, the span of the flat slice that it updates; None where it updates nothing.
        shard: the values [n] that this rank updates, as the optimizer has them; None if it updates nothing.
        group: index of its parameter group.
    """

    name: str
    parameter: nn.Parameter
    spans: tuple[slice | None, ...]
    shard: Tensor | None
    group: int | None

    @property
    def is_layer_matrix(self) -> bool:
        """Whether it is the weight of a linear layer, or a factor of an adapter, inside the transformer's layers."""
        return self.parameter.dim() == 2 and "decoder.layers." in self.name and self.name.endswith(_MATRICES)

    def whole_shape(self, tp: int) -> tuple[int, ...]:
        """Return the shape of the whole tensor, over all tensor-parallel ranks."""
        shape = list(self.parameter.shape)
        if is_sharded(self.parameter):
            shape[partition_dim(self.parameter)] *= tp
        return tuple(shape)


def trained_tensors(optimizer: Any, chunks: list[Any]) -> list[Trained]:
    """Return the tensors of a distributed optimizer over these chunks, in the same order on all ranks of the stage.

    Data-parallel ranks update equal parts of every bucket of a gradient buffer:

        bucket       |  weight 0  |    weight 1    | w 2 |
        updated by   |    rank 0     |     rank 1        |
    """
    names = {parameter: name for chunk in chunks for name, parameter in chunk.module.global_names()}
    return [
        _trained(optimizer, names[parameter], parameter, start, end, buffer.buckets[bucket])
        for buffer in optimizer.buffers
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    ]


def _trained(optimizer: Any, name: str, parameter: nn.Parameter, start: int, end: int, bucket: Any) -> Trained:
    ranks = optimizer.data_parallel_group.size()
    shard = group = None
    if parameter in optimizer.model_param_group_index_map:
        group, place = optimizer.model_param_group_index_map[parameter]
        shard = optimizer.optimizer.param_groups[group]["params"][place]
    return Trained(name, parameter, tuple(_spans(start, end, bucket, ranks)), shard, group)


def _spans(start: int, end: int, bucket: Any, ranks: int) -> Iterator[slice | None]:
    """Yield the span of each rank of a tensor that lies at `start` to `end` of a buffer."""
    part = bucket.grad_data.numel() // ranks
    for rank in range(ranks):
        first = max(start, bucket.offset + rank * part)
        last = min(end, bucket.offset + (rank + 1) * part)
        yield slice(first - start, last - start) if first < last else None
