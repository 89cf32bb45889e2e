"""Wall-clock and CPU time of a process by section, and the work of a step; nothing here influences training."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """The work of one step over all processes: input tokens, and floating-point operations of forward and backward."""

    tokens: int
    flops: float


class Clock:
    """Adds up wall-clock and CPU seconds per named section of a run.

    Sections nest: the time of an inner section counts for the inner one only, so that the sum of all sections never
    exceeds the time of the run. CPU seconds are those of all threads of this process.
    """

    def __init__(
        self, wall: Callable[[], float] = time.perf_counter, cpu: Callable[[], float] = time.process_time
    ) -> None:
        """`wall` and `cpu` read the two times; tests replace them."""
        self._read = (wall, cpu)
        self._open: list[str] = []
        self._listeners: list[Callable[[str], None]] = []
        self._mark = (0.0, 0.0)
        self._counted: dict[str, tuple[float, float]] = {}
        self._earlier: dict[str, tuple[float, float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent inside the `with` block to the section `name`."""
        self._charge()
        self._open.append(name)
        self._tell()
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._tell()

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the innermost open section ("" between sections) whenever that changes."""
        self._listeners.append(listener)

    def totals(self) -> dict[str, dict[str, float]]:
        """Return the seconds per section up to now, also before a resume: {section: {"wall_s": ..., "cpu_s": ...}}."""
        self._charge()
        result = {}
        for name in [*self._earlier, *(name for name in self._counted if name not in self._earlier)]:
            before, since = self._earlier.get(name, (0.0, 0.0)), self._counted.get(name, (0.0, 0.0))
            result[name] = {"wall_s": before[0] + since[0], "cpu_s": before[1] + since[1]}
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the totals for a checkpoint."""
        return {"parts": self.totals()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an earlier process's totals. A state that is loaded twice counts once."""
        self._earlier = {name: (part["wall_s"], part["cpu_s"]) for name, part in state["parts"].items()}

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self._open[-1] if self._open else "")

    def _charge(self) -> None:
        """Add the time since the last mark to the innermost open section."""
        now = (self._read[0](), self._read[1]())
        if self._open:
            wall, cpu = self._counted.get(self._open[-1], (0.0, 0.0))
            self._counted[self._open[-1]] = (wall + now[0] - self._mark[0], cpu + now[1] - self._mark[1])
        self._mark = now
