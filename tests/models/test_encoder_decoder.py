"""An encoder-decoder trains alike whatever is recomputed, and its attention can use fused kernels."""

from typing import Any

import pytest
import torch

from megarl.config.sections.model import EncoderConfig
from megarl.models.attention import RelativePositions, attend_by_distance
from tests.gated import gated
from tests.parallel.engines import train
from tests.worlds import Worlds

T5: dict[str, Any] = {
    "position": "relative",
    "activation": "geglu",
    "encoder": EncoderConfig(num_layers=4, buckets=8, longest_distance=20, start_id=0),
}
STEPS = 3
CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "selective": (1, {}, "selective"),
    "full": (1, {}, "full"),
    "TP2+SP, selective": (2, {"tp": 2, "sequence_parallel": True}, "selective"),
    "PP2, full": (2, {"pp": 2}, "full"),
}


@pytest.fixture(scope="module")
def plainly(worlds: Worlds) -> list[tuple[float, float]]:
    (history,) = worlds.run(1, train, {}, STEPS, T5)
    return history  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", gated(CASES, ["PP2, full"]))
def test_recomputation_changes_no_loss_and_no_gradient(
    name: str, worlds: Worlds, plainly: list[tuple[float, float]]
) -> None:
    size, layout, recompute = CASES[name]
    for history in worlds.run(size, train, layout, STEPS, T5, recompute=recompute):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(history, plainly, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)
    assert plainly[0][0] != plainly[-1][0]


@pytest.mark.parametrize("masked", [True, False])
def test_relative_positions_have_adjacent_keys_as_fused_kernels_need(masked: bool) -> None:
    table, buckets = torch.arange(24.0).view(8, 3), torch.randint(8, (1, 5, 7))
    mask = torch.zeros(2, 1, 5, 7).masked_fill_(torch.rand(2, 1, 5, 7) < 0.5, -torch.inf) if masked else None
    added = RelativePositions(table, buckets).add_to(mask, torch.float32)
    assert added.stride(-1) == 1
    for query in range(5):
        for key in range(7):
            wanted = table[buckets[0, query, key]].expand(added.shape[0], -1)
            hidden = 0.0 if mask is None else mask[:, :, query, key]
            assert torch.equal(added[:, :, query, key], wanted + hidden)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradients_of_attention_by_distance_are_those_of_its_formula(dropout: float) -> None:
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (1, 3, 5, 7)]
    query, key, value, positions = (torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.double)
    mask[1, :, :, 5:] = -torch.inf

    def weights(q: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.transpose(2, 3) + p + mask, -1)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return attend_by_distance(q, k, v, p.detach() + mask, p, dropout)

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        used = weights(q, k, p).flatten(0, 1)
        return torch.native_dropout(used, dropout, True)[0].view(2, 3, 5, 7) @ v if dropout else weights(q, k, p) @ v

    inputs, upstream = (query, key, value, positions), torch.randn(2, 3, 5, 4, dtype=torch.double)
    torch.testing.assert_close(ours(*inputs), formula(*inputs))
    found = torch.autograd.grad(ours(*inputs), inputs, upstream)
    wanted = torch.autograd.grad(formula(*inputs), inputs, upstream)
    torch.testing.assert_close(found, wanted)
