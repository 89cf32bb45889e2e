"""Megarl's shard files: Megatron decides which slice of which tensor a rank stores; this module reads and writes bytes.

A rank's slices go into one safetensors file. A JSON index lists the file of every slice of every tensor, so any layout
can read what it needs. Nothing is pickled and no helper process is started.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megarl.command import say
from megarl.disk import shown
from megarl.errors import CheckpointError, MegarlError, NumericsError
from megarl.parallel.finite import is_finite
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, partition_dim

EXPERTS = ".experts.local_experts."
"""What is in the names of the weights of experts, which `parallel.ep` replicas share."""
T = TypeVar("T")
_FIRST_EXIT_S = 1.0  # let the first rank exit first: launchers report the first that exits


@dataclass(frozen=True)
class Part:
    """One rank's rectangular slice of one tensor, and the file that contains it."""

    key: str
    tensor_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    file: str

    @property
    def name(self) -> str:
        """Name of the slice within its file: the tensor's key and the offset."""
        return f"{self.key}@{','.join(map(str, self.offset))}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, fields: Any) -> "Part":
        """Build a part from `to_json`'s fields. Raises ValueError for a wrong type or a slice out of bounds."""
        names = ("key", "tensor_shape", "offset", "shape", "dtype", "file")
        if not isinstance(fields, dict) or sorted(fields) != sorted(names):
            raise ValueError(f"a part is not described by {', '.join(names)}")
        for name in ("key", "dtype", "file"):
            if not isinstance(fields[name], str):
                raise ValueError(f"the {name} of a part is {shown(fields[name])}, which is not a string")
        shapes = [fields[name] for name in ("tensor_shape", "offset", "shape")]
        if not all(
            isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape) for shape in shapes
        ):
            raise ValueError(f"{fields['key']} has a shape or an offset that is not a list of whole numbers")
        inside = all(start + length <= whole for whole, start, length in zip(*shapes, strict=False))
        if len({len(shape) for shape in shapes}) > 1 or not inside:
            raise ValueError(f"{fields['key']} has a part outside its bounds")
        if not isinstance(getattr(torch, fields["dtype"], None), torch.dtype):
            raise ValueError(f"{fields['key']} has dtype {shown(fields['dtype'])}, which torch does not know")
        if Path(fields["file"]).name != fields["file"] or fields["file"] in ("", ".."):
            raise ValueError(f"{fields['key']} is in {shown(fields['file'])}, which is not a file of the checkpoint")
        tensor_shape, offset, shape = (tuple(one) for one in shapes)
        return cls(fields["key"], tensor_shape, offset, shape, fields["dtype"], fields["file"])


def collect(state: dict[str, Any], grid: Grid, file: str) -> tuple[list[tuple[Part, Tensor]], dict[str, Any]]:
    """Split a sharded state dict into the parts that this rank writes and the values common to all ranks.

    Parts that all data-parallel ranks have are distributed among them by size, so that each writes its share. An expert
    is on fewer ranks, which share their own.
    """
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    shared, split = (grid.groups.dp_cp, grid.groups.expt_dp) if grid.layout.ep > 1 else (grid.groups.dp_cp,) * 2
    loads = {False: [0] * shared.size(), True: [0] * split.size()}
    mine = []
    for tensor in _tensors(sharded):
        if any(tensor.replica_id[:-1]):  # another tensor-parallel or pipeline rank has the same values
            continue
        of_expert = EXPERTS in tensor.key
        load = loads[of_expert]
        owner = load.index(min(load))
        load[owner] += tensor.data.numel()
        if owner == (split if of_expert else shared).rank():
            part = _part(tensor, file)
            mine.append((part, tensor.data.detach().reshape(part.shape)))
    return mine, common


