"""Generation in evaluations."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.forms import temperature, vote_reader
from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Refusal


@dataclass
class SweepConfig(Section):
    """Values of one setting that every evaluation runs through; metrics are logged as name@setting=value."""

    temperature: list[float] = leaf(
        [],
        "Values of rollout.temperature; every evaluation runs once with each (empty: once, with rollout.temperature)."
        " checkpoint.best.metric must then name one, as eval/score@temperature=0.5.",
        at_least=0,
        form=temperature,
    )


@dataclass
class EvalConfig(Section):
    """Settings of generation in evaluations, which otherwise use those of rollout."""

    n: int = leaf(1, "Number of responses per prompt in evaluations.", at_least=1, at_most=2**20)
    vote: str | None = leaf(
        None,
        "What responses to a prompt vote on, if eval.n is above 1: text (the whole response), number (the last one), "
        "choice (the letter, A to J, of the choice that the response states last; a choice stated by its text has no "
        "vote), boxed (the content of the last \\boxed{}; units are not removed), or a function "
        "package.module:function that returns the answer in a response's text: a text, a number or None. Equal numbers "
        "vote together. Unlike a reward function, it runs in the process of rank 0 and without a time limit. The mean "
        "score of the responses with the most frequent answer is logged as eval/vote (null: no vote).",
        form=vote_reader,
    )
    table: int = leaf(
        4,
        "Number of responses that each evaluation prints and adds to samples.jsonl. PPO and its relatives also write "
        "the tokens of as many training responses, with log-probs, values and advantages, to tokens.jsonl: of the "
        "first and the last phase, and of every phase that an evaluation follows.",
        at_least=0,
        at_most=1000,
    )
    sweep: SweepConfig = section(SweepConfig)

    def check(self) -> None:
        """Refuse values for two settings: an evaluation runs through those of one."""
        swept = [name for name, values in vars(self.sweep).items() if values]
        if len(swept) > 1:
            keys = " and ".join(f"eval.sweep.{name}" for name in swept)
            raise Refusal(
                f"{keys} are both given, and an evaluation goes through one setting: leave one empty",
                key=f"eval.sweep.{swept[0]}",
                value=getattr(self.sweep, swept[0]),
            )


@dataclass
class GuidedSweepConfig(SweepConfig):
    """Values of one setting, for models whose Q heads guide the sampling."""

    beta: list[float] = leaf(
        [],
        "Values of rollout.ilql_beta; every evaluation runs once with each (empty: once, with rollout.ilql_beta). "
        "checkpoint.best.metric must then name one, as eval/score@beta=1. Excludes eval.sweep.temperature.",
        at_least=0,
    )


@dataclass
class GuidedEvalConfig(EvalConfig):
    """Settings of generation in evaluations, which otherwise use those of rollout."""

    sweep: GuidedSweepConfig = section(GuidedSweepConfig)
