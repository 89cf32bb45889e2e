"""Predicted bytes against those that torch's allocator hands out, for small runs in several layouts."""

from collections.abc import Callable
from typing import Any

import pytest

from megarl.models.cache import KVCache
from megarl.parallel.layout import Layout
from megarl.planning.memory import in_flight, plan_ranks, plan_stage, slots_of
from megarl.planning.shards import gpt_config
from megarl.planning.work import Role, Work
from tests.planning.runs import GPT2, LLAMA, NEOX, Measured, describe, generated, scored, trained
from tests.worlds import Worlds

WITHIN = 0.10

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
    "llama-generates": ("generate", generated, describe(Layout(), LLAMA, rollouts=32, length=72, loss_tokens=8)),
    "gpt2-generates": ("generate", generated, describe(Layout(), GPT2, rollouts=64, length=72, loss_tokens=8)),
    "llama-scores": ("score", scored, describe(Layout(), LLAMA, rollouts=8, loss_tokens=256)),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_allocated_was_predicted(worlds: Worlds, name: str) -> None:
    phase, run, work = RUNS[name]
    seen = {measured.stage: measured for measured in worlds.run(work.layout.world_size, run, work)}
    for stage, measured in seen.items():
        plan = plan_stage(work, stage, on_cpu=True)
        assert plan.total(phase) == pytest.approx(measured.peak, rel=WITHIN)
        use = plan.uses[phase][0]
        if work.layout.world_size == 1:  # gloo's own buffers are released where nobody counts
            assert use.weights + use.gradients + use.optimizer == pytest.approx(measured.held, rel=0.01)


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


def with_roles(*roles: Role) -> Work:
    work = describe(Layout(), LLAMA, rollouts=8, loss_tokens=256)
    return Work(**{**work.__dict__, "roles": roles})


def test_a_reference_is_held_in_host_memory_and_twice_while_it_is_asked() -> None:
    policy, reference = Role("policy", True, True, ""), Role("reference", False, False, "")
    plan = plan_stage(with_roles(policy, reference), 0)
    weights = plan.shards["policy"].copy
    assert plan.host("train") - plan.host("score") == -weights
    alone = plan_stage(with_roles(policy), 0)
    assert plan.host("generate") - alone.host("generate") == weights
    assert all(plan.total(phase) == alone.total(phase) for phase in plan.uses)


def test_a_critic_of_its_own_costs_a_second_engine_and_a_head_next_to_nothing() -> None:
    policy = Role("policy", True, True, "")
    alone = plan_stage(with_roles(policy), 0).total("train")
    shared = plan_stage(with_roles(Role("policy", True, True, "", value_head=True)), 0)
    separate = plan_stage(with_roles(policy, Role("critic", True, True, "", value_head=True)), 0)
    engine = sum(getattr(separate.uses["train"][0], part) for part in ("weights", "gradients", "optimizer"))
    # The head is 256 x 512 and its bias, a vector of 512 and its bias: 132097 parameters of 16 bytes in float32.
    assert separate.total("train") == pytest.approx(alone + engine + 16 * 132097, rel=0.001)
    assert shared.total("train") - alone < 16 * 132097 * 4


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
