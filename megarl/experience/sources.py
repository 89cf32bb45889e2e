"""Where responses come from: `RolloutSource`, the model's own generation, and a dump of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from megarl.config.rl import RolloutConfig
from megarl.data.prompts import Prompt
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.rollout import stored
from megarl.rollout.generator import Generator, Limits, TokenScorer
from megarl.rollout.noise import GREEDY, TRAINING
from megarl.rollout.requests import Request, Rollout, repeat, sampling_from
from megarl.rollout.resharded import for_generation
from megarl.tokenizers import Tokenizer


class RolloutSource(Protocol):
    """Gives responses to prompts. Every rank of the world asks, and every rank gets all of them."""

    def publish(self, version: int) -> None:
        """Give responses of the policy's present weights from now on; rollouts carry the number of these weights."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        token_scorer: TokenScorer = GPT.logits,
        **changes: Any,
    ) -> list[Rollout]:
        """Return `n` responses to each prompt, sorted by (prompt_id, sample_id); a prompt's id is its index in
        `prompts`.

        Args:
            stream: which stream of randomness, of training or of an evaluation.
            phase: training steps that are done.
            token_scorer: gives the scores that tokens are drawn by.
            changes: settings of `Sampling` that differ from the run's.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that this source cannot answer, before the first phase."""

    def close(self) -> None:
        """Release memory until the next call."""


class GeneratedRollouts:
    """Responses of an engine's model. What is sampled follows from the seed, the stream, the phase and a prompt's
    index."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: RolloutConfig,
        *,
        seed: int,
        chat_template: str | None = None,
        unit: str = "phase",
    ) -> None:
        """
        Args:
            chat_template: the one that prompts are rendered with; its end marker ends a response too.
            unit: what messages call a training step.
        """
        self.unit, self.version = unit, 0
        self.settings, self.sampling = settings, sampling_from(settings)
        self.reshard = for_generation(engine, settings.layout)
        self.generator = Generator(
            engine if self.reshard is None else self.reshard.engine,
            tokenizer.eos_id,
            seed=seed,
            also_eos=tokenizer.stop_ids(chat_template)[1:],
            limits=Limits(settings.slots, settings.cache_bytes, graphs=settings.cuda_graphs),
            decode=tokenizer.decode,
        )

    def publish(self, version: int) -> None:
        """Take the engine's present weights, where it generates in another layout."""
        self.version = version
        if self.reshard is not None:
            self.reshard.refresh()

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        token_scorer: TokenScorer = GPT.logits,
        **changes: Any,
    ) -> list[Rollout]:
        """Generate, and keep what was generated where `rollout.dump` says."""
        self.generator.token_scorer = token_scorer
        trains = stream in (TRAINING, GREEDY)
        when = f"in {self.unit} {phase + 1}" if trains else f"in the evaluation after {self.unit} {phase}"
        rollouts = self.generator.generate(
            requests_of(prompts, n, self.settings, **changes),
            stream=stream,
            phase=phase,
            weights_version=self.version,
            place=lambda number: f"{prompts[number].where or f'prompt {number}'} {when}",
        )
        if self.settings.dump is not None:
            path = stored.phase_file(self.settings.dump, stream, phase)
            self.generator.grid.run_on_rank0(lambda: stored.dump(path, rollouts))  # any rank may replay it after this
        if not self.settings.cuda_graphs:  # they are recorded over the cache, and recording takes seconds
            self.generator.close()  # what comes next has the memory
        return rollouts

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a cache that is too small for the response to any of these prompts."""
        if prompts:
            longest = max(len(prompt.tokens) for prompt in prompts)
            self.generator.check_length(longest + self.sampling.max_new_tokens)

    def close(self) -> None:
        """Free the cache until the next call."""
        self.generator.close()


class ReplayedRollouts:
    """Responses of an earlier run, from the folder of its `rollout.dump`."""

    def __init__(self, folder: str, settings: RolloutConfig) -> None:
        self.folder, self.settings = folder, settings
        sampling_from(settings)  # refuses what no run could sample with

    def publish(self, version: int) -> None:
        """Nothing changes: each rollout carries the version that it was dumped with."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        token_scorer: TokenScorer = GPT.logits,
        **changes: Any,
    ) -> list[Rollout]:
        """Return the dumped responses to these prompts, with whatever settings they were drawn."""
        return stored.replay(self.folder, stream, phase, requests_of(prompts, n, self.settings))

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Nothing is generated, so nothing can be too long."""

    def close(self) -> None:
        """There is nothing to release."""


def requests_of(prompts: Sequence[Prompt], n: int, settings: RolloutConfig, **changes: Any) -> list[Request]:
    """Return `n` requests for each prompt, numbered by its index, with a run's sampling settings but for `changes`."""
    return repeat([prompt.tokens for prompt in prompts], n, replace(sampling_from(settings), **changes))
