"""Replicas that share experts generate the responses of one process, each over its own requests."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config.sections.model import ExpertsConfig
from megarl.errors import ConfigError, DataError
from megarl.experience.response_reference import response_logprobs
from megarl.experience.rows import forward_rows, rollouts_to_rows
from megarl.models.experts import expert_layers
from megarl.parallel.layout import Layout
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Rollout, Sampling
from megarl.rollout.resharded import for_generation
from megarl.rollout.stored import dump, load
from tests.gated import gated
from tests.parallel.engines import small_engine
from tests.refusals import refused
from tests.rollout.test_generate import EOS, MODERATE, check_same, generated, some_requests
from tests.worlds import Worlds

EXPERTS: dict[str, Any] = {
    "hidden_size": 32,
    "experts": ExpertsConfig(count=4, chosen=2, ffn_size=24, shared_ffn_size=40, dense_layers=[1], normalise=False),
}
TIED = ExpertsConfig(count=4, chosen=3, ffn_size=24, dense_layers=[1])
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"ep": 2}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "TP2xEP2": (4, {"tp": 2, "ep": 2}),
    "PP2xEP2": (4, {"pp": 2, "ep": 2}),
    "PP2xEP2 with virtual stages": (4, {"pp": 2, "ep": 2, "vpp": 2}),
    "EP2xDP2": (4, {"ep": 2}),
}


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> list[Rollout]:
    ((rollouts, _),) = worlds.run(1, generated, {}, EXPERTS)
    return rollouts  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", gated(LAYOUTS, ["TP2+SP", "PP2", "TP2xEP2", "PP2xEP2", "EP2xDP2"]))
def test_a_layout_draws_the_same_tokens(name: str, worlds: Worlds, alone: list[Rollout]) -> None:
    size, layout = LAYOUTS[name]
    for slots in (3, 128):
        for rollouts, _ in worlds.run(size, generated, layout, EXPERTS, 1, slots=slots):
            check_same(rollouts, alone, (name, slots))


def few_requests(layout: dict[str, Any], count: int) -> list[Rollout]:
    requests: list[Request] = some_requests()[:count]
    engine = small_engine(layout, {**MODERATE, **EXPERTS}, train=False)
    return Generator(engine, EOS, seed=5).generate(requests)


@pytest.mark.parametrize("count", gated([0, 1, 3], [0, 3]))
def test_a_replica_without_requests_serves_the_others(count: int, worlds: Worlds) -> None:
    (wanted,) = worlds.run(1, few_requests, {}, count)
    assert len(wanted) == count
    for rollouts in worlds.run(2, few_requests, {"ep": 2}, count):
        check_same(rollouts, wanted, count)


def in_another_layout(layout: dict[str, Any], other: str) -> list[Rollout]:
    engine = small_engine(layout, {**MODERATE, **EXPERTS}, train=False)
    reshard = for_generation(engine, other)
    assert reshard is not None
    reshard.refresh()
    found = Generator(reshard.engine, EOS, seed=5).generate(some_requests())
    reshard.close()
    return found


@pytest.mark.parametrize(
    ("layout", "other"),
    gated([({"tp": 2, "sequence_parallel": True}, "pp2"), ({"pp": 2}, "tp2")], [({"pp": 2}, "tp2")]),
)
def test_another_layout_of_whole_mixtures_draws_the_same_tokens(
    layout: dict[str, Any], other: str, worlds: Worlds, alone: list[Rollout]
) -> None:
    for rollouts in worlds.run(2, in_another_layout, layout, other):
        check_same(rollouts, alone, other)


def refusals() -> list[ConfigError | None]:
    engine = small_engine({"ep": 2}, EXPERTS, train=False)
    found: list[ConfigError | None] = []
    for attempt in (
        lambda: Generator(engine, EOS, seed=5, limits=Limits(graphs=True)),
        lambda: for_generation(engine, "tp2"),
    ):
        try:
            attempt()
            found.append(None)
        except ConfigError as problem:
            found.append(problem)
    return found


def test_recorded_passes_and_another_layout_are_refused(worlds: Worlds) -> None:
    for graphs, layout in worlds.run(2, refusals):
        for problem, key, value in (
            (graphs, "rollout.engine.cuda_graphs", True),
            (layout, "rollout.engine.layout", "tp2"),
        ):
            assert isinstance(problem, ConfigError)
            assert (problem.key, problem.value) == (key, value)


def recorded_and_computed(
    layout: dict[str, Any], dense: Sequence[int] = (1,)
) -> tuple[list[Rollout], list[torch.Tensor]]:
    """Responses with the experts of each token, and the log-probs of their tokens as sampled, as computed by the
    recorded experts, and as computed by those that the router chooses. The scores of two experts are as good as equal,
    so that it chooses between them by the last bits of its sums."""
    experts = replace(TIED, dense_layers=list(dense))
    engine = small_engine(layout, {**MODERATE, **EXPERTS, "experts": experts}, train=False)
    for layer in expert_layers(engine.models).values():
        with torch.no_grad():
            layer.router.weight[2:] = layer.router.weight[:2] * (1 + 1e-7)
    generator = Generator(engine, EOS, seed=5, limits=Limits(slots=5, routes=True))
    sampling = Sampling(max_new_tokens=20)
    rollouts = generator.generate([replace(request, sampling=sampling) for request in some_requests()])
    generator.close()
    rows = rollouts_to_rows(rollouts)
    found = [rows["rollout_logprobs"]]
    for engine.follows_routes in (True, False):
        columns = forward_rows(engine, rows, response_logprobs, per_microbatch=3, share_bins=True)
        found.append(columns["logprobs"] * rows.action_mask)
    return rollouts, found


REPLAYED: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "EP2": (2, {"ep": 2}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2xEP2 with virtual stages": (4, {"pp": 2, "ep": 2, "vpp": 2}),
}


@pytest.mark.parametrize("name", gated(REPLAYED, ["EP2", "TP2+SP"]))
def test_recorded_experts_give_the_log_probs_that_were_sampled(name: str, worlds: Worlds) -> None:
    size, layout = REPLAYED[name]
    for rollouts, (sampled, replayed, chosen) in worlds.run(size, recorded_and_computed, layout):
        assert float((replayed - sampled).abs().max()) < 1e-5
        assert float((chosen - sampled).abs().max()) > 1e-3
        for rollout in rollouts:
            assert rollout.routes is not None
            assert rollout.routes.shape == (len(rollout.tokens) - 1, 3, TIED.chosen)
            assert {*rollout.routes.flatten().tolist()} <= {0, 1, 2, 3}


def test_a_stage_without_experts_records_none(worlds: Worlds) -> None:
    for rollouts, (sampled, replayed, _) in worlds.run(2, recorded_and_computed, {"pp": 2}, (0, 1)):
        assert float((replayed - sampled).abs().max()) < 1e-5
        for rollout in rollouts:
            assert rollout.routes is not None
            assert rollout.routes.shape == (len(rollout.tokens) - 1, 2, TIED.chosen)


def test_recorded_experts_are_stored_with_a_response(worlds: Worlds, tmp_path: Path) -> None:
    ((rollouts, _),) = worlds.run(1, recorded_and_computed, {})
    dump(tmp_path / "train-000001.jsonl", [*rollouts, replace(rollouts[0], routes=None)])
    *found, bare = load(tmp_path / "train-000001.jsonl")
    assert bare == rollouts[0]
    assert bare.routes is None
    for one, two in zip(found, rollouts, strict=True):
        assert one == two
        assert one.routes is not None
        assert two.routes is not None
        assert one.routes.tolist() == two.routes.tolist()
    text = (tmp_path / "train-000001.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(text.replace('"chosen": 3', '"chosen": 4', 1))
    with refused(DataError, key="routes", where=f"{tmp_path / 'cut.jsonl'}:2"):
        load(tmp_path / "cut.jsonl")


def test_routes_of_a_model_without_experts_are_refused() -> None:
    key = "rollout.engine.router_replay"
    with refused(ConfigError, key=key, value=True, offers={key: [False]}):
        Limits(routes=True).check(Layout())
