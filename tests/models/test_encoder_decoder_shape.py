"""Fresh weights of an encoder-decoder spread as those of transformers' T5; shapes that no T5 has are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from megarl.config.offers import Refusal
from megarl.config.sections.model import EncoderConfig, ModelConfig
from megarl.models.config import GPTConfig
from megarl.models.encoder_decoder import initial_std
from megarl.models.exchange.families import FAMILIES
from megarl.parallel.initialise import draw
from megarl.parallel.layout import Layout

VOCAB = 300


def test_fresh_weights_have_the_spread_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"d_model": 96, "d_kv": 20, "d_ff": 200, "num_layers": 2, "num_heads": 5, "vocab_size": VOCAB}
    theirs = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    stored = theirs.state_dict()
    model = FAMILIES["t5"].model_config(theirs.config.to_dict())
    config = GPTConfig.build(model, Layout(), vocab_size=VOCAB, precision="fp32", recompute="none")
    compared = 0
    for name, mapped in FAMILIES["t5"].mapping(model, VOCAB).items():
        if "norm" in name:
            continue
        drawn = draw(name, torch.empty(mapped.shape), 1, initial_std(name, config), 1)
        for piece, their in zip(mapped.pieces(drawn), mapped.theirs, strict=True):
            error = 4 * (2 * piece.view.numel()) ** -0.5  # of two samples' deviations
            assert float(piece.view.std()) == pytest.approx(float(stored[their].std()), rel=1.5 * error), their
            compared += 1
    assert (
        compared == 2 * 2 * (4 + 2) + 2 * 4 + 2 + 1
    )  # attention and MLP of both parts, cross attention, tables, words


NO_ENCODER = {"model.encoder": [None]}


@pytest.mark.parametrize(
    ("changes", "key", "value", "offers"),
    [
        (
            {"encoder": None},
            "model.position",
            "relative",
            {"model.position": ["rope"], "model.encoder.num_layers": [3]},
        ),
        ({"position": "rope"}, "model.position", "rope", {"model.position": ["relative"], **NO_ENCODER}),
        ({"num_kv_heads": 2}, "model.num_kv_heads", 2, {"model.num_kv_heads": [None], **NO_ENCODER}),
        ({"qk_norm": True}, "model.qk_norm", True, {"model.qk_norm": [False], **NO_ENCODER}),
        ({"sliding_window": 8}, "model.sliding_window", 8, {"model.sliding_window": [None], **NO_ENCODER}),
        ({"init_std": 0.01}, "model.init_std", 0.01, {"model.init_std": [0.02], **NO_ENCODER}),
        (
            {"encoder": EncoderConfig()},
            "model.encoder.num_layers",
            None,
            {"model.encoder.num_layers": [4], **NO_ENCODER},
        ),
        ({"num_layers_unfrozen": 7}, "model.num_layers_unfrozen", 7, {"model.num_layers_unfrozen": [5]}),
    ],
)
def test_what_no_t5_has_is_refused_by_its_key(
    changes: dict[str, Any], key: str, value: Any, offers: dict[str, list[Any]]
) -> None:
    t5 = ModelConfig(num_layers=3, num_heads=4, position="relative", encoder=EncoderConfig(num_layers=2))
    t5.check_shape()
    with pytest.raises(Refusal) as refusal:
        dataclasses.replace(t5, **changes).check_shape()
    assert (refusal.value.key, refusal.value.value, refusal.value.offers) == (key, value, offers)
