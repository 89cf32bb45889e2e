"""The randomwalks task: the graphs and walks whose figures are known, and what a path is worth."""

import numpy as np
import pytest

from megarl.errors import ConfigError
from megarl.tasks.randomwalks import ALPHABET, RandomWalks, optimality, prompts, samples, task, walks
from tests.refusals import refused


@pytest.mark.parametrize(("seed", "mean"), [(1000, 0.352), (1005, 0.145), (1008, 0.297), (1001, 0.0)])
def test_walks_are_as_good_as_is_known_of_their_graph(seed: int, mean: float) -> None:
    known = task(seed)
    assert np.mean([known.optimality(walk) for walk in known.walks]) == pytest.approx(mean, abs=5e-4)
    assert len(known.walks) == 1000
    assert len(known.starts) == 20


def chain(*nodes: int) -> RandomWalks:
    """A task whose only edges lead along `nodes` and end in the goal."""
    walks = RandomWalks(1000)
    walks.edges = np.zeros_like(walks.edges)
    walks.edges[0, 0] = True
    for a, b in zip(nodes, [*nodes[1:], 0], strict=True):
        walks.edges[a, b] = True
    walks.shortest = {ALPHABET[node]: len(nodes) + 1 - index for index, node in enumerate(nodes)}
    return walks


def test_optimality_counts_the_nodes_that_were_saved() -> None:
    walks = chain(1, 2)  # b c a
    walks.edges[2, 1] = True  # and back
    assert walks.optimality("bca") == 1.0
    assert walks.optimality("bcaaa") == 1.0  # what follows the goal counts for nothing
    assert walks.optimality("bcbca") == pytest.approx((10 - 5) / (10 - 3))
    assert walks.optimality("bcb") == 0.0  # never arrives
    assert walks.optimality("ba") == 0.0  # no such edge
    assert walks.optimality("b!a") == 0.0  # no such letter
    assert walks.optimality("") == 0.0


def test_a_goal_ten_nodes_away_is_worth_1_or_0() -> None:
    nodes = list(range(1, 10))
    walks = chain(*nodes)
    path = "".join(ALPHABET[node] for node in [*nodes, 0])
    assert walks.optimality(path) == 1.0
    assert walks.optimality(path[:-1]) == 0.0


def test_the_reward_function_takes_the_graph_of_each_sample() -> None:
    paths = [task(1000).walks[0], task(1005).walks[0]]
    expected = [task(1000).optimality(paths[0]), task(1005).optimality(paths[1])]
    assert optimality(samples=paths, graph_seed=[1000, 1005], prompts=["", ""], outputs=["", ""]) == expected


def test_sources_hold_the_graph_of_their_seed() -> None:
    assert [record["prompt"] for record in prompts(1005)] == task(1005).starts
    assert {record["graph_seed"] for record in prompts(1005)} == {1005}
    assert [record["text"] for record in walks(1005)] == task(1005).walks
    rewarded = samples(1000)
    assert ["".join(record["samples"]) for record in rewarded] == task(1000).walks
    assert all(len(record["samples"][0]) == 1 for record in rewarded)
    assert np.mean([record["rewards"] for record in rewarded]) == pytest.approx(0.352, abs=5e-4)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "x", None])
def test_what_is_not_a_seed_is_refused(seed: object) -> None:
    with refused(ConfigError, key="data.options.seed", value=seed):
        prompts(seed)  # type: ignore[arg-type]
