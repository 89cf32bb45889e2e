"""The schedule of a pipeline: it takes as long and keeps as much as the plan's formulas say."""

from itertools import pairwise

import pytest

from megarl.parallel.layout import Layout
from megarl.parallel.pipeline_order import Pass, order_of_passes
from megarl.planning.memory import in_flight
from megarl.planning.page import MOST_PASSES, drawn_microbatches
from megarl.planning.schedule import Timed, most_in_flight, schedule, span
from tests.planning.runs import LLAMA, describe

FORWARD, BACKWARD = 1.0, 2.0
PIPELINES = [(2, 1, 1), (2, 1, 4), (4, 1, 2), (4, 1, 8), (2, 2, 2), (2, 2, 4), (4, 2, 4), (4, 2, 8), (4, 3, 16)]


def timed(pp: int, vpp: int, microbatches: int) -> list[list[Timed]]:
    return schedule(Layout(pp=pp, vpp=vpp), microbatches, FORWARD, BACKWARD)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), PIPELINES)
def test_a_step_takes_its_work_and_the_bubble_of_the_plan(pp: int, vpp: int, microbatches: int) -> None:
    work = (FORWARD + BACKWARD) * microbatches
    assert span(timed(pp, vpp, microbatches)) == pytest.approx(work * (1 + (pp - 1) / vpp / microbatches))


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), PIPELINES)
def test_a_stage_keeps_as_many_microbatches_as_the_plan_counts(pp: int, vpp: int, microbatches: int) -> None:
    work = describe(Layout(pp=pp, vpp=vpp), LLAMA, accumulation=microbatches)
    stages = timed(pp, vpp, microbatches)
    assert [most_in_flight(stage, vpp) for stage in stages] == [in_flight(work, stage) for stage in range(pp)]


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), PIPELINES)
def test_no_pass_begins_before_its_input_is_there(pp: int, vpp: int, microbatches: int) -> None:
    stages = timed(pp, vpp, microbatches)
    ends = {(stage, one.of): one.end for stage, passes in enumerate(stages) for one in passes}
    assert len(ends) == 2 * pp * vpp * microbatches
    for stage, passes in enumerate(stages):
        for one in passes:
            assert all(ends[each] <= one.start + 1e-9 for each in _inputs(pp, vpp, stage, one.of))
        assert all(after.start >= one.end - 1e-9 for one, after in pairwise(passes))


def _inputs(pp: int, vpp: int, stage: int, one: Pass) -> list[tuple[int, Pass]]:
    """The passes that a pass must follow: the same microbatch one virtual stage before, or one after for gradients."""
    place = one.chunk * pp + stage
    forward = [(place - 1, False)] if not one.backward else [(place, False), (place + 1, True)]
    return [(at % pp, Pass(one.microbatch, at // pp, back)) for at, back in forward if 0 <= at < pp * vpp]


def test_the_first_stage_of_two_runs_two_forward_passes_first_and_then_one_of_each() -> None:
    order = order_of_passes(Layout(pp=2), 0, 3)
    assert [(one.microbatch, one.backward) for one in order] == [
        (0, False), (1, False), (0, True), (2, False), (1, True), (2, True),
    ]  # fmt: skip


def test_a_drawing_has_whole_rounds_and_few_enough_passes() -> None:
    assert drawn_microbatches(Layout(pp=4, vpp=2), 32) == 32
    drawn = drawn_microbatches(Layout(pp=8, vpp=4), 1024)
    assert drawn % 8 == 0
    assert 2 * 8 * 4 * drawn <= MOST_PASSES
    assert drawn_microbatches(Layout(pp=64, vpp=8), 1024) == 128
