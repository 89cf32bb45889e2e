"""What torch's CPU allocator really hands out, read from the profiler's memory events."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.autograd.profiler import profile


@dataclass
class Allocations:
    """Bytes live after each allocation and release, counted from the start of the recording."""

    live: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.live, default=0)

    @property
    def left(self) -> int:
        return self.live[-1] if self.live else 0


@contextmanager
def recorded() -> Iterator[Allocations]:
    """Record what is allocated inside. Releases of older memory, and those in gloo's own threads, are not seen.

    Memory of an earlier recording is known to the profiler: what of it is garbage is released before this one begins.
    """
    gc.collect()
    found = Allocations()
    with profile(profile_memory=True) as recorder:
        yield found
    events: list[Any] = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    total = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        found.live.append(total)
