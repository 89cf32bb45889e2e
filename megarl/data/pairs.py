"""Responses to learn from: pairs, labelled, ranked and scored ones, in units that are trained on together."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megarl.config.files import load_chat_template
from megarl.data.dataset import documents_to_rows
from megarl.data.formats import Document
from megarl.data.responses import ResponseFormat
from megarl.data.sources import Places, Record, read_records
from megarl.errors import DataError
from megarl.parallel.rows import Rows
from megarl.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megarl.config.sections.data import PairDataConfig

log = logging.getLogger(__name__)


@dataclass
class PairStats:
    """What became of the records: `truncated`, `too_long`, `unusable` and `transcripts` name the first few of each."""

    records: int = 0
    truncated: Places = field(default_factory=Places)
    transcripts: Places = field(default_factory=Places)
    too_long: Places = field(default_factory=Places)
    unusable: Places = field(default_factory=Places)
    reason: str = ""

    def report(self, name: str, kept: str) -> None:
        """Log how many were kept, and in further lines which were truncated or left out."""
        log.info("%s: kept %s of %d records", name, kept, self.records)
        if self.transcripts.count:
            log.warning(
                "%s: %d records have no prompt, so what both responses begin with is taken for it: %s",
                name,
                self.transcripts.count,
                self.transcripts,
            )
        if self.truncated.count:
            log.warning(
                "%s: %d records were truncated to data.seq_length: %s", name, self.truncated.count, self.truncated
            )
        if self.too_long.count:
            log.warning(
                "%s: %d records were left out, longer than data.seq_length: %s",
                name,
                self.too_long.count,
                self.too_long,
            )
        if self.unusable.count:
            log.warning(
                "%s: %d records were left out as unusable: %s (%s)",
                name,
                self.unusable.count,
                self.unusable,
                self.reason,
            )


class Unit(NamedTuple):
    """Responses that are trained on together, each with its prompt, and their columns: a value, or one per token."""

    documents: tuple[Document, ...]
    per_row: Mapping[str, Sequence[float | bool]] = MappingProxyType({})
    per_token: Mapping[str, Sequence[np.ndarray]] = MappingProxyType({})


class ResponseData:
    """Rows of a prompt with one response each, in units that are trained on together, one row directly after another.

    Attributes:
        documents: one per row; the action mask covers the response, or what is scored of it.
        per_row: further columns [rows].
        per_token: further columns, an array [tokens] for each row.
        first: [units + 1] the first row of each unit, and the number of rows.
        lengths: [units] tokens of each unit.
    """

    def __init__(self, units: Sequence[Unit], stats: PairStats | None = None) -> None:
        """All units have the same columns."""
        self.stats = stats or PairStats()
        self.documents = [document for unit in units for document in unit.documents]
        self.per_row = {
            name: _column([value for unit in units for value in unit.per_row[name]]) for name in units[0].per_row
        }
        self.per_token = {name: [row for unit in units for row in unit.per_token[name]] for name in units[0].per_token}
        self.first = np.cumsum([0, *(len(unit.documents) for unit in units)])
        lengths = np.array([len(document) for document in self.documents], dtype=np.int64)
        self.lengths = np.add.reduceat(lengths, self.first[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def per_unit(self) -> int:
        """Number of rows of the largest unit."""
        return int(np.diff(self.first).max())

    def token_rows(self) -> Iterator[np.ndarray]:
        """Iterate over the token ids of the rows."""
        return (document.tokens for document in self.documents)

    def digest(self) -> int:
        """Return a checksum of what is trained on in each row, and of all columns."""
        found = zlib.crc32(self.first.tobytes())
        columns = [*self.per_row.values(), *(row for rows in self.per_token.values() for row in rows)]
        for array in (*columns, *(document.action_mask for document in self.documents)):
            found = zlib.crc32(array.tobytes(), found)
        return found

    def take(self, units: Tensor) -> Rows:
        """Return the rows of some units, unit by unit, with their columns, and the column unit."""
        sizes = np.diff(self.first)[units.numpy()]
        indices = np.concatenate([np.arange(self.first[unit], self.first[unit + 1]) for unit in units.tolist()])
        rows = documents_to_rows([[self.documents[index]] for index in indices], packed=False)
        columns = {name: torch.from_numpy(values[indices]) for name, values in self.per_row.items()}
        for name, values in self.per_token.items():
            column = torch.zeros_like(rows.action_mask)
            for row, index in enumerate(indices):
                column[row, : len(values[index])] = torch.from_numpy(values[index])
            columns[name] = column
        return rows.with_columns(unit=torch.arange(len(units)).repeat_interleave(torch.from_numpy(sizes)), **columns)


def _column(values: Sequence[float | bool]) -> np.ndarray:
    """Return values of rows as booleans or as float32."""
    found = np.array(values)
    return found if found.dtype == bool else found.astype(np.float32)


def mismatched(rows: Rows, longest: int) -> Rows:
    """Return each row's prompt with the response of the next row; the last row takes that of the first.

    A response begins at the first token that is trained on. A row of more than `longest` tokens is truncated, but one
    token of the response stays.
    """
    starts = [int(mask.argmax()) for mask in rows.action_mask]
    documents = []
    for index, start in enumerate(starts):
        other = (index + 1) % len(rows)
        end = int(rows.lengths[other])
        tokens = torch.cat([rows.tokens[index, :start], rows.tokens[other, starts[other] : end]])
        mask = torch.cat([torch.zeros(start), rows.action_mask[other, starts[other] : end]])
        keep = max(longest, start + 1)
        documents.append(Document(tokens[:keep].numpy().astype(np.int32), mask[:keep].numpy().astype(np.uint8)))
    return documents_to_rows([[document] for document in documents], packed=False)


def build_preference_data(
    data: PairDataConfig, tokenizer: Tokenizer, kind: str, *, report: bool = True
) -> tuple[ResponseData, ResponseData | None]:
    """Return the training and the evaluation data, or None in the place of the latter where `data.eval` is empty.

    Args:
        kind: what each record is read as, a key of `READERS`.
        report: log what became of the records, as the first rank does.
    """
    keys = [one.name for one in fields(ResponseFormat) if hasattr(data, one.name) and one.name != "chat_template"]
    record_format = ResponseFormat(
        **{key: getattr(data, key) for key in keys},
        chat_template=load_chat_template(data.chat_template),
        settable=tuple(key for key in keys if key.endswith("_key")),
    )

    def read(paths: Sequence[str], split: str, limit: int | None, name: str) -> ResponseData | None:
        if not paths:
            return None
        records = islice(read_records(paths, split, key=name, options=data.options), limit)
        found = read_units(records, tokenizer, record_format, data, name, kind)
        if report:
            found.stats.report(name, f"{len(found)} {READERS[kind].plural}")
        return found

    train = read(data.train, data.train_split, None, "data.train")
    assert train is not None
    return train, read(data.eval, data.eval_split, data.eval_limit, "data.eval")


def read_units(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    record_format: ResponseFormat,
    data: PairDataConfig,
    name: str,
    kind: str,
) -> ResponseData:
    """Tokenise records as units of a kind, a key of `READERS`."""
    stats, units = PairStats(), []
    for record in records:
        stats.records += 1
        try:
            found = READERS[kind].read(record_format, record, tokenizer)
        except DataError as problem:
            _leave_out(problem, record, data, stats)
            continue
        if record_format.is_transcript(record):
            stats.transcripts.add(record.where)
        units += [fitting for unit in found if (fitting := _fit(unit, record, data, stats)) is not None]
    _require_some(units, stats, data, name, READERS[kind].plural)
    result = ResponseData(units, stats)
    if kind == "labelled" and name == "data.train":
        _require_both_labels(result.per_row["desirable"], record_format, name)
    return result


class Reader(NamedTuple):
    """How a record becomes units, and what those are called."""

    read: Callable[[ResponseFormat, Record, Tokenizer], list[Unit]]
    plural: str


def _pair(record_format: ResponseFormat, record: Record, tokenizer: Tokenizer) -> list[Unit]:
    return [Unit(record_format.pair(record, tokenizer))]


def _labelled(record_format: ResponseFormat, record: Record, tokenizer: Tokenizer) -> list[Unit]:
    found = record_format.labelled(record, tokenizer)
    return [Unit((document,), {"desirable": (label,)}) for document, label in found]


def _ranked(record_format: ResponseFormat, record: Record, tokenizer: Tokenizer) -> list[Unit]:
    documents, levels, margin = record_format.ranked(record, tokenizer)
    return [Unit(documents, {"level": levels, "margin": [margin] * len(levels)})]


def _scored(record_format: ResponseFormat, record: Record, tokenizer: Tokenizer) -> list[Unit]:
    found = record_format.scored(record, tokenizer)
    return [Unit((document,), {"target": (score,)}) for document, score in found]


def _steps(
    record_format: ResponseFormat, record: Record, tokenizer: Tokenizer, *, probabilities: bool = True
) -> list[Unit]:
    document, scores, prompt = record_format.steps(record, tokenizer, probabilities=probabilities)
    target = np.zeros(len(document), dtype=np.float32)
    target[document.action_mask == 1] = scores
    return [Unit((document,), {"prompt_tokens": (prompt,)}, {"target": (target,)})]


READERS = {
    "pairs": Reader(_pair, "pairs"),
    "labelled": Reader(_labelled, "responses"),
    "ranking": Reader(_ranked, "prompts"),
    "regression": Reader(_scored, "responses"),
    "steps": Reader(_steps, "responses"),
    "steps_of_any_score": Reader(partial(_steps, probabilities=False), "responses"),
}
"""What a record can be read as. A unit is a pair; a response with a label (a pair is two of them); a prompt with ranked
responses; a response with a score; a response with a score from 0 to 1, or any score, for each step."""


# --- inside -----------------------------------------------------------------------------------------------------------


def _leave_out(problem: DataError, record: Record, data: PairDataConfig, stats: PairStats) -> None:
    """Count a record that cannot be used, or raise its error."""
    if data.on_error == "error":
        raise DataError(
            f"{problem}; or set data.on_error=drop to leave out such records",
            key=problem.key,
            value=problem.value,
            where=problem.where,
            offers={**problem.offers, "data.on_error": ["drop"]},
        ) from None
    stats.unusable.add(record.where)
    stats.reason = stats.reason or str(problem)


def _fit(unit: Unit, record: Record, data: PairDataConfig, stats: PairStats) -> Unit | None:
    """Return a unit within data.seq_length; None if it is left out."""
    longest, limit = max(map(len, unit.documents)), data.seq_length
    if longest <= limit:
        return unit
    if data.too_long == "error":
        raise DataError(
            f"{record.where}: is {longest} tokens long, more than data.seq_length={limit}; shorten it, raise "
            "data.seq_length, or set data.too_long to truncate or drop",
            key="data.seq_length",
            value=limit,
            where=record.where,
            offers={"data.too_long": ("truncate", "drop")},
        )
    short = tuple(
        Document(document.tokens[:limit].copy(), document.action_mask[:limit].copy()) for document in unit.documents
    )
    nothing_left = not all(document.action_mask.any() for document in short)
    if data.too_long == "drop" or nothing_left or _different(short) < _different(unit.documents):
        stats.too_long.add(record.where)
        return None
    stats.truncated.add(record.where)
    per_token = {name: [row[:limit] for row in rows] for name, rows in unit.per_token.items()}
    return Unit(short, unit.per_row, per_token)


def _different(documents: Sequence[Document]) -> int:
    """Return the number of documents with different tokens."""
    return len({document.tokens.tobytes() for document in documents})


def _require_some(units: Sequence[Unit], stats: PairStats, data: PairDataConfig, name: str, what: str) -> None:
    if units:
        return
    why = f"; the first: {stats.reason}" if stats.reason else ""
    raise DataError(
        f"{name}: none of its {stats.records} records is left as {what} ({stats.too_long.count} longer than "
        f"data.seq_length={data.seq_length}, {stats.unusable.count} unusable{why}); raise data.seq_length, or check "
        "the keys",
        key="data.seq_length",
        value=data.seq_length,
        where=name,
    )


def _require_both_labels(desirable: np.ndarray, record_format: ResponseFormat, name: str) -> None:
    if desirable.min() == desirable.max():
        kind = "desirable" if desirable[0] else "undesirable"
        raise DataError(
            f"{name}: all {len(desirable)} responses are {kind}, and the loss needs both kinds: give both, or "
            f"check data.label_key={record_format.label_key}",
            key="data.label_key",
            value=record_format.label_key,
            where=name,
        )
