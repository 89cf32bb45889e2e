"""NeMo's archives at the file level: tar members, and torch files of tensors in them, read and written one at a time.

This module knows no models. A rank's torch file is never loaded as a whole: its index is read (weights only, no code is
executed) and tensors are read at their offsets in the archive, so memory is that of one tensor.
"""

import gzip
import io
import math
import os
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megarl.disk import UnreadableError, load_plain
from megarl.errors import CheckpointError
from megarl.logging import get_logger
from megarl.models.exchange.stored import DTYPES, Stored, cut_short

log = get_logger(__name__)
_GZIP = b"\x1f\x8b"
MOST_UNPACKED = (100, 2**30)
"""Limits for unpacking a compressed archive: a multiple of its size, and a number of bytes that is always allowed."""


class Span(NamedTuple):
    """Location of a tensor in a file: its first byte, and its strides in elements."""

    start: int
    strides: tuple[int, ...]


class _Member(tarfile.TarInfo):
    """Rejects a negative member size, for which tarfile would seek back and read the same members forever."""

    def _block(self, count: int) -> int:
        if count < 0:
            raise tarfile.ReadError("a member has a negative size")
        return int(super()._block(count))  # type: ignore[misc]


class Archive:
    """A tar file, plain or compressed. A compressed one is first unpacked into an unnamed temporary file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = _plain(path)
            size = os.fstat(self.file.fileno()).st_size
            with tarfile.open(fileobj=self.file, mode="r:", tarinfo=_Member) as tar:
                found = [member for member in tar.getmembers() if member.isreg() and not member.issparse()]
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError, OverflowError) as problem:
            raise CheckpointError(f"{path} is not a whole tar file ({problem}): fetch it again", where=path) from None
        except OSError as problem:
            raise CheckpointError(f"{path} cannot be read ({problem.strerror or problem})", where=path) from None
        self.members = {os.path.normpath(member.name): (member.offset_data, member.size) for member in found}
        for name, (start, length) in self.members.items():
            if start + length > size:
                raise cut_short(path, name)

    def content(self, name: str) -> bytes:
        """Return the bytes of a small member."""
        start, size = self.members[name]
        return os.pread(self.file.fileno(), size, start)

    def tensors(self, name: str) -> "TensorMember":
        """Open a member as a file of tensors."""
        start, size = self.members[name]
        return TensorMember(f"{self.path}:{name}", self.file, start, size)


class TensorMember:
    """A torch file within a larger file; `others` lists the names of values that are not tensors."""

    def __init__(self, label: str, file: BinaryIO, start: int, size: int) -> None:
        self.label, self._file = label, file
        self.tensors: dict[str, Stored] = {}
        self.others: list[str] = []
        self._spans: dict[str, Span] = {}
        for name, value in _index(label, _Window(file, start, size)).items():
            if not isinstance(value, Tensor):
                self.others.append(name)
                continue
            dtype = value.dtype if value.dtype in DTYPES.values() else str(value.dtype)
            try:
                storage: Any = value.untyped_storage()
                offset = int(storage._checkpoint_offset) + int(value.storage_offset()) * value.element_size()
            except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # sparse, meta, before torch 1.6
                raise CheckpointError(
                    f"{label}: {name} is not a plain tensor in a file of torch 1.6 or later", key=name, where=label
                ) from None
            extent = _extent(tuple(value.shape), value.stride()) * value.element_size()
            if offset < 0 or offset + extent > size:
                raise cut_short(label, name)
            self.tensors[name] = Stored(tuple(value.shape), dtype)
            self._spans[name] = Span(start + offset, tuple(value.stride()))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by its stored name."""
        stored, span = self.tensors[name], self._spans[name]
        return self._read(name, stored.shape, span.start)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor; only these are read from disk."""
        (length, *rest), span = self.tensors[name].shape, self._spans[name]
        last = min(last, length)
        first = min(first, last)
        return self._read(name, (last - first, *rest), span.start + first * span.strides[0] * self._width(name))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into the space that `reserve` made for it."""
        stored, span = self.tensors[name], self._spans[name]
        assert tuple(tensor.shape) == stored.shape, (name, tensor.shape, stored.shape)
        self._file.seek(span.start)
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _width(self, name: str) -> int:
        dtype = self.tensors[name].dtype
        assert isinstance(dtype, torch.dtype), "checked by whoever opened the file"
        return dtype.itemsize

    def _read(self, name: str, shape: tuple[int, ...], start: int) -> Tensor:
        strides, dtype = self._spans[name].strides, self.tensors[name].dtype
        assert isinstance(dtype, torch.dtype)
        flat = torch.empty(_extent(shape, strides), dtype=dtype)
        bytes_ = flat.view(torch.uint8).numpy().data
        done = 0
        while done < len(bytes_):  # one call reads at most 2 GB
            read = os.preadv(self._file.fileno(), [bytes_[done:]], start + done)
            if read == 0:
                raise cut_short(self.label, name)
            done += read
        return flat.as_strided(shape, strides)


def reserve(path: Path, described: Mapping[str, Stored]) -> TensorMember:
    """Create a file in `torch.save`'s format with space for the tensors, which `write` fills one after another."""
    with FakeTensorMode():
        empty = {}
        for name, stored in described.items():
            assert isinstance(stored.dtype, torch.dtype)
            empty[name] = torch.empty(stored.shape, dtype=stored.dtype)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, path)
    file = path.open("r+b")
    return TensorMember(str(path), file, 0, path.stat().st_size)


def finish(member: TensorMember) -> None:
    """Close a file that `reserve` created."""
    member._file.close()


def _plain(path: Path) -> BinaryIO:
    file = path.open("rb")
    if file.read(2) != _GZIP:
        file.seek(0)
        return file
    file.close()
    log.info("%s is compressed and is unpacked into %s by every process", path, tempfile.gettempdir())
    plain = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the archive is read
    with gzip.open(path, "rb") as packed:
        most = max(MOST_UNPACKED[0] * path.stat().st_size, MOST_UNPACKED[1])
        while block := packed.read(2**20):
            plain.write(block)
            if plain.tell() > most:
                raise CheckpointError(
                    f"{path} unpacks into more than {MOST_UNPACKED[0]} times its size, which no model's weights do: "
                    "fetch it again",
                    where=path,
                )
    plain.flush()
    plain.seek(0)
    return plain


def _index(label: str, window: "_Window") -> dict[str, Any]:
    """Return names, shapes and offsets without data. BytesIO is what Transformer Engine stores beside its weights."""
    try:
        with FakeTensorMode(), torch.serialization.safe_globals([io.BytesIO]):
            found = load_plain(io.BufferedReader(window), map_location="cpu")
    except UnreadableError as problem:
        raise CheckpointError(f"{label} {problem}: save it again", where=label) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{label} is not a dictionary of tensors: use an archive of one model's weights", where=label
        )
    return found


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the number of elements between the first and the last of a strided tensor, inclusive."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


class _Window(io.RawIOBase):
    """A section of a file as a file object."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        got = os.pread(self._file.fileno(), length, self._start + self._at)
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)
