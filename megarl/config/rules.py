"""Checks of several sections of a configuration together, before anything is built.

Pure Python. A rule is a function `(config, world_size) -> None` that raises `Refusal`. A tree lists its rules in
`rules`; rules of a single algorithm are defined next to its tree. Checks within one section are in `Section.check`,
and those of a single key in its declaration.
"""

from __future__ import annotations

import math
from typing import Any

from megarl.config.forms import MOST_PER_NODE
from megarl.config.leaf import Section, sections
from megarl.config.mixtures import refuse_graphs_and_routes, refuse_moved, refuse_quantised
from megarl.config.offers import Refusal, divisors, either, enforce, multiples
from megarl.config.reward_terms import FN
from megarl.config.sections.reward import SCORER_START_S
from megarl.config.shape import shape_rule
from megarl.config.values import check_values
from megarl.config.world import accumulation, data_parallel_size, layout_sizes, replica_size
from megarl.disk import local


def check(config: Any, world_size: int) -> None:
    """Refuse a configuration that cannot run on `world_size` processes.

    Args:
        config: an entry point's typed tree.
        world_size: processes of the whole run, from `world_size()`.
    """
    check_values(config)
    enforce([each_section, *config.rules], config, world_size)


def each_section(config: Any, world_size: int) -> None:
    """Apply the `check` of every section."""
    for name in sections(type(config)):
        section = getattr(config, name)
        if isinstance(section, Section):  # an optional one may be null
            section.check()


def model_fits_layout(config: Any, world_size: int) -> None:
    """Require the shape of a model that is built from the configuration to be valid and to divide over the layout."""
    if config.model.path is None:
        shape_rule(config, world_size)


def experts_suit_run(config: Any, world_size: int) -> None:
    """Refuse what a mixture of experts cannot do, and what only it can. Of a model with `path`, this is checked again
    once its shape is known."""
    mixture, parallel = config.model.experts is not None, config.parallel
    adapter = getattr(config, "adapter", None)
    if mixture and adapter is not None:
        refuse_quantised(adapter.base_bits)
    if not hasattr(config, "rollout") or not hasattr(config.rollout, "engine_settings"):
        return
    engine = config.rollout.engine_settings
    if engine.layout is not None and layout_sizes(engine.layout) != (parallel.tp, parallel.pp):
        refuse_moved(engine.layout, parallel.ep)
    may_have_experts = mixture or config.model.path is not None
    refuse_graphs_and_routes(
        has_experts=mixture, graphs=engine.cuda_graphs, routes=engine.router_replay and not may_have_experts
    )


def sequences_fit_model(config: Any, world_size: int) -> None:
    """Require training sequences to fit into the context (of a model without `path`), and to divide by parallel.tp with
    sequence parallelism."""
    length, most = config.data.seq_length, config.model.max_positions
    if config.model.path is None and length > most:
        raise Refusal(
            f"data.seq_length={length} is more than model.max_positions={most}",
            {"data.seq_length": [most], "model.max_positions": [length]},
            key="data.seq_length",
            value=length,
        )
    tp = config.parallel.tp
    if config.parallel.sequence_parallel and length % tp:  # with tp = 1 it is off, whatever the key says
        raise Refusal(
            f"parallel.sequence_parallel=true splits sequences into parallel.tp={tp} pieces, and "
            f"data.seq_length={length} is not a multiple of it",
            {"data.seq_length": multiples(tp, length), "parallel.sequence_parallel": [False]},
            key="data.seq_length",
            value=length,
        )


def responses_fit_model(config: Any, world_size: int) -> None:
    """Require room for a prompt besides the longest response, in the context of a model without `path`."""
    most, new = config.model.max_positions, config.rollout.max_new_tokens
    if config.model.path is None and new >= most:
        raise Refusal(
            f"rollout.max_new_tokens={new} leaves no room for a prompt in model.max_positions={most}",
            {"rollout.max_new_tokens": [most - 1], "model.max_positions": [new + 1]},
            key="rollout.max_new_tokens",
            value=new,
        )


def whole_replicas(config: Any, world_size: int) -> None:
    """Require a number of processes that is a multiple of those of one replica."""
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


def whole_experts(config: Any, world_size: int) -> None:
    """Require a number of replicas that is a multiple of those that share the experts."""
    parallel = config.parallel
    replicas = data_parallel_size(config, world_size) * parallel.cp
    if replicas % parallel.ep:
        raise Refusal(
            f"parallel.ep={parallel.ep} replicas are to share experts, and {world_size} processes have {replicas}",
            {"parallel.ep": divisors(replicas)},
            f"{either(multiples(replica_size(config) // parallel.cp * parallel.ep, world_size))} processes",
            key="parallel.ep",
            value=parallel.ep,
        )


def whole_batches(config: Any, world_size: int) -> None:
    """Require micro * accumulation * data-parallel size = global, with an integer accumulation."""
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
            f"trainer.global_batch_size={whole} is not a multiple of {batch} = {step}",
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


