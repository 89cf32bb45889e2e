"""The parts of a live page: the ones of a report, and new versions of what has changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megarl.report.findings import as_plain
from megarl.report.page import page
from megarl.report.write import findings_of
from megarl.run.csv_logger import MetricsFile
from megarl.watch.live import LivePage
from tests.report.keep import kept
from tests.report.made_up import made_up, write_run, write_scores
from tests.report.parsed import Element, parse
from tests.report.test_page import FINDING, check_references


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scores(tmp_path / "run" / "journal", {0: [0.0, 1.0]})
    return write_run(tmp_path / "run", made_up(3))


def outer(tree: Element, identifier: str) -> Element:
    (found,) = tree.all(id=identifier)
    return found


def test_every_part_is_the_same_as_in_the_whole_page_and_in_a_report(folder: Path) -> None:
    live = LivePage(folder)
    tree = parse(live.page())
    check_references(tree)
    report = parse(page([live.run], [findings_of(live.run)]))
    state = live.state()
    assert json.loads(outer(tree, "state").text()) == state
    parts = live.parts(state["parts"])
    assert {name: version for name, (version, _) in parts.items()} == state["parts"]
    sections = {section.attributes["id"] for section in report.all("section")}
    figures = {one.attributes["id"] for one in report.with_class("curve") if one.attributes.get("id")}
    shown = {name: html for name, (_, html) in parts.items() if html}
    assert shown.keys() == {"head", *sections - {"curves"}, *figures}
    assert set(parts) - set(shown) == {"predicted", "tokens"}  # of which this run has none
    for name, html in shown.items():
        (element,) = parse(html).children
        assert element == outer(tree, name) == outer(report, name)


def test_findings_are_those_of_a_report(tmp_path: Path) -> None:
    bad = kept("bad_kl")
    folder = write_run(tmp_path / "run", made_up(0, rows=bad.rows, config=bad.config, summary={}, samples=[]))
    live = LivePage(folder)
    expected = [finding.title for finding in findings_of(live.run)]
    shown = parse(live.parts(["findings"])["findings"][1]).with_class("finding")
    assert expected
    assert [any(title in one.text() for title in expected) for one in shown] == [True] * len(expected)


def test_a_new_finding_shades_its_curve(folder: Path) -> None:
    live = LivePage(folder)
    before = live.state()["parts"]
    assert 'class="band"' not in live.parts(["metric-rollout-kl"])["metric-rollout-kl"][1]
    found = replace(FINDING, metrics=("rollout/kl",), steps=(1, 2))
    (folder / "findings.json").write_text(json.dumps({"findings": as_plain([found]), "steps": 3}))
    live.refresh()
    after = live.state()["parts"]
    assert {"findings", "metric-rollout-kl"} <= {name for name in after if after[name] != before[name]}
    assert 'class="band"' in live.parts(["metric-rollout-kl"])["metric-rollout-kl"][1]


def test_a_part_has_a_new_version_when_its_sources_change(folder: Path) -> None:
    live = LivePage(folder)
    for name, content, changed in (
        ("samples.jsonl", '{"phase": 9, "prompt": "a", "response": "b"}\n', {"samples", "findings"}),
        ("summary.json", '{"status": "failed", "algorithm": "ppo"}', {"head", "run", "predicted"}),
        ("git.json", "{}", {"head", "run", "predicted"}),
        ("tokens.jsonl", '{"phase": 1, "tokens": ["a"], "advantages": [1.0]}\n', {"tokens"}),
        ("journal/reward-train-000001.jsonl", '{"of": "a", "score": 1}\n', {"scores"}),
    ):
        before = live.state()["parts"]
        (folder / name).write_text(content)
        assert live.refresh()
        after = live.state()["parts"]
        assert {part for part in after if after[part] != before.get(part)} <= changed, name
        assert {part for part in after if after[part] != before.get(part)} & changed, name
    assert "failed" in live.parts(["head"])["head"][1]


def test_a_new_metric_is_a_new_part_and_one_that_is_gone_is_none(folder: Path) -> None:
    live = LivePage(folder)
    logger = MetricsFile(folder / "metrics.csv")
    logger.log_metrics({"train/own": 1.0}, 4)
    live.refresh()
    assert "train/own" in live.parts(["metric-train-own"])["metric-train-own"][1]
    (folder / "metrics.csv").write_text("step,a\n1,2.0\n")
    live.refresh()
    assert {name for name in live.state()["parts"] if name.startswith("metric-")} == {"metric-a"}
    assert live.parts(["metric-train-own"]) == {}


def test_what_is_said_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", made_up(0, rows=[], summary={}))
    (folder / "metrics.csv").unlink()
    live = LivePage(folder)
    assert live.state()["said"] == "Nothing is logged yet."
    assert "Nothing is logged yet" in live.page()
    (folder / "config.yaml").write_text("logger: {csv: false}\n")
    live.refresh()
    assert "logger.csv=false" in live.state()["said"]
    MetricsFile(folder / "metrics.csv").log_metrics({"train/loss": 0.5, "eval/x": 1.0}, 1200)
    live.refresh()
    assert live.state()["said"] == "step 1,200: train/loss 0.5"
    assert live.state()["running"]
    (folder / "summary.json").write_text('{"status": "finished"}')
    live.refresh()
    assert not live.state()["running"]


def test_no_version_of_one_server_counts_for_another(folder: Path) -> None:
    one, other = (LivePage(folder).state()["parts"] for _ in range(2))
    assert not set(one.values()) & set(other.values())
