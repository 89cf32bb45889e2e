"""What ranks hold, exactly, of models that no machine here could build."""

from dataclasses import replace
from typing import Any

import pytest

from megarl.config.compose import compose
from megarl.config.sections.model import EncoderConfig, ExpertsConfig, ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.models.flops import layer_weights
from megarl.models.roles import Role
from megarl.parallel.fake import fake_world, rank_of
from megarl.parallel.layout import Layout
from megarl.parallel.vocab import padded_vocab
from megarl.planning.parts import layers_of_stage, stages_that_differ
from megarl.planning.shards import build_shard, measure, shard
from megarl.planning.work import Work
from tests.gated import gated
from tests.planning.runs import LLAMA, MIXTURE, SHARED, describe, policy_of, presets_of_large_models, with_adapter

NEOX_20B = ModelConfig(
    num_layers=44,
    hidden_size=6144,
    num_heads=64,
    ffn_size=24576,
    max_positions=2048,
    rope_percent=0.25,
    norm="layernorm",
    activation="gelu_tanh",
    parallel_residual="two_norms",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
POLICY = policy_of(NEOX_20B, 50432)


def neox(layout: Layout) -> Work:
    return describe(layout, {}, precision="bf16")


def test_gpt_neox_20b_has_its_published_number_of_parameters() -> None:
    # 44 layers: matrices 12 * h * h, biases of 3h + h + 4h + h, two norms of 2h; two tables; the last norm
    h = 6144
    expected = 44 * (12 * h * h + 9 * h + 4 * h) + 2 * 50432 * h + 2 * h
    assert shard(neox(Layout()), POLICY, 0).parameters == expected
    assert expected == 20_554_567_680


FLAN_T5_XL = ModelConfig(
    num_layers=24,
    hidden_size=2048,
    num_heads=32,
    head_dim=64,
    ffn_size=5120,
    max_positions=16384,
    position="relative",
    activation="geglu",
    encoder=EncoderConfig(num_layers=24, start_id=0),
)
XL_PARAMETERS = 2_849_757_184
"""As published: google/flan-t5-xl."""
XL = policy_of(FLAN_T5_XL, 32128)


def test_flan_t5_xl_has_its_published_number_of_parameters() -> None:
    # Attention of 4 * h * h to the own sequence and, in the decoder, to the encoder; gated MLPs; two norms and three;
    # two tables of words, two of 32 distances for 32 heads; two last norms
    h, mlp = 2048, 3 * 2048 * 5120
    layers = 24 * (4 * h * h + mlp + 2 * h) + 24 * (8 * h * h + mlp + 3 * h)
    expected = layers + 2 * 32128 * h + 2 * 32 * 32 + 2 * h
    assert shard(neox(Layout()), XL, 0).parameters == expected == XL_PARAMETERS


@pytest.mark.parametrize(
    "layout", [Layout(tp=8, sequence_parallel=True), Layout(tp=2, pp=2, dp=2), Layout(pp=2)], ids=str
)
def test_every_rank_of_an_encoder_decoder_builds_and_together_they_are_the_model(layout: Layout) -> None:
    work = replace(neox(layout), model=FLAN_T5_XL)
    held = []
    for pp in range(layout.pp):
        for tp in range(layout.tp):
            with fake_world(layout, rank_of(layout, tp=tp, pp=pp)) as grid:
                held.append(measure(build_shard(grid, work, XL), pp).parameters)
    # The vocabulary is padded; norms are held by every tensor rank.
    padded = 2 * 2048 * (padded_vocab(32128, layout.tp) - 32128)
    common = (24 * 2 + 24 * 3 + 2) * 2048
    assert sum(held) - padded - (layout.tp - 1) * common == XL_PARAMETERS
    assert shard(work, XL, layout.pp - 1).layers == 48 // layout.pp


def test_gradients_and_optimizer_of_an_encoder_decoder_are_those_of_its_parameters() -> None:
    held = shard(neox(Layout(tp=4)), XL, 0)
    assert held.weights == pytest.approx(2 * held.parameters, rel=1e-4)
    assert held.gradients == pytest.approx(4 * held.parameters, rel=1e-4)
    assert held.optimizer == pytest.approx(12 * held.parameters, rel=1e-4)


def test_frozen_layers_count_from_the_decoders_last_into_the_encoder() -> None:
    held = {
        unfrozen: shard(neox(Layout()), policy_of(replace(FLAN_T5_XL, num_layers_unfrozen=unfrozen), 32128), 0)
        for unfrozen in (24, 25)
    }
    mlp, h = 3 * 2048 * 5120, 2048
    decoder = 24 * (8 * h * h + mlp + 3 * h) + 32 * 32
    assert held[24].trainable == decoder + h + 32128 * h
    assert held[25].trainable - held[24].trainable == 4 * h * h + mlp + 2 * h + h  # with the encoder's last norm


@pytest.mark.parametrize("layout", [Layout(tp=8, pp=4, dp=2, sequence_parallel=True), Layout(tp=4, pp=11)], ids=str)
def test_every_rank_of_a_20b_model_builds_and_together_they_are_the_model(layout: Layout) -> None:
    work = neox(layout)
    held = []
    for pp in range(layout.pp):
        for tp in range(layout.tp):
            with fake_world(layout, rank_of(layout, tp=tp, pp=pp)) as grid:
                held.append(measure(build_shard(grid, work, POLICY), pp).parameters)
    # Held by every tensor rank: norms, and the biases of the products that are summed over the ranks.
    h = 6144
    common = 44 * (4 * h + 2 * h) + 2 * h
    assert sum(held) - (layout.tp - 1) * common == 20_554_567_680


def test_data_parallel_ranks_share_the_optimizer_and_nothing_else() -> None:
    one, four = (shard(neox(Layout(tp=4, pp=2, dp=dp)), POLICY, 0) for dp in (1, 4))
    assert one.parameters == four.parameters
    assert one.weights == pytest.approx(2 * one.parameters, rel=1e-4)
    assert one.gradients == pytest.approx(4 * one.parameters, rel=1e-4)
    assert one.optimizer == pytest.approx(12 * one.parameters, rel=1e-4)
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-3)


