"""`megarl.Session`: the steps of a run, one call each, for those who own the loop.

    with megarl.Session("ppo", reward_fn=score, prompts=texts, model="gpt2") as session:
        for _ in range(phases):
            prompts = session.prompts()
            responses = session.sample(prompts)
            rows = session.forward(responses)
            rows = session.advantages(rows, session.score(responses))
            for minibatch in session.minibatches(rows):
                session.forward_backward(minibatch)
                session.optim_step()

The steps are those of `python -m megarl.train_ppo`: this loop computes the same numbers. It runs in every process that
a launcher started, or in `processes` that the session starts and ends.
"""

from __future__ import annotations

import atexit
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from megarl.command import process_number
from megarl.config.algorithms import find_algorithm
from megarl.disk import writable
from megarl.errors import ConfigError
from megarl.inputs import Asked, Inputs, asked_for, default_config
from megarl.run.workers import Workers, started

if TYPE_CHECKING:
    from typing import Self, Unpack  # from Python 3.11 on

    from torch import Tensor

    from megarl.data.prompts import Prompt
    from megarl.parallel.rows import Rows
    from megarl.rewards.answers import Score
    from megarl.rewards.scores import Scores
    from megarl.rollout.requests import Rollout
    from megarl.tokenizers import Tokenizer

STEPS = "steps"
"""Name of the `Steps` among what a worker keeps."""
_here: list[Session] = []  # the session whose models are in this process


