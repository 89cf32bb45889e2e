"""A policy with a value head that loads from a path, and its reference."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megarl.compat.lora import adapter_settings
from megarl.compat.trl.config import PPOConfig
from megarl.config.own_keys import words_of
from megarl.errors import ConfigError
from megarl.inputs import default_config
from megarl.rollout.requests import Rollout
from megarl.session import Session

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on


class AutoModelForCausalLMWithValueHead:
    """A policy with a value head. It is built when it is first used, with the settings of its trainer if it has one."""

    def __init__(self, path: str | Path | None, settings: Sequence[str] = ()) -> None:
        self.path, self.settings = path, list(settings)
        self.session: Session | None = None
        self.folder: str | None = None
        self.trains = False  # whether a PPOTrainer opened the session

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        peft_config: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        **others: Any,
    ) -> Self:
        """Return the model at a path: a Hugging Face folder or hub name, or a checkpoint of megarl.

        Args:
            path: folder or hub name.
            peft_config: a LoraConfig, or a mapping with r, lora_alpha, lora_dropout and target_modules.
            load_in_4bit: keep the weights beside adapters in 4 bits.
            load_in_8bit: keep them in 8 bits.
            others: refused.
        """
        if not isinstance(path, str | Path):
            raise ConfigError(
                f"from_pretrained takes a folder or a hub name, not a {type(path).__name__}: call save_pretrained on "
                "it, and give the folder",
                key="path",
            )
        for name, value in others.items():
            raise ConfigError(
                f"from_pretrained has no argument {name}: megarl's keys are set by PPOConfig(overrides=(...))",
                key=name,
                value=value,
            )
        return cls(path, _adapter_settings(peft_config, 4 if load_in_4bit else 8 if load_in_8bit else None))

    def open(self, config: PPOConfig, *, trains: bool) -> Session:
        """Build the model with a trainer's settings, or return the session that has it."""
        if self.session is not None and (self.trains or not trains):
            return self.session
        self.close()
        self.folder = tempfile.mkdtemp(prefix="megarl-trl-")
        kept = [f"run.dir={self.folder}/run", "logger.tensorboard=false", "logger.csv=false", "checkpoint.best.keep=0"]
        tree = default_config("ppo", *config.settings(), *self.settings, *kept)
        unused = ["a"]  # queries come with every call, and no prompt is ever drawn from the data
        self.session = Session(tree, model=self.path, prompts=unused, processes=config.processes)
        self.trains = trains
        return self.session

    def sample(self, queries: Tensor | Sequence[Tensor], **drawn: Any) -> list[Rollout]:
        """Return a response to each query."""
        session = self.open(PPOConfig(batch_size=1, mini_batch_size=1), trains=False)
        return session.sample([query.tolist() for query in queries], 1, **drawn)

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """Return queries and responses [queries, time] as transformers' generate does, padded with EOS.

        Args:
            input_ids: queries of one length, [queries, time].
            settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, do_sample.
        """
        drawn = drawing(settings)
        rollouts = self.sample(input_ids, **drawn)
        assert self.session is not None
        padding = self.session.tokenizer.eos_id or 0
        whole = [torch.tensor(rollout.tokens) for rollout in rollouts]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=padding)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the policy as a folder that transformers loads, with an adapter merged."""
        self.open(PPOConfig(batch_size=1, mini_batch_size=1), trains=False).save_pretrained(folder)

    def close(self) -> None:
        """Release the model. Nothing of it is kept that was not saved."""
        if self.session is not None:
            self.session.close()
            self.session, self.trains = None, False
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


class Reference:
    """The policy as it is when its training begins: what `create_reference_model` returns."""

    def __init__(self, model: AutoModelForCausalLMWithValueHead) -> None:
        self.model = model


def create_reference_model(model: AutoModelForCausalLMWithValueHead) -> Reference:
    """Return the reference of a model: its weights before the first step."""
    return Reference(model)


def as_tensors(rollouts: Sequence[Rollout]) -> list[Tensor]:
    """Return the token ids of responses."""
    return [torch.tensor(rollout.response) for rollout in rollouts]


def drawing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' arguments of `generate` as keys of the section `rollout`."""
    found = {name: value for name, value in settings.items() if name not in ("pad_token_id", "eos_token_id")}
    if found.pop("do_sample", True) is False:
        found["temperature"] = 0.0
    if not found.get("top_k", 1):
        found["top_k"] = None
    if found.get("top_p") == 1.0:
        found["top_p"] = None
    if found.get("min_length", -1) in (-1, 0):
        found.pop("min_length", None)
    known = {"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
    for name in found.keys() - known:
        raise ConfigError(
            f"generate has no argument {name}: it takes {', '.join(sorted(known))} and do_sample",
            key=name,
            value=found[name],
        )
    return found


def _adapter_settings(peft_config: Any, bits: int | None) -> list[str]:
    if peft_config is None:
        if bits is not None:
            raise ConfigError(
                f"load_in_{bits}bit needs an adapter beside the weights: give peft_config", key=f"load_in_{bits}bit"
            )
        return []
    bits_kept = {} if bits is None else {"adapter.base_bits": bits}
    return list(words_of({**adapter_settings(peft_config), **bits_kept}))
