"""The randomwalks task: find short paths to node 0 of a random graph, given walks that wander.

A path is written as letters, one per node, the start first. Everything follows from a seed, `data.options.seed`, so
that a run needs no files: `prompts` are the start nodes, `walks` are texts for behaviour cloning, `samples` are walks
with their rewards for offline learning, and `optimality` is the reward function.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from megarl.errors import ConfigError

NODES, GOAL, MOST_NODES, WALKS, EDGE_RATE = 21, 0, 10, 1000, 0.1
ALPHABET = "".join(chr(ord("a") + node) for node in range(NODES))


class RandomWalks:
    """A graph, random walks through it, and the shortest path from each node."""

    def __init__(self, seed: int) -> None:
        random = np.random.RandomState(seed)
        self.edges = _graph(random)
        self.walks = ["".join(ALPHABET[node] for node in _walk(random, self.edges)) for _ in range(WALKS)]
        self.starts = sorted({walk[0] for walk in self.walks})
        self.shortest = _shortest(self.edges)

    def optimality(self, path: str) -> float:
        """Return 1 for a shortest path to the goal and 0 for one that never gets there.

        Between, it is the nodes saved of the ten allowed, as a share of those that a shortest path saves.
        """
        best = self.shortest.get(path[:1], MOST_NODES)
        length = self._length(path)
        if best >= MOST_NODES:  # nothing can be saved: reaching the goal at all is all there is
            return float(length is not None)
        return (MOST_NODES - min(length or MOST_NODES, MOST_NODES)) / (MOST_NODES - best)

    def _length(self, path: str) -> int | None:
        """Nodes up to and with the goal; None where an edge or letter is not of the graph, or the goal is missed."""
        nodes = [ALPHABET.find(letter) for letter in path]
        for index, node in enumerate(nodes):
            if node < 0 or (index > 0 and not self.edges[nodes[index - 1], node]):
                return None
            if node == GOAL:
                return index + 1
        return None


@cache
def task(seed: int) -> RandomWalks:
    """Return the task of a seed. It is made once per process."""
    return RandomWalks(seed)


def prompts(seed: int = 1000) -> list[dict[str, Any]]:
    """Return a record per start node; its `graph_seed` is for the reward function."""
    return [{"prompt": start, "graph_seed": seed} for start in _task(seed).starts]


def walks(seed: int = 1000) -> list[dict[str, Any]]:
    """Return the walks as texts, for behaviour cloning."""
    return [{"text": walk} for walk in _task(seed).walks]


def samples(seed: int = 1000) -> list[dict[str, Any]]:
    """Return the walks as [prompt, output] with their optimality as reward, for offline learning."""
    known = _task(seed)
    return [{"samples": [walk[:1], walk[1:]], "rewards": known.optimality(walk)} for walk in known.walks]


def optimality(samples: Sequence[str], graph_seed: Sequence[int], **_: object) -> list[float]:
    """Score paths: the reward function `reward.fn=megarl.tasks.randomwalks:optimality`."""
    return [task(int(seed)).optimality(sample) for sample, seed in zip(samples, graph_seed, strict=True)]


def _task(seed: object) -> RandomWalks:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(
            f"data.options.seed={seed!r} is not the seed of a graph: use an integer from 0 to {2**32 - 1}",
            key="data.options.seed",
            value=seed,
        )
    return task(seed)


def _graph(random: np.random.RandomState) -> np.ndarray:
    """Directed edges [from, to]; every node but the goal has a way out, the goal leads to itself."""
    while True:
        edges = random.rand(NODES, NODES) > 1 - EDGE_RATE
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all():
            break
    edges[GOAL] = False
    edges[GOAL, GOAL] = True
    return edges


def _walk(random: np.random.RandomState, edges: np.ndarray) -> list[int]:
    """From a random start that is not the goal, up to nine uniform steps, ending at the goal."""
    node = GOAL
    while node == GOAL:
        node = int(random.randint(NODES))
    walk = [node]
    while len(walk) < MOST_NODES and walk[-1] != GOAL:
        walk.append(int(random.choice(np.nonzero(edges[walk[-1]])[0])))
    return walk


def _shortest(edges: np.ndarray) -> dict[str, int]:
    """Nodes on the shortest path to the goal from each letter; ten where there is none, or none so short."""
    nodes = {GOAL: 1}
    queue = deque([GOAL])
    while queue:
        target = queue.popleft()
        for source in np.nonzero(edges[:, target])[0]:
            if int(source) not in nodes:
                nodes[int(source)] = nodes[target] + 1
                queue.append(int(source))
    return {ALPHABET[node]: min(nodes.get(node, MOST_NODES), MOST_NODES) for node in range(NODES)}
