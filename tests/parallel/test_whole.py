"""Whole tensors from the ranks that hold parts: gradients counted once, and every copy of a parameter."""

from typing import Any

import pytest
import torch

from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.whole import Copies, whole_gradients, whole_norm, whole_parameters
from tests.parallel.engines import batches, small_engine
from tests.worlds import Worlds

TIED = "embedding.word_embeddings.weight"
NORM = "decoder.layers.0.input_layernorm.weight"
GATED = "decoder.layers.1.mlp.linear_fc1.weight"


def gathered(layout: dict[str, Any]) -> tuple[Copies, Copies, float, Copies]:
    """Parameters and gradients of a step, the norm that the optimizer reports, and the parameters afterwards."""
    engine = small_engine(layout, {"hidden_size": 32, "tie_embeddings": True})
    before = whole_parameters(engine)
    engine.train_step(batches(engine, 0), cross_entropy, count_targets)
    gradients = whole_gradients(engine)
    return before, gradients, engine.apply_gradients(), whole_parameters(engine)


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> tuple[Copies, Copies, float, Copies]:
    (found,) = worlds.run(1, gathered, {})
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layout", "copies"),
    [
        ({"tp": 2}, {TIED: 1, NORM: 2, GATED: 1}),
        ({"pp": 2}, {TIED: 2, NORM: 1, GATED: 1}),
        ({}, {TIED: 2, NORM: 2, GATED: 2}),
    ],
    ids=["TP2", "PP2", "DP2"],
)
def test_tensors_of_a_layout_are_whole(
    layout: dict[str, Any], copies: dict[str, int], worlds: Worlds, alone: tuple[Copies, Copies, float, Copies]
) -> None:
    for before, gradients, norm, after in worlds.run(2, gathered, layout):
        assert {name: len(before[name]) for name in copies} == copies
        assert before.keys() == after.keys() == gradients.keys() == alone[1].keys()
        # Adam makes a step of the full size also of a gradient that is mostly rounding.
        for found, wanted, near in ((before, alone[0], 0.0), (gradients, alone[1], 1e-6), (after, alone[3], 1e-4)):
            for name, tensors in found.items():
                for tensor in tensors:
                    torch.testing.assert_close(tensor, wanted[name][0], rtol=1e-4, atol=near)
        assert whole_norm(gradients.values()) == pytest.approx(norm, rel=1e-5)
        assert norm == pytest.approx(alone[2], rel=1e-5)
