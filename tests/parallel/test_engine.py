"""One engine in every layout: the same weights, losses, gradients and updates, and the rules of its optimizer."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config.sections.model import EncoderConfig
from megarl.config.sections.optim import OptimConfig
from megarl.models.gpt import GPT
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.sft import negative_log_likelihood
from megarl.parallel import vocab
from megarl.parallel.digest import digest
from megarl.parallel.engine import Engine, OptimSpec, Outputs
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch
from tests.gated import gated
from tests.parallel.engines import VOCAB, batches, few_batches, seeded_rows, small_engine
from tests.parallel.test_vocab import LargestTensor
from tests.worlds import Worlds

STEPS = 4
Weights = dict[str, Tensor]

# name: (processes, layout, options of small_engine)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP1": (1, {}, {}),
    "selective": (1, {}, {"recompute": "selective"}),
    "full": (1, {}, {"recompute": "full"}),
    "TP2": (2, {"tp": 2}, {}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "PP2": (2, {"pp": 2}, {}),
    "PP2+vpp2": (2, {"pp": 2, "vpp": 2}, {}),
    "DP2": (2, {}, {}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}, {}),
    "TP2xPP2+SP": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, {}),
    "TP2xPP2+SP+full": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}, {"recompute": "full"}),
    "TP2xDP2": (4, {"tp": 2}, {}),
}
# Every part that needs care when it is cut: one key-value head for two ranks, positions with an offset, an embedding
# held by two stages, biases of row-parallel layers, norms inside attention, one norm feeding two branches.
EXOTIC = {
    "num_kv_heads": 1,
    "position": "learned",
    "position_offset": 2,
    "tie_embeddings": True,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "norm": "layernorm",
    "activation": "gelu",
    "qk_norm": True,
    "parallel_residual": "one_norm",
}
T5 = {
    "num_layers": 2,
    "encoder": EncoderConfig(num_layers=2, buckets=8, longest_distance=6, start_id=0),
    "position": "relative",
    "activation": "geglu",
    "tie_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "exotic": EXOTIC, "t5": T5}
LAYOUTS_OF = {
    "llama": [name for name in LAYOUTS if name != "TP1"],
    "exotic": ["TP2", "PP2", "PP2+vpp2", "DP2", "TP2xPP2+SP"],
    "t5": ["selective", "full", "TP2+SP", "PP2", "DP2", "TP2xPP2+SP+full"],
}
CASES = [(model, layout) for model, layouts in LAYOUTS_OF.items() for layout in layouts]
# The parts of these are in the layouts that stay.
LATER = [("llama", layout) for layout in ("TP2", "TP2xPP2", "TP2xPP2+SP")]


def whole(engine: Engine, pick: Callable[[Tensor], Tensor] = lambda parameter: parameter) -> Weights:
    """This stage's tensors put together from their tensor-parallel slices, by global name."""
    tensors: Weights = {}
    group, tp = engine.grid.groups.tp, engine.grid.layout.tp
    for name, parameter in engine.parameters():
        value = pick(parameter).detach().clone()
        if getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(value) for _ in range(tp)]
            dist.all_gather(parts, value, group=group)
            # A stride of 2 (gate and up): every rank holds its slice of the one, then its slice of the other.
            blocks = [part.chunk(parameter.partition_stride, parameter.partition_dim) for part in parts]
            value = torch.cat([block for same in zip(*blocks, strict=True) for block in same], parameter.partition_dim)
        tensors[name] = value
    return tensors


def merged(ranks: list[Weights]) -> Weights:
    """The model from all ranks' tensors; what several ranks hold must be the same on each, bit for bit."""
    model: Weights = {}
    for tensors in ranks:
        for name, value in tensors.items():
            assert torch.equal(model.setdefault(name, value), value), name
    return model


def judge(model: GPT, output: Tensor, batch: Microbatch) -> Outputs:
    result = model.logprobs(output, batch.targets, batch.target_mask, temperature=0.7, entropy=True)
    assert result.entropy is not None
    return {"logprobs": result.logprobs, "entropy": result.entropy, "tokens": batch.tokens}


def evaluated(engine: Engine) -> float:
    """Mean negative log-likelihood of a batch that is not trained on."""

    found = engine.evaluate(batches(engine, 99), negative_log_likelihood)
    return found["nll"] / found["tokens"]


