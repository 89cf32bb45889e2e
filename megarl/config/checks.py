"""Rules a configuration must meet before anything is built: values, batch arithmetic, what goes together.

Pure Python. A new rule is a function `(config, world_size) -> None` that raises `Refusal`, added to a list
below. The tree of an entry point says which list is its own (`rules`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megarl.config.advantages import ADVANTAGES
from megarl.config.launcher import started_by_slurm
from megarl.config.offers import Refusal, Rule, divisors, either, enforce, multiples
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.config.rl import SCORER_START_S
from megarl.config.shape import shape_rule
from megarl.config.values import MOST_PER_NODE, check_values
from megarl.errors import ConfigError
from megarl.logging import get_logger, warn_once


def check(config: Any, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` processes.

    Args:
        config: an entry's typed tree.
        world_size: processes of the whole run, from `world_size()`.
    """
    check_values(config)
    enforce(config.rules, config, world_size)


def world_size(config: Any, environ: Mapping[str, str]) -> int:
    """Processes of the whole run: what torchrun or SLURM say, else `trainer.devices * trainer.num_nodes`.

    Args:
        config: an entry's typed tree.
        environ: the environment, `os.environ`.
    """
    if "WORLD_SIZE" in environ:
        return _count(environ, "WORLD_SIZE")
    if started_by_slurm(environ):
        return _count(environ, "SLURM_NTASKS")
    return local_devices(config) * int(config.trainer.num_nodes)


def local_devices(config: Any) -> int:
    """Processes per node when megarl starts them itself; "auto" counts GPUs, or is 1 on CPU."""
    trainer = config.trainer
    if trainer.devices != "auto":
        return int(trainer.devices)
    if trainer.accelerator == "cpu":
        return 1
    import torch  # only this answer needs it, and importing it takes seconds

    count = torch.cuda.device_count()
    if count == 0 and trainer.accelerator == "gpu":
        raise ConfigError(
            "trainer.devices=auto with trainer.accelerator=gpu, but no GPU is visible: use trainer.accelerator=cpu",
            key="trainer.devices",
            value="auto",
            offers={"trainer.accelerator": ["cpu"]},
        )
    return max(count, 1)


def replica_size(config: Any) -> int:
    """Processes that hold one whole model."""
    return int(config.parallel.tp * config.parallel.pp * config.parallel.cp)


def data_parallel_size(config: Any, world_size: int) -> int:
    """Replicas of the model in a world of that many processes."""
    return world_size // replica_size(config)


