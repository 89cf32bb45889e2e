"""Weights of a second layout are proved before anything is sampled with them: not copied, damaged, or computed with
otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megarl.config.sections.rollout import RolloutConfig, RolloutEngineConfig
from megarl.data.prompts import Prompt
from megarl.errors import InvariantError
from megarl.experience import invariants as invariants_module
from megarl.experience.invariants import Invariants
from megarl.experience.sources import GeneratedRollouts
from megarl.rollout.noise import EVALUATION, GREEDY, TRAINING
from tests.parallel.engines import small_engine
from tests.refusals import assert_refusal
from tests.worlds import Worlds

TOKENIZER: Any = SimpleNamespace(eos_id=100, stop_ids=lambda template: [100], decode=str)
PROMPTS = [Prompt("", (number, 1, 7), {}) for number in range(3)]
NAME = "decoder.layers.3.mlp.linear_fc2.weight"
LAYOUTS: list[tuple[dict[str, int], str, str, str]] = [
    ({"pp": 2}, "tp2", "PP2", "TP2"),
    ({"tp": 2}, "tp1", "TP2", "DP2"),
    ({}, "pp2", "DP2", "PP2"),
]


def source_in(layout: dict[str, int], other: str | None, precision: str = "fp32", **given: Any) -> GeneratedRollouts:
    settings = RolloutConfig(max_new_tokens=5, engine=RolloutEngineConfig(layout=other))
    engine = small_engine(layout, train=False, precision=precision)
    return GeneratedRollouts(engine, TOKENIZER, settings, seed=1, **given)


def collect(source: GeneratedRollouts, phase: int, stream: int = TRAINING) -> InvariantError | int:
    """The number of responses, or the error."""
    try:
        return len(source.collect(PROMPTS, 1, stream=stream, phase=phase))
    except InvariantError as problem:
        return problem


@torch.no_grad()
def change_trained(source: GeneratedRollouts) -> None:
    """As a training step would, on every rank that holds the tensor."""
    assert source.reshard is not None
    for name, parameter in source.reshard.source.parameters():
        if name == NAME:
            parameter.add_(0.01)


def flip_a_bit(source: GeneratedRollouts, of_rank: int) -> None:
    """Damage one value of the copy on one rank."""
    assert source.reshard is not None
    held = dict(source.reshard.engine.parameters())
    if source.reshard.grid.rank == of_rank and NAME in held:
        held[NAME].data.view(torch.int16)[1, 2] ^= 1


def life(layout: dict[str, int], other: str, precision: str) -> list[InvariantError | int]:
    source = source_in(layout, other, precision)
    source.publish(1)
    found = [collect(source, 0)]
    change_trained(source)
    found.append(collect(source, 1))  # a publication that was forgotten
    source.publish(2)
    found.append(collect(source, 1))
    source.publish(2)
    flip_a_bit(source, of_rank=1)
    found.append(collect(source, 1, stream=EVALUATION))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("layout", "other", "here", "there"), LAYOUTS)
def test_weights_that_did_not_arrive_stop_the_run_before_anything_is_sampled(
    layout: dict[str, int], other: str, here: str, there: str, precision: str, worlds: Worlds
) -> None:
    for first, forgotten, published, damaged in worlds.run(2, life, layout, other, precision):
        assert (first, published) == (3, 3)
        for error, when in ((forgotten, "in phase 2"), (damaged, "in the evaluation after phase 1")):
            assert isinstance(error, InvariantError)
            offers = {"rollout.engine.layout": [None]}
            assert_refusal(error, key="weights_arrived", value=[NAME], offers=offers, names=(when, NAME, here, there))


def computed_otherwise(corrected: bool) -> InvariantError | int:
    checks = Invariants("strict", "fp32", lambda: 0, corrected=corrected)
    source = source_in({"pp": 2}, "tp2", invariants=checks)
    source.publish(1)
    assert source.reshard is not None
    norm = source.reshard.engine.models[0].decoder.final_layernorm
    norm.register_forward_hook(lambda module, given, output: output * 1.5)
    return collect(source, 0)


def test_a_layout_that_computes_another_model_of_the_same_weights_is_found(worlds: Worlds) -> None:
    for error in worlds.run(2, computed_otherwise, corrected=False):
        assert isinstance(error, InvariantError)
        offers = {"rollout.engine.layout": [None], "health.invariants": ["warn"]}
        assert_refusal(error, key="logprob_drift", offers=offers, names=("in phase 1", "PP2", "TP2"))
    assert worlds.run(2, computed_otherwise, corrected=True) == [3, 3]  # the loss corrects it


def with_a_warning() -> tuple[InvariantError | int, list[str]]:
    warned: list[str] = []
    log: Any = SimpleNamespace(warning=lambda form, *given: warned.append(form % given))
    plain, invariants_module.log = invariants_module.log, log
    try:
        source = source_in({"pp": 2}, "tp2", invariants=Invariants("warn", "fp32", lambda: 0))
        source.publish(1)
        flip_a_bit(source, of_rank=0)
        return collect(source, 0), warned
    finally:
        invariants_module.log = plain


def test_a_run_that_is_only_warned_goes_on(worlds: Worlds) -> None:
    for responses, warned in worlds.run(2, with_a_warning):
        assert responses == 3
        (line,) = warned
        assert "weights_arrived" in line
        assert NAME in line


def phases_that_were_checked(other: str | None) -> list[str]:
    source = source_in({"pp": 2}, other)
    checked: list[str] = []
    arrival: Any = SimpleNamespace(check=lambda first, when, where: checked.append(when))
    source.arrival = None if source.arrival is None else arrival
    for phase in range(2):
        source.publish(phase)
        for stream in (TRAINING, TRAINING, GREEDY):
            source.collect(PROMPTS, 1, stream=stream, phase=phase)
        source.publish(phase + 1)
        source.collect(PROMPTS, 1, stream=EVALUATION, phase=phase + 1)
    return checked


def test_each_publication_is_checked_once(worlds: Worlds) -> None:
    wanted = ["in phase 1", "in the evaluation after phase 1", "in phase 2", "in the evaluation after phase 2"]
    assert worlds.run(2, phases_that_were_checked, "tp2") == [wanted, wanted]
    assert worlds.run(2, phases_that_were_checked, None) == [[], []]  # weights that are read in place cannot be old