@pytest.mark.parametrize("shape", [LLAMA, MIXTURE], ids=["llama", "mixture"])
def test_ranks_that_share_sequences_hold_what_data_parallel_ranks_hold(shape: dict[str, Any]) -> None:
    ep = 2 if shape is MIXTURE else 1
    layouts = (Layout(cp=4, ep=ep, pp=2), Layout(cp=2, dp=2, ep=ep, pp=2), Layout(dp=4, ep=ep, pp=2))
    held = []
    for layout in layouts:
        work = describe(layout, shape, precision="bf16")
        with fake_world(layout, rank_of(layout, pp=1)) as grid:
            held.append(measure(build_shard(grid, work, work.roles[0]), 1))
    assert held[0] == held[1] == held[2] == shard(describe(layouts[0], shape, precision="bf16"), work.roles[0], 1)
    assert len({each.distributed("weights", layout) for each, layout in zip(held, layouts, strict=True)}) == 1


@pytest.mark.parametrize(("kind", "momentum", "moments"), [("rmsprop", 0, 1), ("rmsprop", 0.9, 2), ("sgd", 0, 0)])
def test_an_optimizer_holds_the_moments_of_its_kind(kind: str, momentum: float, moments: int) -> None:
    role = replace(POLICY, optim=OptimConfig(kind=kind, momentum=momentum))
    held = shard(neox(Layout(tp=4, pp=2)), role, 0)
    assert held.optimizer == pytest.approx((4 + 4 * moments) * held.parameters, rel=1e-4)


def test_lion_has_one_moment_muon_one_for_matrices_and_eight_bits_are_a_byte_and_a_64th() -> None:
    work = describe(Layout(), LLAMA)
    plain, lion, muon, small = (
        shard(work, replace(work.roles[0], optim=OptimConfig(kind=kind)), 0)
        for kind in ("adamw", "lion", "muon", "adamw8bit")
    )
    norms = 9 * 256
    matrices = 4 * layer_weights(work.model)
    assert matrices + norms + 2 * 2048 * 256 == plain.parameters
    assert plain.optimizer == 8 * plain.parameters
    assert lion.optimizer == plain.optimizer / 2
    assert muon.optimizer == plain.optimizer - 4 * matrices
    assert small.optimizer == 8 * norms + 2 * (1 + 4 / 256) * (plain.parameters - norms)
    stored = {"plain": 2, "lion": 1, "muon": 2, "small": 2}
    for held, moments in zip((plain, lion, muon, small), stored.values(), strict=True):
        assert held.moments == moments * plain.parameters - (matrices if held is muon else 0)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=4, dp=2)], ids=str)
def test_a_step_of_muon_holds_whole_matrices(layout: Layout) -> None:
    work = describe(layout, LLAMA)
    held = shard(work, replace(work.roles[0], optim=OptimConfig(kind="muon")), 0)
    assert held.stepping == 4 * (3 * 2 * 1024 * 256 + 2 * 256 * 256)  # gate and up of 4 * 256 channels
    assert shard(work, work.roles[0], 0).stepping == 0


