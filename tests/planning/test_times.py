"""Seconds against hand-worked ones, and against times that others have published."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from megarl.config.cluster import ClusterConfig
from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.roles import Role
from megarl.parallel.layout import Layout
from megarl.planning.hardware import KINDS, Cluster
from megarl.planning.plain import as_json
from megarl.planning.plan import Plan, make_plan, possible_layouts, remedies, suggest
from megarl.planning.show import write
from megarl.planning.times import Phase, Rates
from megarl.planning.work import Work
from tests.planning.runs import LLAMA, MIXTURE, T5, describe, policy_of, with_adapter

QWEN_32B = ModelConfig(
    num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, ffn_size=27648, max_positions=4096
)
LLAMA_70B = ModelConfig(
    num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, ffn_size=28672, max_positions=8192
)


def planned(work: Work, host_s_per_layer: float = 0.0, gpu: str = "h100") -> Plan:
    cluster = Cluster.of(ClusterConfig(gpu=gpu), work.layout.world_size)
    return make_plan(work, cluster, Rates(cluster.gpu.products, host_s_per_layer))


def large(model: ModelConfig, vocab_size: int, layout: Layout, **changes: object) -> Work:
    """Micro batch 1, 4096 tokens, 32 microbatches to a step, bf16, selective recompute."""
    work = describe(layout, {}, micro=1, accumulation=32, length=4096, precision="bf16", recompute="selective")
    return replace(
        work, **{"model": model, "vocab_size": vocab_size, "roles": (policy_of(model, vocab_size),), **changes}
    )


@pytest.mark.parametrize(
    ("work", "published"),
    [
        (large(QWEN_32B, 152064, Layout(tp=8, dp=4, sequence_parallel=True)), 0.46),
        (large(LLAMA_70B, 128256, Layout(tp=8, pp=2, dp=4, sequence_parallel=True)), 0.42),
    ],
    ids=["32B-TP8", "70B-TP8-PP2"],
)
def test_megatrons_published_utilisation_on_h100(work: Work, published: float) -> None:
    assert planned(work).mfu == pytest.approx(published, rel=0.10)


@pytest.mark.parametrize(("gpus", "published"), [(96, 366.7), (768, 56.9)])
def test_a_published_ppo_step_of_a_70b_policy(gpus: int, published: float) -> None:
    """Two thirds of the GPUs are the policy's and decide the time. What was not published is assumed: see the page."""
    actors = gpus * 2 // 3
    work = large(
        LLAMA_70B,
        128256,
        Layout(tp=8, dp=actors // 8, sequence_parallel=True),
        algorithm="ppo",
        roles=(policy_of(LLAMA_70B, 128256), Role("reference", LLAMA_70B, 128256, swaps_with="policy")),
        global_batch=128,
        steps=8,
        length=2560,
        loss_tokens=2048,
        rollouts=1024,
        rescored=True,
        prompt=512,
        response=2048,
        longest=2048,
        slots=8,
    )
    plan = planned(work)
    generate = next(phase for phase in plan.phases if phase.name == "generate")
    assert plan.seconds == pytest.approx(published, rel=0.25)
    assert 0.6 < generate.seconds / plan.seconds < 0.95


def four_of_70b(*, offload: bool) -> Work:
    """PPO of a 70B policy with a critic, a reference and an 8B reward model, on 128 GPUs."""
    policy = policy_of(LLAMA_70B, 128256)
    small = replace(LLAMA_70B, num_layers=32, hidden_size=4096, num_heads=32, ffn_size=14336)
    roles = (
        policy,
        replace(policy, name="critic", heads=("value",)),
        Role("reference", LLAMA_70B, 128256, swaps_with="policy"),
        Role("reward", small, 128256, ("score",)),
    )
    work = large(
        LLAMA_70B,
        128256,
        Layout(tp=8, pp=4, dp=4, sequence_parallel=True),
        **{"algorithm": "ppo", "roles": roles, "rollouts": 512, "rescored": True, "global_batch": 128, "steps": 4},
        **{"length": 2048, "loss_tokens": 1024, "prompt": 1024, "response": 1024, "longest": 1024, "slots": 16},
    )
    return replace(work, parallel=replace(work.parallel, offload=offload))


@pytest.mark.parametrize("offload", [False, True])
def test_a_plan_of_a_70b_ppo_has_the_bytes_and_seconds_of_all_four_roles(offload: bool) -> None:
    page = as_json(planned(four_of_70b(offload=offload), gpu="h200"), [], None)
    for rank in page["ranks"]:
        assert set(rank["phases"]) == {"generate", "reward", "score", "train", "save"}
        for phase, numbers in rank["phases"].items():
            roles = numbers["roles"]
            assert list(roles) == ["policy", "critic", "reference", "reward"]
            on_device = {name for name, parts in roles.items() if parts["weights"]}
            alone = {"generate": {"policy"}, "reward": {"reward"}}.get(phase, {"policy", "critic"})
            assert on_device == (alone if offload else {"policy", "critic", "reward"})
            assert roles["reference"]["host"] > 0
            assert (roles["reward"]["host"] > 0) == offload
            assert numbers["bytes"] == pytest.approx(
                sum(size for parts in roles.values() for part, size in parts.items() if part != "host"), abs=50
            )
    seconds = {name: phase["seconds"] for name, phase in page["phases"].items()}
    # Three passes of 70B and one of 8B: the reference is copied in and out besides.
    assert 0.05 < seconds["reward"] / (seconds["score"] / 3) < 0.15
    assert page["seconds"] == pytest.approx(sum(seconds.values()) - seconds["save"])


def test_a_step_on_one_gpu_is_its_operations_over_what_products_reach() -> None:
    work = describe(Layout(), LLAMA, precision="bf16")
    train = next(phase for phase in planned(work).phases if phase.name == "train")
    # 4 layers of 2 * weights: 256 * (256 + 128 + 256) for attention, 3 * 256 * 1024 for the MLP; causal attention of
    # 512 tokens sees 256.5 keys; the output layer has 2048 rows; forward and backward are three times forward.
    token = 4 * (2 * (256 * 640 + 3 * 256 * 1024) + 4 * 256 * 256.5) + 2 * 256 * 2048
    assert train.flops == pytest.approx(3 * 4 * 512 * token)
    products = train.flops / (989e12 * KINDS["h100"].products)
    parameters = planned(work).ranks[0].shards["policy"].trainable
    assert train.seconds == pytest.approx(products + 30 * parameters / (3.35e12 * 0.8))
    assert sum(train.sent.values()) == 0


def test_with_adapters_no_gradients_of_frozen_weights_are_computed() -> None:
    work = with_adapter(describe(Layout(), LLAMA, precision="bf16"), rank=4)
    train = next(phase for phase in planned(work).phases if phase.name == "train")
    weights, attention = 4 * 2 * (256 * 640 + 3 * 256 * 1024), 4 * 4 * 256 * 256.5
    factors = 4 * 2 * 4 * (3 * 256 + 256 + 2 * 256 + 1024 + (256 + 2 * 64) + 256 + 2 * 1024 + 256)
    token = 2 * weights + 3 * attention + 3 * factors + 2 * 2 * 256 * 2048
    assert train.flops == pytest.approx(4 * 512 * token)


def test_what_is_printed_names_the_adapters_and_offers_a_smaller_base() -> None:
    work = with_adapter(large(LLAMA_70B, 128256, Layout(tp=8, sequence_parallel=True)), kind="dora")
    plan = planned(work)
    page = as_json(plan, [], None)
    trained = plan.fullest.shards["policy"].trainable
    assert page["adapter"] == {
        "kind": "dora",
        "rank": 16,
        "base_bits": 16,
        "linears": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "first_layer": 0,
    }
    assert page["ranks"][0]["trained"] == {"policy": trained}
    console = Console(record=True, width=200, file=io.StringIO())
    write(plan, [], None, console)
    assert (
        f"of which {trained:,} train: DoRA of rank 16 beside frozen linear layers in 16 bits" in console.export_text()
    )
    found = {remedy.change: remedy for remedy in remedies(plan)}
    assert found["adapter.base_bits=4"].peak_bytes < plan.peak_bytes - 10 * 2**30


def test_layouts_are_suggested_where_only_a_quantised_base_fits() -> None:
    work = with_adapter(large(LLAMA_70B, 128256, Layout()), base_bits=4).on(Layout(), micro=1, recompute="full")
    assert planned(work).fits
    assert str(suggest(planned(work))[0].work.layout) == "TP1"


def t5(layout: Layout, prompt: int, response: int, **changes: Any) -> Work:
    """A step of an encoder-decoder of 4 + 4 layers."""
    return describe(
        layout, T5, **{"length": prompt + response, "loss_tokens": response, "precision": "bf16", **changes}
    )


def by_hand(prompt: int, response: int) -> tuple[float, float]:
    """FLOPs of a forward pass of the encoder, and of the decoder with the output layer."""
    layer, crossed = 4 * 256 * 256 + 3 * 256 * 1024, 2 * 256 * 256  # queries and outputs; as many for keys and values
    encoder = 4 * prompt * (2 * layer + 4 * 256 * prompt)  # every token attends to all
    decoder = 4 * response * (2 * (layer + crossed) + 4 * 256 * ((response + 1) / 2 + prompt))
    return encoder, decoder + 4 * prompt * 2 * crossed + response * 2 * 256 * 2048


def phase_of(plan: Plan, name: str) -> Phase:
    return next(phase for phase in plan.phases if phase.name == name)


RATE = 989e12 * KINDS["h100"].products


def test_a_step_of_an_encoder_decoder_is_the_operations_of_both_its_parts() -> None:
    plan = planned(t5(Layout(), 320, 192))
    train = phase_of(plan, "train")
    assert train.flops == pytest.approx(3 * 4 * sum(by_hand(320, 192)))
    parameters = plan.ranks[0].shards["policy"].trainable
    assert train.seconds == pytest.approx(train.flops / RATE + 30 * parameters / (3.35e12 * 0.8))


@pytest.mark.parametrize(("prompt", "response", "slower"), [(448, 64, 0), (64, 448, 1)])
def test_with_a_stage_for_each_part_the_slower_one_counts(prompt: int, response: int, slower: int) -> None:
    parts = by_hand(prompt, response)
    assert parts[slower] == max(parts)
    sending = 4 * 512 * 256 * 2 / (450e9 * 0.75)  # the states of both parts go from stage to stage
    forward, backward = planned(t5(Layout(pp=2), prompt, response)).passes
    assert forward == pytest.approx(4 * parts[slower] / RATE + sending)
    assert backward == pytest.approx(2 * 4 * parts[slower] / RATE + sending)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_ranks_of_an_encoder_decoder_exchange_the_states_of_each_part(sequence_parallel: bool) -> None:
    plan = planned(t5(Layout(tp=2, sequence_parallel=sequence_parallel), 320, 192))
    # Of a layer, attention and MLP, in the decoder attention to the encoder too: summed forward and backward, each as
    # a scatter and a gather. Of the encoder's states only gradients are summed, but they are gathered twice.
    encoder, decoder, read = 4 * 320, 4 * 192, 4 * 320
    positions = 2 * (2 * 2 * encoder + 2 * 3 * decoder) + 2 * read
    if sequence_parallel:
        positions += 2 * encoder + 3 * decoder + read
    assert phase_of(plan, "train").sent["NVLink"] == pytest.approx(4 * positions * 256 * 2 / 2)


OUTPUT = 192 * 2 * 256 * 2048
"""FLOPs of the output layer for 192 tokens."""


@pytest.mark.parametrize(
    ("model", "unfrozen", "trained"),
    [(LLAMA, 1, lambda whole: (whole - OUTPUT) / 4 + OUTPUT), (T5, 4, lambda _: by_hand(320, 192)[1])],
    ids=["a quarter of the layers", "the decoder"],
)
def test_frozen_layers_have_no_backward_pass(
    model: dict[str, Any], unfrozen: int, trained: Callable[[float], float]
) -> None:
    whole, some = (
        planned(describe(Layout(), {**model, "num_layers_unfrozen": layers}, loss_tokens=192, precision="bf16")).passes
        for layers in (-1, unfrozen)
    )
    assert some[0] == whole[0]
    assert whole[1] == pytest.approx(2 * whole[0])
    assert some[1] == pytest.approx(2 * 4 * trained(whole[0] * RATE / 4) / RATE)


def test_with_adapters_of_an_encoder_decoder_no_gradients_of_frozen_weights_are_computed() -> None:
    work = with_adapter(t5(Layout(), 320, 192), rank=4)
    # Factors of q, k, v, o and of gate, up and down; the decoder also has q, k, v and o of its attention to the encoder
    attention, mlp = 4 * (3 * 256 + 256 + 4 * 256), 4 * (2 * 256 + 1024 + 2 * 1024 + 256)
    read, written = 4 * (2 * 256 + 2 * 256), 4 * (2 * 256 + 2 * 256)  # of keys and values, of queries and outputs
    factors = 320 * 4 * 2 * (attention + mlp) + 4 * 2 * (192 * (attention + mlp + written) + 320 * read)
    scores = 4 * 4 * 256 * (320 * 320 + 192 * (193 / 2 + 320))
    weights = sum(by_hand(320, 192)) - scores
    train = phase_of(planned(work), "train")
    assert train.flops == pytest.approx(4 * (2 * weights + 3 * scores + 3 * factors))


def generating(samples: int, layout: Layout | None = None) -> Work:
    """64 responses of 128 tokens to prompts of 1024, which are as much work."""
    layout = layout or Layout()
    work = t5(layout, 1024, 128, rollouts=64, algorithm="ppo")
    return replace(work, per_prompt=samples, slots=64)


def test_the_encoder_reads_a_prompt_once_for_all_samples_of_a_replica() -> None:
    one, four, many = (phase_of(planned(generating(samples)), "generate") for samples in (1, 4, 64))
    read = by_hand(1024, 0)
    reading = sum(read)
    assert one.flops - four.flops == pytest.approx((64 - 16) * reading)
    assert four.flops - many.flops == pytest.approx((16 - 1) * reading)
    # 4 prompts to a pass
    assert one.seconds - four.seconds == pytest.approx((64 - 16) * reading / RATE)
    replicas = [phase_of(planned(generating(4, Layout(dp=dp))), "generate").flops for dp in (1, 4, 8)]
    assert replicas[1] - replicas[0] == pytest.approx((64 - 16) * reading)  # samples of a prompt are dealt out
    assert replicas[2] == replicas[1]


def test_a_decode_pass_reads_the_decoder_and_the_cache_of_prompt_and_response() -> None:
    work = generating(4)
    plan = planned(work, gpu="a100")
    generate = phase_of(plan, "generate")
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 1024 + 2 * 256 * 256) + 2048 * 256
    cache = 2 * 4 * 64 * 256 * (1024 + 128 / 2)
    passes = 128 * 2 * (weights + cache) / (2.04e12 * 0.8)
    reading = 16 * sum(by_hand(1024, 0)) / (312e12 * KINDS["a100"].products)
    assert generate.seconds == pytest.approx(passes + reading)
    assert generate.bound == "reading weights and cache"


