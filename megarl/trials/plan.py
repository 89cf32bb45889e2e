"""The command line of a sweep: what varies, what is the same in every trial, and how to search."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megarl.config.algorithms import ALGORITHMS
from megarl.config.arguments import check_arguments
from megarl.config.leaf import leaves
from megarl.config.messages import unknown_key
from megarl.config.metric_names import is_lower_better
from megarl.config.own_keys import read_mapping, read_own_keys, words_of, written
from megarl.config.sweep import SweepConfig
from megarl.disk import local, shown
from megarl.errors import ConfigError
from megarl.trials.search import BayesianSearch, GridSearch, Hyperband, RandomSearch, Search
from megarl.trials.spaces import Space, parse_space

USAGE = "megarl sweep ALGORITHM KEY=VALUE ... sweep.metric=NAME 'sweep.KEY=loguniform(1e-5,1e-3)'"
_OWN = {field.name for field in fields(SweepConfig)}
_MAY_CHANGE = ("at_once", "cpus", "gpus", "backend", "launcher", "dir", "file", "trials", "retry_failed")
"""Keys that a sweep may be resumed with other values of."""


@dataclass
class Plan:
    """A sweep, as its command line describes it.

    Attributes:
        algorithm: what its trials train by.
        settings: words of every trial's command line.
        spaces: what varies.
        config: how to search.
    """

    algorithm: str
    settings: list[str]
    spaces: list[Space]
    config: SweepConfig

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return local(self.config.dir or f"runs/sweep-{self.algorithm}").absolute()

    @property
    def metric(self) -> str:
        """The metric that decides."""
        assert self.config.metric is not None
        return self.config.metric

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric should be small."""
        return is_lower_better(self.metric, self.config.mode)

    def description(self) -> dict[str, Any]:
        """Return what must be equal when the sweep is resumed."""
        own = {f"sweep.{name}": value for name, value in vars(self.config).items() if name not in _MAY_CHANGE}
        if self.config.kind == "hyperband":
            own["sweep.trials"] = self.config.trials
        spaces = {f"sweep.{one.key}": [one.kind, list(one.choices), one.low, one.high] for one in self.spaces}
        return {"algorithm": self.algorithm, "settings": self.settings, **own, **spaces}

    @property
    def budget_key(self) -> str:
        """The key that hyperband increases."""
        if self.config.budget_key is not None:
            return self.config.budget_key
        tree = {leaf.key for leaf in leaves(ALGORITHMS[self.algorithm].config)}
        return "trainer.max_phases" if "trainer.max_phases" in tree else "trainer.max_steps"


def read(argv: Sequence[str]) -> Plan:
    """Return the sweep that a command line describes. Raise for what cannot be a sweep."""
    words = [word for word in argv if word != "--"]
    if not words or words[0] not in ALGORITHMS:
        raise no_algorithm(words[0] if words else "", "sweep", USAGE)
    algorithm, words = words[0], words[1:]
    own = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("sweep.")}
    settings = [word for word in words if not word.startswith("sweep.")]
    file = own.get("sweep.file")
    if file is not None:
        from_file, more = _read_file(file)
        own, settings = {**from_file, **own}, [*more, *settings]
    tree = ALGORITHMS[algorithm].config
    keys = {leaf.key for leaf in leaves(tree)}
    spaces, ours = [], []
    for word, value in own.items():
        key = word.removeprefix("sweep.")
        if key in _OWN:
            ours.append(f"{key}={value}")
        elif key in keys:
            spaces.append(parse_space(key, value))
        else:
            near = difflib.get_close_matches(key, sorted(_OWN), n=1, cutoff=0.6)
            if near and "." not in key:
                raise ConfigError(
                    f"unknown key '{shown(word)}': did you mean sweep.{near[0]}?", key=word, offers={word: near}
                )
            raise unknown_key(key, tree, f"{word}={value}")
    config = read_own_keys(SweepConfig, ours, "sweep")
    check_arguments(settings, tree)
    plan = Plan(algorithm, settings, spaces, config)
    _check(plan)
    return plan


