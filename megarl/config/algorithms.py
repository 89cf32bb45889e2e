"""The table of algorithms. All properties in which they differ are declared here.

The command line, the Python interface, the plan, `--help` and docs/configuration.md read this table. Tests compare it
with the files that cannot read it (launchers, pyproject.toml). docs/design.md lists what a new algorithm needs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, get_args

from megarl.config.evaluate import EvaluateConfig
from megarl.config.generate import GenerateConfig
from megarl.config.ilql import ILQLConfig
from megarl.config.leaf import leaves
from megarl.config.ppo import PPOConfig
from megarl.config.preference import CPOConfig, DPOConfig, KTOConfig, ORPOConfig
from megarl.config.rft import RFTConfig
from megarl.config.rm import RewardModelConfig
from megarl.config.serve import ServeConfig
from megarl.config.sft import SFTConfig
from megarl.config.trees import TrainingTree
from megarl.errors import ConfigError
from megarl.functions import extensions
from megarl.functions.named import resolve

LearnsFrom = Literal["prompts", "samples", "rewarded samples", "pairs"]
_GROUPS = {"model": "tiny", "parallel": "single"}
_TRAINING_GROUPS = {**_GROUPS, "logger": "default"}

_PROMPT_KEYS = ("model.path", "data.train", "reward.fn", "optim.lr")
_LENGTH_KEYS = ("trainer.max_steps", "trainer.global_batch_size")
_MACHINE_KEYS = ("trainer.devices", "parallel.tp", "run.dir")
_PHASE_KEYS = ("rollout.n", "rollout.max_new_tokens", "trainer.max_phases", *_MACHINE_KEYS)
_DATA_KEYS = ("model.path", "data.train", "data.eval", "optim.lr")


@dataclass(frozen=True)
class EntryPoint:
    """A program with a configuration tree: `python -m megarl.PROGRAM [key=value ...]`.

    Values come from the tree, `groups`, `defaults`, presets and the command line. Later ones override earlier ones.

    Args:
        name: name of the entry point in megarl.
        config: class of its configuration tree. Several entry points may share one.
        about: one sentence for `--help` and docs/configuration.md.
        first_keys: the ten keys that people change first, for `--help`, which leaves out those that the tree lacks.
        groups: option of each configuration group that is used unless the command line selects another.
        defaults: values by dotted key that differ from those of the tree and of the groups.
    """

    name: str
    _: KW_ONLY
    config: type
    about: str
    first_keys: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=_GROUPS.copy)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def program(self) -> str:
        """Name of the program's module in megarl, and of its primary configuration."""
        return self.name

    @property
    def command(self) -> str:
        """Name of the command, as in `megarl COMMAND`."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Algorithm(EntryPoint):
    """An entry point that trains: `python -m megarl.train_NAME`.

    Args:
        module: the class that trains, as package.module:Class. Its arguments are the configuration, the tokenizer and
            the functions that replace those that the configuration names.
        learns_from: the argument with which `megarl.train` selects it. If several algorithms have the same one, the
            first is selected unless `config` belongs to another.
        unit: name of one training step, "step" or "phase".
        source: of an algorithm outside of megarl, the name by which it was found; empty: it is megarl's own.
    """

    _: KW_ONLY
    module: str
    learns_from: LearnsFrom
    unit: str = "step"
    source: str = ""
    first_keys: tuple[str, ...] = (*_DATA_KEYS, *_LENGTH_KEYS, "trainer.precision", *_MACHINE_KEYS)
    groups: Mapping[str, str] = field(default_factory=_TRAINING_GROUPS.copy)

    @property
    def program(self) -> str:
        """Name of its program, `train_NAME`, which is also the name of its primary configuration."""
        return f"train_{self.name}"

    @property
    def command(self) -> str:
        """Name of the command, as in `megarl COMMAND`."""
        return f"train {self.source}" if self.source else super().command


_LEARNED_WEIGHTS_LR = 1e-5  # for pretrained weights; small models with random weights need a hundred times that

_PPO_DEFAULTS = {
    "optim.lr": _LEARNED_WEIGHTS_LR,
    "checkpoint.every": 10,
}

_PREFERENCE_DEFAULTS = {"optim.lr": 1e-6}

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm(
            "sft",
            config=SFTConfig,
            module="megarl.modules.sft:SFT",
            about="Supervised fine-tuning of a GPT on text, completions or conversations.",
            learns_from="samples",
            groups={**_TRAINING_GROUPS, "data": "demo", "trainer": "laptop"},
        ),
        Algorithm(
            "ppo",
            config=PPOConfig,
            module="megarl.modules.ppo:PPO",
            about="Proximal policy optimisation of a GPT on prompts and a reward function.",
            first_keys=(*_PROMPT_KEYS, *_PHASE_KEYS),
            learns_from="prompts",
            unit="phase",
            defaults=_PPO_DEFAULTS,
        ),
        Algorithm(
            "grpo",
            config=PPOConfig,
            module="megarl.modules.ppo:PPO",
            about="Group relative policy optimisation: PPO whose advantages compare the responses to a prompt, without "
            "a critic.",
            first_keys=(*_PROMPT_KEYS, *_PHASE_KEYS),
            learns_from="prompts",
            unit="phase",
            defaults={
                **_PPO_DEFAULTS,
                "ppo.advantages": "grpo",
                "critic.kind": "none",
                "rollout.n": 8,
                "ppo.kl_in": "loss",  # a KL penalty in the scores would also be divided by a group's standard deviation
                "ppo.kl_kind": "k3",
            },
        ),
        Algorithm(
            "rft",
            config=RFTConfig,
            module="megarl.modules.rft:RFT",
            about="Rejection-sampling fine-tuning of a GPT on prompts and a reward function.",
            first_keys=(*_PROMPT_KEYS, *_PHASE_KEYS),
            learns_from="prompts",
            unit="phase",
            defaults={
                "optim.lr": _LEARNED_WEIGHTS_LR,
                "checkpoint.every": 5,
            },
        ),
        Algorithm(
            "ilql",
            config=ILQLConfig,
            module="megarl.modules.ilql:ILQL",
            about="Implicit language Q-learning: a GPT learns from samples with rewards, without generating any while "
            "it trains.",
            first_keys=(*_DATA_KEYS, "ilql.tau", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="rewarded samples",
            defaults={
                "optim.lr": _LEARNED_WEIGHTS_LR,
            },
        ),
        Algorithm(
            "dpo",
            config=DPOConfig,
            module="megarl.modules.dpo:DPO",
            about="Direct preference optimisation of a GPT on pairs of a preferred and a rejected response.",
            first_keys=(*_DATA_KEYS, "dpo.beta", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="pairs",
            defaults=_PREFERENCE_DEFAULTS,
        ),
        Algorithm(
            "kto",
            config=KTOConfig,
            module="megarl.modules.kto:KTO",
            about="Kahneman-Tversky optimisation of a GPT on responses that are labelled as desirable or not.",
            first_keys=(*_DATA_KEYS, "kto.beta", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="pairs",
            defaults=_PREFERENCE_DEFAULTS,
        ),
        Algorithm(
            "orpo",
            config=ORPOConfig,
            module="megarl.modules.orpo:ORPO",
            about="Odds-ratio preference optimisation of a GPT: supervised fine-tuning that also learns from rejected "
            "responses, without a reference.",
            first_keys=(*_DATA_KEYS, "orpo.beta", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="pairs",
            defaults=_PREFERENCE_DEFAULTS,
        ),
        Algorithm(
            "cpo",
            config=CPOConfig,
            module="megarl.modules.cpo:CPO",
            about="Contrastive preference optimisation of a GPT, and SimPO: DPO without a reference.",
            first_keys=(*_DATA_KEYS, "cpo.beta", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="pairs",
            defaults=_PREFERENCE_DEFAULTS,
        ),
        Algorithm(
            "rm",
            config=RewardModelConfig,
            module="megarl.modules.rm:RewardModel",
            about="Training of a reward model on pairs, ranked lists, scores, or scores of steps.",
            first_keys=(*_DATA_KEYS, "rm.kind", *_LENGTH_KEYS, *_MACHINE_KEYS),
            learns_from="pairs",
            defaults={"optim.lr": _LEARNED_WEIGHTS_LR},
        ),
    )
}
"""Algorithms by name, in the order in which they are documented."""

GENERATE = EntryPoint(
    "generate",
    config=GenerateConfig,
    about="Responses of a trained model to prompts, or a chat.",
    first_keys=(
        *("model.path", "prompts", "out", "chat", "system", "rollout.n", "rollout.max_new_tokens"),
        *("rollout.temperature", "trainer.devices", "parallel.tp"),
    ),
)
EVALUATE = EntryPoint(
    "evaluate",
    config=EvaluateConfig,
    about="Measures of a trained model's responses to held-out prompts.",
    first_keys=(
        *("model.path", "data.eval", "reward.fn", "eval.n", "eval.vote", "rollout.max_new_tokens"),
        *("out", "samples", "trainer.devices", "parallel.tp"),
    ),
)
SERVE = EntryPoint(
    "serve_reward",
    config=ServeConfig,
    about="A reward model as a service, which gives scores over HTTP.",
    first_keys=(
        *("model.path", "serve.host", "serve.port", "serve.token_file", "serve.batch_size", "serve.max_wait"),
        *("serve.max_tokens", "trainer.devices", "trainer.precision", "parallel.tp"),
    ),
)


def entry_points() -> dict[str, EntryPoint]:
    """Return every entry point by name: the algorithms, `generate`, `evaluate` and `serve_reward`."""
    return {**ALGORITHMS, **{entry.name: entry for entry in (GENERATE, EVALUATE, SERVE)}}


def entry_point(name: str) -> EntryPoint:
    """Return the entry point with a name, such as `ppo` or `generate`, or an algorithm by another name of it."""
    return entry_points().get(name) or find_algorithm(name)


def find_algorithm(name: str, key: str = "algorithm") -> Algorithm:
    """Return an algorithm of the table, or add one to it that an installed package announces, or that is named as
    package.module:NAME or path/to/file.py:NAME.

    Args:
        name: its name.
        key: what gives the name, for messages.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        return _added(extensions.load(key, name, "NAME"), name, key)
    installed = extensions.announced(extensions.ALGORITHMS)
    if name in installed:
        return _added(extensions.load(key, installed[name].value, "NAME"), name, key)
    known = [*ALGORITHMS, *installed]
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]}? Algorithms are" if near else "use"
    raise ConfigError(
        f"{key} {name!r} is not known here: {meant} {', '.join(known)}, or package.module:NAME for one of yours",
        key=key,
        value=name,
        offers={key: known},
    )


