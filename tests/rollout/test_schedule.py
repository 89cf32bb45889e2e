"""Slots: refilled at once, kept together, shared out by work; and why a response ends."""

import numpy as np
import pytest

from megarl.rollout.requests import Request, Sampling
from megarl.rollout.schedule import Schedule, deal

EOS = 0


def request(number: int, prompt: int = 3, new: int = 4, **settings: object) -> Request:
    return Request(number, 0, tuple(range(1, prompt + 1)), Sampling(max_new_tokens=new, **settings))  # type: ignore[arg-type]


def step(schedule: Schedule, *tokens: int) -> list[tuple[int, int, int]]:
    return schedule.accept(np.array(tokens), np.array(tokens, dtype=np.float32) / 10)


def run(schedule: Schedule, token: int = 7) -> None:
    while not schedule.done:
        list(schedule.prefill(10**6))
        step(schedule, *[token] * schedule.rows)


def test_one_long_and_many_short_responses_take_as_many_passes_as_the_long_one() -> None:
    requests = [request(0, new=64), *(request(n, new=4) for n in range(1, 46))]  # 64 + 45 * 4 tokens in 4 slots
    schedule = Schedule(deal(requests, 1)[0], 4, EOS)
    run(schedule)
    assert len(schedule.finished) == 46
    assert schedule.decoded_rows == 64 + 45 * 4
    lower_bound = max(64, -(-schedule.decoded_rows // 4))
    assert schedule.decode_passes == lower_bound == 64


def test_slots_are_never_idle_while_requests_wait() -> None:
    lengths = [1 + (13 * n) % 17 for n in range(50)]
    schedule = Schedule(deal([request(n, new=length) for n, length in enumerate(lengths)], 1)[0], 8, EOS)
    while schedule.queue:
        assert schedule.rows == 8
        list(schedule.prefill(10**6))
        step(schedule, *[7] * 8)
    run(schedule)
    assert schedule.decoded_rows == sum(lengths)
    assert schedule.decode_passes <= -(-sum(lengths) // 8) + 2


def test_a_free_slot_is_refilled_and_what_it_holds_starts_from_its_own_prompt() -> None:
    schedule = Schedule([request(0, new=1), request(1, new=3), request(2, prompt=5, new=2)], 2, EOS)
    assert schedule.fresh == [0, 1]
    assert list(schedule.prefill(10**6)) == [[0, 1]]
    assert step(schedule, 7, 8) == []
    assert schedule.fresh == [0]
    assert [r.prompt_id for r in schedule.running] == [2, 1]
    assert schedule.lengths.tolist() == [5, 4]
    assert schedule.last_tokens.tolist() == [5, 8]  # the last of the prompt, and what was drawn
    assert list(schedule.prefill(10**6)) == [[0]]


def test_prompts_are_read_in_batches_with_little_padding() -> None:
    schedule = Schedule([request(n, prompt=length) for n, length in enumerate([11, 3, 4, 6, 12])], 5, EOS)
    # Of 10, 2, 3, 5 and 11 tokens without the last: 3 more are padding beside 2, 3 and 5, and 5 beside 10.
    assert list(schedule.prefill(10**6, padding=4)) == [[1, 2], [3], [0, 4]]
    assert list(schedule.prefill(10**6, padding=5)) == [[1, 2, 3], [0, 4]]


def test_the_last_slot_moves_into_a_hole_with_all_it_holds() -> None:
    schedule = Schedule([request(n, prompt=2 + n, new=1 if n == 0 else 5) for n in range(3)], 3, EOS)
    list(schedule.prefill(10**6))
    assert step(schedule, 7, 8, 9) == [(2, 0, 4)]  # a prompt of four; the token just drawn has no entry yet
    assert [r.prompt_id for r in schedule.running] == [2, 1]
    step(schedule, 10, 11)
    step(schedule, EOS, EOS)
    answers = {rollout.prompt_id: rollout for rollout in schedule.finished}
    assert answers[2].response == [9, 10, EOS]
    assert answers[1].response == [8, 11, EOS]
    assert answers[2].logprobs == [pytest.approx(0.9), pytest.approx(1.0), 0.0]


def test_a_fresh_slot_that_moves_has_nothing_to_copy() -> None:
    schedule = Schedule([request(n, new=1) for n in range(3)] + [request(3, new=2)], 3, EOS)
    list(schedule.prefill(10**6))
    assert step(schedule, 7, 7, 7) == []
    assert [r.prompt_id for r in schedule.running] == [3]
    assert schedule.fresh == [0]


def test_prefill_passes_hold_to_their_budget_and_pad_little() -> None:
    schedule = Schedule([request(n, prompt=length) for n, length in enumerate((9, 2, 30, 3, 1, 8))], 6, EOS)
    assert list(schedule.prefill(16)) == [[1, 3], [5, 0], [2]]  # 2 x 2, 2 x 8, one alone; a prompt of one has none
    assert schedule.prefilled_tokens == 8 + 1 + 29 + 2 + 7


@pytest.mark.parametrize(
    ("settings", "tokens", "reason"),
    [
        ({}, [7, EOS], "eos"),
        ({}, [7, 8, 9, 10], "length"),
        ({}, [7, 8, 9, EOS], "eos"),
        ({"stop": ((8, 9),)}, [8, 8, 9], "stop"),
        ({"stop": ((5,), (7, 8, 9, 10))}, [7, 8, 9, 10], "stop"),
        ({"stop": ((3, 8),)}, [8, 7, 7, 7], "length"),  # 3 ends the prompt, which a stop sequence does not see
        ({"stop": ((9, EOS),)}, [9, EOS], "eos"),
        ({"stop_text": ("bcd",)}, [31, 42, 43], "stop"),
        ({"stop_text": ("ca",)}, [33, 31, 31, 31], "length"),
    ],
)
def test_a_response_ends_for_a_reason_and_keeps_the_token_that_ended_it(
    settings: dict[str, object], tokens: list[int], reason: str
) -> None:
    # Letters that do not end where a stop text does: 42 is "bc", 43 is "de".
    letters = {31: "a", 33: "x", 42: "bc", 43: "de"}
    schedule = Schedule([request(0, **settings)], 1, EOS, decode=lambda ids: "".join(letters.get(i, "?") for i in ids))
    for position, token in enumerate(tokens):
        assert not schedule.done, position
        step(schedule, token)
    assert schedule.done
    assert schedule.finished[0].response == tokens
    assert schedule.finished[0].finish_reason == reason


def test_the_end_marker_of_a_chat_ends_a_response_like_eos() -> None:
    marker = 44
    schedule = Schedule([request(n, new=4) for n in range(2)], 2, EOS, also_eos=(marker,))
    step(schedule, 7, marker)
    step(schedule, EOS)
    assert [rollout.finish_reason for rollout in schedule.finished] == ["eos", "eos"]
    assert [rollout.response_without_eos for rollout in schedule.finished] == [[], [7]]


def test_work_is_dealt_evenly_longest_first_and_the_same_whatever_the_order() -> None:
    requests = [request(n, prompt=1 + n % 5, new=1 + (7 * n) % 31) for n in range(40)]
    shares = deal(requests, 3)
    assert deal(requests[::-1], 3) == shares
    loads = [sum(len(r.prompt) + r.sampling.max_new_tokens for r in share) for share in shares]
    assert max(loads) - min(loads) <= 35
    assert sorted(r.prompt_id for share in shares for r in share) == list(range(40))
    work = [len(r.prompt) + r.sampling.max_new_tokens for r in shares[0]]
    assert work == sorted(work, reverse=True)


def test_a_replica_without_requests_is_done_from_the_start() -> None:
    assert Schedule([], 4, EOS).done
    assert [len(share) for share in deal([request(0)], 3)] == [1, 0, 0]
