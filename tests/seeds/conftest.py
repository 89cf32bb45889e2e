"""What stands in for the models and data sets that the seeds' READMEs name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megarl.config.compose import compose
from megarl.training import train
from tests.byte_level import byte_level
from tests.e2e.runs import launched
from tests.t5_tokenizer import save_model

LITTLE = [
    *("trainer.progress=none", "logger.tensorboard=false", "trainer.log_every=1", "trainer.eval_every=null"),
    *("trainer.global_batch_size=4", "trainer.micro_batch_size=2", "checkpoint.every=null", "data.seq_length=48"),
]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers with random weights, and a tokenizer of bytes."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = byte_level("<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4, eos_token_id=tokenizer.eos_token_id
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two and two layers with random weights, and a tokenizer of pieces."""
    folder = tmp_path_factory.mktemp("t5")
    save_model(folder)
    return folder


def command(*words: str) -> None:
    """Run `megarl WORDS` of an algorithm in the current world, as under torchrun."""
    entry, *settings = words
    config, _ = compose(entry, [*LITTLE, *settings])
    with launched():
        assert train(entry, config) == 0


def script(example: Callable[..., Any], arguments: Sequence[Any] = (), importable: str = "") -> Any:
    """Run an example's code in the current world, as a script under torchrun."""
    if importable and importable not in sys.path:
        sys.path.append(importable)
    with launched():
        return example(*arguments)