def test_the_host_launches_the_layers_of_the_decoder_once_per_group_of_slots() -> None:
    for layout in (Layout(), Layout(pp=2)):
        work = generating(4, layout)
        reading = phase_of(planned(work), "generate").seconds
        launched = phase_of(planned(work, host_s_per_layer=1.0), "generate")
        assert launched.bound == "launching passes (host)"
        assert launched.seconds == pytest.approx(128 * 4 * layout.pp, abs=2 * reading)


def test_a_decode_pass_sums_three_times_a_layer_over_tensor_ranks() -> None:
    sent = phase_of(planned(generating(4, Layout(tp=2))), "generate").sent["NVLink"]
    assert sent == pytest.approx(128 * 4 * 3 * 64 * 256 * 2)


def test_layouts_of_an_encoder_decoder_have_one_stage_or_one_for_each_part() -> None:
    work = t5(Layout(dp=8), 512, 256, accumulation=2)
    found = {(plan.work.layout.tp, plan.work.layout.pp) for plan in suggest(planned(work), 20)}
    assert found == {(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2) if tp * pp <= 8}
    changes = {remedy.change for remedy in remedies(planned(t5(Layout(pp=2, dp=4), 512, 256)))}
    assert "parallel.tp=2" in changes
    assert not {change for change in changes if change.startswith("parallel.pp")}
    unequal = replace(work.model, num_layers=6)
    other = replace(work, model=unequal, roles=(policy_of(unequal),))
    assert {plan.work.layout.pp for plan in suggest(planned(other), 20)} == {1}


