"""The page of made-up runs: complete, safe, whole as HTML, and small."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megarl.report.data import RunData
from megarl.report.described import about, algorithm_of
from megarl.report.finding import Finding
from megarl.report.page import labels, page
from tests.report.made_up import NAMES, made_up, rows, settings, write_scores
from tests.report.parsed import Element, parse

FINDING = Finding(
    name="score_collapsed",
    severity="problem",
    title="The score fell",
    evidence="It was 1 and is 0.",
    cause="A learning rate that is too high.",
    remedy="Set optim.lr=1e-6.",
    metrics=("rollout/score", "rollout/kl", "not/logged"),
    steps=(5, 20),
)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x1b[2J\x00\u202e\ud800"


def parsed(*runs: RunData, **given: Any) -> Element:
    return parse(page(runs, **given))


def figure(tree: Element, metric: str) -> Element:
    (found,) = [each for each in tree.with_class("curve") if metric in [code.text() for code in each.all("h4")]]
    return found


def check_references(tree: Element) -> None:
    ids = [element.attributes["id"] for element in tree.all() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    for element in tree.all():
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((element.attributes.get(name) or "").split()) <= set(ids), (name, element)
        link = element.attributes.get("href") or ""
        assert not link.startswith("#") or link[1:] in ids, link


@pytest.fixture
def scored(tmp_path: Path) -> RunData:
    write_scores(tmp_path / "journal", {0: [0.0, 0.0, 1.0, 0.5], 1: [1.0, 1.0], 12: [1.0]})
    return made_up(path=tmp_path)


# --- the whole page ---------------------------------------------------------------------------------------------------


def test_every_reference_of_a_page_leads_somewhere_and_every_identifier_is_there_once(scored: RunData) -> None:
    ranked = made_up(3, Path("other/made-up"), config=settings(checkpoint__best={"metric": "eval/optimality"}))
    for runs in ([scored], [ranked], [scored, made_up(5), ranked]):
        check_references(parsed(*runs, findings=[[FINDING]] * len(runs)))
    names = ("eval/a b", "eval/a-b", "eval/A.B", "eval/score@temperature=0.7", "eval/score-temperature-0-7", "é")
    check_references(parsed(made_up(rows=rows(3, names))))


def test_a_page_needs_no_network(scored: RunData) -> None:
    text = page([scored, made_up(2)], [[FINDING], []])
    outside = re.findall(
        r"""(?:src|href|action|data)=["']?([^"'\s>]+)|url\(([^)]*)\)|@import|https?://[^\s"'<]+""", text
    )
    assert {link for link, _ in outside if link and not link.startswith("#")} <= {"data:,"}
    assert not any(address for _, address in outside)
    assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in text


def test_a_page_has_landmarks_headings_in_order_and_names_for_tables_and_controls(scored: RunData) -> None:
    tree = parsed(scored, findings=[[FINDING]])
    for landmark in ("header", "nav", "main", "footer"):
        assert len(tree.all(landmark)) == 1
    assert tree.all("html")[0].attributes["lang"] == "en"
    levels = [int(element.tag[1]) for element in tree.all() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(table.children[0].tag == "caption" and table.text() for table in tree.all("table"))
    labelled = {element.attributes["for"] for element in tree.all("label")}
    assert all(one.attributes.get("aria-label") or one.attributes.get("id") in labelled for one in tree.all("input"))


def test_a_thousand_phases_make_a_page_below_two_megabytes_that_shows_the_extremes(tmp_path: Path) -> None:
    names = (*NAMES, *(f"own/metric_{index}" for index in range(30)))
    values = rows(1000, names)
    values[314]["rollout/kl"] = 77.5
    write_scores(tmp_path / "journal", {phase: [phase / 1000, 0.5] * 32 for phase in range(1000)})
    run = made_up(path=tmp_path, rows=values)
    text = page([run])
    assert len(text.encode()) < 2_000_000
    kl = figure(parse(text), "rollout/kl")
    assert "highest 77.5 at 315" in kl.all("desc")[0].text()
    assert "77.5" in [cell.text() for cell in kl.all("td")]


@pytest.mark.parametrize(
    ("encoder", "layers"), [(None, "24 layers, "), ({"num_layers": 12}, "12 + 24 layers (encoder + decoder), ")]
)
def test_a_model_is_described_with_the_layers_of_both_its_parts(encoder: Any, layers: str) -> None:
    model = {"num_layers": 24, "hidden_size": 512, "num_heads": 8, "encoder": encoder}
    described = dict(about(made_up(config={**settings(), "model": model})))["Model"]
    assert described == f"{layers}hidden size 512, 8 heads, from random weights"


def test_text_of_a_model_stays_text() -> None:
    run = made_up(
        path=Path("runs") / HOSTILE.replace("/", "").replace("\0", ""),
        config={**settings(), "seed": HOSTILE, "data": {HOSTILE: HOSTILE}},
        rows=[{"step": 1.0, f"eval/{HOSTILE}": 0.5, "eval/score": 1.0}],
        summary={"status": HOSTILE, "error": HOSTILE, "seconds": {HOSTILE: {"wall_s": 1.0}}},
        samples=[{"phase": 0, "prompt": HOSTILE, "response": HOSTILE, HOSTILE: HOSTILE}],
        entry=HOSTILE,
        versions={"megarl": HOSTILE},
        git={"commit": HOSTILE},
    )
    finding = Finding("a", "note", HOSTILE, HOSTILE, HOSTILE, HOSTILE, (f"eval/{HOSTILE}",))
    text = page([run, replace(run, path=Path("other"))], [[finding], []])
    tree = parse(text)
    assert not tree.all("img")
    assert all(not name.startswith("on") for element in tree.all() for name in element.attributes)
    kinds = [element.attributes.get("type") for element in tree.all("script")]
    assert kinds.count(None) == 1  # the page's own
    assert not {sign for sign in text if (ord(sign) < 32 and sign not in "\n\t") or sign in "\u202e\ud800"}
    text.encode()


# --- parts ------------------------------------------------------------------------------------------------------------


def test_findings_come_first_with_the_worst_first_and_link_to_their_curves() -> None:
    note = replace(FINDING, severity="note", title="Worth knowing", metrics=(), steps=None)
    tree = parsed(made_up(), findings=[[note, FINDING]])
    first = tree.all("main")[0].all("section")[0]
    assert [heading.text() for heading in first.all("h3")] == ["Problem The score fell", "Note Worth knowing"]
    assert all(words in first.text() for words in (FINDING.evidence, FINDING.cause, FINDING.remedy))
    links = {(link.text(), link.attributes["href"]) for link in first.all("a")}
    curves = {name: f"#{figure(tree, name).attributes['id']}" for name in ("rollout/score", "rollout/kl")}
    assert links == set(curves.items())
    assert figure(tree, "rollout/score").with_class("band")
    assert not figure(tree, "train/loss").with_class("band")


def test_a_page_says_that_nothing_was_found_only_if_it_was_looked_for() -> None:
    assert "Nothing was found" in parsed(made_up(), findings=[[]]).text()
    tree = parsed(made_up())
    assert "Nothing was found" not in tree.text()
    assert not tree.all(id="findings")


def test_every_metric_has_a_curve_with_its_last_value_and_its_definition() -> None:
    run = made_up()
    tree = parsed(run)
    for name in NAMES:
        found = figure(tree, name)
        value = run.series(name)[-1][1]
        assert float(found.with_class("last")[0].all("strong")[0].text()) == pytest.approx(value, rel=1e-3)
        assert found.with_class("definition")[0].text()
        assert found.all("path", **{"class": "line s0"})
    assert "Mean of metric.fn" in figure(tree, "eval/optimality").text()


def test_a_curve_has_what_is_normal_and_what_to_do_if_not_folded_below_its_definition() -> None:
    found = figure(parsed(made_up()), "policy/clip_fraction")
    advice = next(each for each in found.all("details") if "What is normal" in each.all("summary")[0].text())
    assert "Normal: Up to 0.3" in advice.text()
    assert "If not: 0.4 or more (clipping_always)" in advice.text()
    assert "mean over tokens of [-A clip(ratio) > -A ratio]" in found.with_class("formula")[0].text()


def test_metrics_that_are_not_among_the_first_are_folded_by_their_prefix() -> None:
    tree = parsed(made_up(rows=rows(4, ("rollout/score", "mine/a", "mine/b", "eval/own"))))
    folded = {each.all("summary")[0].text(): each for each in tree.all("section", id="curves")[0].all("details")}
    inside = folded["mine: 2 metrics"]
    assert {heading.text() for heading in inside.all("h4")} == {"mine/a", "mine/b"}
    assert not [each for summary, each in folded.items() if "metric" in summary and "eval/own" in each.text()]


def test_values_that_are_not_finite_are_counted_and_not_drawn() -> None:
    values = rows(6, ("train/loss", "rollout/kl"))
    values[2]["train/loss"], values[3]["train/loss"] = math.nan, math.inf
    for row in values:
        row["rollout/kl"] = math.nan
    tree = parsed(made_up(rows=values))
    loss, kl = figure(tree, "train/loss"), figure(tree, "rollout/kl")
    assert "2 values are not finite, first at phase 3." in loss.text()
    assert len(loss.all("circle")) == 4
    assert "6 values are not finite" in kl.text()
    assert not kl.all("svg")


def test_the_scores_of_the_responses_are_drawn_by_phase(scored: RunData) -> None:
    (found,) = parsed(scored).with_class("distribution")
    assert len({cell.attributes["x"] for cell in found.with_class("cell")}) == 3
    first, *_ = found.all("tbody")[0].all("tr")
    assert [cell.text() for cell in first.children] == ["0", "4", "0", "0", "0.25", "0.625", "1"]
    assert not parsed(made_up()).with_class("distribution")


def test_samples_of_the_first_and_the_last_evaluation_stand_side_by_side() -> None:
    one, two = parsed(made_up()).with_class("sample")
    assert [pre.text() for pre in one.all("pre")] == ["one", "one in 0", "one in 20"]
    assert [heading.text() for heading in two.all("h4")] == ["Phase 0", "Phase 20"]
    assert "score2" in two.text()
    single = parsed(made_up(samples=[{"step": 3, "prompt": "a", "response": ""}]))
    (only,) = single.with_class("sample")
    assert [heading.text() for heading in only.all("h4")] == ["Phase 3"]


def test_a_repeated_evaluation_replaces_its_samples() -> None:
    again = [{"phase": 0, "prompt": "a", "response": "old"}, {"phase": 1, "prompt": "a", "response": "x"}]
    tree = parsed(made_up(samples=[*again, {"phase": 0, "prompt": "a", "response": "new"}]))
    assert [pre.text() for pre in tree.with_class("sample")[0].all("pre")] == ["a", "new", "x"]


def test_settings_that_differ_from_the_defaults_are_listed_and_all_are_there() -> None:
    config = settings("ppo", optim__lr=0.5, ppo__lam=0.9, run__dir="elsewhere", data__train=["a.jsonl"])
    section = parsed(made_up(config=config)).all(id="configuration")[0]
    (table,) = section.all("table")
    found = [[cell.text() for cell in row.children] for row in table.all("tbody")[0].all("tr")]
    assert sorted(found) == [
        ["data.train", '["a.jsonl"]', "[]"],
        ["optim.lr", "0.5", "1e-05"],
        ["ppo.lam", "0.9", "0.95"],
    ]
    whole = section.all("pre")[0].text().splitlines()
    assert {"run.dir=elsewhere", "run.name=null", 'data.train=["a.jsonl"]'} <= set(whole)


@pytest.mark.parametrize("algorithm", ["sft", "ppo", "grpo", "rft", "ilql", "dpo", "kto", "orpo", "cpo", "rm"])
def test_a_run_that_does_not_say_its_algorithm_is_recognised_by_its_settings(algorithm: str) -> None:
    run = made_up(config=settings(algorithm, optim__lr=0.5), entry="", summary={})
    older = {name: section for name, section in run.config.items() if name not in ("adapter", "extensions")}
    assert (algorithm_of(run), algorithm_of(replace(run, config=older))) == (algorithm, algorithm)
    assert algorithm_of(replace(run, config={**run.config, "focal": {"gamma": 2}})) == ""


def test_what_ran_is_on_the_page() -> None:
    said = parsed(made_up(config=settings(parallel__tp=2))).all(id="run")[0].text()
    for words in ("finished, 20 of 20 phases", "tp 2, dp 2", "1 min 40 s", "1.5 GB", "0123456789ab"):
        assert words in said
    assert "torch 2.8.0, megatron-core 0.19.2" in said
    assert re.search(r"train1 min 0 s60%", said)


def test_several_runs_share_their_curves_and_what_differs_is_a_table() -> None:
    first = made_up(20, Path("a/run"), config=settings(optim__lr=0.5))
    second = made_up(10, Path("b/run"), rows=rows(10, shift=3.0), config=settings(optim__lr=0.25))
    tree = parsed(first, second)
    score = figure(tree, "rollout/score")
    assert (
        len([path for path in score.with_class("line") if "d" in path.attributes and path.attributes["d"] != "M0 4H24"])
        == 2
    )
    assert [entry.text().split()[0] for entry in score.with_class("legend")[0].all("li")] == ["a/run", "b/run"]
    table = tree.all(id="configuration")[0].all("table")[0]
    assert [cell.text() for cell in table.all("tbody")[0].all("tr")[0].children] == ["optim.lr", "0.5", "0.25"]
    assert len(table.all("tbody")[0].all("tr")) == 1
    values = {row.children[0].text(): row.children for row in tree.all(id="values")[0].all("tbody")[0].all("tr")}
    assert float(values["train/lr"][2].text()) == pytest.approx(second.series("train/lr")[-1][1], rel=1e-3)


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert labels([made_up(path=Path("/r/a")), made_up(path=Path("/r/b"))]) == ["a", "b"]
    assert labels([made_up(path=Path("/x/a/run")), made_up(path=Path("/x/b/run"))]) == ["a/run", "b/run"]


# --- broken runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": []},
        {"rows": [{"step": 1.0}]},
        {"summary": {}},
        {"config": {}},
        {"config": {"trainer": 3, "model": [], "parallel": "x", "checkpoint": None}},
        {"samples": [{}, {"phase": "x"}, {"phase": 1}, {"phase": 1, "prompt": None, "response": 3, "score": {}}]},
        {"summary": {"status": 3, "steps": "x", "seconds": [1], "wall_s": "x", "world_size": 0, "metrics": 1}},
        {"versions": {"cpu": 1, "gpu": {"names": "x"}}, "git": {"commit": 3}},
        {"rows": [{"step": 1.0, "train/loss": 1e308}, {"step": 1e18, "train/loss": -1e308}]},
    ],
    ids=lambda changed: " ".join(changed),
)
def test_a_run_that_lacks_something_or_has_something_odd_has_a_page(changed: dict[str, Any]) -> None:
    check_references(parsed(made_up(**changed)))
    check_references(parsed(made_up(path=Path("a"), **changed), made_up(path=Path("b"))))


def test_a_chart_of_many_runs_has_few_points_of_each() -> None:
    one = made_up(100)
    tree = parsed(*[replace(one, path=Path(f"run-{index}")) for index in range(12)])
    lines = [path for path in figure(tree, "rollout/score").with_class("line") if len(path.attributes["d"] or "") > 20]
    assert len(lines) == 12
    assert all((path.attributes["d"] or "").count("L") <= 40 for path in lines)


def test_a_run_that_trains_is_at_its_last_logged_step() -> None:
    """summary.json is written at evaluations only."""
    summary = {"status": "running", "steps": 10, "max_steps": 50}
    (head,) = parsed(made_up(13, summary=summary)).all(id="head")
    assert "running, 13 of 50 phases" in head.text()
    (head,) = parsed(made_up(13, summary={**summary, "status": "failed"})).all(id="head")
    assert "failed, 10 of 50 phases" in head.text()
