"""trlX's TRLConfig, of its first and its last version, and the keys of megarl that its fields are."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from megarl.compat.lora import adapter_settings
from megarl.compat.ppo import ppo_settings
from megarl.config.own_keys import words_of
from megarl.disk import UnreadableError, check_yaml, local, read_text
from megarl.errors import ConfigError
from megarl.logging import get_logger, warn_once

SEQ2SEQ = "seq2seq"
NO_DECAY = 1e9
"""From this many steps on, a cosine schedule is a constant one: trlX's defaults decay over 1e12 steps."""


class _Fields:
    """A section. A field that it does not have is refused, on assignment too."""

    def __setattr__(self, name: str, value: Any) -> None:
        known = [each.name for each in fields(self)]  # type: ignore[arg-type]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known
            raise ConfigError(
                f"TRLConfig has no field {type(self).__name__}.{name} here; did you mean {near[0]}? Keys of megarl are "
                "set by config.overrides",
                key=name,
                value=value,
                offers={name: near},
            )
        object.__setattr__(self, name, value)


@dataclass
class TrainConfig(_Fields):
    """Lengths, batches, intervals. Numbers of sequences are for each replica of the model, as in trlX."""

    seq_length: int = 1024
    epochs: int = 100
    total_steps: int = 10_000
    batch_size: int = 32
    minibatch_size: int | None = None
    checkpoint_interval: int = 10_000
    eval_interval: int = 100
    checkpoint_dir: str | None = None
    seed: int = 1000
    tracker: str | None = None
    project_name: str = "trlx"
    trainer: str | None = None
    pipeline: str = "PromptPipeline"  # for the script, as in get_pipeline(config.train.pipeline)
    orchestrator: str = "PPOOrchestrator"
    input_size: int = 0
    gen_size: int | None = None  # for files of the first version: gen_kwargs has the length
    learning_rate_init: float | None = None
    learning_rate_target: float | None = None
    lr_ramp_steps: int = 0
    lr_decay_steps: int | None = None
    opt_betas: list[float] | None = None
    weight_decay: float | None = None


@dataclass
class ModelConfig(_Fields):
    """The model."""

    model_path: str = "gpt2"
    model_arch_type: str = "causal"  # or seq2seq, of an encoder-decoder
    num_layers_unfrozen: int = -1
    peft_config: Any = None
    model_type: str = "AcceleratePPOModel"
    tokenizer_path: str | None = None


@dataclass
class TokenizerConfig(_Fields):
    """The tokenizer."""

    tokenizer_path: str | None = None
    padding_side: str = "left"  # rows have no padding that a model reads
    truncation_side: str = "right"  # of prompts that are too long, the end is kept


@dataclass
class OptimizerConfig(_Fields):
    """The optimizer: its name, and lr, betas, eps and weight_decay in `kwargs`."""

    name: str = "adamw"
    kwargs: dict[str, Any] = field(default_factory=lambda: {"lr": 3e-5, "betas": (0.9, 0.95), "weight_decay": 1e-6})


@dataclass
class SchedulerConfig(_Fields):
    """The schedule of the learning rate: T_max and eta_min in `kwargs`."""

    name: str = "cosine_annealing"
    kwargs: dict[str, Any] = field(default_factory=lambda: {"T_max": 1e12, "eta_min": 3e-5})


