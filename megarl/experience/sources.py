"""Sources of rollouts: the `RolloutSource` protocol, generation by the model, and the dump of an earlier run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.rollout import ResponsesConfig
from megarl.data.prompts import Prompt
from megarl.errors import ConfigError
from megarl.experience.arrival import Arrival
from megarl.experience.invariants import Invariants
from megarl.models.flops import expert_layers
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine
from megarl.rollout import stored
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.lane import Masking
from megarl.rollout.noise import GREEDY, TRAINING
from megarl.rollout.requests import Request, Rollout, repeat, sampling_from
from megarl.rollout.resharded import for_generation
from megarl.rollout.static import TokenScorer
from megarl.tokenizers import Tokenizer


class RolloutSource(Protocol):
    """Returns responses to prompts. Every rank calls it, and every rank gets all responses."""

    def publish(self, version: int) -> None:
        """Use the policy's present weights from now on. `version` is stored in the rollouts."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        token_scorer: TokenScorer = GPT.logits,
        within: range | None = None,
        **changes: Any,
    ) -> list[Rollout]:
        """Return `n` responses to each prompt, sorted by (prompt_id, sample_id). A prompt's id is its index in
        `prompts`.

        Args:
            prompts: the prompts.
            n: number of responses to each.
            stream: random stream: training, greedy or one of an evaluation.
            phase: number of training steps done.
            token_scorer: computes the scores from which tokens are sampled.
            within: indices of the prompts to respond to, without gaps; None for all.
            changes: overrides of the run's `Sampling` settings.
        """

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that this source cannot respond to, before the first phase."""

    def close(self) -> None:
        """Release memory until the next call."""


class GeneratedRollouts:
    """Generates responses with an engine's model. The seed, stream, phase and prompt index determine each sample."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        settings: ResponsesConfig,
        *,
        seed: int,
        dump: str | None = None,
        chat_template: str | None = None,
        unit: str = "phase",
        masking: Masking | None = None,
        invariants: Invariants | None = None,
    ) -> None:
        """
        Args:
            engine: the policy's engine.
            tokenizer: tokenizer of the policy.
            settings: the section `rollout`.
            seed: seed of the samples.
            dump: folder to which responses are written; None: they are not kept.
            chat_template: template that renders the prompts; its end marker ends a response too.
            unit: what messages call a training step.
            masking: decides which tokens may be chosen; None: all.
            invariants: what happens if the weights of generation's own layout are not those of training; None: an
                error.
        """
        self.unit, self.version, self.dump = unit, 0, dump
        self.settings, self.sampling = settings, sampling_from(settings)
        computed = settings.engine_settings
        self.reshard = for_generation(engine, computed.layout)
        self.generator = Generator(
            engine if self.reshard is None else self.reshard.engine,
            tokenizer.eos_id,
            seed=seed,
            also_eos=tokenizer.stop_ids(chat_template)[1:],
            limits=Limits(
                computed.slots,
                computed.cache_bytes,
                graphs=computed.cuda_graphs,
                routes=computed.router_replay,
            ),
            decode=tokenizer.decode,
            masking=masking,
        )
        # Without a layout of its own, the generator reads the weights of training in place, and nothing can differ.
        self.arrival = None if self.reshard is None else Arrival(self.reshard, self.generator, invariants)
        self.checked: int | None = None  # the phase in which the present weights were checked

    def publish(self, version: int) -> None:
        """Copy the engine's present weights, where generation has its own parallel layout."""
        self.version = version
        self.checked = None
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
        within: range | None = None,
        **changes: Any,
    ) -> list[Rollout]:
        """Generate the responses, and write them to the folder `dump` if there is one.

        The first call after `publish`, and the first of each phase, check that the generator has the weights of
        training: a copy that failed, and one that was forgotten, are found before anything is sampled.
        """
        is_training = stream in (TRAINING, GREEDY)
        when = f"in {self.unit} {phase + 1}" if is_training else f"in the evaluation after {self.unit} {phase}"

        def place(number: int) -> str:
            return f"{prompts[number].where or f'prompt {number}'} {when}"

        requests = requests_of(prompts, n, self.settings, within, **changes)
        if self.arrival is not None and self.checked != phase and requests:
            self.arrival.check(requests[0], when, place(requests[0].prompt_id))
            self.checked = phase
        self.generator.token_scorer = token_scorer
        rollouts = self.generator.generate(
            requests,
            stream=stream,
            phase=phase,
            weights_version=self.version,
            place=place,
        )
        if self.dump is not None:
            path = stored.phase_file(self.dump, stream, phase, 0 if within is None else within.start)
            self.generator.grid.run_on_rank0(lambda: stored.dump(path, rollouts))  # complete on return, for any rank
        # CUDA graphs are recorded over the cache, and recording takes seconds.
        if not self.settings.engine_settings.cuda_graphs:
            self.generator.close()  # frees the memory for scoring and training
        return rollouts

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a KV cache that is too small for the longest possible response to these prompts."""
        if prompts:
            longest = max(len(prompt.tokens) for prompt in prompts)
            self.generator.check_length(longest + self.sampling.max_new_tokens)

    def close(self) -> None:
        """Free the KV cache until the next call."""
        self.generator.close()


class ReplayedRollouts:
    """Reads the responses of an earlier run from the folder that its `rollout.dump` names."""

    def __init__(self, folder: str, settings: ResponsesConfig, model: ModelConfig) -> None:
        """`model` is the policy's, which may follow the experts that are named in the folder."""
        self.folder, self.settings, self.model = folder, settings, model
        sampling_from(settings)  # refuses invalid sampling settings

    def publish(self, version: int) -> None:
        """Do nothing: each rollout has the version that it was dumped with."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        stream: int,
        phase: int,
        token_scorer: TokenScorer = GPT.logits,
        within: range | None = None,
        **changes: Any,
    ) -> list[Rollout]:
        """Return the dumped responses to these prompts, whatever settings sampled them, with the experts that computed
        them if the run follows these. Refuse a dump that lacks them then."""
        requests = requests_of(prompts, n, self.settings, within)
        rollouts = stored.replay(self.folder, stream, phase, requests, 0 if within is None else within.start)
        if not self.settings.engine_settings.router_replay:
            return [replace(rollout, routes=None) for rollout in rollouts]
        for rollout in rollouts:
            self._check_routes(rollout)
        return rollouts

    def _check_routes(self, rollout: Rollout) -> None:
        """Refuse a response without the experts that computed it, or with experts that this model does not have."""
        experts, routes, key = self.model.experts, rollout.routes, "rollout.engine.router_replay"
        assert experts is not None
        shape = expert_layers(self.model), experts.chosen
        if routes is None:
            problem = "were generated without it, so that nobody knows which experts computed them"
        elif routes.shape[1:] != shape or routes.max(initial=0) >= (experts.count or 0):
            theirs = " x ".join(map(str, routes.shape[1:]))
            problem = (
                f"name {theirs} experts a token, up to number {routes.max(initial=0)}, and this model has "
                f"{experts.count} in {shape[0]} layers, of which it chooses {shape[1]}"
            )
        else:
            return
        raise ConfigError(
            f"{key}=true: responses in rollout.replay={self.folder} {problem}; use {key}=false, or a dump of a run of "
            "this model with it",
            key=key,
            value=True,
            where=self.folder,
            offers={key: [False]},
        )

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Accept all prompts: nothing is generated, so none is too long."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def requests_of(
    prompts: Sequence[Prompt], n: int, settings: ResponsesConfig, within: range | None = None, **changes: Any
) -> list[Request]:
    """Return `n` requests for each prompt, or for those in the range `within`, with the run's sampling settings and
    `changes` to them. prompt_id is the prompt's index."""
    chosen = range(len(prompts)) if within is None else within
    sampling = replace(sampling_from(settings), **changes)
    return repeat([prompts[index].tokens for index in chosen], n, sampling, first=chosen.start)
