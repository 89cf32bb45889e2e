"""The page of a plan: the numbers of its tables, drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.config.cluster import ClusterConfig
from megarl.parallel.layout import Layout
from megarl.planning.hardware import Cluster, kind_of
from megarl.planning.page import page
from megarl.planning.plain import as_json
from megarl.planning.plan import Plan, Remedy, make_plan
from megarl.planning.times import Rates
from tests.planning.runs import LLAMA, describe
from tests.report.parsed import Element, parse
from tests.report.test_page import check_references


def planned(layout: Layout, accumulation: int = 4) -> Plan:
    work = describe(layout, LLAMA, accumulation=accumulation, rollouts=64, loss_tokens=256)
    return make_plan(work, Cluster.of(ClusterConfig(gpus=layout.world_size), layout.world_size), Rates(0.5, 1e-4))


def parsed(plan: Plan) -> Element:
    tree = parse(page(plan, [Remedy("parallel.tp=2", 2.0**30, fits=True)], [plan]))
    check_references(tree)
    return tree


def test_memory_is_drawn_by_phase_with_the_bytes_of_the_json() -> None:
    plan = planned(Layout(dp=2))
    tree = parsed(plan)
    (rank,) = as_json(plan, [], None)["ranks"]
    said = tree.all(id="memory")[0].all("desc")[0].text()
    for phase in ("generate", "score", "train", "save"):
        drawn = float(said.split(f"{phase}: ")[1].split()[0])
        assert drawn == pytest.approx(rank["phases"][phase]["bytes"] / 2**30, rel=1e-3)
    total = float(said.split("train: ")[1].split("(")[1].split("weights ")[1].split(",")[0])
    assert total == pytest.approx(rank["phases"]["train"]["roles"]["policy"]["weights"] / 2**30, rel=1e-3)
    assert "usable on H100-80G" in said


def test_the_schedule_has_every_pass_of_every_stage_and_lasts_as_long_as_the_plan_says() -> None:
    plan = planned(Layout(pp=2, vpp=2))
    section = parsed(plan).all("section", id="schedule")[0]
    passes = section.with_class("gantt")[0].all("rect")
    assert len(passes) == 2 * 2 * 2 * 4
    titles = [rect.all("title")[0].text() for rect in passes]
    assert sum("microbatch 3 backward, virtual stage b" in title for title in titles) == 2
    share = (2 - 1) / 2 / 4
    assert f"{share / (1 + share):.1%} of its time" in section.text()
    waits = [row.children[4].text() for row in section.all("table")[-1].all("tbody")[0].all("tr")]
    assert len(set(waits)) == 1
    seconds = plan.passes[0] + plan.passes[1]
    assert float(waits[0].split()[0]) == pytest.approx(seconds / 2, rel=1e-2)


def test_one_stage_is_not_drawn_and_a_long_step_is_shortened() -> None:
    assert not parsed(planned(Layout())).all(id="schedule")[0].all("svg")
    long = parsed(planned(Layout(pp=2), accumulation=2000)).all(id="schedule")[0].text()
    assert "Drawn are 750 of the 2000 microbatches" in long


def test_stages_time_and_what_would_change_it_are_there() -> None:
    plan = planned(Layout(pp=4))
    tree = parsed(plan)
    assert len(tree.all(id="memory")[0].all("figure")) == 3  # the first, one in the middle, the last
    assert "the others in the middle are like it" in tree.all(id="memory")[0].text()
    rows = [row.children[0].text() for row in tree.all(id="time")[0].all("tbody")[0].all("tr")]
    assert rows == [phase.name for phase in plan.phases]
    assert "parallel.tp=2" in tree.all(id="changes")[0].text()
    assert "parallel.pp=4" in tree.all(id="layouts")[0].text()


def test_the_passes_of_a_microbatch_include_what_is_computed_again() -> None:
    plain, again = (planned(Layout()), planned(Layout()))
    work = replace(again.work, parallel=replace(again.work.parallel, recompute="full"))
    forward, backward = make_plan(work, again.cluster, again.rates).passes
    assert (forward, backward) == pytest.approx((plain.passes[0], plain.passes[0] + plain.passes[1]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_recognised_by_its_name_if_the_plan_has_its_speed(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind
