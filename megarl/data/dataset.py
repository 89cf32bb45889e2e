"""All documents of a data set, tokenised once and held in memory, and several of them packed into one row."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megarl.data.formats import Document, RecordFormat
from megarl.data.sources import Places, Record
from megarl.errors import DataError
from megarl.tokenizers import Tokenizer

PACKING_WINDOW = 8192
log = logging.getLogger(__name__)


class Rows(Protocol):
    """What batches are made of: rows of one or several documents, with their lengths known up front."""

    packed: bool
    lengths: np.ndarray

    def __len__(self) -> int: ...

    def row(self, index: int) -> Sequence[Document]:
        """The documents of a row, in order."""


@dataclass
class DatasetStats:
    """What became of the records of a data set; `changed` are those that were cut or left out."""

    records: int = 0
    kept: int = 0
    truncated: int = 0
    dropped_too_long: int = 0
    dropped_no_loss: int = 0
    tokens: int = 0
    response_tokens: int = 0
    changed: Places = field(default_factory=Places)

    def report(self, name: str, limit: str) -> None:
        """Log the counts, in a second line those of records that were cut to `limit` or left out."""
        log.info(
            "%s: kept %d of %d records; %d tokens, %d of them trained on",
            name,
            self.kept,
            self.records,
            self.tokens,
            self.response_tokens,
        )
        if self.changed.count:
            log.warning(
                "%s: %d records were cut to %s, %d dropped as longer, %d had no token to train on: %s",
                name,
                self.truncated,
                limit,
                self.dropped_too_long,
                self.dropped_no_loss,
                self.changed,
            )


class SFTDataset:
    """Documents for supervised fine-tuning: item i is the i-th record that was kept.

    Records longer than `seq_length` are cut at the end ("truncate"), left out ("drop") or refused ("error");
    records without a token to train on, from the start or after the cut, are left out. `stats` counts each.
    """

    packed = False

    def __init__(
        self,
        records: Iterable[Record],
        tokenizer: Tokenizer,
        seq_length: int,
        record_format: RecordFormat | None = None,
        too_long: str = "truncate",
        name: str = "data",
    ) -> None:
        """Read and tokenise all records.

        Args:
            name: what the records are called in errors, such as "data.train".
        """
        self.stats = DatasetStats()
        self.documents: list[Document] = []
        record_format = record_format or RecordFormat()
        for record in records:
            self.stats.records += 1
            whole = record_format.encode(record, tokenizer)
            document = self._fit(whole, seq_length, too_long, record.where)
            if document is not None and not document.response_mask.any():
                self.stats.dropped_no_loss += 1
                document = None
            if document is not whole:
                self.stats.changed.add(record.where)
            if document is None:
                continue
            self.documents.append(document)
            self.stats.tokens += len(document)
            self.stats.response_tokens += int(document.response_mask.sum())
        self.stats.kept = len(self.documents)
        if not self.documents:
            raise DataError(
                f"{name}: none of its {self.stats.records} records is left to train on "
                f"({self.stats.dropped_too_long} longer than data.seq_length={seq_length}, "
                f"{self.stats.dropped_no_loss} without a response token in reach); "
                "raise data.seq_length, or check data.format and the keys",
                key="data.seq_length",
                value=seq_length,
                where=name,
            )
        self.lengths = np.array([len(document) for document in self.documents], dtype=np.int64)

    def _fit(self, document: Document, seq_length: int, too_long: str, where: str) -> Document | None:
        if len(document) <= seq_length:
            return document
        if too_long == "error":
            raise DataError(
                f"{where}: is {len(document)} tokens long, more than data.seq_length={seq_length}; "
                "shorten it, raise data.seq_length, or set data.too_long to truncate or drop",
                key="data.seq_length",
                value=seq_length,
                where=where,
                offers={"data.too_long": ("truncate", "drop")},
            )
        if too_long == "drop":
            self.stats.dropped_too_long += 1
            return None
        self.stats.truncated += 1
        # Copied, since a view would keep the whole of a long document in memory.
        return Document(document.tokens[:seq_length].copy(), document.response_mask[:seq_length].copy())

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    def row(self, index: int) -> Sequence[Document]:
        return (self.documents[index],)

    def fingerprint(self) -> str:
        """Hex digest of all tokens and masks, in order: two runs saw the same data only if it is the same."""
        return _fingerprint(self)


class PackedDataset:
    """Rows of up to `seq_length` tokens, each holding whole documents of another data set.

    The packing is made once; epochs draw the rows in new orders.
    """

    packed = True

    def __init__(self, documents: SFTDataset, seq_length: int, seed: int, shuffle: bool = True) -> None:
        self.documents = documents
        self.stats = documents.stats
        self.rows = pack(documents.lengths, seq_length, seed, shuffle)
        self.lengths = np.array([documents.lengths[row].sum() for row in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Sequence[Document]:
        return [self.documents[int(document)] for document in self.rows[index]]

    def fingerprint(self) -> str:
        """Hex digest of all tokens and masks, in order: two runs saw the same data only if it is the same."""
        return _fingerprint(self)


def pack(lengths: np.ndarray, seq_length: int, seed: int, shuffle: bool = True) -> list[np.ndarray]:
    """Share documents out to rows of at most `seq_length` tokens; every document is in exactly one row.

    Documents are taken in a seeded order (their own without shuffle), `PACKING_WINDOW` at a time. Within a
    window the longest goes first, each into the row with the least room that still holds it.

    Args:
        lengths: tokens of each document, [documents], none above `seq_length`.

    Returns:
        The documents of each row; rows follow the order in which their first document was taken.
    """
    order = np.arange(len(lengths))
    if shuffle:
        order = np.random.default_rng([seed, 0x9AC]).permutation(len(lengths))
    rows: list[np.ndarray] = []
    for start in range(0, len(order), PACKING_WINDOW):
        window = order[start : start + PACKING_WINDOW]
        rows += [window[row] for row in _best_fit(lengths[window], seq_length)]
    return rows


def _best_fit(lengths: np.ndarray, seq_length: int) -> list[np.ndarray]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in np.argsort(-lengths, kind="stable"):
        length = int(lengths[document])
        place = bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
        else:
            left, row = seq_length, len(rows)
            rows.append([])
        rows[row].append(int(document))
        insort(room, (left - length, row))
    return [np.array(row) for row in sorted((sorted(row) for row in rows), key=lambda row: row[0])]


def _fingerprint(rows: SFTDataset | PackedDataset) -> str:
    digest = hashlib.sha256(rows.lengths.tobytes())
    for index in range(len(rows)):
        for document in rows.row(index):
            digest.update(document.tokens.tobytes())
            digest.update(document.response_mask.tobytes())
    return digest.hexdigest()
