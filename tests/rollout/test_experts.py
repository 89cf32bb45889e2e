"""Replicas that share experts generate the responses of one process, each over its own requests."""

from typing import Any

import pytest

from megarl.config.sections.model import ExpertsConfig
from megarl.errors import ConfigError
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Rollout
from megarl.rollout.resharded import for_generation
from tests.gated import gated
from tests.parallel.engines import small_engine
from tests.rollout.test_generate import EOS, MODERATE, check_same, generated, some_requests
from tests.worlds import Worlds

EXPERTS: dict[str, Any] = {
    "hidden_size": 32,
    "experts": ExpertsConfig(count=4, chosen=2, ffn_size=24, shared_ffn_size=40, dense_layers=[1], normalise=False),
}
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


@pytest.mark.parametrize("name", gated(LAYOUTS, ["TP2+SP", "PP2", "TP2xEP2", "EP2xDP2"]))
def test_a_layout_draws_the_same_tokens(name: str, worlds: Worlds, alone: list[Rollout]) -> None:
    size, layout = LAYOUTS[name]
    for slots in (3, 128):
        for rollouts, _ in worlds.run(size, generated, layout, EXPERTS, 1, slots=slots):
            check_same(rollouts, alone, (name, slots))


def few_requests(layout: dict[str, Any], count: int) -> list[Rollout]:
    requests: list[Request] = some_requests()[:count]
    engine = small_engine(layout, {**MODERATE, **EXPERTS}, train=False)
    return Generator(engine, EOS, seed=5).generate(requests)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_replica_without_requests_serves_the_others(count: int, worlds: Worlds) -> None:
    (wanted,) = worlds.run(1, few_requests, {}, count)
    assert len(wanted) == count
    for rollouts in worlds.run(2, few_requests, {"ep": 2}, count):
        check_same(rollouts, wanted, count)


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
