"""The data sets and loaders that a configuration asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from megarl.config.files import load_chat_template
from megarl.config.offers import either, multiples
from megarl.data.dataset import PackedDataset, Rows, SFTDataset
from megarl.data.formats import RecordFormat
from megarl.data.loaders import EvalLoader, StepLoader
from megarl.data.order import TrainBatches, shard_rows
from megarl.data.sources import read_records
from megarl.errors import ConfigError
from megarl.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megarl.config.schema import DataConfig, SFTConfig

log = logging.getLogger(__name__)


def build_sft_data(
    config: SFTConfig, tokenizer: Tokenizer, dp_rank: int = 0, dp_size: int = 1, multiple_of: int = 1
) -> tuple[SFTDataset | PackedDataset, SFTDataset | None]:
    """Training rows, packed if asked, and evaluation rows, or None where `data.eval` is empty.

    Every rank holds all of them, and its loaders take its share. Evaluation rows are never packed.

    Args:
        dp_rank, dp_size: the data-parallel rank; the first one reports what became of the records.
        multiple_of: divides the length of every batch, so it must divide `data.seq_length`.
    """
    data = config.data
    if not data.train:
        raise ConfigError(
            "data.train is empty; give files, folders or hub names to train on", key="data.train", value=data.train
        )
    if data.pack and data.group_by_length:
        raise ConfigError(
            "data.pack=true and data.group_by_length=true: packed rows are all about equally long; choose one",
            key="data.pack",
            value=True,
        )
    if data.seq_length % multiple_of:
        working = multiples(multiple_of, data.seq_length)
        raise ConfigError(
            f"data.seq_length={data.seq_length} is not a multiple of {multiple_of}, the number of parts a "
            f"sequence is split into (parallel.tp, parallel.cp); use {either(working)}",
            key="data.seq_length",
            value=data.seq_length,
            offers={"data.seq_length": working},
        )
    # Sizes that do not fit are refused before files are read, which may take a while.
    rows = np.arange(config.trainer.global_batch_size)
    shard_rows(rows, dp_rank, dp_size, config.trainer.micro_batch_size)
    record_format = RecordFormat(
        format=data.format,
        text_key=data.text_key,
        prompt_key=data.prompt_key,
        completion_key=data.completion_key,
        messages_key=data.messages_key,
        chat_template=load_chat_template(data.chat_template),
        loss_on=data.loss_on,
    )
    documents = _read(data, data.train, data.train_split, None, "data.train", tokenizer, record_format)
    if dp_rank == 0:
        documents.stats.report("data.train", "data.seq_length")
    train: SFTDataset | PackedDataset = documents
    if data.pack:
        train = PackedDataset(documents, data.seq_length, config.seed, data.shuffle)
        if dp_rank == 0:
            log.info("data.train: packed %d documents into %d rows", len(documents), len(train))
    if not data.eval:
        return train, None
    held_out = _read(data, data.eval, data.eval_split, data.eval_limit, "data.eval", tokenizer, record_format)
    if dp_rank == 0:
        held_out.stats.report("data.eval", "data.seq_length")
    return train, held_out


def build_train_loader(
    config: SFTConfig,
    dataset: Rows,
    tokenizer: Tokenizer,
    dp_rank: int = 0,
    dp_size: int = 1,
    multiple_of: int = 1,
    start: int = 0,
    rows: int | None = None,
) -> StepLoader:
    """Steps `start` up to `trainer.max_steps` of a run, for one data-parallel rank; `rows` were used before."""
    batches = TrainBatches(
        dataset.lengths,
        config.trainer.global_batch_size,
        config.seed,
        shuffle=config.data.shuffle,
        group_by_length=config.data.group_by_length,
        start=start,
        rows=rows,
    )
    return StepLoader(
        dataset,
        batches,
        micro_batch_size=config.trainer.micro_batch_size,
        seq_length=config.data.seq_length,
        pad_id=tokenizer.pad_id,
        dp_rank=dp_rank,
        dp_size=dp_size,
        multiple_of=multiple_of,
        steps=config.trainer.max_steps,
    )


def build_eval_loader(
    config: SFTConfig,
    dataset: Rows,
    tokenizer: Tokenizer,
    dp_rank: int = 0,
    dp_size: int = 1,
    multiple_of: int = 1,
) -> EvalLoader:
    """One pass over the evaluation rows, in lists that fill the pipeline, for one data-parallel rank."""
    return EvalLoader(
        dataset,
        micro_batch_size=config.trainer.eval_batch_size,
        seq_length=config.data.seq_length,
        pad_id=tokenizer.pad_id,
        dp_rank=dp_rank,
        dp_size=dp_size,
        multiple_of=multiple_of,
        microbatches=config.parallel.pp,
    )


def _read(
    data: DataConfig,
    paths: Sequence[str],
    split: str,
    limit: int | None,
    name: str,
    tokenizer: Tokenizer,
    record_format: RecordFormat,
) -> SFTDataset:
    records = islice(read_records(paths, split, data.text_key, name), limit)
    return SFTDataset(records, tokenizer, data.seq_length, record_format, data.too_long, name)
