"""Logits of a stored model on a fixed batch, in float32: evidence that a conversion preserved the model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.models.config import GPTConfig
from megarl.models.exchange.load import load
from megarl.models.exchange.source import HuggingFaceSource, Source
from megarl.models.gpt import GPT
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import ModelInputs


def fixed_batch(source: Source) -> Tensor:
    """Return token ids [2, time], the same for every model with this vocabulary size and context length."""
    time = min(64, source.model.max_positions)
    return torch.randint(0, source.vocab_size, (2, time), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(source: Source, tokens: Tensor) -> Tensor:
    """Return logits [batch, time, vocab], from transformers for Hugging Face folders and from our model otherwise."""
    if isinstance(source, HuggingFaceSource):
        return _by_transformers(source, tokens)
    return _by_megarl(source, tokens)


def _by_transformers(source: Source, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, trust_remote_code=False)
    found: Tensor = theirs.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found.float()


def _by_megarl(source: Source, tokens: Tensor) -> Tensor:
    alone = not dist.is_initialized()
    grid = Grid(Layout(), start_world())
    try:
        gpt = GPT(GPTConfig.build(source.model, grid.layout, vocab_size=source.vocab_size), grid)
        load(gpt, source, grid)
        gpt.eval()
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        inputs = ModelInputs(tokens=tokens.to(grid.device), positions=positions.to(grid.device))
        hidden = gpt(inputs)  # [time, batch, hidden]
        found = gpt.logits(hidden.transpose(0, 1).flatten(0, 1))
        return found.reshape(*tokens.shape, -1).cpu()
    finally:
        grid.close()
        if alone:
            dist.destroy_process_group()
