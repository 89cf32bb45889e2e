"""Plans of runs whose sequences are split over ranks: bytes against those that torch's allocator hands out, and seconds
against hand-worked ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.config.cluster import ClusterConfig
from megarl.models.attention import Context
from megarl.models.layer import Layer
from megarl.models.rotary import rotation
from megarl.models.sliced_attention import SlicedMasks
from megarl.parallel.context import TimeSlices
from megarl.parallel.fake import fake_world
from megarl.parallel.layout import Layout
from megarl.planning.activations import Shape, kept_by_layer, passing_backward
from megarl.planning.hardware import Cluster
from megarl.planning.parts import Positions
from megarl.planning.plain import overrides
from megarl.planning.plan import possible_layouts, remedies, suggest
from megarl.planning.work import Work
from tests.gated import gated
from tests.planning.allocations import recorded
from tests.planning.runs import (
    GPT2,
    LLAMA,
    MIXTURE,
    NEOX,
    Measured,
    assert_predicted,
    describe,
    generated,
    scored,
    trained,
    trained_packed,
    with_adapter,
)
from tests.planning.test_activations import layer_config
from tests.planning.test_times import RATE, phase_of, planned, t5
from tests.worlds import Worlds

RUNS: dict[str, tuple[str, Callable[[Work], Measured], Work]] = {
    "llama": ("train", trained, describe(Layout(cp=2), LLAMA)),
    "llama-tp2-sp-bf16": (
        "train",
        trained,
        describe(
            Layout(cp=2, tp=2, sequence_parallel=True), LLAMA, accumulation=2, precision="bf16", recompute="selective"
        ),
    ),
    "llama-full": ("train", trained, describe(Layout(cp=2), LLAMA, recompute="full")),
    "llama-bf16-packed": ("train", trained_packed, describe(Layout(cp=2), LLAMA, precision="bf16")),
    "llama-short-responses": ("train", trained, describe(Layout(cp=2), LLAMA, loss_tokens=96)),
    "llama-lora": ("train", trained, with_adapter(describe(Layout(cp=2), LLAMA))),
    "experts": ("train", trained, describe(Layout(cp=2), MIXTURE)),
    "llama-generates": (
        "generate",
        generated,
        describe(Layout(cp=2), LLAMA, rollouts=64, length=72, loss_tokens=8),
    ),
    "llama-generates-elsewhere": (
        "generate",
        generated,
        replace(describe(Layout(cp=2), LLAMA, rollouts=32, length=72, loss_tokens=8), rollout_layout="tp2"),
    ),
    "llama-scores": ("score", scored, describe(Layout(cp=2), LLAMA, rollouts=8, loss_tokens=256)),
}


@pytest.mark.parametrize("name", gated(RUNS, [name for name in RUNS if name != "llama"]))
def test_what_ranks_that_share_sequences_allocate_was_predicted(worlds: Worlds, name: str) -> None:
    assert_predicted(worlds, *RUNS[name])


NARROW = {"ffn_size": 128, "head_dim": 16}


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize(
    "model", [GPT2, NEOX, {"activation": "swiglu"}, {**GPT2, "parallel_residual": "one_norm"}], ids=str
)
def test_gathered_keys_and_values_are_planned_where_their_gradients_are_the_peak(
    cp: int, model: dict[str, Any]
) -> None:
    """In one process, whose collectives do nothing: gloo releases its buffers where nobody counts."""
    layout, bins, time = Layout(cp=cp), 4, 512
    with fake_world(layout, layout.cp - 1, device="cpu") as grid:
        config = layer_config(layout, "fp32", "none", {**NARROW, **model})
        layer = Layer(config, 1, grid.groups).train()
        for parameter in layer.parameters():
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        turn = None
        if config.position == "rope":
            turn = rotation(torch.arange(time).expand(bins, -1), config.rope, config.rotary_dim, torch.float32)
        context = Context(turn, None, sliced=SlicedMasks(TimeSlices(grid.groups.cp), [None, None]))
        hidden = torch.randn(time, bins, 64, requires_grad=True)
        with recorded() as forward:
            output, _ = layer(hidden, context)
        grad = torch.randn_like(output)
        with recorded() as backward:
            output.backward(grad)
    shape, at = Shape.of(config, layout, 4, on_cpu=True), Positions(bins, time, ranks=cp)
    alone = passing_backward(config, shape, replace(at, ranks=1), "none")
    planned_peak = passing_backward(config, shape, at, "none")
    assert planned_peak > 2 * alone
    assert backward.peak == pytest.approx(planned_peak, rel=0.05)
    assert forward.left == pytest.approx(kept_by_layer(config, shape, at, "none"), rel=0.01)  # an output for its input


KEYS_AND_VALUES = 4 * (4 * 512) * 2 * 64 * 2
"""Bytes of the keys and values of a microbatch in the 4 layers of `LLAMA`."""
NVLINK = 450e9 * 0.75


@pytest.mark.parametrize(("recompute", "gathers"), [("none", 3), ("selective", 3), ("full", 4)])
def test_ranks_that_share_sequences_divide_the_products_and_gather_keys_and_values(
    recompute: str, gathers: int
) -> None:
    alone, shared = (
        planned(describe(layout, LLAMA, accumulation=3, precision="bf16", recompute=recompute))
        for layout in (Layout(), Layout(cp=4))
    )
    assert phase_of(shared, "train").flops == phase_of(alone, "train").flops
    sent = KEYS_AND_VALUES * 3 / 4
    assert shared.passes[0] == pytest.approx(alone.passes[0] / 4 + sent / NVLINK)
    # The backward pass gathers them again, and sums their gradients.
    assert shared.passes[1] == pytest.approx(alone.passes[1] / 4 + (gathers - 1) * sent / NVLINK)
    parameters = shared.ranks[0].shards["policy"].trainable
    assert phase_of(shared, "train").sent["NVLink"] == pytest.approx(3 * gathers * sent + 6 * parameters * 3 / 4)


def test_tensor_ranks_gather_the_keys_of_their_heads_and_sum_the_states_of_their_slices() -> None:
    alone, shared = (planned(describe(Layout(tp=2, cp=cp), LLAMA, precision="bf16")) for cp in (1, 2))
    assert shared.passes[0] == pytest.approx(alone.passes[0] / 2 + KEYS_AND_VALUES / 2 / 2 / NVLINK)
    far = planned(describe(Layout(tp=8, cp=2), {**LLAMA, "num_kv_heads": 8}, precision="bf16"))
    assert phase_of(far, "train").sent["network"] > KEYS_AND_VALUES / 2 * 3 / 2


def test_frozen_layers_gather_keys_and_values_in_the_forward_pass_alone() -> None:
    whole, some = (
        planned(describe(Layout(cp=2), {**LLAMA, "num_layers_unfrozen": layers}, precision="bf16"))
        for layers in (-1, 1)
    )
    sent = [phase_of(plan, "train").sent["NVLink"] for plan in (whole, some)]
    trained = [plan.ranks[0].shards["policy"].trainable for plan in (whole, some)]
    assert sent[0] - sent[1] == pytest.approx(2 * KEYS_AND_VALUES / 2 * 3 / 4 + 6 * (trained[0] - trained[1]) / 2)


@pytest.mark.parametrize(("targets", "most"), [(512, 128), (256, 64), (100, 64), (40, 40), (128, 64)])
def test_the_slowest_rank_has_the_slice_with_most_targets(targets: int, most: int) -> None:
    work = describe(Layout(cp=4), LLAMA, loss_tokens=targets, precision="bf16")
    assert work.most_targets == most
    layers = 4 * (2 * (256 * 640 + 3 * 256 * 1024) + 4 * 256 * 256.5)
    forward = 4 * (128 * layers + most * 2 * 256 * 2048) / RATE + KEYS_AND_VALUES * 3 / 4 / NVLINK
    assert planned(work).passes[0] == pytest.approx(forward)


def test_ranks_that_share_sequences_generate_their_own() -> None:
    plans = [
        planned(describe(layout, LLAMA, rollouts=64, length=192, loss_tokens=128, precision="bf16"))
        for layout in (Layout(cp=4, tp=2), Layout(dp=4, tp=2))
    ]
    assert len({str(phase_of(plan, "generate")) for plan in plans}) == 1
    assert len({plan.ranks[0].part("generate", "cache") for plan in plans}) == 1
    assert plans[0].ranks[0].part("generate", "cache") > 0


def test_sharing_sequences_helps_where_they_are_long_and_is_suggested_where_rules_allow() -> None:
    shape = {**LLAMA, "num_kv_heads": 8, "max_positions": 8192}
    work = describe(Layout(cp=2, tp=2, dp=2), shape, micro=1, length=8192, precision="bf16")
    plan = planned(work)
    found = {remedy.change: remedy for remedy in remedies(plan)}
    halved = work.on(replace(work.layout, cp=4, dp=1, sequence_parallel=True), micro=1, recompute="none")
    assert found["parallel.cp=4"].peak_bytes == planned(halved).peak_bytes < 0.75 * plan.peak_bytes
    assert halved.parallel.cp == 4
    cluster = Cluster.of(ClusterConfig(), 8)
    layouts = {(each.tp, each.pp, each.cp) for each in possible_layouts(work, cluster)}
    sizes = (1, 2, 4, 8)  # two sequences are for two replicas at most
    assert layouts == {(tp, pp, cp) for tp in sizes for pp in (1, 2, 4) for cp in sizes if tp * pp * cp in (4, 8)}
    assert all(f"parallel.cp={each.work.layout.cp}" in overrides(each).split() for each in suggest(plan))
    assert {each.cp for each in possible_layouts(replace(work, length=2047, loss_tokens=2047), cluster)} == {1}
    long_t5 = t5(Layout(dp=8), 8192, 8192)
    assert {each.cp for each in possible_layouts(long_t5, cluster)} == {1}