class Session:
    """An algorithm's models and its steps, over any parallel layout.

    Everything that a step returns lies in host memory and is whole, whatever the layout: token rows, log-probs, values.
    What changes the models happens in the processes of the run.

    Attributes:
        config: the configuration, with the architecture of the model at `model.path`.
        run_dir: folder of the run: its configuration, the journal of scores, checkpoints.
        layout: the parallel layout, such as TP2xPP2.
    """

    def __init__(
        self,
        config: DictConfig | str,
        *,
        model: str | Path | Mapping[str, Any] | None = None,
        processes: int | None = None,
        resume: str | Path | None = None,
        **inputs: Unpack[Inputs],
    ) -> None:
        """Build the models. Behaviour is cloned first where `clone.*` says so.

        Args:
            config: the name of an algorithm, or what `megarl.default_config` returned for one.
            model: as in `megarl.train`.
            processes: number of processes to start on this machine (None: this one, or those of a launcher).
            resume: a checkpoint to go on from, of a session or a run.
            inputs: as in `megarl.train`; without reward_fn, scores are passed to `advantages`.
        """
        if processes is None and _here:
            raise ConfigError(
                "a session is open in this process, and its models are the only ones there: close() it first, or give "
                "both processes=1",
                key="processes",
            )
        tree = default_config(config) if isinstance(config, str) else config
        asked = asked_for(model, tree, inputs)
        if find_algorithm(asked.entry).unit == "phase" and not asked.config.reward.sources:
            asked.config.reward.fn = f"{no_reward.__module__}:{no_reward.__name__}"
        asked.config.run.resume = "never" if resume is None else str(Path(resume).absolute())
        self._state: dict[str, Any] = {}
        self._workers: Workers | None = None
        self._tokenizer: Tokenizer | None = None
        self._ends = ExitStack()
        if processes is not None:
            self._workers = self._ends.enter_context(started(processes, asked.config))
        else:
            _here.append(self)
            self._ends.callback(_here.remove, self)
            self._ends.callback(_close, self._state)
        atexit.register(self.close)  # a script that does not close it leaves locks and processes behind
        try:
            described = self._call(_open, asked)
        except BaseException:
            self.close()
            raise
        self.config, self.run_dir, self.layout = described["config"], described["run_dir"], described["layout"]

    # --- experience -------------------------------------------------------------------------------------------------

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """Return the next prompts of data.train: `count` of them, or as many as a phase has."""
        return self._do("prompts", count)  # type: ignore[no-any-return]

    def sample(
        self, prompts: Sequence[str | Sequence[int] | Prompt], n: int | None = None, **changes: Any
    ) -> list[Rollout]:
        """Return responses to prompts, by the policy's present weights.

        The seed, the phase and a prompt's number within the phase determine a response, in every layout. Sampling after
        an optimizer step begins the next phase.

        Args:
            prompts: texts, lists of tokens, or what `prompts` returned.
            n: number of responses to each (None: rollout.n).
            changes: of the section `rollout`, such as temperature or max_new_tokens.
        """
        return self._do("sample", list(prompts), n, **changes)  # type: ignore[no-any-return]

    def responses(
        self, prompts: Sequence[str | Sequence[int] | Prompt], outputs: Sequence[str | Sequence[int]]
    ) -> list[Rollout]:
        """Return responses that were made elsewhere, one to each prompt, in the form of `sample`'s.

        Their log-probs when they were sampled are not known, so they are taken to be the present policy's.

        Args:
            prompts: texts, lists of tokens, or what `prompts` returned.
            outputs: texts, which end with EOS, or lists of tokens.
        """
        return self._do("responses", list(prompts), list(outputs))  # type: ignore[no-any-return]

    def score(self, responses: Sequence[Rollout]) -> Scores:
        """Return the scores of this phase's responses, by the reward that is configured; None for a response that the
        reward left out."""
        return self._do("score", list(responses))  # type: ignore[no-any-return]

    def forward(self, data: Sequence[Rollout] | Rows) -> Rows:
        """Return rows with what the present weights compute of them, as columns [rows, time].

        With PPO and its relatives: old_logprobs, values (if there is a critic), ref_logprobs (if there is a reference).
        Otherwise: logprobs.
        """
        return self._do("forward", data if not isinstance(data, list | tuple) else list(data))  # type: ignore[no-any-return]

    def values(self, rows: Rows) -> Tensor:
        """Return the critic's values [rows, time]."""
        return self._do("values", rows)  # type: ignore[no-any-return]

    def advantages(self, rows: Rows, scores: Scores | Sequence[Score]) -> Rows:
        """Return rows of `forward` with the columns advantages and, with a critic, returns.

        Args:
            rows: the rows.
            scores: a number for each row, or one for each of its response tokens.
        """
        return self._do("advantages", rows, scores)  # type: ignore[no-any-return]

    # --- training ---------------------------------------------------------------------------------------------------

    def batch(self) -> Rows:
        """Return the next global batch of data.train, of an algorithm that learns from data (sft, dpo, ilql ...)."""
        return self._do("batch")  # type: ignore[no-any-return]

    def minibatches(self, rows: Rows) -> Iterator[Rows]:
        """Yield the minibatches of this phase's inner epochs, in the order that the seed determines, until the policy
        has moved past ppo.stop_at_kl."""
        for indices in self._do("minibatches", rows):
            if self._do("is_over"):
                return
            yield rows.take(indices)

    def forward_backward(
        self, rows: Rows, loss: Callable[[Tensor, Rows, dict[str, float]], Any] | None = None
    ) -> dict[str, float]:
        """Compute the gradients of one optimizer step over the rows, and return metrics.

        Args:
            rows: the rows of the step.
            loss: None for the algorithm's. Else loss(logprobs, rows, counts) of the rows of a microbatch: logprobs
                [rows, time] carry gradients, and counts has the numbers of "tokens" (response tokens) and "rows" of the
                whole step: a loss that is divided by one of them does not depend on the layout. It returns the loss, or
                the loss and a mapping of statistics, which are summed over microbatches.
        """
        return self._do("forward_backward", rows, loss)  # type: ignore[no-any-return]

    def optim_step(self, lr: float | None = None) -> dict[str, float]:
        """Clip and apply the gradients. Return the learning rate and the norms of the gradients.

        Args:
            lr: learning rate of this step (None: what the schedule of `optim` says).
        """
        return self._do("optim_step", lr)  # type: ignore[no-any-return]

    def end_phase(self) -> dict[str, float]:
        """Begin the next phase and return the metrics of this one. `prompts` and `sample` after an optimizer step do
        this by themselves."""
        return self._do("end_phase")  # type: ignore[no-any-return]

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of responses to the evaluation prompts, by the present weights."""
        return self._do("evaluate")  # type: ignore[no-any-return]

    # --- state ------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Write a checkpoint and return its folder: a new one (None: RUN/checkpoints/step-N), from which sessions and
        runs go on, and which `megarl.generate` and `megarl.convert` read."""
        return self._do("save", path)  # type: ignore[no-any-return]

    def load(self, path: str | Path) -> None:
        """Go back to a checkpoint: weights, optimizers, counters."""
        self._do("load", path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a new folder that transformers loads, with its adapter merged."""
        target = writable(str(folder), "save_pretrained")
        checkpoint = self.save(self.run_dir / "save_pretrained")
        if process_number() == 0:
            from megarl.models.exchange.formats import write_pretrained

            try:
                write_pretrained(checkpoint, target)
            finally:
                shutil.rmtree(checkpoint)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        if self._tokenizer is None:
            from megarl.tokenizers import tokenizer_of

            self._tokenizer = tokenizer_of(self.config)
        return self._tokenizer

    def text(self, response: Rollout) -> str:
        """Return the text of a response, without EOS."""
        return self.tokenizer.decode(response.response_without_eos)

    def close(self) -> None:
        """Release the models and end the processes that the session started. It cannot be used afterwards."""
        atexit.unregister(self.close)
        self._workers = None
        self._ends.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- processes --------------------------------------------------------------------------------------------------

    def _do(self, verb: str, *arguments: Any, **options: Any) -> Any:
        return self._call(_do, verb, *arguments, **options)

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self._workers is not None:
            return self._workers.call(function, *arguments, **options)
        return function(self._state, *arguments, **options)


def _close(state: dict[str, Any]) -> None:
    if STEPS in state:
        state.pop(STEPS).close()


def _open(state: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """Build the models in a process of the run, and return what the session knows of them."""
    from megarl.run.stepwise import Steps
    from megarl.training import builder

    with ExitStack() as stack:
        stack.enter_context(asked.written())
        state[STEPS] = steps = Steps(asked.entry, asked.config, builder(asked.entry, asked.functions))
        steps.ends_with(stack.pop_all())
    return steps.describe()


def _do(state: dict[str, Any], verb: str, *arguments: Any, **options: Any) -> Any:
    if STEPS not in state:
        raise ConfigError("this session is closed, or was not opened: make a new megarl.Session", key=verb)
    return getattr(state[STEPS], verb)(*arguments, **options)


def no_reward(**_: Any) -> list[float]:
    """Say that a session has no reward."""
    raise ConfigError(
        "this session has no reward: give Session(reward_fn=...) or reward.*, or pass scores to advantages()",
        key="reward.fn",
    )
