"""Log-probs of whole responses under a reference model: computed by a second model, read from disk, or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import local, locked, write_atomically
from megarl.errors import DataError
from megarl.experience.rows import forward_rows
from megarl.logging import get_logger
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine, Outputs
from megarl.parallel.rows import Microbatch, Rows

log = get_logger(__name__)
VERSION = 1
CHECKED_ROWS = 4
"""Number of stored rows that are computed again when a cache is opened."""
TOLERANCES = {"fp32": 1e-3, "bf16": 0.5}
"""Difference of a response's log-prob, per token, above which a stored value is wrong."""
ENTRY = np.dtype([("row", "S16"), ("total", "<f8")])
CHUNK = 256
"""Number of rows in one pass of the reference, before it is divided among replicas."""
SAVED_EVERY = 100_000
"""Number of computed rows after which the file is written, so that a kill loses little."""
NOT_SHAPE = ("path", "dropout", "init_std", "num_layers_unfrozen")
"""Keys of a model that do not change what it computes."""


def reference_name(digest: str, model: ModelConfig, precision: str) -> str:
    """Return the name of the file with the log-probs of a reference, given the digest of its weights."""
    shape = {key: value for key, value in asdict(model).items() if key not in NOT_SHAPE}
    decides = json.dumps([VERSION, precision, shape, digest], sort_keys=True)
    return f"reference-{hashlib.sha256(decides.encode()).hexdigest()[:32]}.bin"


class ResponseReference(Protocol):
    """Computes the log-probs of responses under the reference model."""

    def totals(self, rows: Rows) -> Tensor:
        """Return the sum of the log-probs of each row's response, [rows] float64 on the host, on every rank."""


class NoReference:
    """A reference under which every response has log-prob 0."""

    def totals(self, rows: Rows) -> Tensor:
        """Return zeros, [rows]."""
        return torch.zeros(len(rows), dtype=torch.float64)