@dataclass
class PPOMethod(_Fields):
    """PPO's settings."""

    name: str = "PPOConfig"
    num_rollouts: int = 128
    chunk_size: int = 128
    ppo_epochs: int = 4
    init_kl_coef: float = 0.001
    target: float | None = None
    horizon: float = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 1.0
    scale_reward: Any = "ignored"
    ref_mean: float | None = None
    ref_std: float | None = None
    cliprange_reward: Any = 10
    gen_kwargs: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 40, "do_sample": True})

    entry = "ppo"

    def settings(self, replicas: int) -> dict[str, Any]:
        """Return the keys of megarl."""
        for name, value in (("ref_mean", self.ref_mean), ("ref_std", self.ref_std)):
            if value is not None:
                raise ConfigError(
                    f"method.{name}={value} is not available: leave it out; with scale_reward=ref, the first phase's "
                    "scores are measured",
                    key=f"method.{name}",
                    value=value,
                )
        scaling = {False: "ignored", None: "ignored"}.get(self.scale_reward, self.scale_reward)
        return {
            **ppo_settings(self),
            "ppo.rollouts": self.num_rollouts * replicas,
            "rollout.engine.slots": self.chunk_size,
            "ppo.scale_scores": scaling,
            "ppo.clip_scores": self.cliprange_reward or None,
        }


@dataclass
class ILQLMethod(_Fields):
    """ILQL's settings."""

    name: str = "ilqlconfig"
    tau: float = 0.7
    gamma: float = 0.99
    cql_scale: float = 0.1
    awac_scale: float = 1.0
    alpha: float = 0.001
    beta: float = 0.0
    steps_for_target_q_sync: int = 5
    two_qs: bool = True
    gen_kwargs: dict[str, Any] = field(default_factory=lambda: {"max_new_tokens": 56, "top_k": 20, "beta": 1})

    entry = "ilql"

    def settings(self, replicas: int) -> dict[str, Any]:
        """Return the keys of megarl."""
        return {
            "ilql.tau": self.tau,
            "ilql.gamma": self.gamma,
            "ilql.cql_scale": self.cql_scale,
            "ilql.awac_scale": self.awac_scale,
            "ilql.awac_beta": self.beta,
            "ilql.target_alpha": self.alpha,
            "ilql.target_every": self.steps_for_target_q_sync,
            "ilql.two_qs": self.two_qs,
        }


@dataclass
class SFTMethod(_Fields):
    """Supervised fine-tuning's settings."""

    name: str = "sftconfig"
    gen_kwargs: dict[str, Any] = field(default_factory=dict)

    entry = "sft"

    def settings(self, replicas: int) -> dict[str, Any]:
        """Return the keys of megarl: none."""
        return {}


METHODS = {"ppoconfig": PPOMethod, "ilqlconfig": ILQLMethod, "sftconfig": SFTMethod}
_SECTIONS = {
    "train": TrainConfig,
    "model": ModelConfig,
    "tokenizer": TokenizerConfig,
    "optimizer": OptimizerConfig,
    "scheduler": SchedulerConfig,
}


