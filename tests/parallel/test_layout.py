"""The grid as plain numbers: what fits a world, and what an error says when it does not."""

import pytest

from megarl.errors import ConfigError
from megarl.parallel.layout import Layout
from tests.refusals import refused


def test_data_parallel_size_is_what_the_replicas_leave_of_the_world() -> None:
    layout = Layout.for_world(24, tp=2, pp=3)
    assert (layout.dp, layout.replica_size, layout.world_size) == (4, 6, 24)


def test_context_parallel_ranks_belong_to_the_replica() -> None:
    layout = Layout.for_world(16, tp=2, pp=2, cp=2)
    assert (layout.dp, layout.replica_size) == (2, 8)


@pytest.mark.parametrize(("world", "tp", "pp", "cp"), [(6, 4, 1, 1), (3, 1, 2, 1), (2, 2, 2, 1), (4, 1, 1, 3)])
def test_a_world_that_replicas_do_not_divide_is_refused_with_keys_and_remedy(
    world: int, tp: int, pp: int, cp: int
) -> None:
    names = (f"parallel.tp={tp}", f"parallel.pp={pp}", f"parallel.cp={cp}", f"{world}", f"{tp * pp * cp}")
    with refused(ConfigError, key="parallel.tp", value=tp, names=(*names, "trainer.devices")):
        Layout.for_world(world, tp=tp, pp=pp, cp=cp)


@pytest.mark.parametrize("axis", ["tp", "pp", "cp", "vpp"])
def test_a_size_below_one_is_refused_by_its_key(axis: str) -> None:
    with refused(ConfigError, key=f"parallel.{axis}", value=0):
        Layout.for_world(4, **{axis: 0})


def test_sizes_below_one_are_not_excused_by_a_product_that_divides() -> None:
    with refused(ConfigError, key="parallel.tp", value=-1):
        Layout.for_world(4, tp=-1, pp=-2)


def test_virtual_stages_without_a_pipeline_are_refused_with_the_remedy() -> None:
    with refused(ConfigError, key="parallel.vpp", value=2, offers={"parallel.vpp": [None]}, names=("parallel.pp",)):
        Layout(vpp=2)


def test_sequence_parallelism_is_off_without_tensor_parallelism() -> None:
    assert not Layout.for_world(2, tp=1, sequence_parallel=True).sequence_parallel
    assert Layout.for_world(2, tp=2, sequence_parallel=True).sequence_parallel


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(), "TP1"),
        (Layout(dp=2), "DP2"),
        (Layout(tp=2, pp=2, dp=3), "TP2xPP2xDP3"),
        (Layout(tp=2, pp=2, vpp=2, sequence_parallel=True), "TP2xPP2+vpp2+SP"),
    ],
)
def test_a_layout_is_written_as_its_sizes_above_one(layout: Layout, name: str) -> None:
    assert str(layout) == name
