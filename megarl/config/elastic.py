"""The layout nearest to the configured one for the processes of a start, so that a run goes on with fewer or more.

A run comes back with other nodes than it had: one has failed, or is back. The batch of an optimizer step stays, so its
replicas must divide it; the axes that split the model change as little as possible:

    configured: TP2 x DP3, a batch of 12         six processes    unchanged
                                                 four             TP2 x DP2, the same model in each process
                                                 three            DP3; with one idle, TP2 x DP1 (a launcher does that)

Nothing here is stored. Every start searches from the configured layout, so a run returns to it when its nodes do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.config.offers import Rule, divisors, either, read
from megarl.config.rules import (
    check,
    each_section,
    generation_is_whole,
    whole_batches,
    whole_experts,
    whole_replicas,
)
from megarl.config.shape import possible_stages
from megarl.config.values import check_values
from megarl.errors import ConfigError

AXES = ("parallel.tp", "parallel.pp", "parallel.ep", "parallel.vpp")
"""Keys of the axes that may change. parallel.cp stays: it is chosen for the length of the sequences."""
MICRO, GENERATION = "trainer.micro_batch_size", "rollout.engine.layout"
FEWER = 64
"""A refusal looks for a smaller number of processes among so many."""


@dataclass(frozen=True)
class Fit:
    """Values with which a configuration divides over `world` processes.

    Attributes:
        world: number of processes that are used.
        settings: the values that differ from the configuration's, by key.
        share: how many times as much of the model a process holds as in the configured layout; 1 or less is no risk.
    """

    world: int
    settings: Mapping[str, Any]
    share: float

    @property
    def pasted(self) -> str:
        """The settings as they are typed: `parallel.tp=1 trainer.micro_batch_size=2`."""
        return " ".join(f"{key}={either([value])}" for key, value in self.settings.items())

    def applied(self, config: Any) -> Any:
        """Return a copy of a configuration with these settings. Sections without any are shared with it."""
        changed = copy.copy(config)
        for key, value in self.settings.items():
            *sections, name = key.split(".")
            holder = changed
            for section in sections:
                setattr(holder, section, copy.copy(getattr(holder, section)))
                holder = getattr(holder, section)
            setattr(holder, name, value)
        return changed

    def told(self, config: Any) -> str:
        """Return the line for the log of a start that takes these settings, for the configuration that they change."""
        were = " ".join(f"{key}={either([read(config, key)])}" for key in self.settings)
        line = (
            f"launch.elastic: {were} does not divide over the {self.world} processes of this start, which takes "
            f"{self.pasted}; trainer.global_batch_size={config.trainer.global_batch_size} stays"
        )
        if self.share <= 1:
            return line
        return (
            f"{line}. A process holds {self.share:g} times as much of the model as before: megarl plan {self.pasted} "
            f"cluster.gpus={self.world} shows whether it fits"
        )


def fitted(config: Any, world_size: int) -> tuple[Any, Fit | None]:
    """Check a configuration, and return the one to run on `world_size` processes, and how it differs.

    It is the same one (and None) where it divides, or a copy with the nearest values with launch.elastic=true. Without,
    and where there are none, a `ConfigError` names them or the nearest smaller number of processes that has some.
    """
    try:
        check(config, world_size)
    except ConfigError as refused:
        if not hasattr(config, "launch") or not _is_refused_for_its_world(config, world_size):
            raise
        fit = nearest_layout(config, [world_size])
        if fit is not None and config.launch.elastic:
            return fit.applied(config), fit
        raise _advised(refused, config, world_size, fit) from None
    return config, None


def nearest_layout(config: Any, worlds: Sequence[int]) -> Fit | None:
    """Return the values nearest to the configured ones that satisfy every rule on one of these numbers of processes.

    In this order it prefers: no process with more of the model than in the configured layout, or as little more as
    possible; more processes; a replica of nearly as many processes; fewer changed axes, parallel.tp last of all; and
    the largest microbatch, never more than the configured one. parallel.tp does not grow, as it belongs within a node.

    Args:
        config: typed tree of an algorithm. It is not changed.
        worlds: the numbers of processes that can be used.

    Returns:
        The values; None if there are none. `settings` is empty if the configuration divides as it is.
    """
    found = [(_rank(config, world, keys), world, keys) for world in worlds for keys in _layouts(config, world)]
    for _, world, keys in sorted(found):
        fit = _fit(config, world, keys)
        if _refusing_rule(fit.applied(config), world) is None:
            return fit
    return None


def nodes_to_use(config: Any, nodes: int, per_node: int) -> int:
    """Return how many of a job's nodes its run uses: all without launch.elastic, or where no number of them fits."""
    if not config.launch.elastic:
        return nodes
    fit = nearest_layout(config, [count * per_node for count in range(nodes, 0, -1)])
    return nodes if fit is None else fit.world // per_node


