"""Tensors in files, one at a time: safetensors without memory-mapping, and torch's pickles.

This module knows no models. Files are checked when they are opened, before a tensor is read.
"""

import json
import math
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megarl.disk import UnreadableError, is_file, load_plain, parse_object, read_text, shown
from megarl.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # limit of the safetensors library


class Stored(NamedTuple):
    """A tensor's description. `dtype` is the file's own string if it is not a valid dtype for weights."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def bytes(self) -> int:
        """Size of the values in bytes; an unknown dtype counts as one byte per value."""
        return math.prod(self.shape) * (self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 1)


def cut_short(where: str | Path, name: str) -> CheckpointError:
    """Return the error for a file that ends before a tensor, or a file in it, does."""
    return CheckpointError(f"{where} is truncated within {name}: fetch it again", key=name, where=where)


class TensorFile(Protocol):
    """A file of named tensors."""

    tensors: dict[str, Stored]

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by its stored name."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor."""


class SafetensorsFile:
    """Reads with plain file reads: a memory-mapped file would count as memory of every process that reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(8)
                length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
                if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                    raise CheckpointError(
                        f"{path} is not a complete safetensors file ({size} bytes): fetch it again", where=path
                    )
                header = parse_object(file.read(length))
            for name, fields in header.items():
                if name == "__metadata__":
                    continue
                offsets, shape = fields["data_offsets"], fields["shape"]
                if not (isinstance(shape, list) and len(offsets) == 2 and all(map(_is_count, [*offsets, *shape]))):
                    raise CheckpointError(
                        f"{path}: {shown(name)} has a shape or an offset that is not a list of whole numbers: "
                        "fetch it again",
                        key=shown(name),
                        where=path,
                    )
                start, stop = (8 + length + offset for offset in offsets)
                if start > stop:
                    raise CheckpointError(
                        f"{path}: {shown(name)} ends before it begins: fetch it again", key=shown(name), where=path
                    )
                if stop > size:
                    raise CheckpointError(
                        f"{path} is truncated: {name} ends at byte {stop} and the file at {size}; fetch it again",
                        key=name,
                        value=stop,
                        where=path,
                    )
                stored = Stored(tuple(shape), DTYPES.get(fields["dtype"], str(fields["dtype"])))
                if isinstance(stored.dtype, torch.dtype) and stored.bytes != stop - start:
                    raise CheckpointError(
                        f"{path}: {name} has {stop - start} bytes instead of {stored.bytes}",
                        key=name,
                        value=stop - start,
                        where=path,
                    )
                self.tensors[name], self._spans[name] = stored, (start, stop)
        except OSError as problem:
            raise CheckpointError(f"{path} cannot be read: {problem.strerror}", where=path) from None
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            raise CheckpointError(
                f"{path} has no valid safetensors header ({problem}): fetch it again", key="header", where=path
            ) from None

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by its stored name."""
        stored = self.tensors[name]
        return self._read(name, stored.shape, *self._spans[name])

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor; only these are read from disk."""
        (length, *rest), (start, _) = self.tensors[name].shape, self._spans[name]
        first, last = min(first, length), min(last, length)
        row = Stored(tuple(rest), self.tensors[name].dtype).bytes
        return self._read(name, (last - first, *rest), start + first * row, start + last * row)

    def _read(self, name: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        dtype = self.tensors[name].dtype
        assert isinstance(dtype, torch.dtype)
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(buffer.numpy().data) != stop - start:
                raise cut_short(self.path, name)
        return buffer.view(dtype).reshape(shape)


class PickledFile:
    """A `torch.save` file, read with weights_only: tensors and plain values, never code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values = _unpickled(path)
        self.tensors = {
            name: Stored(tuple(value.shape), value.dtype if value.dtype in _CODES else str(value.dtype))
            for name, value in self._values.items()
        }

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by its stored name."""
        return self._values[name]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor."""
        return self._values[name][first:last]


