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


def recorded_and_computed(layout: dict[str, Any]) -> tuple[list[Rollout], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Responses of a model in bfloat16 whose router is close to ties: with the experts of each token; and the log-probs
    of their tokens as sampled, and by passes over whole rows in which the recorded experts, or those that the router
    chooses, compute each token."""
    model = {**MODERATE, "hidden_size": 32, "experts": ExpertsConfig(count=8, chosen=2, ffn_size=24, dense_layers=[1])}
    engine = small_engine(layout, model, train=False, precision="bf16")
    generator = Generator(engine, EOS, seed=5, limits=Limits(slots=5, routes=True))
    rollouts = generator.generate([replace(one, sampling=Sampling(max_new_tokens=20)) for one in some_requests()])
    generator.close()
    rows = rollouts_to_rows(rollouts)

    def logprobs(follows: bool) -> torch.Tensor:
        engine.follows_routes = follows
        return forward_rows(engine, rows, response_logprobs, per_microbatch=3, share_bins=True)["logprobs"]

    return rollouts, rows["rollout_logprobs"], logprobs(True), logprobs(False)
