"""Predicted bytes against those that torch's allocator hands out, for small runs in several layouts."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarl.config.sections.model import EncoderConfig
from megarl.config.sections.optim import OptimConfig
from megarl.errors import ConfigError
from megarl.models.cache import KVCache
from megarl.models.flops import layer_weights
from megarl.models.roles import Role
from megarl.parallel.layout import Layout
from megarl.planning.memory import GENERATOR, RankPlan, in_flight, plan_ranks, plan_stage, slots_of
from megarl.planning.parts import Part, Positions, parts_of
from megarl.planning.shards import gpt_config
from megarl.planning.work import Work
from tests.gated import gated
from tests.planning.runs import (
    GPT2,
    LLAMA,
    MIXTURE,
    NEOX,
    SHARED,
    T5,
    Measured,
    assert_predicted,
    built,
    describe,
    generated,
    moved,
    scored,
    trained,
    watched,
    with_adapter,
)
from tests.refusals import refused
from tests.worlds import Worlds


def with_kind(kind: str, work: Work) -> Work:
    """The same run with another optimizer."""
    (role,) = work.roles
    return replace(work, roles=(replace(role, optim=OptimConfig(kind=kind)),))


RUNS: dict[str, tuple[str, Callable[[Work], Measured], Work]] = {
    "gpt2": ("train", trained, describe(Layout(), GPT2)),
    "llama-tp2-sp-bf16": (
        "train",
        trained,
        describe(Layout(tp=2, sequence_parallel=True), LLAMA, accumulation=2, precision="bf16", recompute="selective"),
    ),
    "neox-pp2-full": ("train", trained, describe(Layout(pp=2), NEOX, accumulation=4, recompute="full")),
    "neox-pp2": ("train", trained, describe(Layout(pp=2), NEOX, accumulation=4, loss_tokens=256)),
    "gpt2-dp2": ("train", trained, describe(Layout(dp=2), {**GPT2, "num_layers_unfrozen": 2})),
    "llama-adamw8bit": ("train", trained, with_kind("adamw8bit", describe(Layout(), LLAMA))),
    "llama-lion": ("train", trained, with_kind("lion", describe(Layout(), LLAMA))),
    "llama-muon": ("train", trained, with_kind("muon", describe(Layout(), LLAMA))),
    "llama-lora": ("train", trained, with_adapter(describe(Layout(), LLAMA))),
    "gpt2-dora-bf16": ("train", trained, with_adapter(describe(Layout(), GPT2, precision="bf16"), kind="dora")),
    "llama-lora-4-bits": ("train", trained, with_adapter(describe(Layout(), LLAMA), base_bits=4)),
    "llama-lora-8-bits-full": (
        "train",
        trained,
        with_adapter(describe(Layout(), LLAMA, precision="bf16", recompute="full"), base_bits=8),
    ),
    "llama-dora-tp2-sp": (
        "train",
        trained,
        with_adapter(describe(Layout(tp=2, sequence_parallel=True), LLAMA, accumulation=2), kind="dora"),
    ),
    "neox-lora-pp2": ("train", trained, with_adapter(describe(Layout(pp=2), NEOX, accumulation=4), dropout=0.1)),
    "llama-lora-dp2": (
        "train",
        trained,
        with_adapter(describe(Layout(dp=2), {**LLAMA, "num_layers_unfrozen": 2}), targets=["q_proj", "down_proj"]),
    ),
    "llama-dora-generates": (
        "generate",
        generated,
        with_adapter(
            describe(Layout(), LLAMA, rollouts=32, length=72, loss_tokens=8, precision="bf16"), kind="dora", base_bits=4
        ),
    ),
    "llama-lora-scores": ("score", scored, with_adapter(describe(Layout(), LLAMA, rollouts=8, loss_tokens=256))),
    "llama-generates": ("generate", generated, describe(Layout(), LLAMA, rollouts=32, length=72, loss_tokens=8)),
    "gpt2-generates": ("generate", generated, describe(Layout(), GPT2, rollouts=64, length=72, loss_tokens=8)),
    "llama-generates-elsewhere": (
        "generate",
        generated,
        replace(describe(Layout(pp=2), LLAMA, rollouts=32, length=72, loss_tokens=8), rollout_layout="tp2"),
    ),
    "llama-scores": ("score", scored, describe(Layout(), LLAMA, rollouts=8, loss_tokens=256)),
    "experts": ("train", trained, describe(Layout(), MIXTURE)),
    "experts-ep2-bf16": ("train", trained, describe(Layout(dp=2, ep=2), MIXTURE, precision="bf16")),
    "experts-tp2-sp": (
        "train",
        trained,
        describe(Layout(tp=2, sequence_parallel=True), MIXTURE, accumulation=2, recompute="selective"),
    ),
    "experts-full": ("train", trained, describe(Layout(), MIXTURE, recompute="full")),
    "experts-ep2-full": ("train", trained, describe(Layout(dp=2, ep=2), SHARED, precision="bf16", recompute="full")),
    "experts-shared-pp2": ("train", trained, describe(Layout(pp=2), SHARED, accumulation=4)),
    "experts-frozen": ("train", trained, describe(Layout(dp=2), {**SHARED, "num_layers_unfrozen": 2})),
    "experts-lora": ("train", trained, with_adapter(describe(Layout(), SHARED))),
    "experts-generate": ("generate", generated, describe(Layout(), MIXTURE, rollouts=32, length=72, loss_tokens=8)),
    "experts-ep2-generate": (
        "generate",
        generated,
        describe(Layout(dp=2, ep=2), MIXTURE, rollouts=64, length=72, loss_tokens=8, precision="bf16"),
    ),
    "experts-score": ("score", scored, describe(Layout(), SHARED, rollouts=8, loss_tokens=256)),
    "experts-ep2-score": (
        "score",
        scored,
        describe(Layout(dp=2, ep=2), MIXTURE, rollouts=8, loss_tokens=256, precision="bf16"),
    ),
    "t5": ("train", trained, describe(Layout(), T5, loss_tokens=192)),
    "t5-few-layers": (
        "train",
        trained,
        describe(
            Layout(),
            {**T5, "num_layers": 1, "encoder": EncoderConfig(num_layers=1, start_id=0)},
            length=1088,
            loss_tokens=64,
        ),
    ),
    "t5-long-responses-bf16": ("train", trained, describe(Layout(), T5, loss_tokens=384, precision="bf16")),
    "t5-tp2-sp-bf16": (
        "train",
        trained,
        describe(
            Layout(tp=2, sequence_parallel=True),
            T5,
            loss_tokens=192,
            accumulation=2,
            precision="bf16",
            recompute="selective",
        ),
    ),
    "t5-pp2": ("train", trained, describe(Layout(pp=2), T5, loss_tokens=192, accumulation=4)),
    "t5-pp2-full": ("train", trained, describe(Layout(pp=2), T5, loss_tokens=192, accumulation=4, recompute="full")),
    "t5-frozen-encoder": ("train", trained, describe(Layout(), {**T5, "num_layers_unfrozen": 3}, loss_tokens=192)),
    "t5-frozen": ("train", trained, describe(Layout(dp=2), {**T5, "num_layers_unfrozen": 6}, loss_tokens=192)),
    "t5-generates": ("generate", generated, describe(Layout(), T5, rollouts=32, length=72, loss_tokens=8)),
    "t5-tp2-generates": (
        "generate",
        generated,
        describe(Layout(tp=2), T5, rollouts=32, length=384, loss_tokens=128, precision="bf16"),
    ),
    "t5-generates-elsewhere": (
        "generate",
        generated,
        replace(describe(Layout(tp=2), T5, rollouts=32, length=384, loss_tokens=128), rollout_layout="pp2"),
    ),
    "t5-few-layers-score": (
        "score",
        scored,
        describe(
            Layout(),
            {**T5, "num_layers": 1, "encoder": EncoderConfig(num_layers=1, start_id=0)},
            length=1088,
            loss_tokens=64,
            rollouts=8,
        ),
    ),
    "t5-scores": ("score", scored, describe(Layout(), T5, rollouts=8, loss_tokens=192)),
    "t5-lora": ("train", trained, with_adapter(describe(Layout(), T5, loss_tokens=192))),
    "t5-dora-tp2-sp": (
        "train",
        trained,
        with_adapter(
            describe(Layout(tp=2, sequence_parallel=True), T5, loss_tokens=192, accumulation=2, recompute="selective"),
            kind="dora",
        ),
    ),
    "t5-lora-4-bits-full": (
        "train",
        trained,
        with_adapter(describe(Layout(), T5, loss_tokens=192, precision="bf16", recompute="full"), base_bits=4),
    ),
    "t5-lora-pp2": (
        "train",
        trained,
        with_adapter(describe(Layout(pp=2), T5, loss_tokens=192, accumulation=4), dropout=0.1),
    ),
    "t5-lora-frozen-encoder": (
        "train",
        trained,
        with_adapter(describe(Layout(), {**T5, "num_layers_unfrozen": 3}, loss_tokens=192)),
    ),
    "t5-lora-generates": (
        "generate",
        generated,
        with_adapter(describe(Layout(), T5, rollouts=32, length=384, loss_tokens=128, precision="bf16")),
    ),
    "t5-pp2-scores": ("score", scored, describe(Layout(pp=2), T5, rollouts=8, loss_tokens=192, precision="bf16")),
}


LATER = [
    "experts-tp2-sp",
    "experts-shared-pp2",
    "experts-frozen",
    "experts-ep2-score",
    "neox-pp2",
    "neox-lora-pp2",
    "llama-dora-tp2-sp",
    "gpt2-dp2",
    "llama-lion",
    "llama-lora",
    "gpt2-generates",
    "llama-scores",
    "t5-long-responses-bf16",
    "t5-few-layers-score",
    "t5-pp2",
    "t5-frozen",
    "t5-tp2-generates",
    "t5-generates-elsewhere",
    "t5-dora-tp2-sp",
    "t5-lora-4-bits-full",
    "t5-lora-pp2",
    "t5-lora-generates",
    "t5-pp2-scores",
]


@pytest.mark.parametrize("name", gated(RUNS, LATER))
def test_what_is_allocated_was_predicted(worlds: Worlds, name: str) -> None:
    assert_predicted(worlds, *RUNS[name])


def test_the_whole_matrices_of_a_step_of_muon_are_planned_where_they_are_the_peak(worlds: Worlds) -> None:
    work = with_kind("muon", describe(Layout(), LLAMA, micro=1, length=8))
    (measured,) = worlds.run(1, trained, work)
    assert plan_stage(work, 0, on_cpu=True).total("train") == pytest.approx(measured.peak, rel=0.01)
    assert measured.peak > 1.05 * measured.held


def test_a_stage_holds_a_microbatch_for_each_stage_after_it() -> None:
    work = describe(Layout(pp=4), NEOX, accumulation=8)
    assert [in_flight(work, stage) for stage in range(4)] == [4, 3, 2, 1]
    short = describe(Layout(pp=4), NEOX, accumulation=2)
    assert [in_flight(short, stage) for stage in range(4)] == [2, 2, 2, 1]
    # Interleaved, two chunks a rank: rank 0 warms up with 2 * 3 + 4 chunks and holds the one in work: 11 of 2 per batch
    interleaved = describe(Layout(pp=4, vpp=2), {**NEOX, "num_layers": 8}, accumulation=8)
    assert in_flight(interleaved, 0) == 11 / 2
    assert in_flight(interleaved, 3) == 5 / 2


def test_the_cache_is_what_the_generator_makes() -> None:
    work = describe(Layout(), LLAMA, rollouts=10, length=96, loss_tokens=16)
    use = plan_stage(work, 0).uses["generate"][0]
    assert slots_of(work) == 10
    assert use.cache == 10 * KVCache.slot_bytes(gpt_config(work), 4, 1, 96)
    # keys and values of 4 layers, 2 heads of 32 channels, 96 tokens, 4 bytes each
    assert use.cache == 10 * 2 * 4 * 2 * 32 * 96 * 4


@pytest.mark.parametrize(("layout", "stages"), [(Layout(), [4]), (Layout(pp=2), [0, 4]), (Layout(tp=2), [2])], ids=str)
def test_an_encoder_decoder_caches_prompt_and_response_in_its_decoder_alone(
    layout: Layout, stages: list[float]
) -> None:
    work = describe(layout, T5, rollouts=10, length=96, loss_tokens=16)
    # keys and values of each layer of the decoder, 256 wide, 80 tokens read and 16 written, 4 bytes each
    caches = [plan_stage(work, stage).part("generate", "cache") for stage in range(layout.pp)]
    assert caches == [10 * 2 * layers * 256 * 96 * 4 for layers in stages]


@pytest.mark.parametrize(("layout", "slots"), [(Layout(), [7]), (Layout(pp=2), [0, 6])], ids=str)
def test_a_limit_of_the_cache_is_one_of_the_decoders_and_gives_its_stage_an_even_number(
    layout: Layout, slots: list[int]
) -> None:
    slot = 2 * 4 * 256 * 96 * 4
    work = replace(describe(layout, T5, rollouts=10, length=96, loss_tokens=16), cache_bytes=7 * slot)
    assert slots_of(work) == slots[-1]
    caches = [plan_stage(work, stage).part("generate", "cache") for stage in range(layout.pp)]
    assert caches == [count * slot for count in slots]


@pytest.mark.parametrize("graphs", [False, True])
def test_the_cache_is_planned_in_the_phases_in_which_a_run_holds_it(
    worlds: Worlds, tmp_path: Path, graphs: bool
) -> None:
    few = ["clone.data=[]", "trainer.max_phases=1", f"rollout.engine.cuda_graphs={str(graphs).lower()}"]
    (held,) = worlds.run(1, watched, tmp_path, *few)
    work = replace(describe(Layout(), LLAMA, rollouts=8, loss_tokens=256), cuda_graphs=graphs)
    plan = plan_stage(work, 0)
    assert {phase for phase in ("score", "train") if plan.part(phase, "cache")} == held
    assert plan.part("generate", "cache") > 0
    assert {plan.part(phase, "cache") for phase in ("score", "train", "save")} == {
        plan.part("generate", "cache") if graphs else 0.0
    }


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        (Layout(pp=2), "tp2"),
        (Layout(tp=2, sequence_parallel=True), "pp2"),
        pytest.param(Layout(pp=2, dp=2), "tp2xpp2", marks=pytest.mark.gate),
    ],
    ids=str,
)
def test_a_layout_to_generate_in_takes_a_second_copy_of_the_weights(
    worlds: Worlds, layout: Layout, wanted: str
) -> None:
    work = replace(describe(layout, LLAMA, rollouts=8, length=72, loss_tokens=8), rollout_layout=wanted)
    ranks = worlds.run(layout.world_size, moved, work)
    for stage in range(layout.pp):
        here = [rank for rank, found in enumerate(ranks) if found[0] == stage]
        plan = plan_stage(work, stage, on_cpu=True)
        copies = {phase: use for phase, uses in plan.uses.items() for use in uses if use.role == GENERATOR}
        _, weights, peaks = ranks[0]
        assert {use.weights for use in copies.values()} == {max(weights[rank] for rank in here)}
        assert copies["generate"].total >= max(peaks[rank] for rank in here)
        assert [use.role for use in plan.uses["generate"] if use.cache] == [GENERATOR]


def test_recorded_passes_are_refused_over_pipeline_stages_as_the_run_refuses_them() -> None:
    staged = replace(describe(Layout(pp=2), LLAMA, rollouts=8, loss_tokens=256), cuda_graphs=True)
    with refused(ConfigError, names=("rollout.engine.cuda_graphs=true", "PP2")):
        plan_stage(staged, 0)
    assert plan_stage(replace(staged, rollout_layout="tp2"), 0).part("train", "cache") > 0


def test_the_stages_of_an_encoder_decoder_have_its_parts() -> None:
    work = describe(Layout(pp=2), {**T5, "num_layers_unfrozen": 6}, micro=3, length=100, loss_tokens=30)
    (encoder,), (decoder,) = (parts_of(work, stage, work.micro, work.read) for stage in (0, 1))
    assert encoder == Part(4, 2, Positions(3, 70, 30), is_encoder=True, is_last=True)
    assert decoder == Part(4, 4, Positions(3, 30, 70, crosses=True))
    whole = parts_of(replace(work, layout=Layout()), 0, work.micro, work.read)
    assert whole == (encoder, decoder)
    llama = describe(Layout(pp=2), {**LLAMA, "num_layers_unfrozen": 1}, micro=3, length=100, loss_tokens=30)
    parts = [parts_of(llama, stage, llama.micro, llama.read) for stage in (0, 1)]
    assert parts == [(Part(2, trained, Positions(3, 100)),) for trained in (0, 1)]


def test_a_model_without_an_encoder_reads_the_prompts_of_an_encoder_decoder_itself() -> None:
    work = replace(describe(Layout(), T5, length=100, loss_tokens=30), rollouts=8)
    reward = Role("reward", describe(Layout(), LLAMA).model, 2048, ("score",))
    assert work.read == (70, 30)
    assert work.of(reward).read == (0, 100)
    assert work.of(reward).of(work.roles[0]).read == (70, 30)


SCORED = describe(Layout(), LLAMA, rollouts=8, loss_tokens=256)
POLICY = SCORED.roles[0]
CRITIC = replace(POLICY, name="critic", heads=("value",))


def with_roles(*roles: Role) -> Work:
    return replace(SCORED, roles=roles)


def test_a_reference_is_held_in_host_memory_and_twice_while_it_is_evaluated() -> None:
    reference = Role("reference", POLICY.model, POLICY.vocab_size, swaps_with="policy")
    plan = plan_stage(with_roles(POLICY, reference), 0)
    weights = plan.shards["policy"].copy
    assert plan.host("train") - plan.host("score") == -weights
    alone = plan_stage(with_roles(POLICY), 0)
    assert plan.host("generate") - alone.host("generate") == weights
    assert all(plan.total(phase) == alone.total(phase) for phase in plan.uses)


@pytest.mark.parametrize(("ep", "gathered"), [(2, 12), (4, 8)])
def test_experts_are_saved_by_the_replicas_that_hold_them(ep: int, gathered: int) -> None:
    work = with_kind("lion", describe(Layout(dp=4, ep=ep), MIXTURE, precision="bf16"))
    plan = plan_stage(work, 0)
    experts = 4 * 8 * 3 * 256 * 512 // ep
    others = plan.shards["policy"].trainable - experts
    # Of a weight: 2 bytes, 4 of the master weight and 4 of the moment. Megatron gathers 12 bytes over several replicas;
    # a single one has 8.
    written = 10 * (others / 4 + experts * ep / 4)
    (save,) = plan.uses["save"]
    assert save.host == pytest.approx(written + 12 * others + gathered * experts)
    largest = 4 * max(others * (1 + 1 / 4), experts * (1 + ep / 4))
    assert save.activations == pytest.approx(largest)


def test_layers_with_and_without_experts_are_parts_of_their_own() -> None:
    work = describe(Layout(pp=2), {**SHARED, "num_layers_unfrozen": 3}, micro=3, length=100)
    first, last = (parts_of(work, stage, work.micro, work.read) for stage in (0, 1))
    assert first == (Part(1, 0, Positions(3, 100)), Part(1, 1, Positions(3, 100, routed=True)))
    assert last == (Part(2, 2, Positions(3, 100, routed=True)),)


def test_a_separate_critic_costs_a_second_engine_and_a_head_next_to_nothing() -> None:
    alone, asked = (plan_stage(with_roles(role), 0) for role in (POLICY, CRITIC))
    shared = plan_stage(with_roles(replace(POLICY, heads=("lm", "value"))), 0)
    separate = plan_stage(with_roles(POLICY, CRITIC), 0)
    # The head is 256 x 512 and its bias, a vector of 512 and its bias: 132097 parameters of 16 bytes in float32. There
    # is no output layer, 2048 x 256.
    extra = 16 * 132097 - 16 * 2048 * 256
    assert held(separate) == pytest.approx(2 * held(alone) + extra, rel=0.001)
    assert separate.total("train") - held(separate) == max(plan.total("train") - held(plan) for plan in (alone, asked))
    assert shared.total("train") - alone.total("train") < 16 * 132097 * 4


def held(plan: RankPlan) -> float:
    return sum(plan.part("train", part) for part in ("weights", "gradients", "optimizer"))


def test_a_critic_of_another_shape_counts_as_what_it_is() -> None:
    wide = replace(CRITIC, model=replace(POLICY.model, hidden_size=512))
    one = plan_stage(with_roles(POLICY, wide), 0)
    alone = plan_stage(with_roles(replace(wide, name="policy")), 0)
    assert one.shards["critic"] == alone.shards["policy"]
    assert one.uses["train"][1] == replace(alone.uses["train"][0], role="critic")  # the policy waits: it is smaller
    assert one.uses["train"][0].activations == 0


def test_a_save_holds_and_writes_the_moments_of_the_optimizers_kind() -> None:
    alone, shared = (describe(Layout(dp=dp), LLAMA) for dp in (1, 2))
    plain = replace(POLICY, optim=OptimConfig(kind="sgd"))

    def host(work: Work, role: Role) -> float:
        return plan_stage(replace(work, roles=(role,)), 0).host("save")

    trained = 4 * plan_stage(alone, 0).shards["policy"].trainable
    assert host(alone, POLICY) - host(alone, plain) == 2 * 2 * trained  # two moments, in memory and on disk
    assert host(shared, POLICY) - host(shared, plain) == 2 * trained / 2  # both are gathered, and none is written
    small = replace(POLICY, optim=OptimConfig(kind="adamw8bit"))
    assert host(alone, small) == host(alone, POLICY)  # a checkpoint has moments in float32
    muon = replace(POLICY, optim=OptimConfig(kind="muon"))
    assert host(alone, POLICY) - host(alone, muon) == 2 * 4 * 4 * layer_weights(POLICY.model)


ADAPTED = with_adapter(SCORED)
ADAPTED_POLICY = ADAPTED.roles[0]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_critic_beside_the_policys_frozen_weights_counts_its_own_alone(worlds: Worlds, bits: int) -> None:
    work = with_adapter(SCORED, base_bits=bits)
    policy = work.roles[0]
    critic = replace(policy, name="critic", heads=("value",), base="policy")
    both = replace(work, roles=(policy, critic))
    plan = plan_stage(both, 0, on_cpu=True)
    assert plan.shards["critic"].parameters == plan.shards["critic"].trainable
    (measured,) = worlds.run(1, built, both)
    assert held(plan) == pytest.approx(measured.held, rel=0.01)


def test_the_reference_beside_new_adapters_is_the_frozen_weights_and_has_no_copy() -> None:
    alone = plan_stage(ADAPTED, 0)
    reference = replace(REFERENCE, adapter=ADAPTED_POLICY.adapter, has_copy=False)
    without, copied = (
        plan_stage(replace(ADAPTED, roles=(ADAPTED_POLICY, role)), 0)
        for role in (reference, replace(reference, has_copy=True))
    )
    for phase in alone.uses:
        assert without.host(phase) == alone.host(phase)
    assert copied.host("score") - alone.host("score") == 2 * 4 * alone.shards["policy"].trainable


def test_in_float32_adapters_are_merged_into_a_second_copy_of_their_weights_to_sample() -> None:
    plan = plan_stage(ADAPTED, 0)
    adapted = 4 * 4 * layer_weights(ADAPTED.model)
    weights = {phase: plan.part(phase, "weights") for phase in plan.uses}
    assert weights.pop("generate") - plan.shards["policy"].weights == adapted
    assert set(weights.values()) == {plan.shards["policy"].weights}
    for kept in (with_adapter(SCORED, base_bits=4), replace(ADAPTED, precision="bf16")):
        plan = plan_stage(kept, 0)
        assert plan.part("generate", "weights") == plan.part("train", "weights")


def test_a_save_with_adapters_has_these_alone() -> None:
    plan = plan_stage(ADAPTED, 0)
    trained = 4 * plan.shards["policy"].trainable
    assert plan.host("save") - plan.host("train") == trained + 2 * 3 * trained  # weights, and twice the optimizer's


def test_a_frozen_model_takes_its_weights_alone_and_is_not_saved() -> None:
    frozen = Role("reward", POLICY.model, POLICY.vocab_size)
    alone, both = (plan_stage(with_roles(*roles), 0) for roles in ((POLICY,), (POLICY, frozen)))
    weights = both.shards["reward"].weights
    for phase in ("train", "save"):
        assert both.total(phase) == alone.total(phase) + weights
        assert both.host(phase) == alone.host(phase)


REWARD = Role("reward", POLICY.model, POLICY.vocab_size, ("score",))
REFERENCE = Role("reference", POLICY.model, POLICY.vocab_size, swaps_with="policy")
FOUR = with_roles(POLICY, CRITIC, REFERENCE, REWARD)


def offloading(work: Work, *, offload: bool = True) -> Work:
    return replace(work, parallel=replace(work.parallel, offload=offload))


def of_roles(plan: RankPlan, phase: str, part: str) -> dict[str, float]:
    """One part's bytes of each role that has any."""
    return {use.role: size for use in plan.uses[phase] if (size := getattr(use, part))}


