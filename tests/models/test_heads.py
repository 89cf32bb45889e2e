"""The value head: as wide as torch's linear layers at first, one value per chosen token, the same in every layout. The
score head: in the place of the output layer, and as wide at first as it is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.parameters import SCORE, parameters
from megarl.models.gpt import GPT
from megarl.models.heads import ScoreHead
from megarl.models.roles import Role
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Microbatch
from tests.parallel.engines import batches, small_engine
from tests.worlds import Worlds

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (2, {"tp": 2, "sequence_parallel": True}),
    (2, {"pp": 2}),
    (2, {}),
    (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
]


def both_losses(
    model: GPT, output: torch.Tensor, batch: Microbatch, counts: dict[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, _ = cross_entropy(model, output, batch, counts)
    wanted = batch.targets.float() / 50.0
    error = (((model.values(output) - wanted) ** 2) * batch.target_mask).sum() / counts["tokens"]
    return loss + error, {"loss": loss, "error": error}


def read_values(model: GPT, output: torch.Tensor, batch: Microbatch) -> dict[str, torch.Tensor]:
    return {"values": model.values(output)[:, :15]}  # without the padding of a sequence that is split


def trained(layout: dict[str, Any]) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    """First values, the course of training, last values, of one replica's rows of a batch."""
    engine = small_engine(layout, value_head=True)
    rows = batches(engine, 99)
    first = torch.cat([result["values"] for result in engine.forward(rows, read_values)])
    course = []
    for step in range(4):
        metrics = engine.train_step(batches(engine, step), both_losses, count_targets)
        course += [metrics["loss"], metrics["error"], engine.apply_gradients()]
    last = torch.cat([result["values"] for result in engine.forward(rows, read_values)])
    return first, course, last


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> tuple[torch.Tensor, list[float], torch.Tensor]:
    return worlds.run(1, trained, {})[0]


def head_widths() -> dict[str, tuple[float, float]]:
    """The deviation of each of the head's weights, and of torch's own layer of that shape."""
    engine = small_engine({}, value_head=True)
    weights = {name: weight for name, weight in engine.parameters() if name.startswith("value_head.")}
    torchs = {
        name: torch.nn.Linear(*reversed(weight.shape)).weight for name, weight in weights.items() if weight.ndim == 2
    }
    assert all(not weight.any() for name, weight in weights.items() if name.endswith(".bias"))
    return {name: (float(weights[name].std()), float(weight.std())) for name, weight in torchs.items()}


def test_its_weights_start_as_wide_as_those_of_torchs_linear_layers(worlds: Worlds) -> None:
    found = worlds.run(1, head_widths)[0]
    assert set(found) == {"value_head.inner.weight", "value_head.outer.weight"}
    for ours, torchs in found.values():
        assert ours == pytest.approx(torchs, rel=0.15)


def test_values_differ_from_the_start_and_learn(alone: tuple[torch.Tensor, list[float], torch.Tensor]) -> None:
    first, course, last = alone
    assert first.std() > 0.05
    assert course[-2] < course[1]
    assert bool((last != 0).all())


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_layouts_train_values_alike(
    world: int, layout: dict[str, Any], worlds: Worlds, alone: tuple[torch.Tensor, list[float], torch.Tensor]
) -> None:
    for first, course, last in worlds.run(world, trained, layout):
        assert course == pytest.approx(alone[1], rel=1e-4, abs=1e-6)
        if layout:  # one replica: every rank has every row
            assert torch.allclose(first, alone[0], rtol=1e-5, atol=1e-6)
            assert torch.allclose(last, alone[2], rtol=1e-4, atol=1e-5)


def swapped() -> tuple[float, float, bool]:
    """Losses at the present and at the first weights, and whether the present ones came back bit for bit."""

    def loss_of(engine: Engine) -> float:
        return engine.evaluate(batches(engine, 7), lambda m, o, b: cross_entropy(m, o, b, {"tokens": 1.0})[1])["loss"]

    engine = small_engine({}, trainable=lambda name: "layers.3" in name)
    reference, at_first = engine.trainable_copy(), loss_of(engine)
    assert all("layers.3" in name for name in reference)
    for step in range(3):
        engine.train_step(batches(engine, step), cross_entropy, count_targets)
        engine.apply_gradients()
    present = {name: parameter.clone() for name, parameter in engine.parameters()}
    with engine.with_weights(reference):
        inside = loss_of(engine)
    same = all(torch.equal(present[name], parameter) for name, parameter in engine.parameters())
    assert loss_of(engine) != at_first
    return at_first, inside, same