def test_what_is_frozen_has_no_gradients_and_no_copy() -> None:
    work = describe(Layout(), {**LLAMA, "num_layers_unfrozen": 1})
    held = shard(work, work.roles[0], 0)
    layer = layer_weights(work.model) + 2 * 256
    assert held.trainable == layer + 256 + 2048 * 256
    assert held.copy == 4 * held.trainable
    assert held.gradients == pytest.approx(4 * held.trainable, rel=0.001)


@pytest.mark.parametrize(("bits", "size"), [(8, 1.016), (4, 0.516)])
def test_a_quantised_weight_takes_its_codes_and_their_scales(bits: int, size: float) -> None:
    work, quantised = (with_adapter(describe(Layout(tp=2), LLAMA), base_bits=base) for base in (16, bits))
    plain, small = (shard(each, each.roles[0], 0) for each in (work, quantised))
    assert plain.parameters == small.parameters
    assert plain.trainable == small.trainable
    weights = 4 * layer_weights(work.model) // 2
    assert plain.weights - small.weights == pytest.approx((4 - size) * weights, rel=1e-3)


def test_of_adapters_alone_there_are_gradients_and_optimizer_state() -> None:
    work = with_adapter(describe(Layout(), LLAMA), rank=4)
    held = shard(work, work.roles[0], 0)
    # Of a layer: inputs of q, k, v, o, gate, up, down, and outputs of the four; 8 heads and 2 groups of 32 channels
    factors = 4 * 4 * (3 * 256 + 256 + 2 * 256 + 1024 + (256 + 2 * 64) + 256 + 2 * 1024 + 256)
    assert held.trainable == factors
    assert held.gradients == pytest.approx(4 * factors, rel=0.01)
    assert held.optimizer == pytest.approx(8 * factors, rel=0.01)
    assert held.copy == 4 * factors


def test_a_model_without_the_head_lm_has_no_output_layer() -> None:
    work = describe(Layout(), LLAMA)
    speaking, silent = (shard(work, policy_of(work.model, heads=heads), 0) for heads in (("lm", "value"), ("value",)))
    assert speaking.parameters - silent.parameters == speaking.trainable - silent.trainable == 2048 * 256
    assert speaking.gradients - silent.gradients == pytest.approx(4 * 2048 * 256, rel=0.01)


def test_ilqls_heads_are_two_that_train_and_two_that_follow() -> None:
    work = describe(Layout(tp=2), LLAMA)
    plain, headed = (shard(work, policy_of(work.model, heads=("lm", *["q"] * n)), 0) for n in (0, 2))
    # Per head and rank: 256 -> 512 and 512 -> 2048 with biases, cut in two
    head = (256 * 512 + 512 + 512 * 2048 + 2048) // 2
    assert headed.parameters - plain.parameters == 4 * head
    assert headed.trainable - plain.trainable == 2 * head


MIXTRAL = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=14336,
    max_positions=32768,
    experts=ExpertsConfig(count=8, chosen=2),
    tie_embeddings=False,
)
MIXTRAL_PARAMETERS = 46_702_792_704
"""As published: mistralai/Mixtral-8x7B-v0.1."""


def experts_on(work: Work, role: Role, stage: int) -> int:
    """Parameters of experts on a rank that other ranks have not."""
    return shard(work, role, stage).experts.trainable


def test_mixtral_has_its_published_number_of_parameters() -> None:
    # Attention with an eighth of keys and values, a router, 8 experts, two norms; two tables; the last norm
    h, f = 4096, 14336
    expected = 32 * (2 * h * h + 2 * h * 1024 + 8 * h + 8 * 3 * h * f + 2 * h) + 2 * 32000 * h + h
    role = policy_of(MIXTRAL, 32000)
    assert shard(neox(Layout()), role, 0).parameters == expected == MIXTRAL_PARAMETERS