def _is_refused_for_its_world(config: Any, world_size: int) -> bool:
    """Return whether replicas, the experts that they share, batches or copies for generation do not divide over the
    processes, and all rules before these are satisfied."""
    try:
        check_values(config)
    except ConfigError:
        return False
    refusing = _refusing_rule(config, world_size)
    return refusing in (whole_replicas, whole_experts, whole_batches, generation_is_whole)


def _refusing_rule(config: Any, world_size: int) -> Rule | None:
    """Return the first rule that a configuration does not satisfy; None if it satisfies all."""
    rules: tuple[Rule, ...] = (each_section, *config.rules)
    return next((rule for rule in rules if not _satisfies(rule, config, world_size)), None)


def _satisfies(rule: Rule, config: Any, world_size: int) -> bool:
    try:
        rule(config, world_size)
    except ConfigError:
        return False
    return True


def _advised(refused: ConfigError, config: Any, world_size: int, fit: Fit | None) -> ConfigError:
    """Return the refusal of a layout, with the nearest values for these processes, or the nearest fewer processes."""
    offers = dict(refused.offers)
    if fit is not None:
        offers |= {key: [value] for key, value in fit.settings.items()} | {"launch.elastic": [True]}
        advice = f"the nearest layout for {world_size} processes is {fit.pasted}, which launch.elastic=true takes"
    else:
        fewer = nearest_layout(config, range(world_size - 1, max(0, world_size - 1 - FEWER), -1))
        if fewer is None:
            return refused
        advice = f"no layout near it divides over {world_size} processes, but one does over {fewer.world}"
        advice += f" ({fewer.pasted})" if fewer.settings else ""
    return ConfigError(f"{refused}; {advice}", key=refused.key, value=refused.value, offers=offers)


_Keys = tuple[int, int, int, int, int]
"""Sizes of a candidate: tp, pp, ep, vpp (0: the plain schedule), microbatch."""


def _layouts(config: Any, world: int) -> Iterator[_Keys]:
    """Yield the sizes whose replicas fill a world and divide the batch; the rules are not checked."""
    parallel, trainer = config.parallel, config.trainer
    tensor, stages, experts = _sizes(config)
    for tp in tensor:
        for pp in stages:
            replicas, left = divmod(world, tp * pp * parallel.cp)
            if left or replicas == 0 or trainer.global_batch_size % replicas:
                continue
            micros = [n for n in divisors(trainer.global_batch_size // replicas) if n <= trainer.micro_batch_size]
            chunks = {0, parallel.vpp or 0} if pp > 1 else {0}
            for ep in experts:
                if replicas * parallel.cp % ep == 0:
                    yield from ((tp, pp, ep, vpp, micro) for vpp in chunks for micro in micros)


def _sizes(config: Any) -> tuple[list[int], list[int], list[int]]:
    """Return the possible sizes of tensor, pipeline and expert parallelism.

    The architecture of a model with `model.path` is in a file that is read later. Whatever it is, divisors of the
    configured sizes divide what these divide.
    """
    model, parallel = config.model, config.parallel
    if model.path is not None:
        return divisors(parallel.tp), divisors(parallel.pp), divisors(parallel.ep)
    experts = [1] if model.experts is None else divisors(model.experts.count or 1)
    tensor = [size for size in divisors(model.num_heads) if size <= parallel.tp]
    return tensor, possible_stages(model.encoder_layers, model.num_layers), experts


def _rank(config: Any, world: int, keys: _Keys) -> tuple[float, ...]:
    """Return what `nearest_layout` sorts by; smaller is nearer."""
    tp, pp, ep, vpp, micro = keys
    parallel = config.parallel
    changed = (tp != parallel.tp, pp != parallel.pp, ep != parallel.ep, vpp != (parallel.vpp or 0))
    return (
        max(1.0, _share(config, keys)),
        -world,
        abs(math.log(tp * pp / (parallel.tp * parallel.pp))),
        sum(changed),
        abs(math.log(tp / parallel.tp)),
        abs(math.log(ep / parallel.ep)),
        -micro,
    )


def _share(config: Any, keys: _Keys) -> float:
    """Return how many times as much of the layers, or of their experts, a process holds as in the configured layout."""
    tp, pp, ep, *_ = keys
    parallel = config.parallel
    dense = float(parallel.tp * parallel.pp / (tp * pp))
    return max(dense, dense * float(parallel.ep / ep))


def _fit(config: Any, world: int, keys: _Keys) -> Fit:
    """Return a candidate as settings that differ from the configuration's."""
    tp, pp, ep, vpp, micro = keys
    values = dict(zip((*AXES, MICRO), (tp, pp, ep, vpp or None, micro), strict=True))
    if generation_is_whole in config.rules and not _satisfies(generation_is_whole, config, world):
        values[GENERATION] = None  # the training layout generates the same responses
    settings = {key: value for key, value in values.items() if value != read(config, key)}
    return Fit(world, settings, _share(config, keys))