def _unpickled(path: Path) -> dict[str, Tensor]:
    found: Any = None
    problems = []
    for mmap in (True, False):  # files of old torch versions cannot be mapped
        try:
            found = load_plain(path, map_location="cpu", mmap=mmap)
            break
        except UnreadableError as problem:
            problems.append(str(problem))
    else:
        raise CheckpointError(f"{path} {problems[-1]}: convert it to safetensors at its origin", where=path)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is not a dictionary of tensors: save the weights alone", where=path)
    odd = [name for name, value in found.items() if not isinstance(name, str) or _holds_no_numbers(value)]
    if odd:
        raise CheckpointError(
            f"{path}: {shown(odd[0])} is not the name of a dense tensor with data: save plain weights",
            key=shown(odd[0]),
            where=path,
        )
    return found


def _holds_no_numbers(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def write_safetensors(
    path: Path, described: Sequence[tuple[str, Stored]], tensors: Iterable[Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors in the described order, one at a time, so that memory is that of one tensor."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, stored in described:
        assert isinstance(stored.dtype, torch.dtype)
        header[name] = {
            "dtype": _CODES[stored.dtype],
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.bytes],
        }
        offset += stored.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for (name, stored), tensor in zip(described, tensors, strict=True):
            assert tuple(tensor.shape) == stored.shape, (name, tensor.shape, stored.shape)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


class Folder:
    """The weights of a Hugging Face folder: one file, or several with an index; safetensors preferred to pickles."""

    LAYOUTS = (
        ("model.safetensors.index.json", True, SafetensorsFile),
        ("model.safetensors", False, SafetensorsFile),
        ("pytorch_model.bin.index.json", True, PickledFile),
        ("pytorch_model.bin", False, PickledFile),
    )

    def __init__(self, path: Path) -> None:
        self.path = path
        for name, indexed, kind in self.LAYOUTS:
            if is_file(path / name):
                self.files, self.where = _indexed(path, name, kind) if indexed else _single(path / name, kind)
                break
        else:
            names = ", ".join(name for name, _, _ in self.LAYOUTS)
            raise CheckpointError(f"{path} contains no weights: none of {names} exists", where=path)
        self.tensors = {name: self.files[file].tensors[name] for name, file in self.where.items()}

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by its stored name."""
        return self.files[self.where[name]].read(name)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor."""
        return self.files[self.where[name]].rows(name, first, last)


def _single(path: Path, kind: Any) -> tuple[dict[str, TensorFile], dict[str, str]]:
    file: TensorFile = kind(path)
    return {path.name: file}, dict.fromkeys(file.tensors, path.name)


def _indexed(folder: Path, index: str, kind: Any) -> tuple[dict[str, TensorFile], dict[str, str]]:
    path = folder / index
    try:
        where: dict[str, str] = dict(parse_object(read_text(path))["weight_map"])
    except UnreadableError as problem:
        raise CheckpointError(f"{path} {problem}: fetch it again", where=path) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} has no weight_map: fetch it again", key="weight_map", where=path) from None
    wrong = next((tensor for tensor, name in where.items() if not isinstance(name, str)), None)
    if wrong is not None:
        raise CheckpointError(
            f"{path} does not say in which file {shown(wrong)} is: fetch it again",
            key=shown(wrong),
            value=where[wrong],
            where=path,
        )
    files: dict[str, TensorFile] = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise CheckpointError(
                f"{path} names '{shown(name)}', which is not a file beside it", key=shown(name), where=path
            )
        if not is_file(folder / name):
            raise CheckpointError(
                f"{path} names {shown(name)}, which is missing: fetch it", key=shown(name), where=path
            )
        files[name] = kind(folder / name)
    for tensor, name in where.items():
        if tensor not in files[name].tensors:
            raise CheckpointError(
                f"{path} says that {tensor} is in {name}, which does not have it", key=tensor, value=name, where=path
            )
    return files, where