def life(layout: dict[str, Any], model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Everything that layouts are compared by, on one rank."""
    engine = small_engine(layout, model, **options)
    report: dict[str, Any] = {"weights": whole(engine), "dp_rank": engine.grid.dp_rank, "digests": engine.digests()}
    report["forward"] = engine.forward(batches(engine, 99), judge)
    history = []
    for step in range(STEPS):
        metrics = engine.train_step(few_batches(engine, step), cross_entropy, count_targets)
        if step == 0 and engine.grid.layout.dp == 1:
            report["gradients"] = whole(engine, lambda parameter: parameter.main_grad)
        history.append((metrics["loss"], engine.apply_gradients()))
    report["history"] = history
    report["evaluated"] = evaluated(engine)
    report["trained"] = whole(engine)
    report["copies"] = engine.digests_of_copies()
    return report


@pytest.fixture(scope="module")
def lives(worlds: Worlds) -> Callable[[str, str], list[dict[str, Any]]]:
    """The reports of all ranks of a (model, layout), run once."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def of(model: str, layout: str) -> list[dict[str, Any]]:
        if (model, layout) not in known:
            size, grid, options = LAYOUTS[layout]
            known[model, layout] = worlds.run(size, life, grid, MODELS[model], options)
        return known[model, layout]

    return of


Lives = Callable[[str, str], list[dict[str, Any]]]


@pytest.mark.parametrize(("model", "layout"), gated(CASES, LATER))
def test_every_layout_starts_from_the_same_weights(lives: Lives, model: str, layout: str) -> None:
    wanted = merged([lives(model, "TP1")[0]["weights"]])
    found = merged([report["weights"] for report in lives(model, layout)])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("model", "layout"), gated(CASES, LATER))
def test_every_layout_has_the_same_checksums(lives: Lives, model: str, layout: str) -> None:
    wanted = lives(model, "TP1")[0]
    assert wanted["digests"] == {name: digest(value) for name, value in wanted["weights"].items()}
    for report in lives(model, layout):
        assert report["digests"] == wanted["digests"]
        trained = merged([other["trained"] for other in lives(model, layout)])
        assert {name: set(copies) for name, copies in report["copies"].items()} == {
            name: {digest(value)} for name, value in trained.items()
        }


@pytest.mark.parametrize("model", MODELS)
def test_initial_weights_have_the_spread_that_their_place_asks_for(lives: Lives, model: str) -> None:
    for name, value in lives(model, "TP1")[0]["weights"].items():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif name.endswith("bias"):
            assert not value.any(), name
        else:
            rows = value[:VOCAB] if name.startswith(("embedding.word", "output_layer")) else value
            deep = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            wanted = 0.02 / math.sqrt(8) if deep else 0.02
            if model == "t5":  # its spread is as T5's: `test_t5`
                wanted = float(rows.std())
            assert float(rows.std()) == pytest.approx(wanted, rel=max(0.05, 4 / math.sqrt(2 * rows.numel()))), name
            assert not value[len(rows) :].any(), f"{name}: padding"


@pytest.mark.parametrize(("model", "layout"), gated(CASES, LATER))
def test_every_layout_has_the_same_losses_and_gradient_norms(lives: Lives, model: str, layout: str) -> None:
    wanted = lives(model, "TP1")[0]
    for report in lives(model, layout):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(report["history"], wanted["history"], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5, abs=1e-6)
            assert norm == pytest.approx(wanted_norm, rel=1e-4, abs=1e-6)
        assert report["evaluated"] == pytest.approx(wanted["evaluated"], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("model", "layout"), gated((case for case in CASES if "DP2" not in case[1]), LATER))
def test_every_layout_has_the_same_gradient_of_every_tensor(lives: Lives, model: str, layout: str) -> None:
    """Sharper than a norm over all: one norm weight whose gradient is not summed over ranks is nothing in the norm."""
    wanted = lives(model, "TP1")[0]["gradients"]
    for report in lives(model, layout):
        for name, value in report["gradients"].items():
            scale = float(wanted[name].abs().max())
            torch.testing.assert_close(
                value, wanted[name], rtol=0, atol=1e-5 * scale + 1e-8, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("model", "layout"), gated(CASES, LATER))
def test_ranks_that_share_a_tensor_hold_it_alike_after_training(lives: Lives, model: str, layout: str) -> None:
    """Replicas, norms on tensor-parallel ranks, and an embedding held by the first and the last stage."""
    before = merged([report["weights"] for report in lives(model, layout)])
    after = merged([report["trained"] for report in lives(model, layout)])
    still = [name for name, value in after.items() if torch.equal(value, before[name])]
    assert not still