@pytest.mark.parametrize(
    "layout", [Layout(dp=4, ep=4), Layout(tp=2, dp=4, ep=2, pp=2, sequence_parallel=True), Layout(dp=8, ep=8)], ids=str
)
def test_every_rank_of_a_mixture_builds_and_together_they_are_the_model(layout: Layout) -> None:
    work, role = neox(layout), policy_of(MIXTRAL, 32000)
    held = []
    for rank in range(layout.world_size):
        with fake_world(layout, rank) as grid:
            held.append(measure(build_shard(grid, work, role), rank // (layout.tp * layout.dp)))
    experts = sum(shard.experts.trainable for shard in held)
    assert experts == 32 * 8 * 3 * 4096 * 14336 * layout.dp // layout.ep
    # Norms and routers are held by every tensor rank, and all but experts by every replica.
    common = 32 * (8 + 2) * 4096 + 4096
    others = sum(shard.parameters for shard in held) - experts
    assert others == layout.dp * (MIXTRAL_PARAMETERS - 32 * 8 * 3 * 4096 * 14336 + (layout.tp - 1) * common)


def test_the_optimizer_of_experts_is_divided_among_the_replicas_that_hold_them() -> None:
    whole, shared = (shard(neox(Layout(dp=8, ep=ep)), policy_of(MIXTRAL, 32000), 0) for ep in (1, 4))
    experts, others = 32 * 8 * 3 * 4096 * 14336, MIXTRAL_PARAMETERS - 32 * 8 * 3 * 4096 * 14336
    assert whole.optimizer == pytest.approx(12 * MIXTRAL_PARAMETERS / 8, rel=1e-4)
    assert shared.weights == pytest.approx(2 * (others + experts / 4), rel=1e-4)
    assert shared.gradients == pytest.approx(4 * (others + experts / 4), rel=1e-4)
    assert shared.optimizer == pytest.approx(12 * (others / 8 + experts / 4 / 2), rel=1e-4)
    # What a rank saves of the weights: an eighth of what all have, half of what two have.
    assert shared.experts.weights == 2 * experts / 4
    assert shared.experts.moments == 2 * experts / 4
    layout = Layout(dp=8, ep=4)
    assert shared.distributed("trainable", layout) == others / 8 + experts / 8
    assert shared.distributed("moments", layout) == 2 * shared.distributed("trainable", layout)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
@pytest.mark.parametrize("layout", [Layout(tp=2, dp=2, ep=2), Layout(pp=2, dp=4, ep=2)], ids=str)
def test_few_experts_tell_the_sizes_of_many(layout: Layout, kind: str) -> None:
    work = describe(layout, {**MIXTURE, "experts": ExpertsConfig(count=32, chosen=4, ffn_size=512)}, precision="bf16")
    role = replace(work.roles[0], optim=OptimConfig(kind=kind))
    for stage in range(layout.pp):
        exact, quick = (shard(work, role, stage, exact=exact) for exact in (True, False))
        assert quick.parameters == exact.parameters
        assert quick.moments == exact.moments
        assert quick.experts == exact.experts
        for name in ("weights", "gradients", "optimizer", "stepping", "largest", "bucket", "copy"):
            assert getattr(quick, name) == pytest.approx(getattr(exact, name), rel=2e-3), name


def test_stages_with_other_numbers_of_experts_are_built() -> None:
    experts = replace(SHARED["experts"], dense_layers=[0, 2, 3, 7])
    model = describe(Layout(), {**SHARED, "num_layers": 12, "experts": experts}).model
    # The second has no layer with experts, the third two, the fourth one, and the fifth two.
    assert stages_that_differ(Layout(pp=6), model) == [0, 1, 2, 3, 5]
    assert stages_that_differ(Layout(pp=6), replace(model, experts=None)) == [0, 1, 5]
    assert stages_that_differ(Layout(), model) == [0]
    assert layers_of_stage(model, Layout(pp=2, vpp=3), 1) == [2, 3, 6, 7, 10, 11]
    work = describe(Layout(pp=6), {**SHARED, "num_layers": 12, "experts": experts})
    held = [shard(work, work.roles[0], stage).parameters for stage in range(6)]
    assert held[1] < held[3] < held[2] == held[4]


@pytest.mark.parametrize("name", gated(presets_of_large_models(), ["qwen3_30b_a3b"]))
def test_every_preset_builds_at_its_world_size(name: str) -> None:
    entry = "ilql" if name.endswith("_ilql") else "ppo"
    config, _ = compose(entry, [f"+conf={name}"])
    parallel, trainer = config.parallel, config.trainer
    layout = Layout.for_world(
        trainer.devices * trainer.num_nodes,
        tp=parallel.tp,
        pp=parallel.pp,
        ep=parallel.ep,
        sequence_parallel=parallel.sequence_parallel,
    )
    work = describe(layout, {}, precision=trainer.precision)
    policy = policy_of(config.model, config.model.vocab_size)
    stages = stages_that_differ(layout, config.model)
    parts = {stage: shard(work, policy, stage) for stage in stages}
    between = (layout.pp - 2) * parts[stages[1]].parameters if layout.pp > 2 else 0
    held = parts[0].parameters + between + (parts[layout.pp - 1].parameters if layout.pp > 1 else 0)
    held += (layout.ep - 1) * sum(experts_on(work, policy, stage) for stage in range(layout.pp))
    whole = shard(replace(work, layout=Layout()), policy, 0).parameters
    # A rank's parts are a tp-th and what all tensor ranks hold; a tied table is on the first and on the last stage.
    assert whole <= held * layout.tp < whole * 1.02
    assert parts[0].layers == config.model.layers // layout.pp
