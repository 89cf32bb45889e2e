"""The data sets of supervised fine-tuning, and the order of their rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from megarl.config.files import load_chat_template
from megarl.data.dataset import PackedDataset, SFTDataset
from megarl.data.formats import RecordFormat
from megarl.data.order import TrainBatches, TrainLoader
from megarl.data.sources import read_records
from megarl.tokenizers import Tokenizer

if TYPE_CHECKING:
    from megarl.config.sections.data import DataConfig
    from megarl.config.sft import SFTConfig

log = logging.getLogger(__name__)


def build_sft_data(
    config: SFTConfig, tokenizer: Tokenizer, *, report: bool = True
) -> tuple[SFTDataset | PackedDataset, SFTDataset | None]:
    """Return the training rows, packed if asked, and the evaluation rows, or None where `data.eval` is empty.

    Every rank holds all of them. Evaluation rows are never packed.

    Args:
        report: log what became of the records, as the first rank does.
    """
    data = config.data
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
    if report:
        documents.stats.report("data.train", "data.seq_length")
    train: SFTDataset | PackedDataset = documents
    if data.pack and not tokenizer.ends_prompts:  # an encoder-decoder's rows share bins in each batch
        train = PackedDataset(documents, data.seq_length, config.seed, data.shuffle)
        if report:
            log.info("data.train: packed %d documents into %d rows", len(documents), len(train))
    if not data.eval:
        return train, None
    held_out = _read(data, data.eval, data.eval_split, data.eval_limit, "data.eval", tokenizer, record_format)
    if report:
        held_out.stats.report("data.eval", "data.seq_length")
    return train, held_out


def build_train_loader(
    config: SFTConfig, dataset: SFTDataset | PackedDataset, start: int = 0, rows: int | None = None
) -> TrainLoader:
    """Return the rows of steps `start` up to `trainer.max_steps` of a run; `rows` were used before."""
    batches = TrainBatches(
        dataset.lengths,
        config.trainer.global_batch_size,
        config.seed,
        shuffle=config.data.shuffle,
        group_by_length=config.data.group_by_length,
        start=start,
        rows=rows,
    )
    return TrainLoader(batches, config.trainer.max_steps)


def _read(
    data: DataConfig,
    paths: Sequence[str],
    split: str,
    limit: int | None,
    name: str,
    tokenizer: Tokenizer,
    record_format: RecordFormat,
) -> SFTDataset:
    records = islice(read_records(paths, split, data.text_key, name, data.options), limit)
    return SFTDataset(records, tokenizer, data.seq_length, record_format, data.too_long, name)
