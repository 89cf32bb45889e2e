"""Settings of what scores responses: functions and reward models."""

# ruff: noqa: RUF009 - `leaf` and `optional_section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megarl.config.forms import server_url
from megarl.config.leaf import A_YEAR_S, Section, leaf, optional_section
from megarl.config.offers import Refusal
from megarl.config.reward_terms import FN, MODEL, URL, Term, read_terms, reward_term
from megarl.disk import shown

SCORER_START_S = 120.0
"""Seconds that the scoring process may take to start and to load its function."""
ON_ERROR = ("error", "drop")


@dataclass
class RewardCallsConfig(Section):
    """How the reward function or the reward servers are called, and what happens to samples without a score."""

    timeout: float = leaf(
        60.0,
        "Seconds that one call may take before its process is killed, or its connection closed. See also "
        "parallel.timeout_s.",
        above=0,
        at_most=A_YEAR_S,
    )
    retries: int = leaf(
        1,
        "Number of times that a failed call is repeated; with reward.url, on every server.",
        at_least=0,
        at_most=1000,
    )
    batch_size: int | None = leaf(
        None,
        "Maximum number of samples per call (null: all in one call; with reward.url, one call for each server, or "
        "calls of 256 samples if there are more).",
        at_least=1,
        at_most=2**24,
    )
    devices: str = leaf("", "CUDA_VISIBLE_DEVICES of the scoring process (empty: it sees no GPU).")
    on_error: str = leaf(
        "error",
        "What happens to samples that have no score after the last try, also of a reward model (reward.model): the run "
        "ends with an error, or they are left out and counted.",
        ON_ERROR,
    )


@dataclass
class RewardConfig(Section):
    """The reward function, which runs in its own process, the reward model, the reward servers, or a sum of these."""

    fn: str | None = leaf(
        None,
        "Reward function, as package.module:function or file.py:function; several as a weighted sum, '0.7*a:f + "
        "0.3*b:g'. It is called with samples, prompts, outputs, tokenizer and the other fields of the prompts' "
        "records, and returns a number, or a number per token, for each sample. ILQL calls it in evaluations only.",
    )
    model: str | None = leaf(
        None,
        "Reward model, instead of a function: a checkpoint or run folder of train_rm, or a Hugging Face folder or hub "
        "name of a model for sequence classification with one label. It runs on the run's own processes and in their "
        "layout; with parallel.offload, its weights leave the device between scorings.",
    )
    url: list[str] = leaf(
        [],
        "Reward servers, instead of a function or a model: URLs of megarl.serve_reward, all with the same reward "
        "model. Calls are shared out over them. A server that fails is left aside for a while. A token that they want "
        "is read from the environment variable MEGARL_REWARD_TOKEN.",
        form=server_url,
    )
    terms: list[dict[str, Any]] = leaf(
        [],
        "Weighted sum of several functions, reward models and servers, instead of a single one: a list of terms such "
        "as {fn: rewards.py:score, weight: 0.5, options: {}, name: length}, {model: PATH} and {url: [http://HOST:PORT]"
        "}. Only fn, model or url is required. Each term's mean is logged as rollout/score/NAME.",
        form=reward_term,
    )
    options: dict[str, Any] = leaf(
        {},
        "Additional keyword arguments of the reward function. They override fields of the records.",
    )
    calls: RewardCallsConfig | None = optional_section(
        RewardCallsConfig,
        "How the reward function or the reward servers are called, and what happens to samples without a score; null "
        "means the defaults.",
        null_is_defaults=True,
    )

    @property
    def call_settings(self) -> RewardCallsConfig:
        """The settings of calls, at their defaults where they are null."""
        return self.calls or RewardCallsConfig()

    @property
    def sources(self) -> list[Term]:
        """What gives scores: the terms, or the single source; empty if there is none."""
        if self.terms:
            return read_terms(self.terms, "reward.terms")
        single = {FN: self.fn, MODEL: self.model, URL: self.url}
        return [
            Term(kind, value, f"reward.{kind}", options=self.options if kind == FN else {}, role="reward")
            for kind, value in single.items()
            if value
        ]

    def check(self) -> None:
        """Refuse two sources of scores, and options of none."""
        sources: dict[str, Any] = {"fn": None, "model": None, "url": [], "terms": []}
        given = [name for name, nothing in sources.items() if getattr(self, name) != nothing]
        if len(given) > 1:
            named = [f"reward.{name}={shown(getattr(self, name))}" for name in given]
            raise Refusal(
                f"{' and '.join(named)} {'both' if len(given) == 2 else 'all'} give scores",
                {f"reward.{name}": [sources[name]] for name in given},
                key=f"reward.{given[-1]}",
                value=getattr(self, given[-1]),
            )
        if self.options and given and given != ["fn"]:
            other = "the functions of reward.terms" if self.terms else f"reward.{given[0]}"
            raise Refusal(
                f"reward.options={shown(self.options)} belongs to reward.fn, and not to {other}",
                {"reward.options": [{}]},
                "the entry options of a term" if self.terms else None,
                key="reward.options",
                value=self.options,
            )


@dataclass
class MetricConfig(Section):
    """Settings of an additional metric of evaluations."""

    fn: str | None = leaf(
        None,
        "Function that evaluations call like reward.fn, with the settings of reward except reward.options. The mean "
        "of its scores is logged as eval/NAME.",
    )