def no_algorithm(word: str, command: str, usage: str) -> ConfigError:
    """Return the error for a command of megarl whose first word is no algorithm."""
    near = difflib.get_close_matches(word.lower(), ALGORITHMS, n=1, cutoff=0.5)
    meant = f"did you mean megarl {command} {near[0]}? " if near else ""
    said = f"'{shown(word)}' is not an algorithm" if word else "an algorithm comes first"
    return ConfigError(
        f"{said}: {meant}algorithms are {', '.join(ALGORITHMS)}; usage: {usage}",
        key="ALGORITHM",
        value=word or None,
        offers={"ALGORITHM": near or list(ALGORITHMS)},
    )


def _read_file(file: str) -> tuple[dict[str, str], list[str]]:
    """Return the keys of a sweep file as the command line has them: `sweep.KEY` with values, and settings."""
    content = read_mapping(file, "sweep.file")
    search, settings = content.pop("search", None) or {}, content.pop("settings", None) or {}
    for name, value in (("search", search), ("settings", settings)):
        if not isinstance(value, dict):
            raise ConfigError(
                f"sweep.file={shown(file)}: {name} is not a mapping of keys", key=name, value=value, where=file
            )
    for name in content:
        if name not in _OWN or name == "file":
            near = difflib.get_close_matches(name, [*_OWN, "search", "settings"], n=1, cutoff=0.5)
            meant = f": did you mean {near[0]}?" if near else f"; keys are search, settings, {', '.join(sorted(_OWN))}"
            raise ConfigError(
                f"unknown key '{shown(name)}' in sweep.file={shown(file)}{meant}",
                key=name,
                where=file,
                offers={name: near},
            )
    own = {f"sweep.{name}": written(value) for name, value in content.items()}
    for name, value in search.items():
        listed = f"choice({','.join(map(written, value))})" if isinstance(value, list) else str(value)
        own[f"sweep.{name}"] = listed
    return own, list(words_of(settings))


def _check(plan: Plan) -> None:
    """Refuse a sweep without a metric or without anything to search, and settings that it must choose itself."""
    config = plan.config
    if config.metric is None:
        raise ConfigError(
            "sweep.metric is not set: name the metric that decides, as in sweep.metric=eval/loss", key="sweep.metric"
        )
    if not plan.spaces:
        raise ConfigError(
            "the sweep varies nothing: give a key a distribution, as in 'sweep.optim.lr=loguniform(1e-5,1e-3)'",
            key="sweep",
        )
    chosen = {word.lstrip("+").partition("=")[0] for word in plan.settings}
    for key in ("run.dir", "run.name"):
        if key in chosen:
            raise ConfigError(f"{key} is set by the sweep for every trial: set sweep.dir instead", key=key)
    for space in plan.spaces:
        if space.key in chosen:
            raise ConfigError(
                f"{space.key} has a value and is searched by sweep.{space.key}: remove one", key=space.key
            )
    if config.kind == "hyperband" and plan.budget_key in {space.key for space in plan.spaces}:
        raise ConfigError(
            f"hyperband itself sets {plan.budget_key}: remove sweep.{plan.budget_key}", key=plan.budget_key
        )
    if config.backend == "ray" and config.launcher is not None:
        raise ConfigError("sweep.backend=ray and sweep.launcher exclude each other: remove one", key="sweep.launcher")


def make_search(plan: Plan, largest_budget: int = 1) -> Search:
    """Return the search of a sweep."""
    config, lower = plan.config, plan.lower_is_better
    if config.kind == "grid":
        return GridSearch(plan.spaces, config.trials, config.grid_points)
    if config.kind == "hyperband":
        largest = config.max_budget or largest_budget
        smallest = config.min_budget or max(1, largest // config.eta**2)
        if smallest > largest:
            raise ConfigError(
                f"sweep.min_budget={smallest} is more than the largest budget, {largest}: use a smaller one",
                key="sweep.min_budget",
                value=smallest,
            )
        return Hyperband(
            plan.spaces,
            config.trials or 27,
            config.search_seed,
            lower_is_better=lower,
            smallest=smallest,
            largest=largest,
            eta=config.eta,
            brackets=config.brackets,
        )
    kind = BayesianSearch if config.kind == "bayesian" else RandomSearch
    return kind(plan.spaces, config.trials or 20, config.search_seed, lower_is_better=lower)