def test_reference_weights_are_swapped_in_and_out_bit_for_bit(worlds: Worlds) -> None:
    at_first, inside, same = worlds.run(1, swapped)[0]
    assert inside == at_first
    assert same


def handed_over() -> bool:
    teacher = small_engine({}, seed=1)
    pupil = small_engine({}, seed=2, grid=teacher.grid)
    pupil.start_from(teacher)
    batch = batches(pupil, 0)
    losses = []
    for engine in (teacher, pupil):
        losses.append(engine.train_step(batch, cross_entropy, count_targets)["loss"])
        engine.apply_gradients()
    mine = dict(pupil.parameters())
    return losses[0] == losses[1] and all(torch.equal(value, mine[name]) for name, value in teacher.parameters())


def test_an_engine_that_starts_from_another_trains_as_it_does(worlds: Worlds) -> None:
    assert worlds.run(1, handed_over)[0]


# --- the score head ---------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "untied": {"num_kv_heads": 2},
    "tied": {"tie_embeddings": True, "position": "learned"},
    "bias": {"lm_head_bias": True, "parallel_residual": "one_norm", "norm": "layernorm"},
}


def reward_models(pp: int) -> tuple[dict[str, dict[str, tuple[int, ...]]], dict[Any, tuple[float, bool]]]:
    """This rank's parameters of each shape; deviation of the score head's weights by what was asked for, and whether it
    is on this rank."""
    grid = Grid(Layout(pp=pp), start_world())

    def built(model: ModelConfig, std: float | None = None) -> dict[str, torch.Tensor]:
        role = Role("policy", model, 64, ("score",), head_std=std)
        return dict(build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1).parameters())

    names = {
        name: {key: tuple(weight.shape) for key, weight in built(ModelConfig(**shape)).items()}
        for name, shape in SHAPES.items()
    }
    wide, deviations = ModelConfig(num_layers=2, hidden_size=1024, ffn_size=64), {}
    for std in (None, 0.5, 0.0):
        weight = built(wide, std).get(SCORE)
        deviations[std] = (0.0 if weight is None else float(weight.std()), weight is not None)
    grid.close()
    return names, deviations


@pytest.mark.parametrize("pp", [1, 2])
def test_a_reward_model_has_a_score_head_of_a_given_width_and_no_output_layer(pp: int, worlds: Worlds) -> None:
    ranks = worlds.run(pp, reward_models, pp)
    for name, shape in SHAPES.items():
        whole = {key: size for names, _ in ranks for key, size in names[name].items()}
        model = ModelConfig(**shape)
        assert whole == {**parameters(model, 64, output=False), SCORE: (1, model.hidden_size)}
        assert not [key for key in whole if "output_layer" in key]
    assert [there for _, deviations in ranks for _, there in deviations.values()] == [False] * 3 * (pp - 1) + [True] * 3
    _, deviations = ranks[-1]
    assert deviations[None][0] == pytest.approx(1025**-0.5, rel=0.1)
    assert deviations[0.5][0] == pytest.approx(0.5, rel=0.1)
    assert deviations[0.0][0] == 0


def scores_of_a_bf16_head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of a bf16 head near 10 and their exact values; the weight's gradient and its exact value."""
    start_world()
    config: Any = SimpleNamespace(params_dtype=torch.bfloat16, hidden_size=64)
    group: Any = None
    head = ScoreHead(config, 1, group)
    torch.manual_seed(0)
    torch.nn.init.normal_(head.outer.weight, 0.15, 0.01)
    states = (1 + 0.01 * torch.randn(50, 64)).bfloat16()
    found = head(states)
    found.sum().backward()
    exact = states.double() @ head.outer.weight.detach().double().t()
    assert head.outer.weight.grad is not None
    return found.detach(), exact.squeeze(1), head.outer.weight.grad, states.double().sum(0)


def test_the_scores_of_a_bf16_model_have_the_precision_of_float32(worlds: Worlds) -> None:
    found, exact, gradient, exact_gradient = worlds.run(1, scores_of_a_bf16_head)[0]
    assert found.dtype == torch.float32
    assert exact.mean() == pytest.approx(10, abs=1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double().squeeze(0), exact_gradient, rtol=1e-2, atol=0)
