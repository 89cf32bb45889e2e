"""Release device memory while an engine is idle: copy it to host memory, free it, and restore it before use.

Storages are moved, not tensors. Parameters are views of Megatron's buffers, and the optimizer's shards are views of
these; all views stay valid, because each storage is the same object before and after and is only resized.

    present --release--> away --restore--> arriving --need--> present        (on a CPU a restored part has arrived)
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
PIECE = 1 << 28  # bytes of one allocation of host memory


class HostMemory:
    """Host memory in several allocations, because torch rounds each page-locked one up to a power of two."""

    def __init__(self, nbytes: int, *, pin: bool) -> None:
        self.nbytes = nbytes
        self.pieces = [
            torch.empty(min(PIECE, nbytes - start), dtype=torch.uint8, pin_memory=pin)
            for start in range(0, nbytes, PIECE)
        ]

    def beside(self, content: Tensor, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pairs of slices of equal length: of `content` [bytes], and of this memory from `offset` on."""
        start = 0
        while start < content.numel():
            piece, within = divmod(offset + start, PIECE)
            count = min(content.numel() - start, PIECE - within)
            yield content[start : start + count], self.pieces[piece][within : within + count]
            start += count


@dataclass
class _Away:
    """Storages without memory, the bytes that each had, and their content (None: they are restored as zeros)."""

    storages: list[tuple[torch.UntypedStorage, int]]
    content: HostMemory | None


