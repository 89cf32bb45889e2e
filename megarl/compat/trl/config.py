"""TRL's PPOConfig, and the keys of megarl that its fields are."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from megarl.compat.ppo import ppo_settings
from megarl.config.own_keys import words_of
from megarl.errors import ConfigError

_KL = {"kl": "k1", "abs": "abs", "mse": "k2"}


@dataclass
class PPOConfig:
    """Settings of PPOTrainer, by TRL's names and with TRL's defaults.

    Fields that only log, or that describe a layout of TRL's, are not here: megarl.default_config("ppo") has all keys,
    and `overrides` sets any of them.
    """

    model_name: str | None = None
    """For the script, as in from_pretrained(config.model_name)."""
    learning_rate: float = 1.41e-5
    batch_size: int = 128
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    steps: int = 20_000
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float | None = 6.0
    horizon: float = 10_000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    max_grad_norm: float | None = None
    early_stopping: bool = False
    target_kl: float = 1.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False
    seed: int = 0
    log_with: str | None = None
    overrides: tuple[str, ...] = ()
    """More settings of megarl, as on its command line: ("parallel.tp=2", "trainer.precision=bf16")."""
    processes: int | None = None
    """Number of processes to start (None: this one, or those of a launcher)."""

    def __post_init__(self) -> None:
        if self.kl_penalty not in _KL:
            raise ConfigError(
                f"kl_penalty={self.kl_penalty!r} is not available: use {', '.join(_KL)}",
                key="kl_penalty",
                value=self.kl_penalty,
                offers={"kl_penalty": list(_KL)},
            )
        for name, value, remedy in (
            ("use_score_norm", self.use_score_norm, "subtract the mean of the scores before step()"),
            ("log_with", self.log_with, "log what step() returns"),
        ):
            if value:
                raise ConfigError(f"{name}={value!r} is not available: {remedy}", key=name, value=value)
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size * gradient_accumulation_steps="
                f"{self.backward_batch_size}: change one of them",
                key="batch_size",
                value=self.batch_size,
            )

    def settings(self) -> list[str]:
        """Return the settings as megarl's command line would have them."""
        found: dict[str, Any] = {
            "seed": self.seed,
            "optim.lr": self.learning_rate,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.beta2": 0.999,
            "optim.weight_decay": 0,
            "optim.clip_grad": 0 if self.max_grad_norm is None else self.max_grad_norm,
            "ppo.rollouts": self.batch_size,
            **ppo_settings(self if self.adap_kl_ctrl else replace(self, target=None)),
            "ppo.kl_kind": _KL[self.kl_penalty],
            "ppo.whiten_rewards": self.whiten_rewards,
            "ppo.scale_scores": "running" if self.use_score_scaling else "ignored",
            "ppo.clip_scores": self.score_clip,
            "ppo.stop_at_kl": 1.5 * self.target_kl if self.early_stopping else None,
            "rollout.n": 1,
            "rollout.max_new_tokens": 16,  # of responses that name no length
            "trainer.global_batch_size": self.backward_batch_size,
            "trainer.micro_batch_size": self.mini_batch_size,
            "trainer.max_phases": self.steps,
            "trainer.eval_every": None,
        }
        return [*words_of(found), *self.overrides]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
