"""What a server counts, and its text for Prometheus (text format 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """Counts of a server since its start; several threads add to them."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        """`waiting` returns the number of texts in the queue."""
        self._waiting, self._lock = waiting, threading.Lock()
        self.requests: Counter[tuple[str, int]] = Counter()
        self.texts = self.batches = 0
        self.model_seconds = 0.0

    def add_request(self, path: str, status: int) -> None:
        """Count an answered request."""
        with self._lock:
            self.requests[path, status] += 1

    def add_batch(self, texts: int, seconds: float) -> None:
        """Count a batch that the model has scored."""
        with self._lock:
            self.batches += 1
            self.texts += texts
            self.model_seconds += seconds

    def text(self) -> str:
        """Return all counts."""
        with self._lock:
            by_status: Counter[int] = Counter()
            for (_, status), count in self.requests.items():
                by_status[status] += count
            requests = [
                (f'{{path="{path}",status="{status}"}}', n) for (path, status), n in sorted(self.requests.items())
            ]
            errors = [(f'{{status="{status}"}}', n) for status, n in sorted(by_status.items()) if status >= 400]
            metrics: list[tuple[str, str, str, Sequence[tuple[str, float]]]] = [
                ("requests_total", "counter", "Answered requests.", requests),
                ("errors_total", "counter", "Requests that were refused or failed.", errors),
                ("texts_total", "counter", "Texts that the model has scored.", [("", self.texts)]),
                ("batches_total", "counter", "Batches that the model has scored.", [("", self.batches)]),
                ("model_seconds_total", "counter", "Seconds in the model.", [("", self.model_seconds)]),
                ("queue_length", "gauge", "Texts that wait for the model.", [("", self._waiting())]),
            ]
        lines = []
        for name, kind, about, values in metrics:
            lines += [f"# HELP megarl_{name} {about}", f"# TYPE megarl_{name} {kind}"]
            lines += [f"megarl_{name}{labels} {value}" for labels, value in values]
        return "\n".join([*lines, ""])