def union(commons: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the ranks' common values: equal where several ranks have a key; a stage without training lacks some."""
    found: dict[str, Any] = {}
    for common in commons:
        for key, value in common.items():
            if isinstance(value, dict) and isinstance(found.get(key), dict):
                found[key] = union([found[key], value])
            else:
                found.setdefault(key, value)
    return found


def write(path: Path, parts: Sequence[tuple[Part, Tensor]]) -> None:
    """Write this rank's parts to one safetensors file."""
    save_file({part.name: data.contiguous() for part, data in parts}, path)


NEVER_USED = "critic.output_layer."
"""Tensors that checkpoints of earlier versions have: a separate critic had an output layer, which nothing read."""


def read(
    template: dict[str, Any], common: dict[str, Any], parts: Sequence[Part], folder: Path, grid: Grid
) -> dict[str, Any]:
    """Fill the structure of `template` (a state dict made for loading) from shard files of any layout.

    Raises unless all ranks together request every tensor of the checkpoint: a partial restore is never silent.
    """
    sharded, local, factories = load_preprocess(template)
    sharded, _ = extract_sharded_base(sharded)
    sharded, _ = extract_matching_values(sharded, lambda value: isinstance(value, ShardedTensor))
    index: dict[str, list[Part]] = {}
    for part in parts:
        index.setdefault(part.key, []).append(part)
    wanted = list(_tensors(sharded))
    index = {key: found for key, found in index.items() if not key.startswith(NEVER_USED)}
    unused = sorted(index.keys() - set().union(*run_on_all_ranks(grid, lambda: _same_tensors(wanted, index, folder))))
    if unused:
        raise CheckpointError(
            f"the checkpoint {folder} has {unused[0]} ({len(unused)} such tensors), which this model does not: "
            "use the model.* settings it was trained with",
            key=unused[0],
            where=folder,
        )
    files = _Files(folder)

    def assemble() -> None:
        dict_list_map_inplace(lambda tensor: _assemble(tensor, index[tensor.key], files), sharded)

    run_on_all_ranks(grid, assemble)
    merged = merge(merge(common, local), sharded)
    filled: dict[str, Any] = apply_factory_merges(merged, factories)
    return filled


def run_on_all_ranks(grid: Grid, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank and return the (small, picklable) results by rank.

    If it fails on one rank, all ranks raise, so that none waits for a rank that has exited.
    """
    result: Any = None
    problem: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        problem = caught
    expected = problem is None or isinstance(problem, MegarlError)
    report = problem if expected else f"{type(problem).__name__}: {problem}"
    reports = grid.gather((result, report))
    if problem is not None and not expected:
        raise problem
    for rank, (_, theirs) in enumerate(reports):
        if theirs is not None:
            if isinstance(theirs, MegarlError):
                raise theirs
            raise CheckpointError(f"rank {rank} failed: {theirs}", where=f"rank {rank}")
    return [result for result, _ in reports]


def refused_once(grid: Grid, work: Callable[[], T]) -> T:
    """Return this rank's result of `work`, where every rank does the same and so fails on the same bad input.

    A `MegarlError` ends all ranks, and only the first rank prints it.
    """
    done: list[T] = []
    try:
        run_on_all_ranks(grid, lambda: done.append(work()))
    except MegarlError as problem:
        if grid.layout.world_size > 1:
            if grid.rank == 0:
                say(f"error: {problem}")
            else:
                time.sleep(_FIRST_EXIT_S)
            problem.said = True
        raise
    return done[0]


def read_whole(parts: Sequence[Part], folder: Path) -> dict[str, Tensor]:
    """Return every tensor of an index, joined from its parts."""
    files = _Files(folder)
    whole: dict[str, Tensor] = {}
    for part in parts:
        piece = files.slice(part, tuple(slice(0, length) for length in part.shape))
        target = whole.setdefault(part.key, torch.empty(part.tensor_shape, dtype=piece.dtype))
        target[tuple(slice(at, at + length) for at, length in zip(part.offset, part.shape, strict=True))] = piece
    return whole


def sharded_tensor(key: str, parameter: Tensor, groups: ProcessGroupCollection) -> Any:
    """Return Megatron's description of this rank's slice of a parameter, from the attributes that say how it is cut."""
    where: dict[str, Any] = {"tp_group": groups.tp, "dp_cp_group": groups.dp_cp}
    if not is_sharded(parameter):
        return make_sharded_tensor_for_checkpoint(parameter, key, **where)
    whole = make_tp_sharded_tensor_for_checkpoint(parameter, key, partition_dim(parameter), **where)
    if getattr(parameter, "partition_stride", 1) == 1:
        return whole
    return apply_swiglu_sharded_factory(whole, ())  # two blocks, each split over the ranks


def check_complete(parts: Sequence[Part], folder: Path) -> None:
    """Raise if the parts do not fill their tensors. For a checkpoint that is being written into `folder`, a gap or an
    overlap is a bug of megarl, and this finds it before the commit.
    """
    volume: dict[str, int] = {}
    shapes = {part.key: part.tensor_shape for part in parts}
    for part in parts:
        volume[part.key] = volume.get(part.key, 0) + _volume(part.shape)
    wrong = [key for key, shape in shapes.items() if volume[key] != _volume(shape)]
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder}: the parts of {wrong[0]} ({len(wrong)} tensors in all) do not add up to the whole",
            key=wrong[0],
            where=folder,
        )


def _tensors(state: Any) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedObject) and not value.key.endswith("_extra_state"):
            raise CheckpointError(f"{value.key} is not a tensor and cannot be sharded", key=value.key)


def _part(tensor: ShardedTensor, file: str) -> Part:
    shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Part(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), shape, dtype, file)


def _same_tensors(wanted: Sequence[ShardedTensor], index: dict[str, list[Part]], folder: Path) -> set[str]:
    """Return the keys that this rank requests; raise if the index lacks one or has another shape."""
    for tensor in wanted:
        if tensor.key not in index:
            raise CheckpointError(
                f"the checkpoint {folder} has no {tensor.key}: it is of another model or of another algorithm",
                key=tensor.key,
                where=folder,
            )
        shape = index[tensor.key][0].tensor_shape
        if tuple(tensor.global_shape) != shape:
            raise CheckpointError(
                f"{tensor.key} has shape {list(shape)} in the checkpoint {folder}, {list(tensor.global_shape)} in this "
                "model: use the model.* settings it was trained with",
                key=tensor.key,
                value=list(shape),
                where=folder,
            )
    return {tensor.key for tensor in wanted}


def _assemble(wanted: ShardedTensor, parts: Sequence[Part], files: "_Files") -> Tensor:
    """Assemble this rank's slice of a tensor from the parts that overlap it."""
    shape = (1,) * wanted.prepend_axis_num + tuple(wanted.local_shape)
    result = torch.empty(shape, dtype=wanted.dtype)
    filled = 0
    for part in parts:
        overlap = [
            (max(a, b), min(a + m, b + n))
            for a, m, b, n in zip(wanted.global_offset, shape, part.offset, part.shape, strict=True)
        ]
        if any(start >= stop for start, stop in overlap):
            continue
        source = tuple(slice(start - b, stop - b) for (start, stop), b in zip(overlap, part.offset, strict=True))
        target = tuple(
            slice(start - a, stop - a) for (start, stop), a in zip(overlap, wanted.global_offset, strict=True)
        )
        piece = files.slice(part, source)
        result[target] = piece
        filled += piece.numel()
    if filled != result.numel():
        raise CheckpointError(
            f"{wanted.key}: the checkpoint holds {filled} of {result.numel()} values that this rank needs",
            key=wanted.key,
        )
    if not is_finite(result):
        raise NumericsError(
            f"{wanted.key} in the checkpoint {files.folder} holds NaN or infinity: resume an earlier one "
            "(run.resume=FOLDER) with a lower optim.lr",
            key=wanted.key,
            where=files.folder,
        )
    return result.reshape(wanted.local_shape)


class _Files:
    """Shard files of a checkpoint; each is opened (memory-mapped) once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Any] = {}

    def slice(self, part: Part, where: tuple[slice, ...]) -> Tensor:
        try:
            if part.file not in self.open:
                self.open[part.file] = safe_open(self.folder / part.file, framework="pt")
            if not where:  # a scalar
                scalar: Tensor = self.open[part.file].get_tensor(part.name)
                return scalar
            piece: Tensor = self.open[part.file].get_slice(part.name)[where]
        except (OSError, SafetensorError, IndexError, UnicodeError) as problem:
            raise CheckpointError(
                f"{self.folder / part.file} cannot be read ({problem}): all machines of a run must see the same files",
                where=self.folder / part.file,
            ) from None
        if tuple(piece.shape) != tuple(one.stop - one.start for one in where):
            raise CheckpointError(
                f"{self.folder / part.file}: {part.name} is not of the shape {list(part.shape)} that the index says: "
                "the checkpoint is damaged; choose another",
                key=part.name,
                where=self.folder / part.file,
            )
        return piece


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for length in shape:
        volume *= length
    return volume