def test_an_optimizer_with_fewer_moments_updates_and_saves_faster() -> None:
    adamw = describe(Layout(), LLAMA, precision="bf16")
    sgd = replace(adamw, roles=(replace(adamw.roles[0], optim=OptimConfig(kind="sgd")),))
    held = planned(adamw).ranks[0].shards["policy"].trainable
    (train, save), (plain_train, plain_save) = (planned(work).phases for work in (adamw, sgd))
    # Two moments are read and written in float32, and saved.
    assert train.seconds - plain_train.seconds == pytest.approx(16 * held / (3.35e12 * 0.8))
    assert save.seconds - plain_save.seconds == pytest.approx(8 * held / 1e9)


def test_a_pipelines_bubble_is_the_share_of_its_stages() -> None:
    def seconds(accumulation: int) -> float:
        work = describe(Layout(pp=4), LLAMA, accumulation=accumulation, precision="bf16")
        plan = planned(work)
        train = next(phase for phase in plan.phases if phase.name == "train")
        held = max(rank.shards["policy"].trainable for rank in plan.ranks)
        return train.seconds - 30 * held / (3.35e12 * 0.8)

    # (pp - 1) / microbatches: 3 / 4 of the time besides with 4 of them, 3 / 8 with 8
    assert seconds(4) / (4 * 1.75) == pytest.approx(seconds(8) / (8 * 1.375))


