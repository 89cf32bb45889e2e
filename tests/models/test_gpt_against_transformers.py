"""Tiny random models of published families, built by transformers: our GPT must give the same log-probs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from megarl.config.sections.model import ModelConfig
from megarl.models.config import GPTConfig, Rope
from megarl.models.exchange.formats import open_source
from megarl.models.gpt import GPT
from megarl.models.rotary import inverse_frequencies
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import ModelInputs
from tests.models.exchange.published import (
    FFN,
    HEADS,
    HIDDEN,
    POSITIONS,
    PUBLISHED,
    VOCAB,
    fixed_tokens,
    save_published,
)
from tests.worlds import Worlds

Weights = dict[str, Tensor]


def our_gpt(shape: dict[str, Any]) -> GPT:
    """A whole model in a world of one."""
    grid = Grid(Layout(), start_world())
    model = ModelConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_heads": HEADS,
            "ffn_size": FFN,
            "max_positions": POSITIONS,
            **shape,
        }
    )
    gpt = GPT(GPTConfig.build(model, grid.layout, vocab_size=VOCAB), grid)
    gpt.initialise(grid, 1)
    gpt.eval()
    return gpt


def load(gpt: GPT, weights: Weights) -> None:
    """Every parameter from `weights`, the vocabulary's padding with numbers that would show if they were used."""
    parameters = dict(gpt.named_parameters())
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.startswith(("embedding.word", "output_layer")):
                parameter.fill_(9.0)
                parameter[: weights[name].shape[0]] = weights[name]
            else:
                assert parameter.shape == weights[name].shape, name
                parameter.copy_(weights[name])


def token_logprobs(gpt: GPT, tokens: Tensor, positions: Tensor | None = None, **more: Tensor) -> Tensor:
    """[batch, time] log-probs of all tokens but the first."""
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        hidden = gpt(ModelInputs(tokens=tokens, positions=positions, **more))
        followed = pad(torch.ones(len(tokens), tokens.shape[1] - 1), (0, 1))  # nothing follows the last token
        return pad(gpt.logprobs(hidden, tokens.roll(-1, dims=1), followed).logprobs[:, :-1], (1, 0))


def compare_with_transformers(name: str, folder: Path) -> tuple[float, float]:
    """The largest difference of a log-prob, and how far theirs spread (a flat model would prove nothing)."""
    logits = save_published(name, folder)[:, :-1]
    source = open_source(folder)
    gpt = our_gpt(vars(source.model))
    load(gpt, {name: source.read(name) for name in source.names})
    tokens = fixed_tokens()
    wanted = torch.log_softmax(logits.float(), -1).gather(2, tokens[:, 1:, None])[..., 0]
    found = token_logprobs(gpt, tokens)[:, 1:]
    return float((found - wanted).abs().max()), float(wanted.std())


@pytest.mark.parametrize("name", PUBLISHED)
def test_logprobs_are_those_of_transformers(worlds: Worlds, name: str, tmp_path: Path) -> None:
    ((difference, spread),) = worlds.run(1, compare_with_transformers, name, tmp_path / name)
    assert difference < 1e-5
    assert spread > 0.3


@pytest.mark.parametrize(
    "rope",
    [
        Rope(scaling="linear", factor=4.0),
        Rope(scaling="linear", factor=2.5, base=500000.0),
        Rope(scaling="llama3", factor=8.0, original_positions=64),
        Rope(scaling="llama3", factor=32.0, low_freq_factor=1.5, high_freq_factor=6.0, original_positions=8192),
        Rope(scaling="yarn", factor=4.0, original_positions=64),
        Rope(scaling="yarn", factor=40.0, base=500000.0, original_positions=4096),
        Rope(scaling="yarn", factor=1.0, original_positions=4096),
    ],
    ids=lambda rope: f"{rope.scaling}-{rope.factor:g}",
)
@pytest.mark.parametrize("dim", [8, 64, 128])
def test_stretched_frequencies_are_those_of_transformers(rope: Rope, dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.base, "factor": rope.factor}
    if rope.scaling == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.original_positions is not None:
        parameters["original_max_position_embeddings"] = rope.original_positions
    config = LlamaConfig(head_dim=dim, max_position_embeddings=2**20, rope_parameters=parameters)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[rope.scaling](config, "cpu")
    found, factor = inverse_frequencies(rope, dim)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0.0)
    assert factor == pytest.approx(wanted_factor, rel=1e-7)


def packed_and_alone(shape: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float]:
    """Log-probs of two documents in one padded row, of each alone, and the effect of leaving segment_ids out."""
    gpt = our_gpt({**shape, "init_std": 0.15})
    first, second = (torch.randint(2, VOCAB, (1, n), generator=torch.Generator().manual_seed(n)) for n in (9, 14))
    padding = torch.zeros(1, 5, dtype=torch.long)
    tokens = torch.cat([first, second, padding], 1)
    positions = torch.cat([torch.arange(9), torch.arange(14), torch.zeros(5, dtype=torch.long)])[None]
    segments = torch.tensor([[1] * 9 + [2] * 14 + [0] * 5])
    packed = token_logprobs(gpt, tokens, positions, segment_ids=segments)
    together = token_logprobs(gpt, tokens, positions)
    alone = torch.cat([token_logprobs(gpt, document) for document in (first, second)], 1)
    inside = [i for i in range(23) if i not in (0, 9)]  # a document's first token has no state of its own before it
    return packed[0, inside], alone[0, inside], packed[0], float((together - packed)[0, 10:23].abs().max())


@pytest.mark.parametrize("shape", [{}, {"position": "learned", "position_offset": 2}, {"sliding_window": 4}], ids=str)
def test_packed_documents_do_not_see_each_other(worlds: Worlds, shape: dict[str, Any]) -> None:
    ((packed, alone, whole_row, effect),) = worlds.run(1, packed_and_alone, shape)
    torch.testing.assert_close(packed, alone, rtol=0.0, atol=1e-5)
    assert torch.isfinite(whole_row).all()  # padding included
    assert effect > 1e-2  # without segment_ids they do see each other: the comparison can fail