def accumulation(config: Any, world_size: int) -> int:
    """Microbatches per optimizer step and replica."""
    trainer = config.trainer
    return int(trainer.global_batch_size // (trainer.micro_batch_size * data_parallel_size(config, world_size)))


def _model(config: Any, world_size: int) -> None:
    """Shape against layout and length, for models built from the configuration."""
    if config.model.path is None:
        shape_rule(config, world_size)
        length, most = config.data.seq_length, config.model.max_positions
        if length > most:
            raise Refusal(
                f"data.seq_length={length} is more than model.max_positions={most}",
                {"data.seq_length": [most], "model.max_positions": [length]},
                key="data.seq_length",
                value=length,
            )


def _sequence_parallel(config: Any, world_size: int) -> None:
    """Sequence parallelism cuts time into tp pieces; with tp = 1 it is off, whatever the key says."""
    length, tp = config.data.seq_length, config.parallel.tp
    if config.parallel.sequence_parallel and length % tp:
        raise Refusal(
            f"parallel.sequence_parallel=true cuts sequences into parallel.tp={tp} pieces, and "
            f"data.seq_length={length} is no multiple of it",
            {"data.seq_length": multiples(tp, length), "parallel.sequence_parallel": [False]},
            key="data.seq_length",
            value=length,
        )


def _world(config: Any, world_size: int) -> None:
    """The processes hold a whole number of replicas."""
    size = replica_size(config)
    if world_size % size == 0:
        return
    parallel, trainer = config.parallel, config.trainer
    offers: dict[str, list[int]] = {}
    if trainer.devices != "auto" and trainer.devices * trainer.num_nodes == world_size:
        world = f"trainer.devices={trainer.devices} * trainer.num_nodes={trainer.num_nodes} = {world_size} processes"
        unit = size // math.gcd(size, trainer.num_nodes)
        nearest = range(trainer.devices // unit - 3, trainer.devices // unit + 2)
        offers["trainer.devices"] = [unit * count for count in nearest if 0 < unit * count <= MOST_PER_NODE]
    else:
        world = f"the {world_size} processes that were started"
    for name in ("tp", "pp", "cp"):
        if getattr(parallel, name) > 1:
            offers[f"parallel.{name}"] = divisors(world_size)
    raise Refusal(
        f"parallel.tp={parallel.tp} * parallel.pp={parallel.pp} * parallel.cp={parallel.cp} = {size} "
        f"processes per model do not divide {world}",
        offers,
        None if "trainer.devices" in offers else f"{either(multiples(size, world_size))} processes",
        key="parallel.tp",
        value=parallel.tp,
    )


def _batch(config: Any, world_size: int) -> None:
    """micro * accumulation * data-parallel size = global, with a whole accumulation."""
    trainer, parallel = config.trainer, config.parallel
    replicas, micro, whole = (
        data_parallel_size(config, world_size),
        trainer.micro_batch_size,
        trainer.global_batch_size,
    )
    step = micro * replicas
    batch = (
        f"trainer.micro_batch_size={micro} * data-parallel size {replicas} "
        f"({world_size} processes / {replica_size(config)} per model)"
    )
    # An interleaved pipeline hands microbatches from stage to stage in rounds of pp.
    rounds = parallel.pp if parallel.vpp is not None else 1
    offers: dict[str, list[Any]] = {
        "trainer.global_batch_size": multiples(step * rounds, whole),
        "trainer.micro_batch_size": divisors(max(1, whole // replicas)),
    }
    if whole % step:
        raise Refusal(
            f"trainer.global_batch_size={whole} is no multiple of {batch} = {step}",
            offers,
            key="trainer.global_batch_size",
            value=whole,
        )
    count = accumulation(config, world_size)
    if count % rounds:
        raise Refusal(
            f"parallel.vpp={parallel.vpp} needs an accumulation that is a multiple of "
            f"parallel.pp={parallel.pp}, but trainer.global_batch_size={whole} / ({batch}) is {count}",
            {**offers, "parallel.vpp": [None]},
            key="parallel.vpp",
            value=parallel.vpp,
        )


def _data(config: Any, world_size: int) -> None:
    """There is something to train on, and the demo's evaluation set does not judge another's training."""
    train, evaluation = config.data.train, config.data.eval
    if not train:
        raise Refusal(
            "data.train is empty: name files, for example data.train=[train.jsonl]", key="data.train", value=train
        )
    if DEMO_EVAL in evaluation and DEMO_TRAIN not in train:
        warn_once(
            get_logger(__name__),
            "data.eval is the demo set while data.train is not: set data.eval=[...], or [] for no evaluation",
        )


def _tokenizer(config: Any, world_size: int) -> None:
    """Tokenizers that live in a file are told which."""
    tokenizer = config.tokenizer
    if tokenizer.kind != "bytes" and tokenizer.path is None and config.model.path is None:
        raise Refusal(f"tokenizer.kind={tokenizer.kind} needs tokenizer.path: its file or folder", key="tokenizer.path")


def _generation(config: Any, world_size: int) -> None:
    """There is something to answer, in one way, and room for it."""
    if config.model.path is None:
        shape_rule(config, world_size)
        most, new = config.model.max_positions, config.rollout.max_new_tokens
        if new >= most:
            raise Refusal(
                f"rollout.max_new_tokens={new} leaves no room for a prompt in model.max_positions={most}",
                {"rollout.max_new_tokens": [most - 1], "model.max_positions": [new + 1]},
                key="rollout.max_new_tokens",
                value=new,
            )
    if config.chat == (config.prompts is not None):
        raise Refusal(
            "chat=true and prompts exclude each other: leave one out"
            if config.chat
            else "prompts is empty: give a file or a text, prompts=questions.jsonl, or --chat to talk to the model",
            key="prompts",
            value=config.prompts,
        )


def _context_parallel(config: Any, world_size: int) -> None:
    if config.parallel.cp > 1:
        raise Refusal(
            f"parallel.cp={config.parallel.cp}: context parallelism needs Transformer Engine's attention, which megarl "
            "does not drive yet",
            {"parallel.cp": [1]},
            "parallel.tp with parallel.sequence_parallel=true for long sequences",
            key="parallel.cp",
            value=config.parallel.cp,
        )


def _room(config: Any, world_size: int) -> None:
    """Shape against layout, and room for prompts, for models built from the configuration."""
    if config.model.path is None:
        shape_rule(config, world_size)
        most, new = config.model.max_positions, config.rollout.max_new_tokens
        if new >= most:
            raise Refusal(
                f"rollout.max_new_tokens={new} leaves no room for a prompt in model.max_positions={most}",
                {"rollout.max_new_tokens": [most - 1], "model.max_positions": [new + 1]},
                key="rollout.max_new_tokens",
                value=new,
            )


def _prompts(config: Any, world_size: int) -> None:
    """There is something to answer, and something that judges answers."""
    if not config.data.train:
        raise Refusal(
            "data.train is empty: name files of prompts, for example data.train=[prompts.jsonl]",
            key="data.train",
            value=config.data.train,
        )
    if config.reward.fn is None:
        raise Refusal("reward.fn is empty: name a function, for example reward.fn=rewards.py:score", key="reward.fn")


def _sweep(config: Any, world_size: int) -> None:
    """An evaluation goes through the values of one setting."""
    swept = [name for name, values in vars(config.eval.sweep).items() if values]
    if len(swept) > 1:
        keys = " and ".join(f"eval.sweep.{name}" for name in swept)
        raise Refusal(
            f"{keys} are both given, and an evaluation goes through one setting: leave one empty",
            key=f"eval.sweep.{swept[0]}",
            value=getattr(config.eval.sweep, swept[0]),
        )


def _phase(config: Any, world_size: int) -> None:
    """A phase's responses are whole groups, drawn at random."""
    rollouts, n = config.ppo.rollouts, config.rollout.n
    if rollouts % n:
        raise Refusal(
            f"ppo.rollouts={rollouts} is no multiple of rollout.n={n}, the responses to each prompt",
            {"ppo.rollouts": multiples(n, rollouts), "rollout.n": divisors(rollouts)},
            key="ppo.rollouts",
            value=rollouts,
        )
    _explores(config)
    if ADVANTAGES[config.ppo.advantages].groups and n < 2:
        raise Refusal(
            f"ppo.advantages={config.ppo.advantages} compares the responses to a prompt, and with rollout.n={n} there "
            "is one",
            {
                "rollout.n": [divisor for divisor in divisors(rollouts) if divisor > 1],
                "ppo.advantages": [name for name, needs in ADVANTAGES.items() if not needs.groups],
            },
            key="rollout.n",
            value=n,
        )
    needs = ADVANTAGES[config.ppo.advantages]
    if config.ppo.whiten_rewards and (needs.groups or needs.greedy):
        raise Refusal(
            f"ppo.advantages={config.ppo.advantages} compares scores of whole responses, which ppo.whiten_rewards=true "
            "would change by their lengths",
            {"ppo.whiten_rewards": [False]},
            key="ppo.whiten_rewards",
            value=True,
        )
    for key in ("kl_target", "kl_limit"):
        if config.ppo.kl_coef == 0 and getattr(config.ppo, key) is not None:
            raise Refusal(
                f"ppo.{key}={getattr(config.ppo, key):g} needs a reference, and with ppo.kl_coef=0 none is kept",
                {f"ppo.{key}": [None]},
                "a ppo.kl_coef above 0",
                key=f"ppo.{key}",
                value=getattr(config.ppo, key),
            )
    if config.model.dropout > 0:
        raise Refusal(
            f"model.dropout={config.model.dropout:g} would train another policy than the one that responded",
            {"model.dropout": [0.0]},
            key="model.dropout",
            value=config.model.dropout,
        )


def _critic(config: Any, world_size: int) -> None:
    """There is a critic if it is needed, and its keys belong together. Keys that nothing reads are warned of later."""
    critic, advantages = config.critic, config.ppo.advantages
    if not ADVANTAGES[advantages].values:
        return
    if critic.kind == "none":
        raise Refusal(
            f"ppo.advantages={advantages} needs the values of a critic, and critic.kind=none",
            {
                "critic.kind": ["shared", "separate"],
                "ppo.advantages": [name for name, needs in ADVANTAGES.items() if not needs.values],
            },
            key="critic.kind",
            value="none",
        )
    own = critic.settings
    for key in ("path", "lr", "warmup_phases"):
        if critic.kind == "shared" and getattr(own, key):
            raise Refusal(
                f"critic.separate.{key}={getattr(own, key)} applies to critic.kind=separate alone, which is shared",
                {"critic.kind": ["separate"]},
                key=f"critic.separate.{key}",
                value=getattr(own, key),
            )
    if own.warmup_phases >= config.trainer.max_phases:
        raise Refusal(
            f"critic.separate.warmup_phases={own.warmup_phases} leaves the policy none of trainer.max_phases="
            f"{config.trainer.max_phases}",
            {"critic.separate.warmup_phases": [config.trainer.max_phases - 1]},
            key="critic.separate.warmup_phases",
            value=own.warmup_phases,
        )


def _explores(config: Any) -> None:
    if config.rollout.temperature == 0:
        raise Refusal(
            "rollout.temperature=0 draws nothing at random, so there is nothing to learn from: use 1",
            key="rollout.temperature",
            value=0,
        )


def _rejection(config: Any, world_size: int) -> None:
    """There are answers to choose among, and the choice grows stricter."""
    _explores(config)
    if config.rollout.n < 2:
        raise Refusal(
            f"rollout.n={config.rollout.n} leaves no choice among the answers to a prompt: use rollout.n=32",
            key="rollout.n",
            value=config.rollout.n,
        )
    first, last = config.rft.start_percentile, config.rft.end_percentile
    if first > last:
        raise Refusal(
            f"rft.start_percentile={first:g} is above rft.end_percentile={last:g}, which it rises to: swap them",
            key="rft.start_percentile",
            value=first,
        )


def _reward_time(config: Any, world_size: int) -> None:
    """Processes that wait for the one that asks must not give up before it does."""
    reward = config.reward
    longest = (reward.retries + 1) * (reward.timeout + SCORER_START_S)
    asks = reward.fn is not None or config.metric.fn is not None
    if asks and world_size > 1 and longest >= config.parallel.timeout_s:
        raise Refusal(
            f"a call of the reward function can take {reward.retries + 1} tries * (reward.timeout={reward.timeout:g} + "
            f"{SCORER_START_S:g} to start) = {longest:g} s, and the other processes wait only parallel.timeout_s="
            f"{config.parallel.timeout_s} s",
            {"parallel.timeout_s": [int(longest) + 120]},
            "a shorter reward.timeout",
            key="reward.timeout",
            value=reward.timeout,
        )


RULES: list[Rule] = [_context_parallel, _model, _sequence_parallel, _world, _batch, _data, _tokenizer]
"""Rules that join several keys, in the order they are applied."""

PHASE_RULES: list[Rule] = [
    *(_context_parallel, _room, _world, _batch, _prompts, _sweep, _critic, _phase, _reward_time, _tokenizer)
]
"""Those of an entry point whose steps are phases of PPO and its kin."""

REJECTION_RULES: list[Rule] = [_rejection if rule is _phase else rule for rule in PHASE_RULES if rule is not _critic]
"""Those of an entry point whose steps are phases of rejection sampling."""

OFFLINE_RULES: list[Rule] = [*RULES, _room, _sweep, _reward_time]
"""Those of an entry point that learns from samples and generates in evaluations."""

GENERATION_RULES: list[Rule] = [_context_parallel, _generation, _world, _tokenizer]
"""Those of an entry point that only generates."""


def _count(environ: Mapping[str, str], name: str) -> int:
    """A number of processes the launcher left in the environment."""
    text = environ[name]
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(
            f"the launcher's {name}={text} is no number of processes: unset it, or start with torchrun",
            key=name,
            value=text,
        )
    return int(text)
