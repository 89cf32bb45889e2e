"""All documents of a data set, tokenised once and held in memory, and several of them packed into one row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megarl.data.formats import Document, RecordFormat
from megarl.data.sources import Places, Record
from megarl.errors import DataError
from megarl.parallel.packing import pack
from megarl.parallel.rows import Rows
from megarl.tokenizers import Tokenizer

log = logging.getLogger(__name__)


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
            whole = record_format.document(record, tokenizer)
            document = self._fit(whole, seq_length, too_long, record.where)
            if document is not None and not document.action_mask.any():
                self.stats.dropped_no_loss += 1
                document = None
            if document is not whole:
                self.stats.changed.add(record.where)
            if document is None:
                continue
            self.documents.append(document)
            self.stats.tokens += len(document)
            self.stats.response_tokens += int(document.action_mask.sum())
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

    def token_rows(self) -> Iterator[np.ndarray]:
        """Iterate over the token ids of the documents."""
        return (document.tokens for document in self.documents)

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
        return Document(document.tokens[:seq_length].copy(), document.action_mask[:seq_length].copy())

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    def row(self, index: int) -> Sequence[Document]:
        """Return the one document of a row."""
        return (self.documents[index],)

    def take(self, indices: Tensor) -> Rows:
        """Return some rows, a document each."""
        return documents_to_rows([self.row(index) for index in indices.tolist()], packed=False)


class PackedDataset:
    """Rows of up to `seq_length` tokens, each holding whole documents of another data set.

    The packing is made once; epochs draw the rows in new orders.
    """

    def __init__(self, documents: SFTDataset, seq_length: int, seed: int, shuffle: bool = True) -> None:
        self.documents = documents
        self.stats = documents.stats
        self.rows = pack(documents.lengths, seq_length, seed, shuffle=shuffle)
        self.lengths = np.array([documents.lengths[row].sum() for row in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def token_rows(self) -> Iterator[np.ndarray]:
        """Iterate over the token ids of the documents."""
        return self.documents.token_rows()

    def row(self, index: int) -> Sequence[Document]:
        """Return the documents that a row holds, in order."""
        return [self.documents[int(document)] for document in self.rows[index]]

    def take(self, indices: Tensor) -> Rows:
        """Return some rows, with the columns positions and segment_ids."""
        return documents_to_rows([self.row(index) for index in indices.tolist()], packed=True)


def documents_to_rows(rows: Sequence[Sequence[Document]], *, packed: bool) -> Rows:
    """Return rows that hold the given documents, one after the other.

    Args:
        packed: add the columns positions and segment_ids, which begin anew with each document.
    """
    lengths = np.array([sum(map(len, documents)) for documents in rows], dtype=np.int64)
    shape = (len(rows), int(lengths.max()))
    tokens, action_mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    columns = {name: np.zeros(shape, dtype=np.int64) for name in ("positions", "segment_ids") if packed}
    for row, documents in enumerate(rows):
        begin = 0
        for segment, document in enumerate(documents, 1):
            here = row, slice(begin, begin + len(document))
            tokens[here], action_mask[here] = document.tokens, document.action_mask
            if packed:
                columns["positions"][here], columns["segment_ids"][here] = np.arange(len(document)), segment
            begin += len(document)
    made = Rows(torch.from_numpy(tokens), torch.from_numpy(lengths), torch.from_numpy(action_mask))
    return made.with_columns(**{name: torch.from_numpy(column) for name, column in columns.items()})
