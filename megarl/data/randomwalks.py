"""The randomwalks task: find short paths to node 0 of a random graph, given walks that wander.

A path is written as letters, one per node, the start first. The task is generated from a seed, so that a run needs no
files: its walks are what behaviour is cloned from, its starts are the prompts, its optimality is the reward.
"""

from collections import deque
from collections.abc import Sequence
from functools import cache

import numpy as np

RANDOMWALKS = "randomwalks"
"""Stands in lists of sources for the task's own records."""
NODES, GOAL, MOST_NODES, WALKS, EDGE_RATE = 21, 0, 10, 1000, 0.1
ALPHABET = "".join(chr(ord("a") + node) for node in range(NODES))


class RandomWalks:
    """Everything that follows from a graph seed."""

    def __init__(self, graph_seed: int) -> None:
        random = np.random.RandomState(graph_seed)
        self.edges = _graph(random)
        self.walks = ["".join(ALPHABET[node] for node in _walk(random, self.edges)) for _ in range(WALKS)]
        self.starts = sorted({walk[0] for walk in self.walks})
        self.shortest = _shortest(self.edges)

    def optimality(self, path: str) -> float:
        """1 for a shortest path to the goal, 0 for none; between, by the nodes that were saved of the ten allowed."""
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
def task(graph_seed: int) -> RandomWalks:
    return RandomWalks(graph_seed)


def optimality(samples: Sequence[str], graph_seed: Sequence[int], **_: object) -> list[float]:
    """The reward function: `reward.fn=megarl.data.randomwalks:optimality`."""
    return [task(int(seed)).optimality(sample) for sample, seed in zip(samples, graph_seed, strict=True)]


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
