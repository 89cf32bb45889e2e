"""Texts of many requests share batches, and every answer belongs to its request."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError

import pytest

from megarl.serving.batcher import DRAIN_S, Batcher, ClosedError, NoScoreError


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def texts(*names: int) -> list[list[int]]:
    return [[name] for name in names]


def score(batcher: Batcher, patience: float = 0.0) -> list[int]:
    """Take a batch and give every text its name as a score; the names."""
    batch = batcher.take(patience)
    assert batch is not None
    names = [text[0] for text in batch.texts]
    batcher.put(batch, [float(name) for name in names])
    return names


def run(batcher: Batcher) -> None:
    """Score until the batcher is closed."""
    while (batch := batcher.take(1.0)) is not None:
        batcher.put(batch, [float(text[0]) for text in batch.texts])


def test_requests_share_batches_and_large_ones_are_spread_over_several() -> None:
    batcher = Batcher(3, 0.0)
    answers = [batcher.submit(texts(1, 2)), batcher.submit(texts(3, 4, 5, 6, 7)), batcher.submit(texts(8))]
    assert batcher.waiting == 8
    assert [score(batcher) for _ in range(3)] == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert [answer.result(0) for answer in answers] == [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0], [8.0]]
    assert score(batcher) == []
    assert batcher.submit([]).result(0) == []


def test_a_text_waits_for_others_until_its_time_is_up() -> None:
    clock = Time()
    batcher = Batcher(2, 10.0, clock)
    batcher.submit(texts(1))
    assert score(batcher) == [], "it waits for a second text"
    clock.now = 9.0
    assert score(batcher) == []
    clock.now = 10.0
    assert score(batcher) == [1]
    batcher.submit(texts(2))
    batcher.submit(texts(3))
    assert score(batcher) == [2, 3], "a full batch waits for nothing"


def test_a_waiting_thread_wakes_when_a_batch_is_full() -> None:
    batcher = Batcher(1, 60.0)
    timer = threading.Timer(0.05, batcher.submit, (texts(1),))
    timer.start()
    began = time.monotonic()
    assert score(batcher, patience=30.0) == [1]
    assert time.monotonic() - began < 5


def test_a_request_that_was_cancelled_leaves_the_queue() -> None:
    batcher = Batcher(2, 0.0)
    gone, kept = batcher.submit(texts(1, 2, 3)), batcher.submit(texts(4))
    assert score(batcher) == [1, 2]
    assert gone.cancel()
    assert score(batcher) == [4]
    assert kept.result(0) == [4.0]
    with pytest.raises(CancelledError):
        gone.result(0)
    late = batcher.submit(texts(5))
    batch = batcher.take(0.0)
    assert late.cancel()
    assert batch is not None
    batcher.put(batch, [5.0])  # nobody waits for it any more


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_fails_its_request_alone(value: float) -> None:
    batcher = Batcher(8, 0.0)
    wrong, right = batcher.submit(texts(1, 2)), batcher.submit(texts(3))
    batch = batcher.take(0.0)
    assert batch is not None
    batcher.put(batch, [1.0, value, 3.0])
    assert right.result(0) == [3.0]
    with pytest.raises(NoScoreError):
        wrong.result(0)


def test_a_closed_batcher_scores_what_waits_and_takes_no_more() -> None:
    batcher = Batcher(2, 60.0)
    answer = batcher.submit(texts(1, 2, 3))
    batcher.close()
    with pytest.raises(ClosedError):
        batcher.submit(texts(4))
    assert [score(batcher), score(batcher)] == [[1, 2], [3]], "the last one waits for no others"
    assert answer.result(0) == [1.0, 2.0, 3.0]
    assert batcher.take(60.0) is None


def test_what_a_closed_batcher_cannot_score_in_time_is_refused() -> None:
    clock = Time()
    batcher = Batcher(1, 0.0, clock)
    early, late = batcher.submit(texts(1)), batcher.submit(texts(2))
    batcher.close()
    assert score(batcher) == [1]
    clock.now = DRAIN_S + 1
    assert batcher.take(60.0) is None
    assert early.result(0) == [1.0]
    with pytest.raises(ClosedError):
        late.result(0)


def test_an_aborted_batcher_refuses_the_batch_that_was_not_scored() -> None:
    batcher = Batcher(1, 0.0)
    answers = [batcher.submit(texts(1)), batcher.submit(texts(2))]
    batcher.abort(batcher.take(0.0))
    for answer in answers:
        with pytest.raises(ClosedError):
            answer.result(0)


def test_answers_belong_to_their_requests_however_many_threads_ask() -> None:
    batcher, wrong = Batcher(16, 0.001), []

    def client(number: int) -> None:
        draw = random.Random(number)
        for turn in range(20):
            mine = [number * 1000 + turn * 10 + index for index in range(draw.randint(1, 9))]
            if batcher.submit(texts(*mine)).result(30) != [float(name) for name in mine]:
                wrong.append(number)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    model = threading.Thread(target=lambda: run(batcher), daemon=True)
    for thread in (*clients, model):
        thread.start()
    for thread in clients:
        thread.join(60)
    batcher.close()
    assert not wrong
    assert not any(thread.is_alive() for thread in clients)
