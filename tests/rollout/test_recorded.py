"""CUDA graphs without CUDA: what a recording must not do is refused, and a replay must be the recording again."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megarl.rollout import static
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Rollout
from tests.parallel.engines import small_engine
from tests.rollout.test_generate import EOS, MODERATE, some_requests
from tests.worlds import Worlds

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2")
"""Operations for which the host waits for a value: a graph cannot hold them."""


class Recording(TorchDispatchMode):
    """Notes every operation with all that is no tensor in it, and shapes; refuses to read values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        filled = name.startswith("index_put") and args[2].numel() == 1  # which is done as a masked fill
        indices = args[1] if name.startswith("index") and isinstance(args[1], list) and not filled else []
        if name in READS or any(index is not None and index.dtype == torch.bool for index in indices):
            raise AssertionError(f"{name} waits for a value inside of a recording")
        self.operations.append((str(func), *map(plain, args), *map(plain, (kwargs or {}).values())))
        return func(*args, **(kwargs or {}))


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype)
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value


class Graph:
    """In the place of `torch.cuda.CUDAGraph`: a replay computes again and must come to the same operations."""

    made: list["Graph"] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.owner: static.StaticPass | None = None
        self.recording = Recording()
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        assert self.owner is not None
        assert self.owner.scores is not None
        self.replays += 1
        with Recording() as again:
            scores = self.owner._compute()
        assert again.operations == self.recording.operations, "what is replayed is not what was recorded"
        self.owner.scores.copy_(scores)


@contextmanager
def recorded(graph: Graph, pool: Any = None) -> Iterator[None]:
    with graph.recording:
        yield


@contextmanager
def stand_ins() -> Iterator[None]:
    """What `StaticPass` asks of CUDA."""
    made, record = static.StaticPass.__init__, static.StaticPass._record

    def that_records(self: Any, *args: Any) -> None:
        made(self, *args)
        self.records = True

    def owned(self: static.StaticPass) -> None:
        record(self)
        Graph.made[-1].owner = self

    with (
        mock.patch.object(static.StaticPass, "__init__", that_records),
        mock.patch.object(static.StaticPass, "_record", owned),
        mock.patch.multiple(
            torch.cuda,
            Stream=mock.MagicMock,
            current_stream=mock.MagicMock(),
            stream=lambda _: nullcontext(),
            CUDAGraph=Graph,
            graph=recorded,
        ),
    ):
        yield


def generated(record: bool) -> tuple[list[Rollout], list[int]]:
    """Responses, and how often each graph was replayed."""
    Graph.made.clear()
    engine = small_engine({}, MODERATE, train=False)
    generator = Generator(engine, EOS, seed=5, limits=Limits(slots=6, graphs=record))
    with stand_ins() if record else nullcontext():
        return list(generator.generate(some_requests())), [graph.replays for graph in Graph.made]


def test_recordings_read_no_value_and_replay_to_the_same_responses(worlds: Worlds) -> None:
    ((plainly, none),) = worlds.run(1, generated, False)
    ((graphed, replays),) = worlds.run(1, generated, True)
    assert none == []
    assert len(replays) > 2
    assert max(replays) > 5
    assert [rollout.response for rollout in graphed] == [rollout.response for rollout in plainly]
    for ours, theirs in zip(graphed, plainly, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_the_stand_in_refuses_what_a_graph_cannot_hold() -> None:
    numbers = torch.arange(4.0)
    with Recording():
        numbers[numbers > 2] = 0.0  # a masked fill
        for read in (lambda: float(numbers[0]), lambda: numbers[numbers > 1], lambda: numbers.nonzero()):
            with pytest.raises(AssertionError, match="waits for a value"):
                read()