@dataclass
class TRLConfig(_Fields):
    """A configuration of trlX."""

    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    method: Any = field(default_factory=PPOMethod)
    overrides: tuple[str, ...] = ()
    """More settings of megarl, as on its command line: ("parallel.tp=2", "trainer.precision=bf16")."""

    @classmethod
    def load_yaml(cls, path: str | Path) -> TRLConfig:
        """Read a configuration from a YAML file."""
        try:
            text = read_text(local(str(path)))
            check_yaml(text)
            plain = yaml.safe_load(text)
        except (UnreadableError, yaml.YAMLError, OSError) as problem:
            raise ConfigError(
                f"TRLConfig.load_yaml({path}): {' '.join(str(problem).split())}; give a YAML file with the sections "
                "model, train and method",
                key="TRLConfig",
                value=str(path),
                where=path,
            ) from None
        return cls.from_dict(plain)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TRLConfig:
        """Return a configuration from nested plain values; what is missing has trlX's defaults."""
        if not isinstance(plain, Mapping):
            raise ConfigError(
                f"TRLConfig needs a mapping of sections, not a {type(plain).__name__}", key="TRLConfig", value=plain
            )
        config = cls()
        for name, values in plain.items():
            if name == "method":
                method = METHODS.get(str(values.get("name", "PPOConfig")).lower())
                if method is None:
                    raise ConfigError(
                        f"method.name={values['name']!r} is not available: use {', '.join(METHODS)}",
                        key="method.name",
                        value=values["name"],
                        offers={"method.name": list(METHODS)},
                    )
                config.method = _filled(method(), values)
            elif name in _SECTIONS:
                _filled(getattr(config, name), values)
            else:
                setattr(config, name, values)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values."""
        return asdict(self)

    @classmethod
    def update(cls, base: TRLConfig | Mapping[str, Any], changes: Mapping[str, Any]) -> TRLConfig:
        """Return the configuration `base` with changes by dotted name, as in {"train.seed": 1}."""
        config = cls.from_dict(base.to_dict() if isinstance(base, TRLConfig) else base)
        for name, value in changes.items():
            *parents, last = name.split(".")
            holder: Any = config
            for part in parents:
                holder = holder[part] if isinstance(holder, dict) else getattr(holder, part)
            if isinstance(holder, dict):
                holder[last] = value
            else:
                setattr(holder, last, value)
        return config

    def settings(self, replicas: int = 1) -> list[str]:
        """Return the settings as megarl's command line would have them.

        Args:
            replicas: number of replicas of the model, each of which has `train.batch_size` sequences.
        """
        train, method = self.train, self.method
        found: dict[str, Any] = {
            "seed": train.seed,
            "model.num_layers_unfrozen": self.model.num_layers_unfrozen,
            "trainer.global_batch_size": train.batch_size * replicas,
            "trainer.micro_batch_size": train.minibatch_size or train.batch_size,
            **self._optimizer(),
            **self._lengths(replicas),
            **method.settings(replicas),
        }
        tokenizer = self.tokenizer.tokenizer_path or self.model.tokenizer_path
        if tokenizer not in (None, self.model.model_path):
            found |= {"tokenizer.kind": "huggingface", "tokenizer.path": tokenizer}
        if train.checkpoint_dir is not None:
            found["run.dir"] = train.checkpoint_dir
        if train.tracker == "wandb":
            found["logger.wandb.project"] = train.project_name
        elif train.tracker not in (None, "tensorboard"):
            raise ConfigError(
                f"train.tracker={train.tracker!r} is not available: use wandb, tensorboard or None",
                key="train.tracker",
                value=train.tracker,
                offers={"train.tracker": ["wandb", "tensorboard", None]},
            )
        if self.model.peft_config is not None:
            found |= adapter_settings(self.model.peft_config)
        if method.entry != "sft":
            before = 1 if self.model.model_arch_type == SEQ2SEQ else train.input_size
            found |= {f"rollout.{key}": value for key, value in sampling(method.gen_kwargs, before).items()}
        return [*words_of(found), *self.overrides]

    def _optimizer(self) -> dict[str, Any]:
        """Return the keys of the optimizer; the first version of trlX had them in `train`."""
        if self.optimizer.name.lower() not in ("adamw", "adam"):
            raise ConfigError(
                f"optimizer.name={self.optimizer.name!r} is not translated: use adamw, or set optim.kind by "
                "config.overrides",
                key="optimizer.name",
                value=self.optimizer.name,
                offers={"optimizer.name": ["adamw"]},
            )
        train, given = self.train, {"eps": 1e-8, "betas": (0.9, 0.95), "weight_decay": 1e-6, **self.optimizer.kwargs}
        lr, end, steps = given["lr"], self.scheduler.kwargs.get("eta_min", 0), self.scheduler.kwargs.get("T_max", 1e12)
        if train.learning_rate_init is not None:
            lr = train.learning_rate_init
            end = lr if train.learning_rate_target is None else train.learning_rate_target
            steps = train.lr_decay_steps or math.inf
        betas = train.opt_betas or given["betas"]
        constant = steps >= NO_DECAY or end >= lr or self.scheduler.name == "constant"
        return {
            "optim.lr": lr,
            "optim.beta1": betas[0],
            "optim.beta2": betas[1],
            "optim.eps": given["eps"],
            "optim.weight_decay": given["weight_decay"] if train.weight_decay is None else train.weight_decay,
            "optim.warmup_steps": train.lr_ramp_steps,
            "optim.schedule": "constant" if constant else "cosine",
            "optim.min_lr_ratio": 0 if constant else end / lr,
        }

    def _lengths(self, replicas: int) -> dict[str, Any]:
        """Return the keys of lengths and intervals: in PPO, trlX's optimizer steps become phases."""
        train, method = self.train, self.method
        if method.entry != "ppo":
            return {
                "data.seq_length": train.seq_length,
                "data.too_long": "truncate",
                "trainer.max_steps": train.total_steps,
                "trainer.eval_every": train.eval_interval,
                "checkpoint.every": min(train.checkpoint_interval, train.total_steps),
            }
        per_phase = method.ppo_epochs * -(-method.num_rollouts // train.batch_size)
        phases = max(1, min(train.epochs, -(-train.total_steps // per_phase)))
        return {
            "model.max_positions": train.seq_length,
            "rollout.too_long": "truncate",
            "trainer.max_phases": phases,
            "trainer.eval_every": max(1, train.eval_interval // per_phase),
            "checkpoint.every": max(1, min(phases, train.checkpoint_interval // per_phase)),
        }


def sampling(gen_kwargs: Mapping[str, Any], prompt_length: int = 0) -> dict[str, Any]:
    """Return keys of megarl's section `rollout` for arguments of transformers' `generate`.

    `prompt_length` is the number of tokens before a response that `max_length` counts: those of its prompt, or 1 for an
    encoder-decoder.
    """
    found: dict[str, Any] = {}
    for name, value in gen_kwargs.items():
        if name == "max_length":
            found.setdefault("max_new_tokens", max(1, int(value) - prompt_length))
        elif name == "top_k":
            found["top_k"] = int(value) or None
        elif name == "top_p":
            found["top_p"] = None if value >= 1 else value
        elif name == "do_sample":
            found |= {} if value else {"temperature": 0.0}
        elif name == "beta":
            found["ilql_beta"] = float(value[0] if isinstance(value, list | tuple) else value)
        elif name in ("max_new_tokens", "temperature", "min_p", "repetition_penalty"):
            found[name] = value
        elif name == "min_length":
            warn_once(get_logger(__name__), f"gen_kwargs.min_length={value} has no effect: responses end at EOS")
        elif name not in ("eos_token_id", "pad_token_id", "use_cache") and (name, value) != ("num_beams", 1):
            raise ConfigError(
                f"gen_kwargs.{name}={value!r} is not available: leave it out", key=f"gen_kwargs.{name}", value=value
            )
    return found


def default_ppo_config() -> TRLConfig:
    """Return trlX's defaults for PPO."""
    return TRLConfig(
        train=TrainConfig(trainer="AcceleratePPOTrainer"),
        model=ModelConfig(num_layers_unfrozen=2),
    )


def default_ilql_config() -> TRLConfig:
    """Return trlX's defaults for ILQL."""
    return TRLConfig(
        train=TrainConfig(
            seq_length=64, total_steps=1000, batch_size=128, checkpoint_interval=1000, trainer="AccelerateILQLTrainer"
        ),
        optimizer=OptimizerConfig(kwargs={"lr": 5e-5, "betas": (0.9, 0.95), "weight_decay": 1e-6}),
        scheduler=SchedulerConfig(kwargs={"T_max": 1e12, "eta_min": 5e-5}),
        method=ILQLMethod(),
    )


def default_sft_config() -> TRLConfig:
    """Return trlX's defaults for supervised fine-tuning."""
    return TRLConfig(
        train=TrainConfig(total_steps=1000, batch_size=8, trainer="AccelerateSFTTrainer"),
        optimizer=OptimizerConfig(kwargs={"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 1e-6}),
        scheduler=SchedulerConfig(kwargs={"T_max": 1e12, "eta_min": 1e-4}),
        method=SFTMethod(),
    )


def _filled(section: Any, values: Mapping[str, Any]) -> Any:
    for name, value in values.items():
        setattr(section, name, value)
    return section
