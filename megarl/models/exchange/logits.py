"""Logits of a stored model on a fixed batch, or scores of a reward model, in float32: evidence that a conversion
preserved the model."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megarl.config.sections.model import ModelConfig
from megarl.models.config import GPTConfig
from megarl.models.exchange.load import load
from megarl.models.exchange.parameters import SCORE
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
def logits(source: Source, tokens: Tensor, rounded: torch.dtype | None = None) -> Tensor:
    """Return logits [batch, time, vocab], from transformers for Hugging Face folders and from our model otherwise.
    Products are in float32, of weights that were rounded to the dtype `rounded` first (None: as stored).

    A reward model, which has no output layer, gives the score [batch, time, 1] of each position. Of an encoder-decoder,
    the encoder reads the first half of the tokens, and the positions are those of the decoder over the other half.
    """
    if isinstance(source, HuggingFaceSource):
        return _by_transformers(source, tokens, rounded)
    return _by_megarl(source, tokens, rounded)


def _round(model: nn.Module, dtype: torch.dtype | None) -> None:
    for parameter in model.parameters() if dtype is not None else ():
        parameter.copy_(parameter.to(dtype))


def _by_transformers(source: Source, tokens: Tensor, rounded: torch.dtype | None) -> Tensor:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if source.model.encoder is not None:
        return _by_transformers_of_both(source, tokens)
    known = AutoModelForCausalLM if source.has_output else AutoModelForSequenceClassification
    # Their grouped products of experts refuse widths that are no multiple of 16 bytes.
    options = {} if source.model.experts is None else {"experts_implementation": "eager"}
    theirs: Any = known.from_pretrained(source.path, dtype=torch.float32, trust_remote_code=False, **options).eval()
    _round(theirs, rounded)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if not source.has_output:  # its own forward pass returns the score of one position
        scores: Tensor = theirs.score(theirs.base_model(**inputs).last_hidden_state)
        return scores.float()
    found: Tensor = theirs(**inputs).logits
    return found.float()


def _by_transformers_of_both(source: Source, tokens: Tensor) -> Tensor:
    from transformers import AutoModel, AutoModelForSeq2SeqLM

    assert source.model.encoder is not None
    assert source.model.encoder.start_id is not None
    known = AutoModelForSeq2SeqLM if source.has_output else AutoModel
    theirs: Any = known.from_pretrained(source.path, dtype=torch.float32, trust_remote_code=False).eval()
    prompts, responses = tokens.tensor_split(2, dim=1)
    start = torch.full_like(tokens[:, :1], source.model.encoder.start_id)
    found = theirs(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        decoder_input_ids=torch.cat([start, responses[:, :-1]], dim=1),
    )
    if source.has_output:
        logits: Tensor = found.logits.float()
        return logits
    scores: Tensor = found.last_hidden_state.float() @ source.read(SCORE).float().t()
    return scores


def inputs_of(model: ModelConfig, tokens: Tensor) -> ModelInputs:
    """Return what a model reads of tokens [batch, time]; see `logits` for an encoder-decoder."""

    def positions(rows: Tensor) -> Tensor:
        return torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)

    if model.encoder is None:
        return ModelInputs(tokens=tokens, positions=positions(tokens))
    prompts, responses = tokens.tensor_split(2, dim=1)
    encoder = ModelInputs(tokens=prompts, positions=positions(prompts), segment_ids=torch.ones_like(prompts))
    # The model puts its start token at the first position.
    return ModelInputs(tokens=responses.roll(1, dims=1), positions=positions(responses), encoder=encoder)


def _by_megarl(source: Source, tokens: Tensor, rounded: torch.dtype | None) -> Tensor:
    alone = not dist.is_initialized()
    grid = Grid(Layout(), start_world())
    try:
        config = GPTConfig.build(source.model, grid.layout, vocab_size=source.vocab_size)
        gpt = GPT(config, grid, heads=("lm",) if source.has_output else ("score",))
        load(gpt, source, grid)
        _round(gpt, rounded)
        gpt.eval()
        hidden = gpt(inputs_of(source.model, tokens.to(grid.device))).transpose(0, 1)  # [batch, time, hidden]
        states = hidden.flatten(0, 1)
        found = gpt.logits(states) if source.has_output else gpt.score_head(states)
        return found.reshape(*hidden.shape[:2], -1).cpu()
    finally:
        grid.close()
        if alone:
            dist.destroy_process_group()
