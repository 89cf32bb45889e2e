"""Prompts with preferred and rejected responses, or with labelled ones, and the order in which they are trained on."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from megarl.config.files import load_chat_template
from megarl.data.dataset import documents_to_rows
from megarl.data.formats import Document, RecordFormat
from megarl.data.sources import Places, Record, read_records
from megarl.errors import DataError
from megarl.parallel.rows import Rows
from megarl.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megarl.config.sections.data import PairDataConfig

log = logging.getLogger(__name__)
_T = TypeVar("_T")
CHOSEN, REJECTED = 0, 1
"""The two rows of a pair, in this order."""


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


class ResponseData:
    """Rows of a prompt with one response each, in units that are trained on together.

    Pairs: unit i is the preferred response, row 2i, and the rejected one, row 2i + 1. Labelled responses: unit i is
    row i.

    Attributes:
        documents: one per row; the action mask covers the response.
        desirable: [rows] whether a labelled response is desirable; None for pairs.
        lengths: [units] tokens of each unit.
    """

    def __init__(
        self, documents: Sequence[Document], desirable: Sequence[bool] | None = None, stats: PairStats | None = None
    ) -> None:
        self.documents = list(documents)
        self.desirable = None if desirable is None else np.array(desirable, dtype=bool)
        self.stats = stats or PairStats()
        self.per_unit = 2 if desirable is None else 1
        self.row_lengths = np.array([len(document) for document in self.documents], dtype=np.int64)
        self.lengths = self.row_lengths.reshape(-1, self.per_unit).sum(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def token_rows(self) -> Iterator[np.ndarray]:
        """Iterate over the token ids of the rows."""
        return (document.tokens for document in self.documents)

    def digest(self) -> int:
        """Return a checksum of what is trained on in each row, and of the labels."""
        found = zlib.crc32(b"" if self.desirable is None else self.desirable.tobytes())
        for document in self.documents:
            found = zlib.crc32(document.action_mask.tobytes(), found)
        return found

    def take(self, units: Tensor) -> Rows:
        """Return the rows of some units, unit by unit, with the columns unit, and desirable for labelled responses."""
        indices = (units[:, None] * self.per_unit + torch.arange(self.per_unit)).flatten()
        rows = documents_to_rows([[self.documents[index]] for index in indices.tolist()], packed=False)
        rows = rows.with_columns(unit=torch.arange(len(units)).repeat_interleave(self.per_unit))
        if self.desirable is None:
            return rows
        return rows.with_columns(desirable=torch.from_numpy(self.desirable[indices.numpy()]))


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
    data: PairDataConfig, tokenizer: Tokenizer, *, labelled: bool, report: bool = True
) -> tuple[ResponseData, ResponseData | None]:
    """Return the training and the evaluation data, or None in the place of the latter where `data.eval` is empty.

    Args:
        labelled: each record is a response with a label, or a pair, which counts as two of them.
        report: log what became of the records, as the first rank does.
    """
    record_format = RecordFormat(
        prompt_key=data.prompt_key,
        completion_key=getattr(data, "completion_key", "completion"),
        label_key=getattr(data, "label_key", "label"),
        messages_key=data.messages_key,
        chosen_key=data.chosen_key,
        rejected_key=data.rejected_key,
        chat_template=load_chat_template(data.chat_template),
        settable=("prompt_key", "chosen_key", "rejected_key", "messages_key")
        + (("completion_key", "label_key") if labelled else ()),
    )

    def read(paths: Sequence[str], split: str, limit: int | None, name: str) -> ResponseData | None:
        if not paths:
            return None
        records = islice(read_records(paths, split, key=name, options=data.options), limit)
        found = (read_labelled if labelled else read_pairs)(records, tokenizer, record_format, data, name)
        if report:
            found.stats.report(name, f"{len(found)} {'responses' if labelled else 'pairs'}")
        return found

    train = read(data.train, data.train_split, None, "data.train")
    assert train is not None
    return train, read(data.eval, data.eval_split, data.eval_limit, "data.eval")


def read_pairs(
    records: Iterable[Record], tokenizer: Tokenizer, record_format: RecordFormat, data: PairDataConfig, name: str
) -> ResponseData:
    """Tokenise pairs of a preferred and a rejected response."""
    stats, documents = PairStats(), []
    for record, whole in _encoded(records, lambda record: record_format.pair(record, tokenizer), data, stats):
        pair = _fit(whole, record, data, stats)
        if pair is None:
            continue
        if not record_format.has_prompt(record):
            stats.transcripts.add(record.where)
        documents += pair
    _require_some(documents, stats, data, name, "pairs")
    return ResponseData(documents, stats=stats)


def read_labelled(
    records: Iterable[Record], tokenizer: Tokenizer, record_format: RecordFormat, data: PairDataConfig, name: str
) -> ResponseData:
    """Tokenise responses with a label; a pair becomes a desirable response and an undesirable one."""
    stats, documents, desirable = PairStats(), [], []
    for record, responses in _encoded(records, lambda record: record_format.labelled(record, tokenizer), data, stats):
        for document, label in responses:
            fitting = _fit((document,), record, data, stats)
            if fitting is not None:
                documents += fitting
                desirable.append(label)
    _require_some(documents, stats, data, name, "responses")
    if name == "data.train" and len(set(desirable)) == 1:
        kind = "desirable" if desirable[0] else "undesirable"
        raise DataError(
            f"{name}: all {len(desirable)} responses are {kind}, and the loss needs both kinds: give both, or "
            f"check data.label_key={record_format.label_key}",
            key="data.label_key",
            value=record_format.label_key,
            where=name,
        )
    return ResponseData(documents, desirable, stats)


# --- inside -----------------------------------------------------------------------------------------------------------


def _encoded(
    records: Iterable[Record], encode: Callable[[Record], _T], data: PairDataConfig, stats: PairStats
) -> Iterator[tuple[Record, _T]]:
    """Yield each record with what it is read as. Count the records that cannot be used, or raise their error."""
    for record in records:
        stats.records += 1
        try:
            found = encode(record)
        except DataError as problem:
            if data.on_error == "error":
                raise DataError(
                    f"{problem}; or set data.on_error=drop to leave out such records",
                    key=problem.key,
                    value=problem.value,
                    where=problem.where,
                    offers={"data.on_error": ["drop"]},
                ) from None
            stats.unusable.add(record.where)
            stats.reason = stats.reason or str(problem)
            continue
        yield record, found


def _fit(
    documents: Sequence[Document], record: Record, data: PairDataConfig, stats: PairStats
) -> list[Document] | None:
    """Return the rows of a record within data.seq_length; None if it is left out."""
    longest, limit = max(map(len, documents)), data.seq_length
    if longest <= limit:
        return list(documents)
    if data.too_long == "error":
        raise DataError(
            f"{record.where}: is {longest} tokens long, more than data.seq_length={limit}; shorten it, raise "
            "data.seq_length, or set data.too_long to truncate or drop",
            key="data.seq_length",
            value=limit,
            where=record.where,
            offers={"data.too_long": ("truncate", "drop")},
        )
    short = [Document(document.tokens[:limit].copy(), document.action_mask[:limit].copy()) for document in documents]
    nothing_left = not all(document.action_mask.any() for document in short)
    same = len(short) == 2 and np.array_equal(short[CHOSEN].tokens, short[REJECTED].tokens)
    if data.too_long == "drop" or nothing_left or same:
        stats.too_long.add(record.where)
        return None
    stats.truncated.add(record.where)
    return short


def _require_some(documents: Sequence[Document], stats: PairStats, data: PairDataConfig, name: str, what: str) -> None:
    if documents:
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