class ResidentReference:
    """A model on the device that computes the log-probs when they are needed.

    With `restored`, it is the policy, which has its first weights in that context.
    """

    def __init__(
        self,
        engine: Engine,
        per_microbatch: int,
        restored: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine, self.per_microbatch, self.restored = engine, per_microbatch, restored

    def totals(self, rows: Rows) -> Tensor:
        """Return the sum of the log-probs of each row's response, [rows], by a forward pass."""
        with self.restored():
            columns = forward_rows(
                self.engine, rows, response_logprobs, per_microbatch=self.per_microbatch, share_bins=True
            )
        return (columns["logprobs"].double() * rows.action_mask).sum(dim=1)


class CachedReference:
    """Log-probs that were computed before training and are kept in a file, row by row.

    A row is known by its tokens and its action mask, and the file by the weights, so that a new tokenizer, template or
    record needs new entries and nothing that is stored can be wrong for it. The model is released when `fill` returns.
    """

    def __init__(self, engine: Engine, folder: str, name: str, per_microbatch: int, tolerance: float, key: str) -> None:
        """
        Args:
            engine: an engine that has the reference's weights until `fill` returns.
            folder: value of the `cache` key.
            name: name of the file, which belongs to these weights alone.
            per_microbatch: rows of full length in a forward pass of a replica.
            tolerance: difference of a response's log-prob, per token, above which a stored value is wrong.
            key: the configuration key of the folder, for messages.
        """
        self.key = key
        self.grid = engine.grid
        self.model: ResidentReference | None = ResidentReference(engine, per_microbatch)
        self.tolerance, self.path = tolerance, local(folder) / name
        self.known: dict[bytes, float] = {}
        self.computed: dict[bytes, float] = {}  # by this run
        self.trusted = True  # whether what the file held is right

    def fill(self, chunks: Iterable[Rows]) -> None:
        """Compute the log-probs of all rows that the file does not have, and add them to it."""
        self.known = self.grid.run_on_rank0(self._open)
        used: set[bytes] = set()
        waiting: dict[bytes, Rows] = {}  # a row may occur several times
        saved, checked = 0, not self.known
        for rows in chunks:
            if not checked:
                checked = self._check(rows)
            for index, name in enumerate(row_names(rows)):
                used.add(name)
                if name not in self.known and name not in waiting:
                    waiting[name] = rows.take(torch.tensor([index]))
            if len(waiting) >= CHUNK:
                self._compute(list(waiting.values()))
                waiting = {}
                if len(self.computed) // SAVED_EVERY > saved:
                    saved = len(self.computed) // SAVED_EVERY
                    self.grid.run_on_rank0(self._write)
                    log.info("reference: %d responses computed so far", len(self.computed))
        if waiting:
            self._compute(list(waiting.values()))
        if self.computed:
            self.grid.run_on_rank0(self._write)
        log.info("reference: %d responses computed, %d stored in %s", len(self.computed), len(self.known), self.path)
        self.known = {name: self.known[name] for name in used}
        self.computed, self.model = {}, None

    def totals(self, rows: Rows) -> Tensor:
        """Return the stored sums of the rows' responses, [rows]."""
        names = row_names(rows)
        if any(name not in self.known for name in names):
            raise ValueError("rows whose log-probs under the reference were not computed")
        return torch.tensor([self.known[name] for name in names], dtype=torch.float64)

    def _compute(self, rows: list[Rows]) -> None:
        joined = _join(rows)
        names = row_names(joined)
        assert self.model is not None
        totals = dict(zip(names, self.model.totals(joined).tolist(), strict=True))
        self.computed.update(totals)
        self.known.update(totals)

    def _check(self, rows: Rows) -> bool:
        """Compute a few stored rows again; forget all of them if one differs. Return whether there were any here."""
        names = row_names(rows)
        stored = [index for index, name in enumerate(names) if name in self.known][:CHECKED_ROWS]
        if not stored:
            return False
        assert self.model is not None
        some = rows.take(torch.tensor(stored))
        per_token = (self.model.totals(some) - self.totals(some)).abs() / some.action_mask.sum(dim=1)
        if not bool((per_token <= self.tolerance).all()):
            log.warning("reference: %s holds other log-probs than this model has: computing all again", self.path)
            self.known, self.trusted = dict(self.computed), False
        return True

    def _open(self) -> dict[bytes, float]:
        """Return the stored entries, once it is known that more can be added."""
        with self._writing():
            found = _read(self.path)
        if found is None:
            log.warning("reference: %s is damaged: its log-probs are computed again", self.path)
        self.trusted = found is not None
        return found or {}

    def _write(self) -> None:
        """Add this run's entries to those that other runs may have written meanwhile."""
        with self._writing():
            entries = {**((self.trusted and _read(self.path)) or {}), **self.known}
            self.trusted = True
            table = np.array(sorted(entries.items()), dtype=ENTRY)
            digest = hashlib.sha256(table.tobytes()).digest()
            write_atomically(self.path, digest + table.tobytes())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the lock of the file; turn errors of the file system into one that names the key."""
        try:
            with locked(self.path.with_suffix(".lock")):
                yield
        except OSError as problem:
            raise DataError(
                f"{self.path} cannot be written ({problem.strerror or problem}): set {self.key} to another folder",
                key=self.key,
                value=str(self.path.parent),
                where=self.path,
            ) from None


def response_logprobs(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
    """Return the log-probs [bins, time] of the target tokens."""
    return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}


def row_names(rows: Rows) -> list[bytes]:
    """Return a digest of each row's tokens and action mask, without trailing zero bytes."""
    tokens, masks = rows.tokens.numpy().astype("<i4"), rows.action_mask.numpy().astype(np.uint8)
    names = []
    for index, length in enumerate(rows.lengths.tolist()):
        content = tokens[index, :length].tobytes() + masks[index, :length].tobytes()
        names.append(hashlib.blake2b(content, digest_size=15).digest() + b"\x01")  # numpy strips zeros at the end
    return names


def _read(path: Path) -> dict[bytes, float] | None:
    """Return the entries of a file, none if it does not exist; None if it is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    digest, table = content[:32], content[32:]
    if hashlib.sha256(table).digest() != digest:
        return None
    return {bytes(row): float(total) for row, total in np.frombuffer(table, dtype=ENTRY)}


def _join(rows: list[Rows]) -> Rows:
    """Return single rows as one, padded to the longest."""
    width = max(int(row.lengths.max()) for row in rows)
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        length = int(row.lengths[0])
        tokens[index, :length], mask[index, :length] = row.tokens[0, :length], row.action_mask[0, :length]
    return Rows(tokens, torch.cat([row.lengths for row in rows]), mask)
