"""Files in, batches out: records are read, tokenised, masked, ordered, shared out and padded here."""

from megarl.data.build import build_eval_loader, build_sft_data, build_train_loader
from megarl.data.collate import Batch, batch_length, collate
from megarl.data.dataset import DatasetStats, PackedDataset, Rows, SFTDataset, pack
from megarl.data.formats import Document, RecordFormat, load_chat_template
from megarl.data.loaders import EvalLoader, StepLoader
from megarl.data.order import TrainBatches, shard_rows
from megarl.data.sources import Record, read_records

__all__ = [
    "Batch",
    "DatasetStats",
    "Document",
    "EvalLoader",
    "PackedDataset",
    "Record",
    "RecordFormat",
    "Rows",
    "SFTDataset",
    "StepLoader",
    "TrainBatches",
    "batch_length",
    "build_eval_loader",
    "build_sft_data",
    "build_train_loader",
    "collate",
    "load_chat_template",
    "pack",
    "read_records",
    "shard_rows",
]