def test_a_reward_model_computes_in_its_own_phase_and_waits_in_the_others() -> None:
    without, plan = (plan_stage(with_roles(POLICY, CRITIC, REFERENCE, *more), 0) for more in ((), (REWARD,)))
    assert list(plan.uses) == ["generate", "reward", "score", "train", "save"]
    assert list(without.uses) == ["generate", "score", "train", "save"]
    weights = plan.shards["reward"].weights
    assert weights < plan.shards["policy"].weights  # it has no output layer
    for phase, uses in without.uses.items():
        assert [use for use in plan.uses[phase] if use.role != "reward"] == uses
        assert of_roles(plan, phase, "weights")["reward"] == weights
    assert set(of_roles(plan, "reward", "activations")) == {"reward"}
    assert of_roles(plan, "reward", "logits") == {}
    # Rewards are read off the same passes over the layers as log-probs, without logits.
    policy = plan_stage(with_roles(replace(POLICY, heads=("value",))), 0)
    assert of_roles(plan, "reward", "activations") == {"reward": policy.part("score", "activations")}


def test_with_offload_a_model_that_generates_or_gives_rewards_is_alone_on_the_device() -> None:
    plain, plan = (plan_stage(offloading(FOUR, offload=offload), 0) for offload in (False, True))
    there = {name: shard.weights for name, shard in plan.shards.items()}
    assert set(there) == {"policy", "critic", "reward"}
    both = {name: there[name] for name in ("policy", "critic")}
    assert of_roles(plan, "generate", "weights") == {"policy": there["policy"]}
    assert of_roles(plan, "reward", "weights") == {"reward": there["reward"]}
    for phase in ("score", "train", "save"):
        assert of_roles(plan, phase, "weights") == both
        assert of_roles(plan, phase, "activations") == of_roles(plain, phase, "activations")
    for part in ("gradients", "optimizer"):
        assert [phase for phase in plan.uses if plan.part(phase, part)] == ["train", "save"]
        assert all(plain.part(phase, part) for phase in plain.uses)
    assert plain.total("train") - plan.total("train") == there["reward"]
    kept = sum(there.values()) + plain.part("train", "optimizer")
    for phase in plan.uses:
        assert plan.host(phase) - plain.host(phase) == kept