@pytest.mark.parametrize(("model", "layout"), gated(CASES, LATER))
def test_forward_gives_every_rank_of_a_replica_the_same_tensors(lives: Lives, model: str, layout: str) -> None:
    wanted = lives(model, "TP1")[0]["forward"]
    for report in lives(model, layout):
        found = report["forward"]
        share = len(wanted) // (2 if "DP2" in layout else 1)
        mine = wanted[report["dp_rank"] :: len(wanted) // share]
        for given, expected in zip(found, mine, strict=True):
            time = expected["tokens"].shape[1]  # a sequence that is split has padding
            assert torch.equal(given["tokens"][:, :time], expected["tokens"])
            for key in ("logprobs", "entropy"):
                torch.testing.assert_close(given[key][:, :time], expected[key], rtol=0, atol=1e-5)
    for key in ("logprobs", "entropy"):
        of_replica = [report["forward"] for report in lives(model, layout) if report["dp_rank"] == 0]
        assert all(torch.equal(one[i][key], of_replica[0][i][key]) for one in of_replica for i in range(len(one)))


def engine_with(
    layout: dict[str, Any],
    settings: OptimConfig,
    model: dict[str, Any] | None = None,
    total_steps: int = 20,
    **options: Any,
) -> Engine:
    """As `small_engine`, with an optimizer of one's own and weights that `prepare(name, parameter)` has changed."""
    plain = small_engine(layout, model, train=False, **options)
    prepare = options.get("prepare", lambda name, parameter: None)
    with torch.no_grad():
        for name, parameter in plain.parameters():
            prepare(name, parameter)
    models = iter(plain.models)
    return Engine(
        plain.grid,
        lambda **_: next(models),
        optim=OptimSpec(settings, total_steps),
        trainable=options.get("trainable"),
    )


# --- how a batch is cut -----------------------------------------------------------------------------------------------


def cut(layout: dict[str, Any], micro: int) -> tuple[float, float]:
    engine = small_engine(layout)
    metrics = engine.train_step(batches(engine, 0, micro=micro), cross_entropy, count_targets)
    return metrics["loss"], engine.apply_gradients()


@pytest.mark.parametrize(("size", "layout"), [(1, {}), (2, {"pp": 2}), (2, {})], ids=["TP1", "PP2", "DP2"])
def test_a_loss_does_not_depend_on_how_its_batch_is_cut(worlds: Worlds, size: int, layout: dict[str, Any]) -> None:
    (loss, norm), *others = [worlds.run(size, cut, layout, micro)[0] for micro in (1, 2, 4)]
    for other_loss, other_norm in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)


def with_emptied(layout: dict[str, Any], micro: int, emptied: int, rows: int = 8) -> dict[str, Any]:
    """A step whose first `emptied` rows of the global batch have no response."""
    engine = small_engine(layout)
    given = seeded_rows(0, rows)
    given.action_mask[:emptied] = 0.0
    numbers = torch.arange(rows)
    if engine.grid.layout.dp == 2:  # microbatches are dealt out in turn: the first replica gets all that are empty
        numbers = numbers.view(2, -1, micro).transpose(0, 1).flatten()
    mine = make_microbatches(given, numbers, engine, per_microbatch=micro, share_bins=False)
    metrics = engine.train_step(mine, cross_entropy, count_targets)
    finite = all(torch.isfinite(parameter.main_grad).all() for _, parameter in engine.parameters())
    return {"loss": metrics["loss"], "norm": engine.apply_gradients(), "finite": finite}


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {})], ids=["TP1", "TP2", "PP2", "DP2"]
)
def test_a_microbatch_without_a_response_adds_nothing(worlds: Worlds, size: int, layout: dict[str, Any]) -> None:
    """Four of eight rows: with microbatches of two, the first two are empty; in DP2, all of the first replica's."""
    wanted = worlds.run(1, with_emptied, {}, 8, 4)[0]
    for found in worlds.run(size, with_emptied, layout, 2, 4):
        assert found["finite"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)


def largest_tensor_of_a_step() -> tuple[int, int]:
    """Elements of the largest tensor made in a training step, and of the logits of a microbatch."""
    narrow = {"num_layers": 1, "hidden_size": 4, "num_heads": 1, "ffn_size": 4, "max_positions": 512}
    engine = small_engine({}, narrow)
    given = batches(engine, 0, rows=8, time=512, micro=8)
    budget, vocab.CHUNK_ELEMENTS_CPU = vocab.CHUNK_ELEMENTS_CPU, 2**14
    try:
        with LargestTensor() as seen:
            engine.train_step(given, cross_entropy, count_targets)
    finally:
        vocab.CHUNK_ELEMENTS_CPU = budget
    return seen.numel, 8 * 512 * VOCAB


