"""Which records are read, and how they become sequences."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megarl.config.leaf import Section, leaf, optional_section
from megarl.config.offers import Refusal
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.logging import get_logger, warn_once

TOO_LONG = ("truncate", "drop", "error")
ON_ERROR = ("error", "drop")
SOURCES = (
    "{}: files, folders, names of hub data sets, or functions (package.module:function or file.py:function), as a list."
)


@dataclass
class TrainSourcesConfig(Section):
    """Where records to train on come from."""

    train: list[str] = leaf([], SOURCES.format("Records to train on"))
    train_split: str = leaf(
        "train",
        "Split to train on, of hub data sets, of folders written by save_to_disk, and of folders with files named "
        "after splits.",
    )


@dataclass
class EvalSourcesConfig(Section):
    """Where records to evaluate on come from, and how any record is read."""

    eval: list[str] = leaf([], SOURCES.format("Records to evaluate on"))
    eval_split: str = leaf(
        "validation",
        "Split to evaluate on, of hub data sets, of folders written by save_to_disk, and of folders with files named "
        "after splits.",
    )
    options: dict[str, Any] = leaf({}, "Keyword arguments of every function in data.eval.")
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


@dataclass
class SourcesConfig(EvalSourcesConfig, TrainSourcesConfig):
    """Where records to train and to evaluate on come from, whatever they are used for."""

    eval: list[str] = leaf([], SOURCES.format("Records to evaluate on") + " Empty: no evaluation.")
    options: dict[str, Any] = leaf(
        {},
        "Keyword arguments of every function in data.train, data.eval and clone.data.",
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
        "Fields that records have. text: data.text_key; completion: data.prompt_key and data.completion_key, or "
        "instruction, input and output; chat: data.messages_key. auto: the first of chat, completion and text whose "
        "fields a record has.",
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
        "Tokens that are trained on. completion: the completion, or the assistant's messages of a conversation; all: "
        "every token. Plain text is always trained on as a whole.",
        ("completion", "all"),
    )
    pack: bool = leaf(
        False,
        "Put several short records into one training sequence, without attention between them, which saves padding. "
        "Excludes data.group_by_length.",
    )
    group_by_length: bool = leaf(
        False,
        "Put records of similar length into one batch, which saves padding. Requires data.shuffle=true and "
        "data.pack=false.",
    )
    shuffle: bool = leaf(True, "Read the records in a new random order every epoch; the order depends on the seed.")
    eval_limit: int | None = leaf(
        None, "Maximum number of records to evaluate on, the first ones (null: all).", at_least=1
    )

    def check(self) -> None:
        """Refuse an empty training set and orders that exclude each other.

        Warn if the demo's evaluation set is used with another training set.
        """
        _require_data(self.train, "train.jsonl")
        if self.pack and self.group_by_length:
            raise Refusal(
                "data.pack=true and data.group_by_length=true: packed sequences are all about equally long",
                {"data.pack": [False], "data.group_by_length": [False]},
                key="data.pack",
                value=True,
            )
        if self.group_by_length and not self.shuffle:
            raise Refusal(
                "data.group_by_length=true reorders records, which data.shuffle=false forbids",
                {"data.group_by_length": [False], "data.shuffle": [True]},
                key="data.group_by_length",
                value=True,
            )
        if DEMO_EVAL in self.eval and DEMO_TRAIN not in self.train:
            warn_once(
                get_logger(__name__),
                "data.eval is the demo set while data.train is not: set data.eval=[...], or [] for no evaluation",
            )


@dataclass
class MixingConfig(Section):
    """How often the prompts of each entry of data.train are used."""

    weights: list[float] = leaf(
        [],
        "How often prompts of each entry of data.train are used, relative to the others: one number per entry. All "
        "prompts of an entry are used, in random order, before any is repeated.",
        at_least=0,
    )
    final_weights: list[float] = leaf(
        [],
        "A curriculum: the weights move in a straight line to these, one per entry (empty: they stay).",
        at_least=0,
    )
    over_phases: int | None = leaf(
        None,
        "Number of phases after which data.mixing.final_weights are reached (null: trainer.max_phases).",
        at_least=1,
    )


@dataclass
class PromptDataConfig(SourcesConfig):
    """Which prompts are trained and evaluated on. The other fields of a record are passed to the reward function."""

    train: list[str] = leaf([], SOURCES.format("Prompts to train on"))
    eval: list[str] = leaf([], SOURCES.format("Prompts of evaluations") + " Empty: no evaluation.")
    mixing: MixingConfig | None = optional_section(
        MixingConfig,
        "Use the entries of data.train with weights (null: all prompts equally often).",
        needs="weights",
    )

    def check(self) -> None:
        """Refuse an empty training set, and weights that do not fit it."""
        _require_data(self.train, "prompts.jsonl", " of prompts")
        mixing = self.mixing
        if mixing is None:
            return
        for key, weights in (("weights", mixing.weights), ("final_weights", mixing.final_weights)):
            wrong = len(weights) != len(self.train) if weights or key == "weights" else False
            if wrong or (weights and not 0 < sum(weights) < math.inf):
                raise Refusal(
                    f"data.mixing.{key}={weights} needs one number for each of the {len(self.train)} entries of "
                    "data.train, at least one of them above 0",
                    {f"data.mixing.{key}": [[1.0] * len(self.train)]},
                    key=f"data.mixing.{key}",
                    value=weights,
                )


@dataclass
class HeldOutDataConfig(EvalSourcesConfig):
    """Which prompts a trained model is evaluated on. The other fields of a record are passed to the reward function."""

    eval: list[str] = leaf([], SOURCES.format("Prompts to evaluate on"))


@dataclass
class OfflineDataConfig(SourcesConfig):
    """Which samples with rewards are trained on, and which prompts evaluations use."""

    train: list[str] = leaf([], SOURCES.format("Samples with rewards to train on"))
    eval: list[str] = leaf([], SOURCES.format("Prompts of evaluations") + " Empty: no evaluation.")
    samples_key: str = leaf(
        "samples",
        "Field of a record that holds the sample: a text (all of it output), [prompt, output], or a longer list that "
        "alternates prompts and outputs. Records without it are read by data.messages_key.",
    )
    rewards_key: str = leaf(
        "rewards",
        "Field of a record that holds the reward: a number, which counts at the last output, or one number for each "
        "output. Rewards are standardised so that returns have mean 0 and standard deviation 1 over the data.",
    )
    seq_length: int = leaf(128, "Maximum number of tokens per sample.", at_least=2, at_most=2**31 - 1)
    too_long: str = leaf(
        "truncate",
        "What happens to samples longer than data.seq_length: their end is cut off, and later rewards count at the "
        "last remaining output token; they are left out; or the run ends with an error.",
        TOO_LONG,
    )
    shuffle: bool = leaf(True, "Read the samples in a new random order every epoch; the order depends on the seed.")
    cache: str | None = leaf(
        "~/.cache/megarl",
        "Folder in which tokenised samples are kept for later runs, if data.train names only files and folders (null:"
        " they are not kept).",
    )

    def check(self) -> None:
        """Refuse an empty training set."""
        _require_data(self.train, "samples.jsonl", " of samples")


@dataclass
class PairDataConfig(SourcesConfig):
    """Which pairs of a preferred and a rejected response are trained and evaluated on."""

    train: list[str] = leaf([], SOURCES.format("Pairs to train on"))
    eval: list[str] = leaf([], SOURCES.format("Pairs to evaluate on") + " Empty: no evaluation.")
    prompt_key: str = leaf(
        "prompt",
        "Field of a record that holds the prompt. In records without it, the prompt is their instruction and input, or "
        "else what both responses begin with.",
    )
    chosen_key: str = leaf(
        "chosen", "Field of a record that holds the preferred response: a text, or a list of messages."
    )
    rejected_key: str = leaf(
        "rejected", "Field of a record that holds the rejected response: a text, or a list of messages."
    )
    seq_length: int = leaf(
        128, "Maximum number of tokens of a prompt with one response.", at_least=2, at_most=2**31 - 1
    )
    too_long: str = leaf(
        "truncate",
        "What happens to pairs with more than data.seq_length tokens in one of the two: the end is cut off, they are "
        "left out, or the run ends with an error.",
        TOO_LONG,
    )
    on_error: str = leaf(
        "error",
        "What happens to records that cannot be used, such as two equal responses or an empty one: the run ends with "
        "an error, or they are left out, counted and named.",
        ON_ERROR,
    )
    shuffle: bool = leaf(True, "Read the pairs in a new random order every epoch; the order depends on the seed.")
    pack: bool = leaf(
        True, "Put several short pairs into one sequence of a forward pass, without attention between responses."
    )
    eval_limit: int | None = leaf(None, "Number of pairs to evaluate on (null: all).", at_least=1)

    def check(self) -> None:
        """Refuse an empty training set."""
        _require_data(self.train, "pairs.jsonl", " of pairs")


@dataclass
class LabelledDataConfig(PairDataConfig):
    """Which responses with a label are trained and evaluated on. Pairs count as two of them."""

    completion_key: str = leaf("completion", "Field of a record that holds a response with a label.")
    label_key: str = leaf(
        "label", "Field of a record that holds its label: true for a desirable response, false for an undesirable one."
    )


@dataclass
class ScoredDataConfig(PairDataConfig):
    """Which judged responses a reward model is trained and evaluated on."""

    train: list[str] = leaf([], SOURCES.format("Judged responses to train on"))
    eval: list[str] = leaf([], SOURCES.format("Judged responses to evaluate on") + " Empty: no evaluation.")
    margin_key: str = leaf(
        "margin",
        "Field of a record that holds by how much the better response should lead: a number, which may be missing.",
    )
    responses_key: str = leaf(
        "responses",
        "Field of a record that holds several responses to one prompt: a list of texts, or of lists of messages.",
    )
    ranks_key: str = leaf(
        "ranks",
        "Field of a record that holds the rank of each response of a list: 1 is the best, and equal ranks are not "
        "compared. Without ranks and scores, the best response comes first.",
    )
    scores_key: str = leaf(
        "scores", "Field of a record that holds the score of each response of a list: higher is better."
    )
    completion_key: str = leaf("completion", "Field of a record that holds a single response with a score.")
    score_key: str = leaf("score", "Field of a record that holds the score of a single response.")
    steps_key: str = leaf("steps", "Field of a record that holds a response step by step: a list of texts.")
    labels_key: str = leaf("labels", "Field of a record that holds the score of each step; true is 1 and false is 0.")
    step_separator: str = leaf("\n", "Text between two steps.")


def _require_data(train: list[str], example: str, of: str = "") -> None:
    if not train:
        raise Refusal(
            f"data.train is empty: name files{of}, for example data.train=[{example}]", key="data.train", value=train
        )
