"""Train one case in the world that this process is in, and gather what must be the same in every layout."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megarl.conformance.objectives import Objective, objectives
from megarl.experience.rows import forward_rows
from megarl.models.build import build_engine
from megarl.models.gpt import EMBEDDING
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.whole import Copies, whole_gradients, whole_norm, whole_parameters

OUTPUT = "output_layer.weight"
SEED = 1


@dataclass
class Outcome:
    """What the training of a model for one objective gave.

    Attributes:
        stats: the loss and what goes with it, by name for each step.
        norms: the norm of the gradients at each step, as the optimizer reports it.
        own_norms: the same, computed from the whole gradients.
        outputs: log-probs, and values of a value head, of all rows under the first weights, [rows, time].
        first_gradients, last_gradients: the whole gradients of the first and of the last step.
        parameters: all copies of the whole parameters after the last step.
        moved: the largest change of a frozen parameter, by name.
        unreached: trained parameters whose last gradient is zero everywhere.
    """

    stats: dict[str, list[float]] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    own_norms: list[float] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    first_gradients: Copies = field(default_factory=dict)
    last_gradients: Copies = field(default_factory=dict)
    parameters: Copies = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)


Outcomes = dict[str, Outcome]
"""By the name of the objective."""


def train_case(
    settings: Mapping[str, Any], world: int, steps: int, timeout_s: float, same_ends: bool = False
) -> Outcomes | None:
    """Train for both objectives in the current world, which replicas fill. Returns the outcomes on the first rank.

    Args:
        settings: the configuration keys of the case.
        world: number of processes.
        steps: number of optimizer steps.
        timeout_s: how long a process waits for another.
        same_ends: start the output layer with the embedding's weights, and return one gradient for both: that of a
            model which ties them.
    """
    device = start_world(timeout_s)
    found: Outcomes = {}
    grid: Grid | None = None
    try:
        for objective in objectives(settings):
            if grid is None:
                grid = Grid(Layout.of(objective.config.parallel, world), device, timeout_s=timeout_s)
            found[objective.name] = _trained(objective, grid, steps, same_ends)
        assert grid is not None
        return found if grid.rank == 0 else None
    finally:
        if grid is not None:
            grid.close()
        gc.collect()  # engines hold their groups in cycles, and each group has threads


def _trained(objective: Objective, grid: Grid, steps: int, same_ends: bool) -> Outcome:
    """Train the model of an objective."""
    config, rows = objective.config, objective.rows
    micro = {"per_microbatch": config.trainer.micro_batch_size, "share_bins": objective.share_bins}
    engine = build_engine(
        objective.role, grid, config.parallel, precision=config.trainer.precision, seed=SEED, total_steps=steps
    )
    if same_ends:
        _copy_embedding(engine)
    found = Outcome(outputs=forward_rows(engine, rows, objective.outputs, **micro))
    frozen = {
        name: parameter.detach().clone() for name, parameter in engine.parameters() if not parameter.requires_grad
    }
    for step in range(steps):
        batch = make_microbatches(rows, torch.arange(len(rows)), engine, **micro)
        stats = {**engine.train_step(batch, objective.loss, objective.count), **engine.observed}
        for name, value in stats.items():
            found.stats.setdefault(name, []).append(value)
        gradients = whole_gradients(engine)
        if step == 0:
            found.first_gradients = _of_both_ends(gradients) if same_ends else gradients
        if step == steps - 1:
            found.last_gradients = gradients
            reached, wanted = engine.gradient_names()
            found.unreached = sorted(wanted - reached)
        found.own_norms.append(whole_norm(gradients.values()))
        found.norms.append(engine.apply_gradients())
    found.parameters = whole_parameters(engine)
    moved = {
        name: float((parameter.detach() - frozen[name]).abs().max())
        for name, parameter in engine.parameters()
        if name in frozen
    }
    for of_rank in grid.gather(moved):
        for name, change in of_rank.items():
            found.moved[name] = max(change, found.moved.get(name, 0.0))
    return found


def _copy_embedding(engine: Engine) -> None:
    """Give the output layer the weights of the embedding, in one process."""
    here = dict(engine.parameters())
    with torch.no_grad():
        here[OUTPUT].copy_(here[EMBEDDING])
    assert engine.optimizer is not None
    engine.optimizer.reload_model_params()


def _of_both_ends(gradients: Copies) -> Copies:
    """Return the gradients with the sum of the embedding's and the output layer's as that of the embedding."""
    (embedding,), (output,) = gradients[EMBEDDING], gradients[OUTPUT]
    rest = {name: copies for name, copies in gradients.items() if name != OUTPUT}
    return {**rest, EMBEDDING: [embedding + output]}
