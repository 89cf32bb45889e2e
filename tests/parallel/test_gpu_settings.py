"""A GPU's settings, tried on a CPU: the same numbers as with a CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megarl.errors import ConfigError
from megarl.parallel.device import CPU, GPU, VARIABLE, DeviceSettings, assumed, device_settings
from tests.parallel.engines import batches, count_tokens, small_engine, token_loss
from tests.worlds import Worlds

STEPS = (2, 4, 2)  # microbatches of each replica: packing gives every step its own number
GPT2 = {"position": "learned", "norm": "layernorm", "activation": "gelu", "tie_embeddings": True, "mlp_bias": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {"dp": 2}),
    "pp2vpp2": (2, {"pp": 2, "vpp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp2pp2sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
    "pp2dp2": (4, {"pp": 2, "dp": 2}),
}


def trained(
    layout: dict[str, Any], model: dict[str, Any], **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of steps with several numbers of microbatches, and this rank's weights after them."""
    engine = small_engine({key: value for key, value in layout.items() if key != "dp"}, model, **options)
    course = []
    for step, count in enumerate(STEPS):
        rows = batches(engine, step, rows=2 * count * engine.grid.layout.dp)
        course.append(engine.train_step(rows, token_loss, count_tokens)["loss"])
        course.append(engine.apply_gradients())
    return course, {name: weight.detach().clone() for name, weight in engine.parameters()}


def with_settings(settings: DeviceSettings, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with assumed(settings):
        return work(*args, **options)


@pytest.mark.parametrize("model", [{}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_with_a_gpus_settings(layout: str, model: dict[str, Any], worlds: Worlds) -> None:
    world, grid = LAYOUTS[layout]
    plain = worlds.run(world, with_settings, CPU, trained, grid, model)
    gpus = worlds.run(world, with_settings, GPU, trained, grid, model)
    for (course, weights), (wanted, expected) in zip(gpus, plain, strict=True):
        assert course == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        for name, weight in weights.items():
            assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name


def test_the_variable_switches_them_on_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert device_settings() == CPU
    for value, wanted in (("1", GPU), ("0", CPU), ("", CPU)):
        monkeypatch.setenv(VARIABLE, value)
        assert device_settings() == wanted
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ConfigError, match="MEGARL_GPU_SETTINGS=yes"):
        device_settings()