def generation_is_whole(config: Any, world_size: int) -> None:
    """Require a number of processes that is a multiple of those of one copy of the model in `rollout.engine.layout`."""
    layout = config.rollout.engine_settings.layout
    size = 1 if layout is None else math.prod(layout_sizes(layout))
    if world_size % size:
        raise Refusal(
            f"rollout.engine.layout={layout} takes {size} processes for one model, which do not divide the "
            f"{world_size} processes of the run",
            {"rollout.engine.layout": [None]},
            "a layout whose sizes do",
            key="rollout.engine.layout",
            value=layout,
        )


def adapter_is_exported(config: Any, world_size: int) -> None:
    """Require an adapter where one is to be written."""
    peft = config.exports.peft
    if peft is not None and config.adapter is None:
        raise Refusal(
            f"export.peft={peft} writes an adapter, and this run trains all weights",
            {"export.peft": [None]},
            "export.hf for the whole model, or adapter.rank=16 to train an adapter",
            key="export.peft",
            value=peft,
        )


def exports_differ(config: Any, world_size: int) -> None:
    """Refuse two exports into one folder, or one inside the other, and an adapter of weights that are nowhere."""
    hf, peft = config.exports.hf, config.exports.peft
    if hf is not None and peft is not None:
        first, second = (local(folder).absolute() for folder in (hf, peft))
        if first == second or first in second.parents or second in first.parents:
            raise Refusal(
                f"export.peft={peft} and export.hf={hf} are not two separate folders",
                {"export.peft": [f"{hf}-adapter"], "export.hf": [None]},
                key="export.peft",
                value=peft,
            )
    if peft is not None and config.model.path is None:
        raise Refusal(
            f"export.peft={peft} is an adapter of random weights, which are stored nowhere without model.path",
            {"export.peft": [None]},
            "export.hf for the whole model",
            key="export.peft",
            value=peft,
        )


def adapter_has_layers(config: Any, world_size: int) -> None:
    """Refuse adapters where all layers are frozen: those have none."""
    if config.adapter is not None and config.model.num_layers_unfrozen == 0:
        raise Refusal(
            "model.num_layers_unfrozen=0 leaves no layer for the adapters of adapter.*",
            {"model.num_layers_unfrozen": [-1], "adapter": [None]},
            key="model.num_layers_unfrozen",
            value=0,
        )


def sampler_has_whole_weights(config: Any, world_size: int) -> None:
    """Refuse a layout for generation beside quantised weights: the copy in it would need them as they were loaded."""
    bits = 16 if config.adapter is None else config.adapter.base_bits
    layout = config.rollout.engine_settings.layout
    if bits < 16 and layout is not None:
        raise Refusal(
            f"adapter.base_bits={bits} is not available with rollout.engine.layout={layout}, whose copy of the model "
            "would need the weights that were quantised",
            {"rollout.engine.layout": [None], "adapter.base_bits": [16]},
            key="adapter.base_bits",
            value=bits,
        )


def tokenizer_is_named(config: Any, world_size: int) -> None:
    """Require tokenizer.path for kinds other than bytes, unless the model has a tokenizer."""
    tokenizer = config.tokenizer
    if tokenizer.kind != "bytes" and tokenizer.path is None and config.model.path is None:
        needed = "the alphabet" if tokenizer.kind == "characters" else "its file or folder"
        raise Refusal(f"tokenizer.kind={tokenizer.kind} needs tokenizer.path: {needed}", key="tokenizer.path")


def responses_are_scored(config: Any, world_size: int) -> None:
    """Require a reward function, a reward model or reward servers for responses that are trained on."""
    if not config.reward.sources:
        raise Refusal(
            "reward.fn is empty: name a function, for example reward.fn=rewards.py:score, a reward model with "
            "reward.model, reward servers with reward.url, or several of these with reward.terms",
            key="reward.fn",
        )


def responses_are_sampled(config: Any, world_size: int) -> None:
    """Refuse greedy sampling in training."""
    if config.rollout.temperature == 0:
        raise Refusal(
            "rollout.temperature=0 takes the most likely token every time, so there is nothing to learn from: use 1",
            key="rollout.temperature",
            value=0,
        )


def scoring_ends_in_time(config: Any, world_size: int) -> None:
    """Require parallel.timeout_s to exceed the longest possible call of a function.

    While rank 0 waits for reward servers, it sends the other ranks a message every half second.
    """
    reward, calls = config.reward, config.reward.call_settings
    longest = (calls.retries + 1) * (calls.timeout + SCORER_START_S)
    scores = any(term.kind == FN for term in reward.sources) or config.metric.fn is not None
    if scores and world_size > 1 and longest >= config.parallel.timeout_s:
        raise Refusal(
            f"a call of the reward function can take {calls.retries + 1} tries * (reward.calls.timeout="
            f"{calls.timeout:g} + {SCORER_START_S:g} to start) = {longest:g} s, and the other processes wait only "
            f"parallel.timeout_s={config.parallel.timeout_s} s",
            {"parallel.timeout_s": [int(longest) + 120]},
            "a shorter reward.calls.timeout",
            key="reward.calls.timeout",
            value=calls.timeout,
        )