def _added(found: Any, source: str, key: str) -> Algorithm:
    """Add an algorithm to the table, after checking its declaration."""
    if not isinstance(found, Algorithm):
        raise extensions.wrong_kind(key, source, "a megarl.config.algorithms.Algorithm", found)
    known = entry_points().get(found.name)
    if isinstance(known, Algorithm) and replace(known, source="") == found:
        return known  # under another name, such as another path of its file
    if known is not None and getattr(known, "source", "") != source:
        of = getattr(known, "source", "") or "megarl's own"
        raise ConfigError(
            f"{key}={source} declares an algorithm with the name {found.name}, and there is one already ({of}): give "
            "it another name",
            key=key,
            value=source,
        )
    problem = _problem_of(found)
    if problem:
        raise ConfigError(f"{key}={source} {problem}", key=key, value=source)
    resolve(found.module, f"{source}.module", "class")
    ALGORITHMS[found.name] = replace(found, source=source)
    return ALGORITHMS[found.name]


def _problem_of(found: Algorithm) -> str | None:
    """Return what is wrong with the declaration of an algorithm, or None."""
    if not found.name.isidentifier():
        return f"has name={found.name!r}: use letters, digits and underscores"
    if not (isinstance(found.config, type) and issubclass(found.config, TrainingTree)):
        return f"has config={found.config!r}: use a dataclass that inherits megarl.config.trees.TrainingTree"
    if found.learns_from not in get_args(LearnsFrom):
        return f"has learns_from={found.learns_from!r}: choose from {', '.join(get_args(LearnsFrom))}"
    if found.unit not in ("step", "phase"):
        return f"has unit={found.unit!r}: choose from step, phase"
    keys = {leaf.key for leaf in leaves(found.config)}
    unknown = [name for name in (*found.defaults, *found.first_keys) if name not in keys]
    if unknown and unknown[0] in found.defaults:
        return f"has a default for {unknown[0]}, which is no key of {found.config.__name__}: correct the key"
    return None