class DeviceMemory:
    """An engine's device memory in three parts: weights, gradients, optimizer. Each can be released separately."""

    def __init__(self, device: torch.device, tensors: dict[str, Callable[[], Iterable[Tensor]]], *, pins: bool) -> None:
        """
        Args:
            tensors: the tensors of each part. A storage belongs to the first part that has a tensor in it: float32
                weights are their own master weights.
            pins: keep the host memory of a part for reuse, page-locked on a GPU.
        """
        self.device, self.tensors, self.pins = device, tensors, pins
        self.returns = 0  # how often weights were reallocated: addresses recorded before are stale
        self._away: dict[str, _Away] = {}
        self._arriving: dict[str, torch.cuda.Event] = {}
        self._host: dict[str, HostMemory] = {}
        self._stream: torch.cuda.Stream | None = None

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def release(self, part: str, *, keep: bool = True) -> None:
        """Free a part's device memory. Without `keep`, its content is dropped and it is restored as zeros."""
        if part in self._away:
            return
        self.need(part)  # a copy to the device may still be running
        storages = self._storages_of(part)
        content = self._copy_out(part, storages) if keep else None
        self._away[part] = _Away(storages, content)
        for storage, _ in storages:
            storage.resize_(0)

    def restore(self, part: str) -> None:
        """Allocate a part's memory and start to copy its content; on a GPU this overlaps computation until `need`."""
        away = self._away.get(part)
        if away is None:
            return
        for storage, nbytes in away.storages:
            storage.resize_(nbytes)  # from the memory pool of the compute stream, where it is freed again
        if self._on_gpu:
            self._stream = self._stream or torch.cuda.Stream(self.device)
            # The memory may have belonged to another tensor that running kernels still read.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self._copy_in(away)
            self._arriving[part] = self._stream.record_event()
        else:
            self._copy_in(away)
        del self._away[part]  # last, so that a caller that runs out of memory can retry
        if self.pins and away.content is not None:
            self._host[part] = away.content
        self.returns += part == WEIGHTS

    def need(self, *parts: str) -> None:
        """Restore the parts that are away, and make the computation wait for their content. Call this before use."""
        if not self._away and not self._arriving:
            return
        for part in parts:
            self.restore(part)
            if part in self._arriving:
                torch.cuda.current_stream(self.device).wait_event(self._arriving.pop(part))

    def is_away(self, part: str) -> bool:
        """Return whether a part's device memory is released."""
        return part in self._away

    def forget(self, part: str) -> None:
        """Drop the saved content of a part that is away, so that it is restored as zeros."""
        self._away[part].content = None

    def _storages_of(self, part: str) -> list[tuple[torch.UntypedStorage, int]]:
        """Return the part's storages on the device with their sizes, except those of earlier parts."""
        found: dict[int, torch.UntypedStorage] = {}
        for name, tensors in self.tensors.items():
            here = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
                for tensor in tensors()
                if tensor.device.type == self.device.type and tensor.untyped_storage().nbytes() > 0
            }
            if name == part:
                return [(storage, storage.nbytes()) for address, storage in here.items() if address not in found]
            found |= here
        raise KeyError(part)

    def _copy_out(self, part: str, storages: Sequence[tuple[torch.UntypedStorage, int]]) -> HostMemory:
        """Copy the content to host memory; the copy is complete on return."""
        total = sum(nbytes for _, nbytes in storages)
        host = self._host.pop(part, None)
        if host is None or host.nbytes != total:
            host = HostMemory(total, pin=self.pins and self._on_gpu)
        offset = 0
        for storage, nbytes in storages:
            for source, target in host.beside(self._bytes(storage), offset):
                target.copy_(source, non_blocking=self.pins)
            offset += nbytes
        if self._on_gpu:  # freed memory may be reused at once
            torch.cuda.current_stream(self.device).synchronize()
        return host

    def _copy_in(self, away: _Away) -> None:
        offset = 0
        for storage, nbytes in away.storages:
            content = self._bytes(storage)
            if self._on_gpu:  # also if the engine is deleted before it is used
                content.record_stream(torch.cuda.current_stream(self.device))
            if away.content is None:
                content.zero_()
                continue
            for target, source in away.content.beside(content, offset):
                target.copy_(source, non_blocking=self.pins)
            offset += nbytes

    def _bytes(self, storage: torch.UntypedStorage) -> Tensor:
        """Return a storage's content as a tensor [bytes]."""
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def memory_of(
    models: Sequence[nn.Module], chunks: Sequence[Any], optimizer: Any, device: torch.device, *, pins: bool
) -> DeviceMemory:
    """Return the memory of an engine's models, of the gradient buffers around them, and of its optimizer.

    A hook restores the weights before any forward pass of a model, also when it is called directly.
    """
    wrapped = chunks if optimizer is not None else ()  # without an optimizer, the chunks are the bare models
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    def weights() -> Iterator[Tensor]:
        for model in models:
            yield from model.parameters()
            yield from model.buffers()
        yield from (buffer.param_data for buffer in buffers if buffer.param_data is not None)

    def state() -> Iterator[Tensor]:
        for part in optimizer.chained_optimizers if optimizer is not None else ():
            if part.is_stub_optimizer:  # of a chunk without trainable parameters
                continue
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for values in part.optimizer.state.values():  # scalar step counters are read by the host
                yield from (value for value in values.values() if isinstance(value, Tensor) and value.dim() > 0)

    tensors = {WEIGHTS: weights, GRADIENTS: lambda: [buffer.grad_data for buffer in buffers], OPTIMIZER: state}
    memory = DeviceMemory(device, tensors, pins=pins)
    kept = weakref.ref(memory)  # the memory references the models; a strong reference would be a cycle

    def restore_weights(*_: Any) -> None:
        if (present := kept()) is not None:
            present.need(WEIGHTS)

    for model in models:
        model.register_forward_pre_hook(restore_weights)
    return memory


class Offloadable(Protocol):
    """The two methods of an engine that `alone` uses."""

    def offload(self, *, weights: bool = True, optimizer: bool = True) -> None:
        """Move weights, and optimizer state with gradients, to host memory."""

    def onload(self, *, weights: bool = True, optimizer: bool = True) -> None:
        """Start to move them back to the device."""


@contextmanager
def alone(active: Offloadable, engines: Iterable[Offloadable], *, frozen: Sequence[Offloadable] = ()) -> Iterator[None]:
    """Keep only the weights of `active` on the device. On exit the other weights are being restored; optimizer state
    and gradients stay in host memory until they are used.

    On exit, the weights of `frozen` engines are in host memory: they are idle while others train.
    """
    others = [engine for engine in engines if engine is not active]
    active.offload(weights=False)
    for engine in others:
        engine.offload()
    yield
    if active in frozen:
        active.offload()
    for engine in others:
        if engine not in frozen:
            engine.onload(optimizer=False)