def test_gradients_travel_by_the_network_once_replicas_span_machines() -> None:
    near, far = (describe(Layout(dp=dp), LLAMA, precision="bf16") for dp in (8, 16))
    assert planned(near).phases[0].sent["network"] == 0
    sent = planned(far).phases[0].sent["network"]
    held = planned(far).ranks[0].shards["policy"].trainable
    assert sent == pytest.approx((4 + 2) * held * 15 / 16)


def test_what_does_not_fit_is_told_what_would_help_and_it_does() -> None:
    work = large(LLAMA_70B, 128256, Layout(tp=8, dp=4, sequence_parallel=True))
    plan = planned(work)
    assert not plan.fits
    found = {remedy.change: remedy for remedy in remedies(plan)}
    assert found["parallel.pp=2"].peak_bytes < plan.peak_bytes
    assert found["parallel.recompute=full"].peak_bytes < plan.peak_bytes
    halved = planned(large(LLAMA_70B, 128256, Layout(tp=8, pp=2, dp=2, sequence_parallel=True)))
    assert found["parallel.pp=2"].fits == (halved.peak_bytes <= halved.cluster.usable)


def test_suggestions_fit_and_the_fastest_comes_first() -> None:
    work = describe(Layout(dp=8), {**LLAMA, "num_kv_heads": 8}, accumulation=2, precision="bf16")
    plans = suggest(planned(work))
    assert len({str(plan.work.layout) for plan in plans}) == len(plans) > 2
    assert all(plan.fits and plan.work.layout.world_size == 8 for plan in plans)
    assert [plan.seconds for plan in plans] == sorted(plan.seconds for plan in plans)
    assert isinstance(plans[0].work.parallel, ParallelConfig)


