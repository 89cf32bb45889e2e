"""From the sections `reward` and `metric` to the scorers of a run, and to the roles of its reward models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.config.files import load_chat_template, no_score_head
from megarl.config.reward_terms import FN, MODEL, URL, Term
from megarl.data.prompts import Prompt
from megarl.disk import local
from megarl.experience.http_scorer import HttpScorer
from megarl.experience.journal import Journal
from megarl.experience.model_scorer import Alone, ModelScorer
from megarl.experience.scorers import FunctionScorer, Scorer, check_fields
from megarl.experience.sum_scorer import SumScorer, Weighted
from megarl.logging import get_logger
from megarl.models.exchange.pretrained import Sources, model_at
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)
REWARD, METRIC = "reward.fn", "metric.fn"
"""Keys of functions, and names of scorers. Reward models, servers and sums take the place of the reward function."""


class ScorerBuilder:
    """Makes the scorers that a configuration names, on the processes of a run."""

    def __init__(
        self,
        config: Any,
        tokenizer: Tokenizer,
        grid: Grid,
        engines: Mapping[str, Engine],
        sources: Sources,
        run_dir: Path,
        *,
        alone: Alone | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        micro_batch_size: int,
        dump: str | None = None,
        replay: str | None = None,
    ) -> None:
        """
        Args:
            config: the configuration tree.
            tokenizer: the policy's.
            grid: the processes of the run.
            engines: the engines of the reward models, by role.
            sources: the stored models of the run.
            run_dir: folder of the run; scores are in its folder `journal`.
            alone: what runs around the forward passes of a reward model; None for nothing.
            functions: callables to use instead of the functions that `reward.fn` and `metric.fn` name.
            micro_batch_size: rows in a forward pass of a reward model on one replica.
            dump: folder of dumped rollouts, into which scores are copied as well; None: they are not copied.
            replay: folder of an earlier dump, whose scores are reused; None: there is none.
        """
        self.config, self.tokenizer, self.grid, self.engines, self.sources = config, tokenizer, grid, engines, sources
        self.run_dir, self.alone, self.functions = run_dir, alone, functions or {}
        self.micro_batch_size, self.dump, self.replay = micro_batch_size, dump, replay

    def scorers(self) -> dict[str, Scorer]:
        """Return the scorer of the reward under REWARD and that of the metric under METRIC, if they are configured."""
        reward, metric = self.config.reward, self.config.metric.fn
        found: dict[str, Scorer] = {}
        terms = reward.sources
        if reward.terms:
            found[REWARD] = SumScorer([Weighted(self.scorer(term), term.weight, term.name) for term in terms])
        elif terms:
            found[REWARD] = self.scorer(terms[0])
        if metric is not None:
            found[METRIC] = self.scorer(Term(FN, metric, METRIC))
        return found

    def scorer(self, term: Term) -> Scorer:
        """Return the scorer of a function, a reward model or servers."""
        config, journal = self.config, self._journal(_journal_name(term.key))
        if term.kind == MODEL:
            return self._reward_model(term)
        if term.kind == URL:
            return HttpScorer(
                config.reward,
                term.value,
                self.tokenizer,
                self.grid,
                key=term.key,
                journal=journal,
                stop=config.rollout.stop,
            )
        return FunctionScorer(
            self.functions.get(term.key) or term.value,
            config.reward,
            self.tokenizer,
            self.grid,
            key=term.key,
            options=dict(term.options),
            journal=journal,
        )

    def _reward_model(self, term: Term) -> ModelScorer:
        source = self.sources.at(term.value)
        assert source is not None
        if source.reward_kind == "steps":
            log.info(
                "%s=%s was trained on steps (rm.kind=steps): a response has the score of its last step",
                term.key,
                term.value,
            )
        return ModelScorer(
            self.engines[term.role],
            source,
            self.tokenizer,
            load_chat_template(self.config.data.chat_template),
            per_microbatch=self.micro_batch_size,
            alone=self.alone,
            stop=self.config.rollout.stop,
            drops=self.config.reward.call_settings.on_error == "drop",
            key=term.key,
        )

    def _journal(self, name: str) -> Journal:
        """Return the journal of scores."""
        copy, source = (None if folder is None else local(folder) for folder in (self.dump, self.replay))
        return Journal(self.run_dir / "journal", name, copy=copy, source=source)


def by_metric_name(scorers: Mapping[str, Scorer]) -> dict[str, Scorer]:
    """Return the scorers by the names under which evaluations log their means: `score` for the reward."""
    return {"score" if key == REWARD else scorer.name: scorer for key, scorer in scorers.items()}


def check_fields_of_functions(prompts: Sequence[Prompt], config: Any) -> None:
    """Refuse prompts whose records have a field with the name of a reserved argument of the configured functions."""
    functions = [term.key for term in config.reward.sources if term.kind == FN]
    for key in (*functions, *([METRIC] if config.metric.fn is not None else [])):
        check_fields(prompts, key)


def reward_roles(config: Any, sources: Sources) -> list[Role]:
    """Return the roles of the reward models."""
    roles = []
    for term in config.reward.sources:
        source = sources.at(term.value) if term.kind == MODEL else None
        if source is None:
            continue
        if source.has_output:
            raise no_score_head(term.key, term.value)
        # Its context may be shorter than the policy's: what it cannot read is known only for a response.
        model, about = model_at(config, source), "scores, does not train"
        roles.append(Role(term.role, model, source.vocab_size, ("score",), source=source, about=about))
    return roles


def _journal_name(key: str) -> str:
    """Return the prefix of a journal's files: reward, metric, or reward_term_2 of the second term."""
    section, _, rest = key.partition(".")
    number = re.match(r"terms\[(\d+)\]", rest)
    return f"{section}_term_{int(number[1]) + 1}" if number else section
