"""Samples with rewards in, batches for offline learning out: tokenised once, kept on disk, read as far as needed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megarl.config.files import load_chat_template
from megarl.data.formats import Document, RecordFormat
from megarl.data.order import TrainBatches, TrainLoader
from megarl.data.sources import Places, Record, read_records
from megarl.disk import exists, is_file, local, locked, shown, written_aside
from megarl.errors import DataError
from megarl.parallel.rows import Rows
from megarl.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megarl.config.ilql import ILQLConfig
    from megarl.config.sections.data import OfflineDataConfig

log = logging.getLogger(__name__)
LARGEST = 1e30  # a reward; sums and squares of such are still finite where they are computed
VERSION = 3  # of the files in a cache: another meaning of the same samples is another number
ARRAYS = ("tokens", "action_mask", "rewards", "starts", "returns")
REPORT = "report.txt"


@dataclass(frozen=True)
class Sample:
    """A dialogue, and what it earned [time], at the token that earned it."""

    document: Document
    rewards: np.ndarray

    def __len__(self) -> int:
        return len(self.document)


def encode_sample(
    record: Record, tokenizer: Tokenizer, record_format: RecordFormat, rewards_key: str = "rewards"
) -> Sample:
    """Return the whole sample of a record, however long."""
    document = record_format.dialogue(record, tokenizer)
    try:
        return Sample(document, _rewards(record.fields, rewards_key, document.action_mask))
    except DataError as problem:
        raise problem.within(record.where) from None


def _rewards(fields: Mapping[str, Any], key: str, mask: np.ndarray) -> np.ndarray:
    """A reward at the last token of the output that earned it; a single one at the end of the last output."""
    if key not in fields:
        raise DataError(f"has no {key!r}: add the reward, or set data.rewards_key", key=key)
    given = fields[key]
    earned = [_number(value, key) for value in (given if isinstance(given, list) else [given])]
    (ends,) = np.nonzero(mask & ~np.append(mask[1:], 0).astype(bool))
    if not isinstance(given, list):
        ends = ends[-1:]
    if len(earned) != len(ends):
        raise DataError(
            f"has {len(earned)} {key} for {len(ends)} outputs: give one number for the whole sample, or one for "
            "each output",
            key=key,
            value=given,
        )
    rewards = np.zeros(len(mask))
    rewards[ends] = earned
    return rewards


def paired(samples: Sequence[Any], rewards: Sequence[Any], name: str = "samples") -> list[Record]:
    """Lists of samples and their rewards as records, under the keys that are the defaults."""
    if len(samples) != len(rewards):
        fewer = min(len(samples), len(rewards))
        raise DataError(
            f"{name} holds {len(samples)} samples and {len(rewards)} rewards, so record {fewer + 1} has only one of "
            "the two: give one reward for each sample",
            key="rewards",
            where=name,
        )
    return [
        Record({"samples": sample, "rewards": reward}, f"{name}: record {number}")
        for number, (sample, reward) in enumerate(zip(samples, rewards, strict=True), 1)
    ]


# --- the store --------------------------------------------------------------------------------------------------------


class OfflineStore:
    """All samples of a data set as a few long arrays, in memory or mapped from files.

    Rewards are handed out so that returns have mean 0 and deviation 1 over the data set: all are divided by the
    deviation of the returns, whose mean is taken from the last reward of a sample. Returns that are all equal are 0.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], report: str = "") -> None:
        """
        Args:
            arrays: tokens int32, action_mask uint8 and rewards float32 of all samples one after the other; starts
                int64 [samples + 1]; returns float64 [samples].
            report: how many samples were cut or left out, in words.
        """
        self.arrays, self.report = dict(arrays), report
        self.starts, self.returns = np.asarray(arrays["starts"]), np.asarray(arrays["returns"])
        self.lengths = np.diff(self.starts)
        differ = len(self.returns) > 1 and self.returns.min() != self.returns.max()
        self.mean = float(self.returns.mean() if differ else self.returns[0])
        self.deviation = float(self.returns.std(ddof=1)) if differ else 1.0

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Tensor) -> Rows:
        """Return some samples; their column rewards [rows, time] is standardised as said above."""
        rows = indices.numpy()
        sizes = self.lengths[rows]
        within = np.arange(sizes.max()) < sizes[:, None]  # [rows, time]
        index = (self.starts[rows][:, None] + np.arange(within.shape[1]))[within]

        def filled(name: str, dtype: type) -> np.ndarray:
            whole = np.zeros(within.shape, dtype)
            whole[within] = self.arrays[name][index]
            return whole

        action_mask = filled("action_mask", np.float32)
        rewards = filled("rewards", np.float32) / np.float32(self.deviation)
        last = within.shape[1] - 1 - np.argmax(action_mask[:, ::-1], axis=1)
        rewards[np.arange(len(rows)), last] -= self.mean / self.deviation
        tokens = torch.from_numpy(filled("tokens", np.int64))
        samples = Rows(tokens, torch.from_numpy(sizes), torch.from_numpy(action_mask))
        return samples.with_columns(rewards=torch.from_numpy(rewards))

    def save(self, folder: Path) -> None:
        """Write aside, then rename: a folder that is there is whole."""
        with written_aside(folder) as aside:
            for name in ARRAYS:
                np.save(aside / f"{name}.npy", self.arrays[name], allow_pickle=False)
            (aside / REPORT).write_text(self.report, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> OfflineStore:
        """Map the arrays that `save` wrote into memory."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
        return cls(arrays, (folder / REPORT).read_text(encoding="utf-8"))


def build_store(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    seq_length: int,
    record_format: RecordFormat | None = None,
    too_long: str = "truncate",
    name: str = "data.train",
    rewards_key: str = "rewards",
) -> OfflineStore:
    """Read and tokenise all records. Of a sample that is cut, what was earned beyond the cut counts at its last
    action; one that has no action left is left out."""
    record_format = record_format or RecordFormat()
    kept: list[Sample] = []
    read = cut = dropped = 0
    changed = Places()
    for record in records:
        read += 1
        sample = encode_sample(record, tokenizer, record_format, rewards_key)
        if len(sample) > seq_length:
            if too_long == "error":
                raise DataError(
                    f"{record.where}: is {len(sample)} tokens long, more than data.seq_length={seq_length}; "
                    "shorten it, raise data.seq_length, or set data.too_long to truncate or drop",
                    key="data.seq_length",
                    value=seq_length,
                    where=record.where,
                    offers={"data.too_long": ("truncate", "drop")},
                )
            changed.add(record.where)
            shorter = None if too_long == "drop" else _cut(sample, seq_length)
            if shorter is None:
                dropped += 1
                continue
            cut, sample = cut + 1, shorter
        kept.append(sample)
    if not kept:
        raise DataError(
            f"{name}: none of its {read} samples is left ({dropped} longer than data.seq_length={seq_length}); "
            "raise data.seq_length, or give other samples",
            key="data.seq_length",
            value=seq_length,
            where=name,
        )
    report = ""
    if changed.count:
        report = f"{name}: of {read} samples, {cut} were cut to data.seq_length and {dropped} left out"
        log.warning("%s: %s", report, changed)
    starts = np.cumsum([0, *(len(sample) for sample in kept)], dtype=np.int64)
    return OfflineStore(
        {
            "tokens": np.concatenate([sample.document.tokens for sample in kept]),
            "action_mask": np.concatenate([sample.document.action_mask for sample in kept]),
            "rewards": np.concatenate([sample.rewards for sample in kept]).astype(np.float32),
            "starts": starts,
            "returns": np.array([sum(sample.rewards.tolist()) for sample in kept], np.float64),
        },
        report,
    )


def open_store(data: OfflineDataConfig, tokenizer: Tokenizer) -> OfflineStore:
    """The store of `data.train`, from the cache where these very files were tokenised like this before.

    Of several processes on a machine one makes it while the others wait.
    """
    record_format = RecordFormat(
        samples_key=data.samples_key,
        messages_key=data.messages_key,
        chat_template=load_chat_template(data.chat_template),
        settable=("samples_key", "messages_key"),
    )

    def build() -> OfflineStore:
        return build_store(
            read_records(data.train, data.train_split, key="data.train", options=data.options),
            tokenizer,
            data.seq_length,
            record_format,
            data.too_long,
            rewards_key=data.rewards_key,
        )

    name = None if data.cache is None else _content_name(data, tokenizer, record_format)
    if data.cache is None or name is None:
        return build()
    folder = local(data.cache) / f"samples-{name}"
    try:
        with locked(folder.with_suffix(".lock")):
            made = not folder.is_dir()
            if made:
                build().save(folder)
                log.info("data.train: tokenised and kept in %s", folder)
    except OSError as problem:
        raise DataError(
            f"data.cache={data.cache} cannot be written ({problem.strerror or problem}): name another folder, or null",
            key="data.cache",
            value=data.cache,
            offers={"data.cache": [None]},
        ) from None
    store = OfflineStore.load(folder)
    if store.report and not made:
        log.warning("%s (when %s was made)", store.report, folder)
    return store


def build_offline_loader(
    config: ILQLConfig, store: OfflineStore, start: int = 0, rows: int | None = None
) -> TrainLoader:
    """Return the rows of steps `start` up to `trainer.max_steps` of a run; `rows` were used before."""
    batches = TrainBatches(
        store.lengths,
        config.trainer.global_batch_size,
        config.seed,
        shuffle=config.data.shuffle,
        start=start,
        rows=rows,
    )
    return TrainLoader(batches, config.trainer.max_steps)


# --- inside -----------------------------------------------------------------------------------------------------------


def _number(value: Any, key: str) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not (number and abs(value) <= LARGEST):  # NaN is not, and no integer is too long to be compared
        raise DataError(
            f"{key} is {shown(repr(value))}, which is not a finite number between "
            f"-{LARGEST:g} and {LARGEST:g}: give one, or take the record out",
            key=key,
            value=value,
        )
    return float(value)


def _cut(sample: Sample, length: int) -> Sample | None:
    """The first `length` tokens, with what was earned later on the last action; None without an action."""
    document = sample.document
    (actions,) = np.nonzero(document.action_mask[:length])
    if not len(actions):
        return None
    rewards = sample.rewards[:length].copy()
    rewards[actions[-1]] += sample.rewards[length:].sum()
    return Sample(Document(document.tokens[:length].copy(), document.action_mask[:length].copy()), rewards)


def _content_name(data: OfflineDataConfig, tokenizer: Tokenizer, record_format: RecordFormat) -> str | None:
    """A digest of all that a store follows from; None where that is not all in files."""
    settings = [
        *(VERSION, data.seq_length, data.too_long, data.train_split, data.rewards_key, data.samples_key),
        *(data.messages_key, record_format.chat_template, tokenizer.fingerprint(), tokenizer.ends_prompts),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in data.train:
        source = local(path)
        inside = source.rglob("*") if exists(source) else ()
        files = [source] if is_file(source) else sorted(item for item in inside if is_file(item))
        if not files:
            return None
        for file in files:
            digest.update(json.dumps([str(file.relative_to(source)), file.suffix, file.stat().st_size]).encode())
            with file.open("rb") as content:
                while block := content.read(2**20):
                    digest.update(block)
    return digest.hexdigest()[:32]
