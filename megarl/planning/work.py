"""What a run does, as numbers: its roles, batches, lengths and how often each part of it happens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megarl.config.cluster import PlanConfig
from megarl.config.schema import ModelConfig, OptimConfig, ParallelConfig
from megarl.errors import ConfigError
from megarl.models.exchange.adopt import adopt_critic
from megarl.parallel.layout import Layout
from megarl.rollout.resharded import other_layout


@dataclass(frozen=True)
class Part:
    """A model of a run, or what takes a model's place. Its heads are those of `Role`."""

    name: str
    trained: bool
    on_device: bool  # False: weights in host memory that take another role's place, or no model at all
    about: str
    heads: tuple[str, ...] = ("lm",)
    model: ModelConfig | None = None  # None: the run's


@dataclass(frozen=True)
class Work:
    """A run on a layout. Counts of sequences are of one unit of work: a phase of PPO, a step of SFT or ILQL."""

    algorithm: str
    roles: tuple[Part, ...]
    model: ModelConfig
    parallel: ParallelConfig
    optim: OptimConfig
    layout: Layout
    vocab_size: int
    precision: str
    micro: int  # sequences of one forward pass
    global_batch: int  # sequences of an optimizer step
    steps: int  # optimizer steps
    length: int  # tokens of a sequence in training
    loss_tokens: int  # of these, those that log-probs are computed of
    entropy: bool = False
    rollouts: int = 0  # responses that are trained on
    evaluates: bool = False  # by generating, in a run that has no rollouts
    rescored: bool = False  # whether policy, critic and reference read them before training
    prompt: int = 0
    response: int = 0  # mean tokens
    longest: int = 0  # tokens of the longest response
    slots: int = 0
    cache_bytes: int | None = None
    rollout_layout: str | None = None
    cuda_graphs: bool = False

    @property
    def accumulation(self) -> int:
        """Microbatches per optimizer step and replica."""
        return max(1, self.global_batch // (self.micro * self.layout.dp))

    @property
    def element(self) -> int:
        """Bytes of a weight or activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def engines(self) -> tuple[Part, ...]:
        """The roles that hold memory on the device."""
        return tuple(role for role in self.roles if role.on_device)

    def role(self, name: str) -> Part | None:
        return next((role for role in self.roles if role.name == name), None)

    def of(self, role: Part) -> "Work":
        """The same run, as far as it is that role's model's."""
        model = role.model
        return self if model is None else replace(self, model=model, vocab_size=model.vocab_size or self.vocab_size)

    @property
    def generating(self) -> "Work":
        """The same run in the layout that it generates in."""
        other = other_layout(self.rollout_layout, self.layout)
        return self if other is None else self.on(other, micro=self.micro, recompute="none")

    def on(self, layout: Layout, *, micro: int, recompute: str) -> "Work":
        """The same run in another layout."""
        parallel = replace(
            self.parallel,
            tp=layout.tp,
            pp=layout.pp,
            vpp=layout.vpp if layout.vpp > 1 else None,
            sequence_parallel=layout.sequence_parallel,
            recompute=recompute,
        )
        return replace(self, layout=layout, micro=micro, parallel=parallel)


def work_of(algorithm: str, config: Any, plan: PlanConfig, gpus: int, vocab_size: int) -> Work:
    """The run that `config`, the tree of the algorithm's entry point, describes on so many GPUs."""
    parallel = config.parallel
    layout = Layout.for_world(
        gpus,
        tp=parallel.tp,
        pp=parallel.pp,
        cp=parallel.cp,
        vpp=parallel.vpp or 1,
        sequence_parallel=parallel.sequence_parallel,
    )
    common = Work(
        algorithm=algorithm,
        roles=(),
        model=config.model,
        parallel=parallel,
        optim=config.optim,
        layout=layout,
        vocab_size=vocab_size,
        precision=config.trainer.precision,
        micro=config.trainer.micro_batch_size,
        global_batch=config.trainer.global_batch_size,
        steps=1,
        length=0,
        loss_tokens=0,
    )
    return _KINDS[algorithm](common, config, plan)


def _sft(common: Work, config: Any, plan: PlanConfig) -> Work:
    length = config.data.seq_length
    policy = Part("policy", True, True, "trains")
    return replace(common, roles=(policy,), length=length, loss_tokens=length)


def _ilql(common: Work, config: Any, plan: PlanConfig) -> Work:
    length = config.data.seq_length
    about = "trains, with Q heads, their targets and V"
    policy = Part("policy", True, True, about, heads=("lm", "value", *["q"] * config.ilql.q_heads))
    work = replace(common, roles=(policy,), length=length, loss_tokens=length)
    if not config.data.eval or config.trainer.eval_every is None:
        return work
    return replace(work, evaluates=True, **_generation(config, plan))


def _ppo(common: Work, config: Any, plan: PlanConfig) -> Work:
    separate = config.critic.kind == "separate"
    roles = [Part("policy", True, True, "trains and generates", heads=("lm",) if separate else ("lm", "value"))]
    if separate:
        about, model = "trains, a model of its own", adopt_critic(config, common.vocab_size)
        roles.append(Part("critic", True, True, about, heads=("value",), model=model))
    else:
        roles.append(Part("critic", True, False, "a head on the policy's trunk"))
    if config.ppo.kl_coef > 0:
        roles.append(Part("reference", False, False, "the policy's first weights, in host memory"))
    roles.append(Part("reward", False, False, "a function in a process of its own"))
    minibatches = -(-config.ppo.rollouts // common.global_batch)
    return replace(
        common,
        roles=tuple(roles),
        steps=minibatches * config.ppo.inner_epochs,
        entropy=config.ppo.entropy_coef > 0,
        rollouts=config.ppo.rollouts,
        rescored=True,
        **_responses(config, plan),
    )


def _rft(common: Work, config: Any, plan: PlanConfig) -> Work:
    rft = config.rft
    if rft.prompts is None:
        raise ConfigError(
            "rft.prompts=null is all prompts of a file that a plan does not read: set their number", key="rft.prompts"
        )
    rollouts = rft.prompts * config.rollout.n
    kept = 1 - (rft.start_percentile + rft.end_percentile) / 2  # of the answers, in a mean improvement step
    return replace(
        common,
        roles=(
            Part("policy", True, True, "trains and generates"),
            Part("reward", False, False, "a function in a process of its own"),
        ),
        steps=rft.improve_steps * max(1, math.ceil(rollouts * kept / common.global_batch)),
        rollouts=rollouts,
        **_responses(config, plan),
    )


def _responses(config: Any, plan: PlanConfig) -> dict[str, Any]:
    """What a run trains on that generates it, and what it generates with."""
    drawn = _generation(config, plan)
    return {"length": drawn["prompt"] + drawn["longest"], "loss_tokens": drawn["longest"], **drawn}


def _generation(config: Any, plan: PlanConfig) -> dict[str, Any]:
    prompt, response, longest = _lengths(config, plan)
    return {
        "prompt": prompt,
        "response": response,
        "longest": longest,
        "slots": config.rollout.slots,
        "cache_bytes": config.rollout.cache_bytes,
        "rollout_layout": config.rollout.layout,
        "cuda_graphs": config.rollout.cuda_graphs,
    }


def _lengths(config: Any, plan: PlanConfig) -> tuple[int, int, int]:
    """Tokens of a prompt, of a response on average, and of the longest response."""
    longest, most = config.rollout.max_new_tokens, config.model.max_positions
    if longest >= most:
        raise ConfigError(
            f"rollout.max_new_tokens={longest} leaves no room for a prompt in model.max_positions={most}: "
            f"use rollout.max_new_tokens={max(1, most // 2)} or a longer context",
            key="rollout.max_new_tokens",
            value=longest,
            offers={"rollout.max_new_tokens": [max(1, most // 2)]},
        )
    prompt = min(longest, most - longest) if plan.prompt_tokens is None else plan.prompt_tokens
    if prompt + longest > most:
        raise ConfigError(
            f"prompt_tokens={prompt} and rollout.max_new_tokens={longest} are more than model.max_positions={most}: "
            f"use prompt_tokens={most - longest} or less",
            key="prompt_tokens",
            value=prompt,
            offers={"prompt_tokens": [most - longest]},
        )
    response = longest if plan.response_tokens is None else plan.response_tokens
    if response > longest:
        raise ConfigError(
            f"response_tokens={response} is more than rollout.max_new_tokens={longest}: use {longest} or less",
            key="response_tokens",
            value=response,
            offers={"response_tokens": [longest]},
        )
    return prompt, response, longest


_KINDS: dict[str, Callable[[Work, Any, PlanConfig], Work]] = {"sft": _sft, "ppo": _ppo, "ilql": _ilql, "rft": _rft}