def test_nothing_is_suggested_where_nothing_fits() -> None:
    work = large(LLAMA_70B, 128256, Layout(tp=8, sequence_parallel=True))
    assert suggest(planned(work)) == []


LAYER = 256 * (256 + 128 + 256)
"""Weights of attention in a layer of `MIXTURE`."""
EXPERT = 3 * 256 * 512


def mixture(layout: Layout, **changes: Any) -> Work:
    return describe(layout, MIXTURE, **{"precision": "bf16", **changes})


def test_a_step_of_a_mixture_is_the_operations_of_the_chosen_experts() -> None:
    train = phase_of(planned(mixture(Layout())), "train")
    token = 4 * (2 * (LAYER + 256 * 8 + 2 * EXPERT) + 4 * 256 * 256.5) + 2 * 256 * 2048
    assert train.flops == pytest.approx(3 * 4 * 512 * token)
    parameters = planned(mixture(Layout())).ranks[0].shards["policy"].trainable
    assert parameters > 4 * (LAYER + 8 * EXPERT)
    assert train.seconds == pytest.approx(train.flops / RATE + 30 * parameters / (3.35e12 * 0.8))
    assert sum(train.sent.values()) == 0


COPIES = 4 * (4 * 512) * 2 * 256 * 2
"""Bytes of all tokens of a microbatch, twice each, over the layers."""