def test_a_model_that_masks_tokens_generates_beside_the_policy() -> None:
    mask = replace(POLICY, name="action_mask", heads=("lm",), optim=None, follows=True)
    without, plan = (plan_stage(with_roles(POLICY, *more), 0) for more in ((), (mask,)))
    assert plan.part("generate", "cache") == 2 * without.part("generate", "cache")
    assert plan.part("generate", "logits") > without.part("generate", "logits")
    assert set(of_roles(plan, "generate", "weights")) == {"policy", "action_mask"}
    offloaded = plan_stage(offloading(with_roles(POLICY, mask)), 0)
    assert of_roles(offloaded, "generate", "weights") == of_roles(plan, "generate", "weights")
    one = KVCache.slot_bytes(gpt_config(with_roles(POLICY)), 4, 1, SCORED.prompt + SCORED.longest)
    limited = [replace(with_roles(POLICY, *more), cache_bytes=4 * one) for more in ((), (mask,))]
    assert [slots_of(work) for work in limited] == [4, 2]


def test_with_offload_the_policy_stays_where_no_reward_model_needs_the_memory() -> None:
    plain, plan = (plan_stage(offloading(with_roles(POLICY, CRITIC), offload=offload), 0) for offload in (False, True))
    kept = plan.shards["critic"].weights + plain.part("train", "optimizer")
    assert plan.host("train") - plain.host("train") == kept
    train = replace(offloading(SCORED), rollouts=0, rescored=False)  # a run that does not generate
    assert plan_stage(train, 0) == plan_stage(offloading(train, offload=False), 0)


def test_a_reward_model_has_a_phase_where_no_other_model_scores() -> None:
    for work in (replace(FOUR, rescored=False), replace(FOUR, rescored=False, rollouts=0, evaluates=True, slots=8)):
        assert list(plan_stage(work, 0).uses) == ["generate", "reward", "train", "save"]
    assert "reward" not in plan_stage(replace(FOUR, rescored=False, rollouts=0), 0).uses


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"recompute": "full"}, "activations"),
        ({"micro": 2}, "activations"),
        ({"precision": "bf16"}, "weights"),
    ],
)
def test_what_should_take_less_takes_less(change: dict[str, Any], part: str) -> None:
    before = plan_ranks(describe(Layout(), LLAMA, accumulation=2))[0].part("train", part)
    after = plan_ranks(describe(Layout(), LLAMA, **{"accumulation": 2, **change}))[0].part("train", part)
    assert after < before * 0.8
