"""Which records are read, and how they become sequences."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.leaf import Section, leaf
from megarl.config.offers import Refusal
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.logging import get_logger, warn_once

TOO_LONG = ("truncate", "drop", "error")
SOURCES = (
    "{}: files, folders, names of hub data sets, or functions (package.module:function or file.py:function), as a list."
)


@dataclass
class SourcesConfig(Section):
    """Where records come from, whatever they are used for."""

    train: list[str] = leaf([], SOURCES.format("Records to train on"))
    eval: list[str] = leaf([], SOURCES.format("Records to evaluate on") + " Empty: no evaluation.")
    options: dict[str, Any] = leaf({}, "Keyword arguments of the functions among the sources of data.")
    train_split: str = leaf("train", "Split of a hub data set that is trained on.")
    eval_split: str = leaf("validation", "Split of a hub data set that is evaluated on.")
    prompt_key: str = leaf("prompt", "Field of a record that holds the prompt.")
    messages_key: str = leaf("messages", "Field of a record that holds a conversation: a list of messages.")
    chat_template: str | None = leaf(
        None,
        "Jinja template that turns conversations into text, or a file that holds one (null: the tokenizer's own "
        "template, or the built-in one if it has none).",
    )


@dataclass
class DataConfig(SourcesConfig):
    """Which records are trained and evaluated on, and how they become batches."""

    eval: list[str] = leaf(
        [],
        SOURCES.format("Records to evaluate on") + " Empty: no evaluation. The default is the demo set, but only while "
        "data.train is the demo set too.",
    )
    format: str = leaf(
        "auto",
        "What records contain. auto: the fields of each record decide.",
        ("auto", "text", "completion", "chat"),
    )
    text_key: str = leaf("text", "Field of a text record that holds the text.")
    completion_key: str = leaf("completion", "Field of a completion record that holds the completion.")
    seq_length: int = leaf(128, "Maximum number of tokens per training sequence.", at_least=2, at_most=2**31 - 1)
    too_long: str = leaf(
        "truncate",
        "What happens to records longer than data.seq_length: their end is cut off, they are left out, or the run ends "
        "with an error.",
        TOO_LONG,
    )
    loss_on: str = leaf(
        "completion",
        "Tokens that are trained on: completions and the assistant's messages, or all.",
        ("completion", "all"),
    )
    pack: bool = leaf(
        False, "Put several short records into one sequence, without attention between them. Saves padding."
    )
    group_by_length: bool = leaf(False, "Put records of similar length into one batch. Saves padding.")
    shuffle: bool = leaf(True, "Read the records in a new random order every epoch; the order depends on the seed.")
    eval_limit: int | None = leaf(None, "Number of records to evaluate on (null: all).", at_least=1)

    def check(self) -> None:
        """Refuse an empty training set; warn where the demo's evaluation set judges another training set."""
        _require_data(self.train, "train.jsonl")
        if DEMO_EVAL in self.eval and DEMO_TRAIN not in self.train:
            warn_once(
                get_logger(__name__),
                "data.eval is the demo set while data.train is not: set data.eval=[...], or [] for no evaluation",
            )


@dataclass
class PromptDataConfig(SourcesConfig):
    """Which prompts are trained and evaluated on. The other fields of a record are passed to the reward function."""

    train: list[str] = leaf([], SOURCES.format("Prompts to train on"))
    eval: list[str] = leaf([], SOURCES.format("Prompts of evaluations") + " Empty: no evaluation.")

    def check(self) -> None:
        """Refuse an empty training set."""
        _require_data(self.train, "prompts.jsonl", " of prompts")


@dataclass
class OfflineDataConfig(SourcesConfig):
    """Which samples with rewards are trained on, and which prompts evaluations use."""

    train: list[str] = leaf([], SOURCES.format("Samples with rewards to train on"))
    eval: list[str] = leaf([], SOURCES.format("Prompts of evaluations") + " Empty: no evaluation.")
    samples_key: str = leaf(
        "samples",
        "Field of a record that holds the sample: a text, [prompt, output], or a longer dialogue of such turns.",
    )
    rewards_key: str = leaf(
        "rewards", "Field of a record that holds the reward of its sample: a number, or one number for each output."
    )
    seq_length: int = leaf(128, "Maximum number of tokens per sample.", at_least=2, at_most=2**31 - 1)
    too_long: str = leaf(
        "truncate",
        "What happens to samples longer than data.seq_length: their end is cut off, they are left out, or the run ends "
        "with an error.",
        TOO_LONG,
    )
    shuffle: bool = leaf(True, "Read the samples in a new random order every epoch; the order depends on the seed.")
    cache: str | None = leaf(
        "~/.cache/megarl", "Folder in which tokenised samples are kept for later runs (null: they are not kept)."
    )

    def check(self) -> None:
        """Refuse an empty training set."""
        _require_data(self.train, "samples.jsonl", " of samples")


def _require_data(train: list[str], example: str, of: str = "") -> None:
    if not train:
        raise Refusal(
            f"data.train is empty: name files{of}, for example data.train=[{example}]", key="data.train", value=train
        )