@pytest.mark.parametrize(("recompute", "passes"), [("none", 2), ("selective", 2), ("full", 3)])
def test_tokens_travel_to_their_experts_and_back_in_every_pass(recompute: str, passes: int) -> None:
    layouts = (Layout(dp=8), Layout(dp=8, ep=4))
    alone, shared = (planned(mixture(each, accumulation=3, recompute=recompute)) for each in layouts)
    sent = [phase_of(plan, "train").sent["NVLink"] for plan in (alone, shared)]
    experts = 4 * 8 * EXPERT
    parameters = alone.ranks[0].shards["policy"].trainable
    assert sent[0] == pytest.approx(6 * parameters * 7 / 8)
    # Of four ranks, three are elsewhere. A quarter of the experts is reduced over 2 replicas, all else over 8.
    exchanged = 3 * passes * 2 * COPIES * 3 / 4
    assert sent[1] == pytest.approx(exchanged + 6 * ((parameters - experts) * 7 / 8 + experts / 4 / 2))
    assert phase_of(alone, "train").sent["network"] == phase_of(shared, "train").sent["network"] == 0


def test_an_exchange_takes_the_longer_of_its_ways_within_and_between_machines() -> None:
    near, far = (planned(mixture(Layout(dp=16, ep=ep))) for ep in (1, 16))
    forward = [plan.passes[0] for plan in (near, far)]
    # Of 16 ranks, 7 others are in the same machine and 8 in the other one.
    between = 2 * COPIES * 8 / 16
    assert forward[1] - forward[0] == pytest.approx(between / (50e9 * 0.75))
    assert phase_of(far, "train").sent["network"] > 2 * between
    eight = planned(mixture(Layout(dp=8, ep=8)))
    assert eight.passes[0] - forward[0] == pytest.approx(2 * COPIES * 7 / 8 / (450e9 * 0.75))


def test_tensor_ranks_all_send_all_tokens() -> None:
    plans = [planned(mixture(Layout(tp=4, dp=2, ep=ep, sequence_parallel=True))) for ep in (1, 2)]
    assert plans[1].passes[0] - plans[0].passes[0] == pytest.approx(2 * COPIES / 2 / (450e9 * 0.75))


