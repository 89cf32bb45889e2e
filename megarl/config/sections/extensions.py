"""Objects of yours that a run uses beside megarl's own, by name: package.module:NAME or path/to/file.py:NAME."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.leaf import Section, leaf

EXTENSIONS = "Code of yours that the program uses beside megarl's own (docs/extending.md)."


@dataclass
class ExtensionsConfig(Section):
    """What every program that builds a model can use."""

    families: list[str] = leaf(
        [],
        "Families of models beside megarl's own, each as package.module:NAME or path/to/file.py:NAME, where NAME is a "
        "Family. Those that installed packages announce need not be named.",
    )


@dataclass
class TrainingExtensionsConfig(ExtensionsConfig):
    """What a training run can use."""

    callbacks: list[str] = leaf(
        [],
        "Lightning callbacks, each as package.module:Class or path/to/file.py:Class. Their hooks run after megarl's "
        "own.",
    )
    callback_options: dict[str, Any] = leaf(
        {},
        "Keyword arguments of the classes in extensions.callbacks: each class gets those that it takes.",
    )
    nemo: bool = leaf(
        False,
        "Let NeMo's exp_manager add its folder and callbacks to the Trainer. Requires megarl[nemo].",
    )
    exp_manager: dict[str, Any] = leaf(
        {},
        "Keys of NeMo's exp_manager, with extensions.nemo=true. Those of checkpoints, resuming and stopping are "
        "refused, as megarl does these.",
    )


@dataclass
class PPOExtensionsConfig(TrainingExtensionsConfig):
    """What a run of PPO can use."""

    orchestrator: str | None = leaf(
        None,
        "Class that makes the experience of a phase, as package.module:Class or path/to/file.py:Class: a subclass of "
        "megarl.experience.orchestrator.Orchestrator (null: that class).",
    )
