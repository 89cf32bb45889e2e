"""Tiny random T5s, as transformers saves them, of odd sizes so that nothing fits by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration

from megarl.parallel.rows import Rows

VOCAB, EOS, START = 99, 1, 0
KINDS: dict[str, dict[str, Any]] = {
    "T5 1.0": {},
    "T5 1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "UL2": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "num_decoder_layers": 3},
}


def make(kind: str, factor: float = 1.0) -> T5ForConditionalGeneration:
    """A random model; the output layer of T5 1.1 and its relatives is not the embedding."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "d_model": 40,
        "d_kv": 12,
        "d_ff": 56,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 6,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": START,
        "dropout_rate": 0.0,
        "initializer_factor": factor,
        **KINDS[kind],
    }
    model = T5ForConditionalGeneration(T5Config(**settings)).eval()
    if KINDS[kind]:
        model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 40))
    return model


def pairs(count: int = 4) -> list[tuple[list[int], list[int]]]:
    """Prompts that end with EOS, and responses, of unequal lengths."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    return [([*tokens(5 + 7 * (index % 3)), EOS], tokens(4 + 9 * (index % 2) + index)) for index in range(count)]


def rows_of(given: list[tuple[list[int], list[int]]]) -> Rows:
    """Rows of prompts and responses, whose tokens are the actions."""
    tokens = pad_sequence([torch.tensor(prompt + response) for prompt, response in given], batch_first=True)
    mask = torch.zeros(tokens.shape)
    for row, (prompt, response) in enumerate(given):
        mask[row, len(prompt) : len(prompt) + len(response)] = 1
    return Rows(tokens, torch.tensor([len(prompt) + len(response) for prompt, response in given]), mask)


@torch.no_grad()
def their_logprobs(model: T5ForConditionalGeneration, prompt: list[int], response: list[int]) -> Tensor:
    """The log-prob of each token of a response, by transformers."""
    read = torch.tensor([[START, *response[:-1]]])
    logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def save(kind: str, folder: Path) -> T5ForConditionalGeneration:
    """Save a model and return it."""
    model = make(kind)
    model.save_pretrained(folder)
    return model
