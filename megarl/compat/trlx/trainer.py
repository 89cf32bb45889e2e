"""`trlx.train`: the same arguments, run by `megarl.train`; and what it returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import megarl
from megarl.api import Trained
from megarl.compat.trlx.config import (
    SEQ2SEQ,
    TRLConfig,
    default_ilql_config,
    default_ppo_config,
    default_sft_config,
    sampling,
)
from megarl.config.compose import compose
from megarl.config.leaf import or_defaults
from megarl.config.world import data_parallel_size, world_size
from megarl.errors import ConfigError

Function = Callable[..., Any]


class Trainer:
    """A trained model, with the methods that trlX's README shows."""

    def __init__(self, trained: Trained, *, has_encoder: bool = False) -> None:
        self.trained, self.has_encoder = trained, has_encoder

    @property
    def history(self) -> list[dict[str, float]]:
        """Logged metrics, a row per step that has any."""
        return self.trained.history

    def generate(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Return prompts and responses as token ids [rows, time], padded on the right; of an encoder-decoder, the start
        token and responses.

        Args:
            input_ids: [rows, time] token ids of the prompts, as transformers' tokenizers return them.
            attention_mask: [rows, time], 0 at padding; None: there is none.
            kwargs: arguments of transformers' `generate`, such as do_sample, max_new_tokens, temperature, top_k, beta.
        """
        import torch

        from megarl.generate import open_generator
        from megarl.rollout.noise import EVALUATION
        from megarl.rollout.requests import repeat, sampling_from

        rows = torch.as_tensor(input_ids)
        rows = rows[None] if rows.dim() == 1 else rows
        mask = torch.ones_like(rows) if attention_mask is None else torch.as_tensor(attention_mask).reshape(rows.shape)
        prompts = [row[kept.bool()].tolist() for row, kept in zip(rows, mask, strict=True)]
        config = self.trained.settings("generate", sampling(kwargs, 1 if self.has_encoder else rows.shape[1]))
        with open_generator(config) as (generator, tokenizer, _):
            requests = repeat([tuple(prompt) for prompt in prompts], 1, sampling_from(config.rollout))
            rollouts = generator.generate(requests, stream=EVALUATION)
            encoder = generator.config.encoder
            openings = prompts if encoder is None else [[encoder.start_id]] * len(prompts)
            whole = [torch.tensor([*opening, *one.response]) for opening, one in zip(openings, rollouts, strict=True)]
            padding = tokenizer.eos_id if encoder is None else tokenizer.pad_id
            return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=padding)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a new folder that transformers loads."""
        self.trained.save_pretrained(folder)


def train(
    model_path: str | None = None,
    reward_fn: Function | None = None,
    dataset: tuple[Sequence[Any], Sequence[float]] | None = None,
    samples: Sequence[Any] | None = None,
    rewards: Sequence[Any] | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
    metric_fn: Function | None = None,
    config: TRLConfig | None = None,
    stop_sequences: Sequence[str] | None = None,
) -> Trainer:
    """Train by PPO with a reward function, by ILQL on samples with rewards, or supervised on samples alone.

    Args:
        model_path: a model of the hub or a folder; it replaces `config.model.model_path`.
        reward_fn: called as `fn(samples=..., prompts=..., outputs=..., **metadata)`.
        dataset: samples and their rewards, as trlX's older versions took them.
        samples: texts, [prompt, output] pairs, or dialogues.
        rewards: a number for each sample.
        prompts: what a reward function's responses answer; None: the tokenizer's first token.
        eval_prompts: what evaluations answer.
        metric_fn: measures the responses of evaluations.
        config: trlX's configuration; None: the defaults of the algorithm that the arguments ask for.
        stop_sequences: texts that end a response.
    """
    if dataset is not None:
        samples, rewards = dataset
    if config is None:
        default = default_ppo_config if reward_fn is not None else default_ilql_config
        config = default_sft_config() if reward_fn is None and rewards is None else default()
    if not isinstance(config, TRLConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}: give a TRLConfig, as from default_ppo_config()", key="config"
        )
    if model_path is not None:
        config = TRLConfig.update(config, {"model.model_path": str(model_path)})
    tree = settings_of(config)
    _check_architecture(config, tree)
    if reward_fn is not None and prompts is None:
        prompts = [_first_token(config)]
    evaluates: dict[str, Any] = {"eval_prompts": eval_prompts, "stop_sequences": stop_sequences}
    if config.method.entry == "sft":  # does not generate
        evaluates = {}
    trained = megarl.train(
        config.model.model_path,
        reward_fn=reward_fn,
        prompts=prompts,
        samples=samples,
        rewards=rewards,
        metric_fn=metric_fn,
        config=tree,
        **evaluates,
    )
    return Trainer(trained, has_encoder=config.model.model_arch_type == SEQ2SEQ)


def _check_architecture(config: TRLConfig, tree: Any) -> None:
    """Raise if `model.model_arch_type` is not what the model is."""
    from megarl.models.exchange.families import add_families
    from megarl.models.exchange.formats import open_source

    add_families(or_defaults(tree, "extensions").families)
    given, path = config.model.model_arch_type, config.model.model_path
    found = "causal" if open_source(path).model.encoder is None else SEQ2SEQ
    if given != found:
        raise ConfigError(
            f"model.model_arch_type={given!r} is not what {path} is: use {found}",
            key="model.model_arch_type",
            value=given,
            offers={"model.model_arch_type": [found]},
        )


def _first_token(config: TRLConfig) -> str:
    """Return the text of the token that trlX's responses begin with if there are no prompts."""
    from transformers import AutoTokenizer

    path = config.tokenizer.tokenizer_path or config.model.tokenizer_path or config.model.model_path
    tokenizer = AutoTokenizer.from_pretrained(path)
    token: str | None = tokenizer.bos_token or tokenizer.eos_token
    if token is None:
        raise ConfigError(
            f"prompts are missing, and the tokenizer at {path} has no token that begins a text: give prompts=",
            key="prompts",
        )
    return token


def settings_of(config: TRLConfig) -> Any:
    """Return megarl's configuration for trlX's."""
    entry = config.method.entry
    own = compose(entry, list(config.overrides))[0]
    replicas = max(1, data_parallel_size(own, world_size(own, os.environ)))
    return megarl.default_config(entry, *config.settings(replicas))
