"""An encoder-decoder trains alike whatever is recomputed."""

from typing import Any

import pytest

from megarl.config.sections.model import EncoderConfig
from tests.gated import gated
from tests.parallel.engines import train
from tests.worlds import Worlds

T5: dict[str, Any] = {
    "position": "relative",
    "activation": "geglu",
    "encoder": EncoderConfig(num_layers=4, buckets=8, longest_distance=20),
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
