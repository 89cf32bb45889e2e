"""An encoder-decoder's responses: the same in every layout, with any slots, and in passes of fixed shapes; each prompt
is read once for all samples that are generated at that time."""

import random
from dataclasses import replace
from typing import Any

import pytest

from megarl.config.sections.model import EncoderConfig
from megarl.rollout.requests import Request, Rollout
from megarl.rollout.schedule import Schedule
from tests.parallel.engines import small_engine
from tests.rollout.test_generate import EOS, MODERATE, check_same, generator_of, some_requests
from tests.rollout.test_recorded import stand_ins
from tests.rollout.test_schedule import request, run, step
from tests.worlds import Worlds

START = 1
T5: dict[str, Any] = {
    **MODERATE,
    "position": "relative",
    "activation": "geglu",
    "encoder": EncoderConfig(num_layers=4, buckets=8, longest_distance=20, start_id=START),
}
SLOT = 2 * 4 * 64 * (23 + 21) * 4
"""Bytes of the longest sequence: keys and values of the decoder's layers, 64 wide, 4 bytes each, of 23 tokens that are
read and 21 that are written."""


def generated(layout: dict[str, Any], slots: int, **limits: Any) -> list[Rollout]:
    requests = some_requests()
    random.Random(slots).shuffle(requests)
    return generator_of(small_engine(layout, T5, train=False), slots=slots, **limits).generate(requests)


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> list[Rollout]:
    """One process, everything in flight at once."""
    (rollouts,) = worlds.run(1, generated, {}, 128)
    return rollouts  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("size", "layout", "slots", "limits"),
    [
        (1, {}, 7, {"prefill_tokens": 4}),
        (1, {}, 128, {"graphs": True}),
        (1, {}, 5, {"graphs": True}),
        (2, {"pp": 2}, 7, {}),
        (2, {"pp": 2}, 128, {"cache_bytes": 6 * SLOT}),
        (2, {"tp": 2, "sequence_parallel": True}, 9, {"graphs": True}),
        (2, {}, 3, {}),
    ],
    ids=str,
)
def test_the_same_responses_however_they_are_computed(
    size: int, layout: dict[str, Any], slots: int, limits: dict[str, Any], worlds: Worlds, alone: list[Rollout]
) -> None:
    for rollouts in worlds.run(size, generated, layout, slots, **limits):
        check_same(rollouts, alone, (layout, slots))
    assert len({tuple(rollout.response) for rollout in alone}) > 10


def slots_of_each_rank(limit: int) -> tuple[int, int]:
    """The slots, and the bytes of the cache."""
    generator = generator_of(small_engine({"pp": 2}, T5, train=False), cache_bytes=limit)
    generator.generate(some_requests())
    assert generator.cache is not None
    return generator.cache.slots, generator.cache.nbytes


def test_both_stages_have_as_many_slots_as_the_decoder_has_memory_for(worlds: Worlds) -> None:
    assert worlds.run(2, slots_of_each_rank, 6 * SLOT) == [(6, 0), (6, 6 * SLOT)]


def recorded(longest: int) -> tuple[list[Rollout], list[Rollout], list[tuple[int, int, int]]]:
    """Responses with and without recordings, and the shapes of these. One prompt has `longest` tokens."""
    engine = small_engine({}, {**T5, "max_positions": 256}, train=False)
    requests = [replace(one, prompt=tuple(range(longest))) if one.prompt_id == 3 else one for one in some_requests()]
    plainly = generator_of(engine, slots=6).generate(requests)
    generator = generator_of(engine, slots=6, graphs=True)
    with stand_ins():
        graphed = generator.generate(requests)
    assert generator.static is not None
    return graphed, plainly, list(generator.static.passes)


def test_a_recording_reads_no_value_and_long_prompts_have_recordings_of_their_own(worlds: Worlds) -> None:
    ((graphed, plainly, shapes),) = worlds.run(1, recorded, 100)
    check_same(graphed, plainly, "recorded")
    assert {encoded for _, _, encoded in shapes} == {64, 100}
    assert {length for _, length, _ in shapes} == {21}


def prefilled(slots: int) -> tuple[int, list[int]]:
    """Prompt tokens that were read, and the lengths of the passes of the encoder."""
    engine = small_engine({}, T5, train=False)
    read: list[int] = []
    generator = generator_of(engine, slots=slots)
    (model,) = engine.models
    forward = model.forward

    def watched(inputs: Any, cache: Any = None) -> Any:
        if inputs.encoder is not None:
            read.append(int(inputs.encoder.segment_ids.sum()))
        return forward(inputs, cache)

    model.forward = watched  # type: ignore[method-assign]
    generator.generate(some_requests())
    return generator.stats.prefilled_tokens, read


@pytest.mark.parametrize("slots", [1, 4, 128])
def test_the_statistic_counts_the_prompt_tokens_that_the_encoder_read(slots: int, worlds: Worlds) -> None:
    ((counted, read),) = worlds.run(1, prefilled, slots)
    assert counted == sum(read)
    prompts = {one.prompt_id: len(one.prompt) for one in some_requests()}
    if slots == 128:
        assert counted == sum(prompts.values())
    assert sum(prompts.values()) <= counted <= 2 * sum(prompts.values())


def sample(number: int, index: int, prompt: int = 3, new: int = 4) -> Request:
    return replace(request(number, prompt, new), sample_id=index)


def test_samples_of_a_prompt_share_one_reading_and_a_running_one_lends_it() -> None:
    requests = [sample(0, 0), sample(1, 0, prompt=5), sample(0, 1, new=1), sample(0, 2)]
    schedule = Schedule(requests, 3, EOS, start_id=START)
    assert list(schedule.prefill(10**6)) == [[0, 1]]
    assert schedule.shared() == {2: 0}
    assert schedule.prefilled_tokens == 3 + 5
    step(schedule, 7, 7, 7)  # the second sample ends, and the third takes its slot
    assert list(schedule.prefill(10**6)) == []
    assert schedule.shared() == {2: 0}
    assert schedule.prefilled_tokens == 3 + 5
    run(schedule)
    assert len(schedule.finished) == 4


def test_the_budget_of_a_pass_counts_each_prompt_once() -> None:
    requests = [sample(number, index, prompt=4 + number) for number in range(3) for index in range(4)]
    schedule = Schedule(requests, 12, EOS, start_id=START)
    assert list(schedule.prefill(12)) == [[0, 4], [8]]  # 2 x 5 padded tokens, and one of six
    assert schedule.shared() == {slot: slot // 4 * 4 for slot in range(12) if slot % 4}


def test_a_prompt_is_read_anew_once_no_running_response_has_it() -> None:
    schedule = Schedule([sample(0, 0, new=1), sample(0, 1)], 1, EOS, start_id=START)
    list(schedule.prefill(10**6))
    step(schedule, 7)
    assert list(schedule.prefill(10**6)) == [[0]]
    assert schedule.prefilled_tokens == 6


def test_other_models_read_a_prompt_for_each_of_its_samples() -> None:
    schedule = Schedule([sample(0, index) for index in range(3)], 3, EOS)
    assert list(schedule.prefill(10**6)) == [[0, 1, 2]]
    assert schedule.shared() == {}
    assert schedule.prefilled_tokens == 3 * 2
