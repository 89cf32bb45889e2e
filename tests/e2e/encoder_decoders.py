"""Short runs of every algorithm on a small T5 that transformers saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.e2e.every_algorithm import train


def save_model(folder: Path) -> None:
    """Save a random T5 1.1 for the bytes tokenizer, whose output layer is not the embedding."""
    torch.manual_seed(3)
    shape = {"d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 262}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**shape, **kind, decoder_start_token_id=0))
    model.lm_head.weight = nn.Parameter(torch.randn(262, 32) / 8)
    model.save_pretrained(folder)


def run(run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
    """Train in the current world on the model and the data of a folder."""
    two = "trainer.micro_batch_size=4"  # microbatches of a step, where there are no replicas
    train(run_dir, algorithm, folder, f"model.path={folder / 'model'}", two, *overrides)