def test_a_training_step_never_holds_the_logits_of_its_batch(worlds: Worlds) -> None:
    largest, logits = worlds.run(1, largest_tensor_of_a_step)[0]
    assert largest < logits / 4


# --- the optimizer's rules --------------------------------------------------------------------------------------------


def nothing(model: GPT, output: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Outputs]:
    loss = cross_entropy(model, output, batch, counts)[0] * 0.0
    return loss, {"loss": loss}


def decay_without_gradient(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights before and after a step of lr 0.1 and weight decay 0.5 in which all gradients are 0."""
    settings = OptimConfig(kind=kind, lr=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    engine = engine_with(
        {}, settings, {**EXOTIC, "lm_head_bias": True}, prepare=lambda name, parameter: parameter.add_(0.25)
    )
    before = whole(engine)
    engine.train_step(batches(engine, 0), nothing, count_targets)
    engine.apply_gradients()
    after = whole(engine)
    return {name: (value, after[name]) for name, value in before.items()}


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "lion", "muon", "rmsprop", "sgd"])
def test_matrices_decay_and_biases_and_norms_do_not(worlds: Worlds, kind: str) -> None:
    kinds = {True: 0, False: 0}
    for name, (before, after) in worlds.run(1, decay_without_gradient, kind)[0].items():
        exempt = "norm" in name or name.endswith("bias")
        kinds[exempt] += 1
        torch.testing.assert_close(
            after, before if exempt else before * 0.95, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert all(count > 4 for count in kinds.values())


def size_of_update(clip: float) -> tuple[float, float]:
    """The norm of an update and the gradient norm that was reported. With so large an eps, Adam's step is lr / eps
    times the gradient."""
    settings = OptimConfig(lr=100.0, eps=1e4, weight_decay=0.0, warmup_steps=0, schedule="constant", clip_grad=clip)
    engine = engine_with({}, settings)
    before = whole(engine)
    engine.train_step(batches(engine, 0), cross_entropy, count_targets)
    norm = engine.apply_gradients()
    after = whole(engine)
    moved = math.sqrt(sum(float((after[name] - value).double().square().sum()) for name, value in before.items()))
    return moved / 0.01, norm


def test_the_whole_gradient_is_clipped_to_a_norm(worlds: Worlds) -> None:
    (free, norm), (loose, loose_norm), (tight, tight_norm) = [
        worlds.run(1, size_of_update, clip)[0] for clip in (0.0, 1e3, 0.5)
    ]
    assert norm > 0.6  # or there would be nothing to clip
    assert norm == loose_norm == tight_norm  # reported as it was before
    assert free == pytest.approx(norm, rel=1e-3)
    assert loose == pytest.approx(norm, rel=1e-3)
    assert tight == pytest.approx(0.5, rel=1e-3)


def rates(settings: OptimConfig, total_steps: int, steps: int) -> list[float]:
    """The learning rate that each step used, as Megatron's optimizer was told."""
    engine = engine_with({}, settings, {"num_layers": 1, "hidden_size": 8, "num_heads": 1}, total_steps=total_steps)
    used = []
    for step in range(steps):
        told = {group["lr"] for group in engine.optimizer.param_groups}  # type: ignore[union-attr]
        assert told == {engine.learning_rate}
        used.append(engine.learning_rate)
        engine.train_step(batches(engine, step, rows=2), cross_entropy, count_targets)
        engine.apply_gradients()
    return used


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "wanted"),
    [
        ("constant", 4, 6, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]),
        # from 1 at step 4 to 0.1 at step 10: 0.15 a step
        ("linear", 4, 10, [0.25, 0.5, 0.75, 1.0, 0.85, 0.70, 0.55, 0.40, 0.25, 0.10, 0.10]),
        # 0.1 + 0.9 * (1 + cos(pi * k / 6)) / 2 for k = 1 ... 6
        ("cosine", 4, 10, [0.25, 0.5, 0.75, 1.0, 0.9397114, 0.775, 0.55, 0.325, 0.1602886, 0.10, 0.10]),
        ("linear", 0, 3, [0.7, 0.4, 0.1]),
        # warm-up that would never end is cut to end before the last step
        ("linear", 10, 3, [0.5, 1.0, 0.1]),
        ("cosine", 10, 1, [0.1]),
    ],
)
def test_learning_rates_follow_the_schedule(
    worlds: Worlds, schedule: str, warmup: int, total: int, wanted: list[float]
) -> None:
    settings = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=warmup, schedule=schedule)
    (found,) = worlds.run(1, rates, settings, total, len(wanted))
    assert found == pytest.approx(wanted, abs=1e-6)


