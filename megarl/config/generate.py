"""The configuration of `python -m megarl.generate`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.rules import responses_fit_model
from megarl.config.sections.rollout import GuidedRolloutConfig
from megarl.config.sections.trainer import DevicesConfig
from megarl.config.trees import Tree


def prompts_or_chat(config: Any, world_size: int) -> None:
    """Require exactly one of prompts and chat=true."""
    if config.chat == (config.prompts is not None):
        raise Refusal(
            "chat=true and prompts exclude each other: leave one out"
            if config.chat
            else "prompts is empty: give a file or a text, prompts=questions.jsonl, or --chat to talk to the model",
            key="prompts",
            value=config.prompts,
        )


@dataclass
class GenerateConfig(Tree):
    """The keys of generation with a trained model."""

    rules: ClassVar[tuple[Rule, ...]] = (*Tree.rules, responses_fit_model, prompts_or_chat)

    prompts: str | None = leaf(None, "Prompts: a .jsonl, .json, .parquet or .txt file, or the text of a single prompt.")
    prompt_key: str = leaf(
        "prompt",
        "Field of a record that holds the prompt. In records without it, the prompt is their instruction and input.",
    )
    messages_key: str = leaf("messages", "Field of a record that holds a conversation: a list of messages.")
    chat_template: str | None = leaf(
        None,
        "Jinja template that turns conversations into text, or a file that holds one (null: the tokenizer's own "
        "template, or the built-in one if it has none).",
    )
    out: str | None = leaf(
        None,
        "JSON-lines file, which must not exist yet, for the responses. Each is written when it is complete, those of "
        "other replicas at the end (null: standard output).",
    )
    chat: bool = leaf(
        False,
        "Talk to the model in the terminal; --chat does the same. Excludes prompts; rollout.n has no effect.",
    )
    system: str | None = leaf(
        None, "System message at the beginning of a chat; --system TEXT does the same (null: none)."
    )
    plain: bool | None = leaf(
        None,
        "Chat without a template: the model continues the text of the conversation, whose messages are joined by line "
        "feeds (null: only where the tokenizer has no template and cannot encode the built-in one).",
    )
    rollout: GuidedRolloutConfig = section(GuidedRolloutConfig)
    trainer: DevicesConfig = section(DevicesConfig)
