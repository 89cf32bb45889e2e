"""The classes of trlX's first version: a task is a prompt pipeline and an orchestrator with a scoring function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch.utils.data import Dataset

from megarl.compat.trlx.config import TRLConfig
from megarl.compat.trlx.trainer import Trainer, train
from megarl.errors import ConfigError

Kind = TypeVar("Kind", bound=type)


@dataclass
class PromptElement:
    """A prompt.

    Attributes:
        text: the prompt as text.
        tokens: [time] its token ids, padded.
    """

    text: str
    tokens: Any


@dataclass
class PromptBatch:
    """Several prompts: their texts, and [rows, time] token ids."""

    text: Sequence[str]
    tokens: Any


class BasePipeline(Dataset[PromptElement]):
    """Supplies prompts by index. A subclass has `__getitem__` and `__len__`; `create_loader` is not called, as megarl
    draws prompts by index, in an order that the seed determines."""


class BaseRLModel:
    """A model to train: its configuration and its tokenizer. The weights exist inside of `learn`."""

    def __init__(self, config: TRLConfig) -> None:
        from transformers import AutoTokenizer

        self.config = config
        path = config.tokenizer.tokenizer_path or config.model.tokenizer_path or config.model.model_path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.orchestrator: PPOOrchestrator | None = None
        self.trained: Trainer | None = None

    @property
    def model(self) -> Any:
        """Refuse: there are no weights to watch."""
        raise ConfigError(
            "model.model: the weights exist inside of learn(), sharded over processes: leave wandb.watch out; gradient "
            'norms are logged, to Weights & Biases with cfg.train.tracker = "wandb"',
            key="model.model",
        )


class AcceleratePPOModel(BaseRLModel):
    """A model that PPO trains."""

    def learn(self) -> Trainer:
        """Train by `megarl.train` and return the trained model, which `trained` holds as well."""
        orchestrator = self.orchestrator
        if orchestrator is None:
            raise ConfigError(
                "model.learn() has no experience to learn from: make an orchestrator of this model first", key="learn"
            )
        if type(orchestrator).score is PPOOrchestrator.score:
            raise ConfigError(
                f"{type(orchestrator).__name__} has no score: define score(self, texts), which returns a number for "
                "each text",
                key="score",
                value=type(orchestrator).__name__,
            )
        method = replace(self.config.method, num_rollouts=orchestrator.num_rollouts or self.config.method.num_rollouts)
        config = replace(self.config, method=replace(method, chunk_size=orchestrator.chunk_size))
        self.trained = train(reward_fn=_Score(orchestrator), prompts=orchestrator.prompts(), config=config)
        return self.trained


class PPOOrchestrator:
    """Makes experience: the policy answers the pipeline's prompts, and `score` judges the answers."""

    def __init__(self, pipeline: Any, rl_model: BaseRLModel, chunk_size: int = 512) -> None:
        """
        Args:
            pipeline: the prompts.
            rl_model: the model to train.
            chunk_size: number of responses that are generated at a time.
        """
        self.pipeline, self.rl_model, self.chunk_size = pipeline, rl_model, chunk_size
        self.num_rollouts = 0
        rl_model.orchestrator = self

    def score(self, texts: list[str]) -> Any:
        """Return a number for each text, a prompt with its response; a subclass defines it."""
        raise NotImplementedError

    def make_experience(self, num_rollouts: int = 1024, iter_count: int = 0) -> None:
        """Set the number of responses of a phase. They are made as `learn` begins, and in every later phase."""
        if num_rollouts < 1:
            raise ConfigError(
                f"make_experience(num_rollouts={num_rollouts}) makes none: use 1 or more",
                key="num_rollouts",
                value=num_rollouts,
            )
        self.num_rollouts = num_rollouts

    def prompts(self) -> list[str]:
        """Return the pipeline's prompts as text, without padding."""
        tokenizer = self.rl_model.tokenizer
        found = []
        for index in range(len(self.pipeline)):
            tokens = [int(token) for token in self.pipeline[index].tokens]
            while tokens and tokens[-1] == tokenizer.pad_token_id:
                tokens.pop()
            while tokens and tokens[0] == tokenizer.pad_token_id:
                tokens.pop(0)
            found.append(str(tokenizer.decode(tokens)))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave prompts and model out: `score` runs in another process."""
        return {name: value for name, value in vars(self).items() if name not in ("pipeline", "rl_model")}


class _Score:
    """An orchestrator's `score` as a reward function."""

    def __init__(self, orchestrator: PPOOrchestrator) -> None:
        self.orchestrator = copy.copy(orchestrator)  # without its prompts and model

    def __call__(self, samples: list[str], **_: Any) -> list[float]:
        return [float(score) for score in self.orchestrator.score(samples)]


_PIPELINES: dict[str, type] = {}
_ORCHESTRATORS: dict[str, type] = {"ppoorchestrator": PPOOrchestrator}
_MODELS: dict[str, type[AcceleratePPOModel]] = {"accelerateppomodel": AcceleratePPOModel}


def register_datapipeline(kind: Any) -> Any:
    """Register a class of prompt pipelines under its name, or under a name: `@register_datapipeline("name")`."""
    return _register(_PIPELINES, "pipeline", ("__getitem__", "__len__"), kind)


def register_orchestrator(kind: Any) -> Any:
    """Register a class of orchestrators under its name, or under a name."""
    return _register(_ORCHESTRATORS, "orchestrator", ("score", "make_experience"), kind)


def get_pipeline(name: str) -> Any:
    """Return a registered class of prompt pipelines."""
    return _found(_PIPELINES, "pipeline", name)


def get_orchestrator(name: str) -> Any:
    """Return a registered class of orchestrators."""
    return _found(_ORCHESTRATORS, "orchestrator", name)


def get_model(name: str) -> Any:
    """Return a class of models."""
    return _found(_MODELS, "model", name)


def _register(table: dict[str, type], what: str, methods: Sequence[str], kind: Any) -> Any:
    if isinstance(kind, str):
        named: Callable[[Any], Any] = lambda given: _added(table, what, methods, given, kind)  # noqa: E731
        return named
    return _added(table, what, methods, kind, getattr(kind, "__name__", str(kind)))


def _added(table: dict[str, type], what: str, methods: Sequence[str], kind: Kind, name: str) -> Kind:
    lacks = [method for method in methods if not hasattr(kind, method)]
    if not isinstance(kind, type) or lacks:
        raise ConfigError(
            f"register_{what}: {name} is no {what}: give a class with {' and '.join(methods)}", key=what, value=name
        )
    known = table.get(name.lower())
    same = known is not None and (known.__module__, known.__qualname__) == (kind.__module__, kind.__qualname__)
    if known is not None and not same:  # a notebook's cell may run again
        raise ConfigError(
            f"register_{what}: there is a {what} {name} already, {known.__module__}.{known.__qualname__}: give this "
            "one another name",
            key=what,
            value=name,
        )
    table[name.lower()] = kind
    return kind


def _found(table: dict[str, Any], what: str, name: str) -> Any:
    if str(name).lower() not in table:
        known = [kind.__name__ for kind in table.values()]
        raise ConfigError(
            f"{what} {name!r} is not registered: "
            + (f"use {', '.join(known)}" if known else f"put @register_data{what} above its class"),
            key=what,
            value=name,
            offers={what: known} if known else None,
        )
    return table[str(name).lower()]
