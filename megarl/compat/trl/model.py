"""A policy with a value head that loads from a path, and its reference."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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

    has_encoder: ClassVar[bool] = False

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
        if self.has_encoder != (self.session.config.model.encoder is not None):
            self.close()
            raise self._wrong_kind()
        return self.session

    def _wrong_kind(self) -> ConfigError:
        right = AutoModelForCausalLMWithValueHead if self.has_encoder else AutoModelForSeq2SeqLMWithValueHead
        kind = "has no encoder" if self.has_encoder else "is an encoder-decoder"
        return ConfigError(
            f"from_pretrained: {self.path} {kind}: use {right.__name__}.from_pretrained",
            key="from_pretrained",
            value=str(self.path),
            where=str(self.path),
        )

    def as_tensors(self, rollouts: Sequence[Rollout], *, with_query: bool) -> list[Tensor]:
        """Return the token ids of responses, with their queries before them or without."""
        return [torch.tensor(one.tokens if with_query else one.response) for one in rollouts]

    def without_start(self, response: Sequence[int]) -> list[int]:
        """Return the tokens of a response that the model generated."""
        return list(response)

    def sample(self, queries: Tensor | Sequence[Tensor], **drawn: Any) -> list[Rollout]:
        """Return a response to each query."""
        session = self.open(PPOConfig(batch_size=1, mini_batch_size=1), trains=False)
        return session.sample([query.tolist() for query in queries], 1, **drawn)

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """Return queries and responses [queries, time] as transformers' generate does, padded on the right.

        Args:
            input_ids: queries of one length, [queries, time].
            settings: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, do_sample.
        """
        drawn = drawing(settings)
        rollouts = self.sample(input_ids, **drawn)
        assert self.session is not None
        tokenizer = self.session.tokenizer
        padding = tokenizer.pad_id if self.has_encoder else tokenizer.eos_id or 0
        whole = self.as_tensors(rollouts, with_query=True)
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


class AutoModelForSeq2SeqLMWithValueHead(AutoModelForCausalLMWithValueHead):
    """The same of an encoder-decoder. Its encoder reads queries, which end with EOS as tokenizers encode them; what it
    generates begins with the start token instead of the query."""

    has_encoder = True

    @property
    def _start(self) -> int:
        assert self.session is not None
        return int(self.session.config.model.encoder.start_id)

    def as_tensors(self, rollouts: Sequence[Rollout], *, with_query: bool) -> list[Tensor]:
        """Return the token ids of the decoder: the start token, and the response."""
        return [torch.tensor([self._start, *one.response]) for one in rollouts]

    def without_start(self, response: Sequence[int]) -> list[int]:
        """Return the tokens of a response that the decoder generated, with the start token before it or without."""
        return list(response[1:] if response[:1] == [self._start] else response)


class Reference:
    """The policy as it is when its training begins: what `create_reference_model` returns."""

    def __init__(self, model: AutoModelForCausalLMWithValueHead) -> None:
        self.model = model


def create_reference_model(model: AutoModelForCausalLMWithValueHead) -> Reference:
    """Return the reference of a model: its weights before the first step."""
    return Reference(model)


_TOKENS = ("pad_token_id", "eos_token_id", "decoder_start_token_id")
"""Arguments of `generate` that the model knows."""


def drawing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' arguments of `generate` as keys of the section `rollout`."""
    found = {name: value for name, value in settings.items() if name not in _TOKENS}
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
