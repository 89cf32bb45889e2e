"""Prompts in, rollouts out: an engine's generator with the settings of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megarl.config.rl import RolloutConfig
from megarl.data.prompts import Prompt
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.rollout.generator import Generator, Limits, Scorer
from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Rollout, repeat, sampling_from
from megarl.rollout.resharded import for_generation
from megarl.tokenizers import Tokenizer


class Responder:
    """What is sampled follows from the seed, the stream, the phase and the place of a prompt in its list."""

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
        self.unit = unit
        self.settings, self.sampling = settings, sampling_from(settings)
        self.reshard = for_generation(engine, settings.layout)
        self.generator = Generator(
            engine if self.reshard is None else self.reshard.engine,
            tokenizer.eos_id,
            seed=seed,
            also_eos=tokenizer.stop_ids(chat_template)[1:],
            limits=Limits(settings.slots, settings.cache_bytes, graphs=settings.cuda_graphs),
            decode=tokenizer.decode,
            dump=settings.dump,
            replay=settings.replay,
        )

    def respond(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        scorer: Scorer = GPT.logits,
        **changes: Any,
    ) -> list[Rollout]:
        """`n` responses to each prompt, sorted by (prompt_id, sample_id): a prompt's id is its place in `prompts`.

        Args:
            scorer: what tokens are drawn by.
            changes: settings of `Sampling` that differ from the run's.
        """
        requests = repeat([prompt.tokens for prompt in prompts], n, replace(self.sampling, **changes))
        if self.reshard is not None:
            self.reshard.refresh()
        self.generator.scorer = scorer
        trains = stream == TRAINING
        when = f"in {self.unit} {phase + 1}" if trains else f"in the evaluation after {self.unit} {phase}"
        rollouts = self.generator.generate(
            requests,
            stream=stream,
            phase=phase,
            weights_version=phase,
            place=lambda number: f"{prompts[number].where or f'prompt {number}'} {when}",
        )
        if not self.settings.cuda_graphs:  # they are recorded over the cache, and recording takes seconds
            self.generator.close()  # what comes next has the memory
        return rollouts

    def check_room(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a cache that is too small for the response to any of these prompts."""
        if prompts and self.settings.replay is None:
            longest = max(len(prompt.tokens) for prompt in prompts)
            self.generator.check_length(longest + self.sampling.max_new_tokens)

    def close(self) -> None:
        """Free the cache until the next call."""
        self.generator.close()
