"""Initial weights from (seed, global name), sliced afterwards, so that every layout starts from the same model."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

# The standard deviation of a parameter, or of each row of the whole tensor [rows, 1]: 0.0 gives zeros, None leaves what
# the module's constructor wrote (norms: ones).
Std = float | Tensor
StdRule = Callable[[str, nn.Parameter], Std | None]


def initialise(
    named_parameters: list[tuple[str, nn.Parameter]],
    *,
    seed: int,
    std: StdRule,
    tp_rank: int,
    tp: int,
    full_rows: Callable[[str], int | None],
) -> None:
    """Fill parameters in place. Names are global: layers are numbered over the whole model, not within the stage.

    A sharded parameter has Megatron's `partition_dim` and `partition_stride` attributes. `full_rows(name)` is the
    number of rows to sample of a table that is padded for the layout (vocabularies); None if it is not padded.
    """
    for name, parameter in named_parameters:
        deviation = std(name, parameter)
        if deviation is None or parameter.is_meta:
            continue
        with torch.no_grad():
            if not isinstance(deviation, Tensor) and deviation == 0.0:
                parameter.zero_()
            else:
                parameter.copy_(
                    local_slice(draw(name, parameter, seed, deviation, tp, full_rows(name)), parameter, tp_rank, tp)
                )


def draw(name: str, parameter: Tensor, seed: int, std: Std, tp: int, rows: int | None = None) -> Tensor:
    """Sample the whole tensor, with zeros in padded rows."""
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[partition_dim(parameter)] *= tp
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = torch.empty([rows or shape[0], *shape[1:]])
    if isinstance(std, Tensor):
        drawn = drawn.normal_(0.0, 1.0, generator=generator) * std
    else:
        drawn = drawn.normal_(0.0, std, generator=generator)
    if rows is None or rows == shape[0]:
        return drawn
    return torch.cat([drawn, drawn.new_zeros(shape[0] - rows, *shape[1:])])


def local_slice(full: Tensor, parameter: Tensor, tp_rank: int, tp: int) -> Tensor:
    """Return this rank's slice. With stride s, the tensor is s blocks, each split tp ways (gate and up of a GLU)."""
    if not is_sharded(parameter) or tp == 1:
        return full
    dim, stride = partition_dim(parameter), partition_stride(parameter)
    pieces = full.chunk(stride * tp, dim=dim)
    return torch.cat(pieces[tp_rank::tp], dim=dim)


def copy_slice(full: Tensor, parameter: Tensor, tp_rank: int, tp: int) -> None:
    """Copy this rank's slice into the parameter, block by block, without a temporary copy of the slice."""
    if not is_sharded(parameter) or tp == 1:
        parameter.data.copy_(full)
        return
    dim, stride = partition_dim(parameter), partition_stride(parameter)
    for mine, theirs in zip(
        parameter.data.chunk(stride, dim=dim), full.chunk(stride * tp, dim=dim)[tp_rank::tp], strict=True
    ):
        mine.copy_(theirs)


def join_slices(parts: list[Tensor], parameter: Tensor) -> Tensor:
    """Join all ranks' slices to the whole tensor: the inverse of `local_slice`."""
    dim, stride = partition_dim(parameter), partition_stride(parameter)
    cut = [part.chunk(stride, dim=dim) for part in parts]
    return torch.cat([pieces[block] for block in range(stride) for pieces in cut], dim=dim)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether Megatron split this parameter over the tensor-parallel ranks."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def partition_dim(parameter: Tensor) -> int:
    """Return the dimension along which Megatron split this parameter (0 if it has no such attribute)."""
    return int(getattr(parameter, "partition_dim", 0))


def partition_stride(parameter: Tensor) -> int:
    """Return the number of blocks that Megatron split one by one, such as gate and up of a GLU (1 without them)."""
    return int(getattr(parameter, "partition_stride", 1))