def rate_after_loading() -> tuple[float, float]:
    """The learning rate of the fourth step, in the engine that took three and in one that loads its state."""
    settings = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=2, schedule="linear")
    tiny = {"num_layers": 1, "hidden_size": 8, "num_heads": 1}
    first = engine_with({}, settings, tiny)
    for step in range(3):
        first.train_step(batches(first, step, rows=2), cross_entropy, count_targets)
        first.apply_gradients()
    assert first.schedule is not None
    assert first.optimizer is not None
    state = {
        "weights": {"model0": first.models[0].state_dict()},
        "optimizer": first.optimizer.state_dict(),
        "schedule": first.schedule.state_dict(),
    }
    first.grid.close()
    second = engine_with({}, settings, tiny)
    second.load_state_dict(state)
    return first.learning_rate, second.learning_rate


def test_a_loaded_schedule_goes_on_where_it_was(worlds: Worlds) -> None:
    kept, loaded = worlds.run(1, rate_after_loading)[0]
    assert kept == pytest.approx(1.0 - 0.9 * 2 / 18)
    assert loaded == kept


# --- freezing ---------------------------------------------------------------------------------------------------------


def top_layer(name: str) -> bool:
    return name.startswith(("decoder.layers.3.", "decoder.final_layernorm", "output_layer"))


def all_but_embedding(name: str) -> bool:
    return not name.startswith("embedding")


def lower_half(name: str) -> bool:
    return name.startswith(("embedding", "decoder.layers.0.", "decoder.layers.1."))


def frozen_run(
    layout: dict[str, Any], trainable: Callable[[str], bool], options: dict[str, Any]
) -> tuple[Weights, Weights, list[tuple[float, float]]]:
    """Weights before and after three steps, and the history."""
    settings = OptimConfig(lr=1e-3, warmup_steps=0, weight_decay=0.1)
    engine = engine_with(layout, settings, trainable=trainable, **options)
    before, history = whole(engine), []
    for step in range(3):
        metrics = engine.train_step(batches(engine, step), cross_entropy, count_targets)
        history.append((metrics["loss"], engine.apply_gradients()))
        assert engine.learning_rate > 0
    return before, whole(engine), history


FREEZING = {"top_layer": top_layer, "all_but_embedding": all_but_embedding, "lower_half": lower_half}


FROZEN = [(chosen, layout) for chosen in FREEZING for layout in ("TP1", "full", "PP2", "PP2+vpp2", "TP2xPP2+SP", "DP2")]
FROZEN_LATER = [("all_but_embedding", "PP2"), ("all_but_embedding", "full"), ("lower_half", "full")]
FROZEN_LATER += [("all_but_embedding", "PP2+vpp2"), ("lower_half", "TP2xPP2+SP"), ("all_but_embedding", "DP2")]


@pytest.fixture(scope="module")
def frozen_alone(worlds: Worlds) -> Callable[[str], list[tuple[float, float]]]:
    """The history of one process."""
    return cache(lambda chosen: worlds.run(1, frozen_run, {}, FREEZING[chosen], {})[0][2])


@pytest.mark.parametrize(("chosen", "layout"), gated(FROZEN, FROZEN_LATER))
def test_only_chosen_parameters_move(
    worlds: Worlds, chosen: str, layout: str, frozen_alone: Callable[[str], list[tuple[float, float]]]
) -> None:
    """In PP2, `top_layer` leaves the first stage without anything to train and `lower_half` the last."""
    size, grid, options = LAYOUTS[layout]
    trainable, wanted_history = FREEZING[chosen], frozen_alone(chosen)
    reports = worlds.run(size, frozen_run, grid, trainable, options)
    before, after = (merged([report[i] for report in reports]) for i in (0, 1))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if trainable(name)}
    for report in reports:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(report[2], wanted_history, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-5)
            assert norm == pytest.approx(wanted_norm, rel=1e-4)


