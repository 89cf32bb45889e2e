"""Whether a case may run: what the rules of the configuration and of the layout say of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megarl.config.rules import check
from megarl.config.world import data_parallel_size
from megarl.conformance.features import Case
from megarl.conformance.objectives import objectives
from megarl.errors import ConfigError
from megarl.models.build import refuse_quantised_experts
from megarl.parallel.layout import Layout


def refuse(settings: Mapping[str, Any], world: int) -> None:
    """Raise the `ConfigError` of the first rule that forbids settings in a world of so many processes."""
    for objective in objectives(settings):
        config = objective.config
        trainer, parallel = config.trainer, config.parallel
        # The suite's batch does not grow with the world; the rule wants one that divides.
        whole = trainer.micro_batch_size * max(1, data_parallel_size(config, world)) * parallel.pp
        trainer.global_batch_size = whole
        check(config, world)
        Layout.of(parallel, world)
        refuse_quantised_experts(objective.role)


def refusal(case: Case, world: int | None = None) -> str | None:
    """Return why a case does not run; None if it does.

    Args:
        world: number of the processes that there are (None: as many as the case needs).
    """
    try:
        refuse(case.settings, case.world if world is None else world)
    except ConfigError as problem:
        return str(problem)
    if world is not None and world % case.world:
        return f"needs {case.world} processes or a multiple, and there are {world}"
    return None
