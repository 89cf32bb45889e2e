"""Q heads: the numbers of the dense computation, the same training in every layout, targets that follow and start
equal, and scores that guide generation over any shards."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megarl.algorithms import ilql_loss, ilql_scores, next_state_values
from megarl.config.compose import compose
from megarl.config.sections.model import ModelConfig
from megarl.models.config import GPTConfig
from megarl.models.exchange.parameters import parameters
from megarl.models.gpt import GPT
from megarl.models.roles import Role
from megarl.modules.losses import count_targets
from megarl.parallel.engine import Engine, Outputs
from megarl.parallel.fake import fake_world
from megarl.parallel.initialise import is_sharded
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Microbatch
from megarl.parallel.vocab import padded_vocab
from megarl.rollout.generator import Generator
from megarl.rollout.guided import guided
from megarl.rollout.requests import Request, Sampling
from tests.parallel.engines import VOCAB, batches, small_engine
from tests.worlds import Worlds

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (2, {"tp": 2, "sequence_parallel": True}),
]  # stages and replicas are those of the whole runs in tests/e2e
TERMS = ("loss", "loss_q", "loss_v", "loss_cql", "loss_awac", "q", "target_q")


def ilql_engine(layout: dict[str, Any], **options: Any) -> Engine:
    role = Role("policy", ModelConfig(num_layers=4), VOCAB, ("lm", "value", "q", "q"))
    return small_engine(layout, value_head=True, q_heads=2, trainable=role.is_trainable, **options)


def loss(model: GPT, hidden: torch.Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[torch.Tensor, Outputs]:
    targets, mask = batch.targets, batch.target_mask
    heads, v = model.token_q(hidden, targets, mask), model.values(hidden)
    next_v, not_done = next_state_values(v, mask)
    total, parts = ilql_loss(
        *(heads.q, heads.target_q, v, next_v, heads.nll, -model.logprobs(hidden, targets, mask).logprobs),
        rewards=targets / 50.0 - 1.0,
        not_done=not_done,
        mask=mask,
        **{"tau": 0.8, "gamma": 0.9, "cql_scale": 0.1, "awac_scale": 1.0, "awac_beta": 0.5},
        denominator=counts["tokens"],
    )
    means = {
        "q": (heads.q[0] * mask).sum() / counts["tokens"],
        "target_q": (heads.target_q[1] * mask).sum() / counts["tokens"],
    }
    return total, {"loss": total, **parts, **means}


def greedy(engine: Engine, beta: float) -> list[list[int]]:
    generator = Generator(engine, eos_id=0, seed=1, token_scorer=guided(beta))
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    rollouts = generator.generate([Request(number, 0, (number + 1, 7), sampling) for number in range(6)])
    generator.close()
    return [rollout.response for rollout in rollouts]


def trained(layout: dict[str, Any]) -> tuple[list[dict[str, float]], list[list[int]], list[list[int]]]:
    """Terms and gradient norm of each step, with targets that move every other step; then greedy responses, guided by
    the values and not."""
    engine = ilql_engine(layout)
    course = []
    for step in range(1, 5):
        metrics = engine.train_step(batches(engine, step), loss, count_targets)
        course.append({**{term: metrics[term] for term in TERMS}, "norm": engine.apply_gradients()})
        if step % 2 == 0:
            for model in engine.models:
                model.move_targets(0.3)
    return course, greedy(engine, 50.0), greedy(engine, 0.0)


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> tuple[list[dict[str, float]], list[list[int]], list[list[int]]]:
    return worlds.run(1, trained, {})[0]


def test_the_values_change_what_is_generated_and_the_targets_move(
    alone: tuple[list[dict[str, float]], list[list[int]], list[list[int]]],
) -> None:
    course, with_values, without = alone
    assert with_values != without
    assert course[-1]["loss_q"] < course[0]["loss_q"]
    assert course[-1]["target_q"] != course[0]["target_q"]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_layouts_train_and_generate_alike(
    world: int,
    layout: dict[str, Any],
    worlds: Worlds,
    alone: tuple[list[dict[str, float]], list[list[int]], list[list[int]]],
) -> None:
    for course, with_values, without in worlds.run(world, trained, layout):
        for ours, theirs in zip(course, alone[0], strict=True):
            for term in TERMS:
                assert ours[term] == pytest.approx(theirs[term], rel=1e-5, abs=1e-6), term
            assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4, abs=1e-6)
        assert with_values == alone[1]
        assert without == alone[2]


def total_probability(layout: dict[str, Any]) -> list[float]:
    """Of each row, summed over the shards of its unguided scores."""

    def of_rows(model: GPT, hidden: torch.Tensor, _: Microbatch) -> Outputs:
        sums = guided(0.0)(model, model.whole_sequence(hidden)[-1]).exp().sum(1)
        dist.all_reduce(sums)
        return {"sums": sums}

    engine = ilql_engine(layout)
    return [total for result in engine.forward(batches(engine, 1), of_rows) for total in result["sums"].tolist()]


def test_scores_are_log_probs_over_all_shards(worlds: Worlds) -> None:
    assert worlds.run(2, total_probability, {"tp": 2})[0] == pytest.approx([1.0] * 8)


def against_dense(precision: str) -> dict[str, bool]:
    """The heads' numbers beside those of plain torch on the whole vocabulary, without its padding rows."""
    engine = ilql_engine({}, precision=precision)
    (model,) = engine.models
    for head in model.q_heads:
        torch.nn.init.normal_(head.outer.bias)  # of padding rows too: they must not count
    model.move_targets(0.25)

    def dense(head: Any, states: torch.Tensor) -> torch.Tensor:
        wide = torch.relu(F.linear(states, head.inner.weight.to(states.dtype), head.inner.bias.to(states.dtype)))
        return F.linear(wide.double(), head.outer.weight.double(), head.outer.bias.double())[:, :VOCAB]

    def compare(model: GPT, hidden: torch.Tensor, batch: Microbatch) -> Outputs:
        mask = batch.target_mask != 0
        states, chosen = hidden.transpose(0, 1)[mask], batch.targets[mask]
        found = model.token_q(hidden, batch.targets, batch.target_mask)
        close = {"q": True, "nll": True, "target_q": True}
        for number, (head, target) in enumerate(zip(model.q_heads, model.target_q_heads, strict=True)):
            values, followed = dense(head, states), dense(target, states)
            wanted = {
                "q": values.gather(1, chosen[:, None])[:, 0],
                "nll": F.cross_entropy(values, chosen, reduction="none"),
                "target_q": followed.gather(1, chosen[:, None])[:, 0],
            }
            for name, want in wanted.items():
                got = getattr(found, name)[number][mask].double()
                close[name] &= torch.allclose(got, want, rtol=1e-5 if precision == "fp32" else 0.03, atol=1e-5)
        smallest = torch.stack([dense(target, states) for target in model.target_q_heads]).amin(0)
        logits, v = model.logits(states).double(), model.value_head(states).double()
        scores = guided(3.0)(model, states).double()
        bound = 1e-4 if precision == "fp32" else 0.2
        close["guided"] = bool((scores - ilql_scores(logits, smallest, v, 3.0)).abs().max() < bound)
        unasked = (~mask).any() and all(bool((tensor[~mask] == 0).all()) for tensors in found for tensor in tensors)
        return {**{name: torch.tensor([value]) for name, value in close.items()}, "unasked": torch.tensor([unasked])}

    (result,) = engine.forward(batches(engine, 3, rows=2), compare)
    return {name: bool(value) for name, value in result.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_give_the_numbers_of_the_dense_computation(precision: str, worlds: Worlds) -> None:
    checked = worlds.run(1, against_dense, precision)[0]
    assert checked == dict.fromkeys(("q", "nll", "target_q", "guided", "unasked"), True)


def targets(precision: str) -> dict[str, bool]:
    engine = ilql_engine({}, precision=precision)
    (model,) = engine.models
    pairs = list(zip(model.q_heads.parameters(), model.target_q_heads.parameters(), strict=True))
    # Targets keep float32 of what is rounded in a bf16 head.
    equal_at_first = all(torch.equal(q, target.to(q.dtype)) and target.dtype == torch.float32 for q, target in pairs)
    differ = not torch.equal(
        model.q_heads.get_submodule("0").inner.weight, model.q_heads.get_submodule("1").inner.weight
    )
    first = [target.clone() for _, target in pairs]
    engine.train_step(batches(engine, 0), loss, count_targets)
    engine.apply_gradients()
    untouched = all(torch.equal(before, target) for before, (_, target) in zip(first, pairs, strict=True))
    model.move_targets(0.001)
    expected = [before + 0.001 * (q.float() - before) for before, (q, _) in zip(first, pairs, strict=True)]
    moved = [torch.allclose(want, target, atol=1e-9) for want, (_, target) in zip(expected, pairs, strict=True)]
    exact = all(moved) and not any(torch.equal(b, t) for b, (_, t) in zip(first, pairs, strict=True) if t.dim() > 1)
    return {"equal_at_first": equal_at_first, "heads_differ": differ, "untouched": untouched, "exact": exact}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_targets_start_equal_do_not_train_and_move_by_small_steps(precision: str, worlds: Worlds) -> None:
    checked = worlds.run(1, targets, precision)[0]
    assert checked == dict.fromkeys(checked, True)


def test_every_rank_of_a_20b_model_with_heads_builds_and_the_counts_add_up() -> None:
    config, _ = compose("ilql", ["+conf=gpt20b_ilql"])
    layout = Layout(tp=config.parallel.tp, pp=config.parallel.pp, sequence_parallel=True)
    vocab = config.model.vocab_size
    counted: dict[str, int] = {}
    for rank in range(layout.world_size):
        with fake_world(layout, rank) as grid:
            shape = GPTConfig.build(config.model, layout, vocab_size=vocab, precision="bf16")
            last = grid.is_last_stage
            gpt = GPT(
                shape, grid, pre_process=grid.is_first_stage, post_process=last, heads=("lm", "value", "q", "q")
            )  # heads are made where the last stage is
            gpt.initialise(grid, 1)
            for name, parameter in gpt.global_names():
                assert parameter.is_meta
                counted[name] = counted.get(name, 0) + (
                    parameter.numel() if is_sharded(parameter) or grid.tp_rank == 0 else 0
                )
    hidden, rows = config.model.hidden_size, padded_vocab(vocab, layout.tp)
    q_head = hidden * 2 * hidden + 2 * hidden + 2 * hidden * rows + rows
    value = hidden * 2 * hidden + 2 * hidden + 2 * hidden + 1
    trunk = parameters(config.model, rows)
    assert {name: counted[name] for name in trunk} == {name: math.prod(shape) for name, shape in trunk.items()}
    assert sum(counted.values()) == sum(map(math.prod, trunk.values())) + 4 * q_head + value
