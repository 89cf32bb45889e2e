"""Predicted and measured: what is compared, what is not and why, and plans that megarl did not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.report.markup import NOTHING
from megarl.report.page import page
from tests.report.made_up import SUMMARY, made_up, rows
from tests.report.parsed import Element, parse
from tests.report.test_page import check_references

ROLE = {"weights": 4e8, "gradients": 4e8, "optimizer": 8e8, "activations": 0, "logits": 0, "cache": 0, "host": 5e9}


def plan(**changed: Any) -> dict[str, Any]:
    """A plan of a run on a GPU that peaks in training, at 2 GB."""
    generate, train = {**ROLE, "cache": 2e8}, {**ROLE, "activations": 4e8}
    phases = {"generate": {"roles": {"policy": generate}}, "train": {"roles": {"policy": train}}}
    whole = {
        "device": "gpu",
        "seconds_for": "H100-80G",
        "known_gpus": ["A100-80G", "H100-80G"],
        "assumed": {"sequences": 8, "tokens_per_sequence": 16, "prompt_tokens": 6, "response_tokens": 10},
        "tokens": 128,
        "notes": {},
        "ranks": [{"stage": 0, "phases": phases}],
        "phases": {name: {"seconds": seconds} for name, seconds in (("generate", 0.5), ("train", 1.5), ("save", 9.0))},
    }
    return {**whole, **changed}


def section(folder: Path, content: Any, **changed: Any) -> Element | None:
    """The section of the page of a run in a folder whose plan.json has this content."""
    (folder / "plan.json").write_text(content if isinstance(content, str) else json.dumps(content))
    tree = parse(page([made_up(path=folder, **changed)]))
    check_references(tree)
    found = tree.all("section", id="predicted")
    return found[0] if found else None


def cells(found: Element | None) -> dict[str, list[str]]:
    assert found is not None
    body = found.all("table")[0].all("tbody")[0]
    return {row.children[0].text(): [cell.text() for cell in row.children[1:]] for row in body.all("tr")}


def test_on_a_gpu_that_the_plan_knows_memory_and_times_have_ratios(tmp_path: Path) -> None:
    found = section(tmp_path, plan())
    table = cells(found)
    assert table["memory of the first process at its peak"] == ["2 GB in train", "1.5 GB", "0.75"]
    assert table["generate, time of a phase"] == ["0.5 s", "1.5 s", "3"]  # 30 s in 20 phases
    assert table["train, time of a phase"] == ["1.5 s", "3 s", "2"]
    assert "save, time of a phase" not in table
    assert found is not None
    assert [each.attributes["class"] for each in found.with_class("limit")] == ["limit", "limit"]  # drawn, and its key
    assert "Memory is not compared" not in found.text()
    assert "those of H100-80G" in found.text()


def test_without_a_gpu_nothing_is_set_against_it_and_the_reasons_are_there(tmp_path: Path) -> None:
    on_cpu = plan(device="cpu", seconds_for=None, phases={"train": {"seconds": None}})
    found = section(tmp_path, on_cpu)
    table = cells(found)
    assert table["memory of the first process at its peak"] == ["2 GB in train", "1.5 GB", "not compared"]
    assert table["train, time of a phase"] == [NOTHING, "3 s", "not compared"]
    assert found is not None
    assert not found.with_class("limit")
    assert "Memory is not compared: without a GPU" in found.text()
    assert "this run used a CPU, and the plan knows A100-80G, H100-80G." in found.text()


def test_tokens_are_compared_with_what_the_run_read(tmp_path: Path) -> None:
    values = rows(2, ("rollout/response_tokens",))
    for row, (rate, seconds, length) in zip(values, ((100.0, 0.5, 4.0), (30.0, 1.0, 6.0)), strict=True):
        row |= {"perf/tokens_per_second": rate, "perf/step_seconds": seconds, "rollout/response_tokens": length}
    table = cells(section(tmp_path, plan(), rows=values))
    assert table["tokens of the sequences of a phase"] == ["128", "40", "0.3125"]
    assert table["tokens of a response"] == ["10", "5", "0.5"]


def test_time_that_waits_for_a_reward_function_is_not_set_against_a_reward_model(tmp_path: Path) -> None:
    summary = {**SUMMARY, "seconds": {"score": {"wall_s": 40.0}}}
    phases = {"reward": {"seconds": 1.0}}
    alone = cells(section(tmp_path, plan(phases=phases), summary=summary))
    assert alone["reward, time of a phase"] == ["1 s", "2 s", "2"]
    both = cells(section(tmp_path, plan(phases=phases, notes={"reward": "a function"}), summary=summary))
    assert "reward, time of a phase" not in both


def test_a_run_that_has_measured_nothing_yet_has_the_prediction(tmp_path: Path) -> None:
    table = cells(section(tmp_path, plan(), summary={}, rows=[]))
    assert table == {"memory of the first process at its peak": ["2 GB in train", NOTHING, NOTHING]}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        {},
        plan(ranks=[]),
        plan(ranks=[{"phases": {}}]),
        plan(ranks=[{"phases": {"train": {"roles": {"policy": {"weights": "many"}}}}}]),
        plan(ranks=[{"phases": {"train": {"roles": {"policy": {"weights": -1}}}}}]),
        plan(ranks=[{"phases": {"train": {"roles": {"policy": {"weights": 1, "host": "x"}}}}}]),
        plan(ranks=3),
        plan(phases=[1]),
        plan(known_gpus=3),
        plan(assumed=None),
    ],
    ids=map(str, range(13)),
)
def test_a_plan_that_megarl_did_not_write_is_left_out(tmp_path: Path, content: Any) -> None:
    assert section(tmp_path, content) is None


def test_a_plan_of_odd_values_makes_a_page(tmp_path: Path) -> None:
    odd = plan(tokens="x", notes={"<b>": 3}, phases={"<b>": {"seconds": 1.0}, "train": {"seconds": True}})
    found = section(tmp_path, {**odd, "seconds_for": "<script>", "assumed": {"response_tokens": "<b>"}})
    assert found is not None
    assert not found.all("b")


def test_runs_that_are_compared_each_have_theirs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(json.dumps(plan()))
    tree = parse(page([made_up(path=tmp_path / "a"), made_up(path=tmp_path / "b"), made_up(path=tmp_path / "c")]))
    check_references(tree)
    (found,) = tree.all("section", id="predicted")
    assert [heading.text() for heading in found.all("h3")] == ["a", "b"]
