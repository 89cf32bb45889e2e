"""What the cases train on: the cross entropy of fine-tuning, and PPO's losses with a value head, over fixed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.algorithms import gae
from megarl.config.leaf import or_defaults
from megarl.config.ppo import PPOConfig
from megarl.config.sft import SFTConfig
from megarl.conformance.features import MODEL
from megarl.experience.shaping import Shaping
from megarl.models.exchange.pretrained import Sources
from megarl.models.gpt import GPT, TokenLogprobs
from megarl.models.roles import Role
from megarl.modules import ppo_models
from megarl.modules.critics import SharedCritic
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.ppo_loss import PolicyLoss
from megarl.modules.sft import SFT
from megarl.parallel.passes import CountFn, LossFn, Outputs
from megarl.parallel.rows import Microbatch, Rows

VOCAB = 101
SHORT = (33, 5, 17, 9, 26, 3, 12, 21, 7)
LONG = (290, 12, 150, 40, 231, 5, 66, 180, 21)
"""Tokens of each row, in PPO and in fine-tuning: attention has other kernels for few tokens than for many, also for the
slices of two context-parallel ranks. The number of rows leaves filler rows in most cuts of the batch."""
PROMPT = 2
"""Tokens of each prompt."""
COMMON: Mapping[str, Any] = {
    "data.pack": False,
    "data.seq_length": MODEL["model.max_positions"],
    "data.train": ["rows.jsonl"],  # the rows are those below: nothing is read
    "ppo.pack": False,
    "ppo.kl_in": "loss",
    "ppo.kl_kind": "k3",
    "ppo.entropy_coef": 0.01,
    "reward.fn": "megarl.rewards.builtin:length",  # nor is anything scored
    "rollout.max_new_tokens": max(SHORT) - PROMPT,
    "trainer.micro_batch_size": 2,
    "optim.lr": 1e-2,
    "optim.warmup_steps": 0,
    "optim.schedule": "constant",
    # As large as gradients are: an update then follows from their size, a wrong norm shows, and rounding stays small.
    "optim.eps": 1e-3,
    "optim.clip_grad": 0.2,
}
"""Settings of all cases beside the model's. The limit of the gradient's norm is below every norm."""


@dataclass(frozen=True)
class Objective:
    """What a model is trained for.

    Attributes:
        name: sft or ppo.
        config: the tree of the settings.
        role: the trained model.
        rows: what it learns from.
        share_bins: whether short rows share a bin.
        loss, count: the loss and its denominators.
        outputs: what a forward pass returns, [bins, time] each.
    """

    name: str
    config: Any
    role: Role
    rows: Rows
    share_bins: bool
    loss: LossFn
    count: CountFn
    outputs: ForwardOutputs


class ForwardOutputs(Protocol):
    """Returns what a forward pass computes for each token."""

    def __call__(self, model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
        """Return outputs [bins, time] by name."""


def tree(kind: type, settings: Mapping[str, Any]) -> Any:
    """Return a configuration tree with these settings by dotted key. Keys that the tree lacks are left out."""
    config = kind()
    for key, value in {**COMMON, **settings}.items():
        section, _, name = key.rpartition(".")
        holder = _opened(config, section.split("."))
        if holder is not None and hasattr(holder, name):
            setattr(holder, name, value)
    return config


def _opened(section: Any, path: list[str]) -> Any:
    """Return a section by its path, with optional ones on it switched on; None if the tree lacks it."""
    for name in path:
        if not hasattr(section, name):
            return None
        setattr(section, name, or_defaults(section, name))
        section = getattr(section, name)
    return section


def trees(settings: Mapping[str, Any]) -> list[Any]:
    """Return the configuration tree of each objective."""
    return [tree(kind, settings) for kind in (SFTConfig, PPOConfig)]


def objectives(settings: Mapping[str, Any]) -> list[Objective]:
    """Return the two objectives with these settings."""
    return [_fine_tuning(tree(SFTConfig, settings)), _reinforcement(tree(PPOConfig, settings))]


def _fine_tuning(config: SFTConfig) -> Objective:
    def outputs(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
        return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

    (role,) = SFT.roles(config, VOCAB, Sources())
    return Objective("sft", config, role, ragged_rows(LONG), config.data.pack, cross_entropy, count_targets, outputs)


def _reinforcement(config: PPOConfig) -> Objective:
    critic = SharedCritic(config.ppo.clip_value, config.ppo.vf_coef)

    def logprobs(model: GPT, hidden: Tensor, batch: Microbatch, entropy: bool = False) -> TokenLogprobs:
        return model.logprobs(hidden, batch.targets, batch.target_mask, config.rollout.temperature, entropy)

    def outputs(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
        return {"logprobs": logprobs(model, hidden, batch).logprobs, **critic.values_beside(model, hidden)}

    loss = PolicyLoss(config, Shaping(config.ppo, config.rollout.max_new_tokens), critic, logprobs)
    role = ppo_models.roles(config, VOCAB, Sources())[0]
    return Objective(
        "ppo", config, role, with_advantages(ragged_rows(SHORT)), config.ppo.pack, loss, loss.count, outputs
    )


def ragged_rows(tokens_of_rows: Sequence[int]) -> Rows:
    """Return rows of these lengths, [rows, time], whose prompts have two tokens."""
    lengths = torch.tensor(tokens_of_rows)
    inside = torch.arange(max(tokens_of_rows)) < lengths[:, None]
    tokens = torch.randint(1, VOCAB, inside.shape, generator=torch.Generator().manual_seed(1)) * inside
    mask = inside.float()
    mask[:, :PROMPT] = 0.0
    return Rows(tokens, lengths, mask)


def with_advantages(rows: Rows) -> Rows:
    """Return the rows with the columns that PPO's losses read, [rows, time] each: those of a policy that has moved."""
    generator = torch.Generator().manual_seed(2)
    mask = rows.action_mask

    def noise(mean: float, std: float) -> Tensor:
        return torch.normal(mean, std, mask.shape, generator=generator) * mask

    values, rewards = noise(0.0, 0.5), noise(0.1, 0.5)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    return rows.with_columns(
        old_logprobs=noise(-4.6, 0.3),
        ref_logprobs=noise(-4.6, 0.3),
        values=values,
        advantages=advantages,
        returns=returns,
    )