def test_an_engine_without_an_optimizer_holds_no_gradient_buffers(worlds: Worlds) -> None:
    def evaluator() -> tuple[bool, float]:
        engine = small_engine({}, train=False)
        loss = evaluated(engine)
        return any(
            parameter.requires_grad or hasattr(parameter, "main_grad") for _, parameter in engine.parameters()
        ), loss

    has_gradients, loss = worlds.run(1, evaluator)[0]
    assert not has_gradients
    assert loss == pytest.approx(math.log(VOCAB), rel=0.05)  # an untrained model knows nothing


# --- evaluation -------------------------------------------------------------------------------------------------------


def judged(layout: dict[str, Any], rows: int, model: dict[str, Any]) -> list[Tensor]:
    engine = small_engine(layout, model)
    engine.train()
    return [result["logprobs"] for result in engine.forward(batches(engine, 99, rows=rows), judge)]


@pytest.mark.parametrize("layout", ["PP2", "PP2+vpp2"])
@pytest.mark.parametrize("rows", [2, 6])
def test_any_number_of_microbatches_is_evaluated(worlds: Worlds, layout: str, rows: int) -> None:
    """One and three microbatches of two rows; an interleaved pipeline of two stages works in rounds of two, over which
    the rows are spread."""
    wanted = torch.cat(worlds.run(1, judged, {}, rows, {})[0])
    size, grid, _ = LAYOUTS[layout]
    for found in worlds.run(size, judged, grid, rows, {}):
        torch.testing.assert_close(torch.cat(found)[:rows], wanted, rtol=0, atol=1e-5)


def test_evaluation_drops_nothing_out(worlds: Worlds) -> None:
    wanted, found = [worlds.run(1, judged, {}, 2, {"dropout": rate})[0] for rate in (0.0, 0.5)]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- dropout and precision --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_history(worlds: Worlds) -> tuple[list[float], float]:
    """Of one process in float32, without dropout."""
    (found,) = worlds.run(1, short_history, {}, {}, {})
    return found  # type: ignore[no-any-return]


def short_history(layout: dict[str, Any], model: dict[str, Any], options: dict[str, Any]) -> tuple[list[float], float]:
    """Losses of four steps, and one evaluated after them."""
    engine = small_engine(layout, model, **options)
    losses = []
    for step in range(4):
        losses.append(engine.train_step(batches(engine, step), cross_entropy, count_targets)["loss"])
        engine.apply_gradients()
    return losses, evaluated(engine)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_draws_the_same_dropout_again(
    worlds: Worlds, recompute: str, plain_history: tuple[list[float], float]
) -> None:
    wanted, found = [
        worlds.run(1, short_history, {}, {"dropout": 0.3}, options)[0] for options in ({}, {"recompute": recompute})
    ]
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    assert wanted[0] != pytest.approx(plain_history[0], rel=1e-4)  # dropout does something


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_keeps_tensor_parallel_ranks_in_step(worlds: Worlds, sequence_parallel: bool) -> None:
    """Ranks that dropped other elements of a replicated tensor would drift apart."""
    layout = {"tp": 2, "sequence_parallel": sequence_parallel}

    def trained() -> Weights:
        engine = small_engine(layout, {"dropout": 0.3})
        for step in range(3):
            engine.train_step(batches(engine, step), cross_entropy, count_targets)
            engine.apply_gradients()
        return whole(engine)

    merged(worlds.run(2, trained))


def bf16_engine(layout: dict[str, Any]) -> tuple[list[float], float, set[torch.dtype], set[torch.dtype]]:
    losses, evaluated = short_history(layout, {}, {"precision": "bf16"})
    torch.distributed.barrier()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    engine = small_engine(layout, precision="bf16")
    outputs = engine.forward(batches(engine, 99), judge)
    parameters = {parameter.dtype for _, parameter in engine.parameters()}
    return losses, evaluated, parameters, {outputs[0]["logprobs"].dtype, outputs[0]["entropy"].dtype}


@pytest.mark.parametrize(
    ("size", "layout"), [(1, {}), (4, {"tp": 2, "pp": 2, "sequence_parallel": True})], ids=["TP1", "TP2xPP2+SP"]
)
def test_bf16_models_train_near_float32_and_report_float32(
    worlds: Worlds, size: int, layout: dict[str, Any], plain_history: tuple[list[float], float]
) -> None:
    wanted = plain_history
    for losses, evaluated, parameters, outputs in worlds.run(size, bf16_engine, layout):
        assert parameters == {torch.bfloat16}
        assert outputs == {torch.float32}
        assert losses == pytest.approx(wanted[0], rel=5e-3)
        assert evaluated == pytest.approx(wanted[1], rel=5e-3)