def test_a_pass_is_no_faster_than_its_experts_are_launched() -> None:
    slow = planned(mixture(Layout()), host_s_per_layer=1.0)
    assert slow.passes[0] == pytest.approx(4 * 8 / 4)
    assert phase_of(slow, "train").bound == "launching experts (host)"
    assert planned(mixture(Layout(dp=4, ep=4)), host_s_per_layer=1.0).passes[0] == pytest.approx(2, rel=0.01)
    frozen = replace(mixture(Layout()).model, num_layers_unfrozen=1)
    work = replace(mixture(Layout()), model=frozen, roles=(policy_of(frozen),))
    assert planned(work, host_s_per_layer=1.0).passes == pytest.approx((8, 2))


def generation_of_a_mixture(responses: int, layout: Layout) -> Phase:
    work = mixture(layout, rollouts=responses * layout.dp, length=192, loss_tokens=128)
    return phase_of(planned(replace(work, slots=responses)), "generate")


def test_a_decode_pass_reads_the_experts_of_its_tokens() -> None:
    def read(experts: float, rows: int) -> float:
        weights = 4 * (LAYER + 256 * 8 + experts * EXPERT) + 2048 * 256
        cache = 2 * 4 * rows * 2 * 32 * (64 + 64)
        return 128 * 2 * (weights + cache) / (3.35e12 * 0.8)

    def prompts(rows: int) -> float:
        token = 4 * (2 * (LAYER + 256 * 8 + 2 * EXPERT) + 4 * 256 * 32.5) + 2 * 256 * 2048
        return rows * 64 * token / RATE

    one, many = (generation_of_a_mixture(rows, Layout()).seconds for rows in (1, 16))
    assert one - prompts(1) == pytest.approx(read(2, 1), rel=1e-3)
    assert many - prompts(16) == pytest.approx(read(8 * (1 - 0.75**16), 16), rel=1e-3)


def test_replicas_that_share_experts_exchange_the_tokens_of_a_decode_pass() -> None:
    alone, shared = (generation_of_a_mixture(4, Layout(dp=4, ep=ep)) for ep in (1, 4))
    assert shared.sent["NVLink"] - alone.sent["NVLink"] == pytest.approx(128 * 4 * 2 * 4 * 2 * 256 * 2 * 3 / 4)
    assert shared.seconds > alone.seconds + 128 * 3 * 4 * 15e-6 / 2


def test_layouts_of_a_mixture_share_its_experts_where_rules_allow() -> None:
    experts = ExpertsConfig(count=12, chosen=2, ffn_size=512, dense_layers=[1])
    model = replace(mixture(Layout()).model, num_kv_heads=8, experts=experts, num_layers=8, ffn_size=512)
    work = replace(mixture(Layout(dp=8), accumulation=2), model=model, roles=(policy_of(model),))
    cluster = Cluster.of(ClusterConfig(), 8)
    found = {(each.tp, each.pp, each.ep) for each in possible_layouts(work, cluster)}
    assert found == {
        (tp, pp, ep) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) for ep in (1, 2, 4) if 8 % (tp * pp * ep) == 0
    }
    plans = suggest(planned(work), 20)
    assert len({(plan.work.layout.tp, plan.work.layout.pp) for plan in plans}) == len(plans) > 4
    assert all(plan.work.parallel.ep == plan.work.layout.ep for plan in plans)
    changes = {remedy.change for remedy in remedies(planned(work))}
    assert "parallel.ep=2" in changes
    # A critic without experts has none to share.
    critic = replace(policy_of(describe(Layout(), {**LLAMA, "num_kv_heads": 8, "num_layers": 8}).model), name="critic")
    beside = replace(work, roles=(work.roles[0], critic))
    assert {each.ep for each in possible_layouts(beside, cluster)} == {1}


def test_a_layout_that_does_not_cut_experts_is_not_suggested() -> None:
    experts = ExpertsConfig(count=8, chosen=2, ffn_size=6)
    model = replace(mixture(Layout()).model, num_kv_heads=8, experts=experts)
    work = replace(mixture(Layout(dp=8), accumulation=2), model=model, roles=(policy_of(model),))
    assert {each.tp for each in possible_layouts(work, Cluster.of(ClusterConfig(), 8))} == {1, 2}
