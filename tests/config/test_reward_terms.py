"""reward.terms: what a term may say, what it is called, and what it excludes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarl.config.compose import compose
from megarl.config.reward_terms import Term, read_terms, reward_term
from megarl.config.rules import check
from megarl.config.sections.reward import RewardConfig
from megarl.errors import ConfigError
from tests.refusals import refused


def test_terms_have_weights_names_and_roles_of_their_own() -> None:
    entries: list[dict[str, Any]] = [
        {"fn": "rewards.py:score", "weight": 0.5, "options": {"x": 1}},
        {"model": "runs/rm"},
        {"fn": "other.py:score"},
        {"model": "runs/second", "name": "safety"},
        {"url": "http://a:1"},
        {"url": ["http://b:1", "http://c:1"], "weight": -2},
        {"fn": "0.7*a:f + 0.3*b:g"},
    ]
    assert read_terms(entries, "reward.terms") == [
        Term("fn", "rewards.py:score", "reward.terms[0].fn", 0.5, "score", {"x": 1}),
        Term("model", "runs/rm", "reward.terms[1].model", 1.0, "reward_model", role="reward"),
        Term("fn", "other.py:score", "reward.terms[2].fn", 1.0, "score_2"),
        Term("model", "runs/second", "reward.terms[3].model", 1.0, "safety", role="reward_2"),
        Term("url", ["http://a:1"], "reward.terms[4].url", 1.0, "reward_server"),
        Term("url", ["http://b:1", "http://c:1"], "reward.terms[5].url", -2.0, "reward_server_2"),
        Term("fn", "0.7*a:f + 0.3*b:g", "reward.terms[6].fn", 1.0, "combined"),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"fn": "a:b", "options": {"x": 1}}, [Term("fn", "a:b", "reward.fn", options={"x": 1}, role="reward")]),
        ({"model": "m"}, [Term("model", "m", "reward.model", role="reward")]),
        ({"url": ["http://a:1"]}, [Term("url", ["http://a:1"], "reward.url", role="reward")]),
    ],
)
def test_a_single_source_is_one_term(settings: dict[str, Any], expected: list[Term]) -> None:
    assert RewardConfig(**settings).sources == expected


@pytest.mark.parametrize(
    "value",
    [
        "rewards.py:score",
        {},
        {"weight": 1.0},
        {"fn": "a:b", "model": "c"},
        {"fn": None},
        {"fn": "a:b", "model": None},
        {"fn": 3},
        {"model": ["a"]},
        {"url": [3]},
        {"fn": "a:b", "wieght": 2},
        {"fn": "a:b", "weight": "two"},
        {"fn": "a:b", "weight": True},
        {"fn": "a:b", "weight": float("nan")},
        {"fn": "a:b", "name": "two words"},
        {"fn": "a:b", "options": [1]},
        {"model": "a", "options": {"x": 1}},
    ],
)
def test_what_is_no_term_is_refused_in_one_line(value: Any) -> None:
    with refused(ConfigError, key="reward.terms"):
        reward_term("reward.terms", value)


def test_what_is_no_url_is_refused_as_in_reward_url() -> None:
    with refused(ConfigError, key="reward.terms.url", value="not a url"):
        reward_term("reward.terms", {"url": "not a url"})


def test_a_misspelt_entry_is_told_the_nearest() -> None:
    with refused(ConfigError, key="reward.terms", value=2, offers={"reward.terms": ["weight"]}):
        reward_term("reward.terms", {"fn": "a:b", "wieght": 2})


def test_terms_are_read_from_the_command_line_and_from_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(
        "# @package _global_\nreward:\n  terms:\n    - {fn: 'rewards.py:score', weight: 0.5}\n    - model: runs/rm\n"
    )
    for argv in (["reward.terms=[{fn:rewards.py:score,weight:0.5},{model:runs/rm}]"], ["+conf=mine"]):
        terms = compose("ppo", argv)[0].reward.sources
        assert [(term.value, term.weight) for term in terms] == [("rewards.py:score", 0.5), ("runs/rm", 1.0)]


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["reward.fn=a:b", "reward.terms=[{fn:c:d}]"], "reward.terms"),
        (["reward.fn=a:b", "reward.url=[http://a:1]"], "reward.url"),
        (["reward.model=a", "reward.url=[http://a:1]"], "reward.url"),
        (["reward.terms=[{fn:c:d}]", "reward.options={x:1}"], "reward.options"),
        (["reward.terms=[{fn:c:d},{weight:1}]"], "reward.terms"),
        (["reward.model=a", "reward.options={x:1}"], "reward.options"),
        (["reward.url=[http://a:1]", "reward.options={x:1}"], "reward.options"),
    ],
)
def test_terms_exclude_a_single_source_and_its_options(argv: list[str], key: str) -> None:
    def start() -> None:
        config, _ = compose("ppo", ["data.train=[x.jsonl]", *argv])
        check(config, 1)

    with refused(ConfigError, key=key):
        start()


def test_the_remedy_for_options_of_no_function_works_where_a_preset_set_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("# @package _global_\nreward: {fn: a:b, options: {x: 1}}\n")
    argv = ["+conf=mine", "data.train=[x.jsonl]", "reward.fn=null", "reward.model=a"]
    with refused(ConfigError, key="reward.options", value={"x": 1}, offers={"reward.options": [{}]}):
        check(compose("ppo", argv)[0], 1)
    check(compose("ppo", [*argv, "reward.options={}"])[0], 1)


@pytest.mark.parametrize(
    "argument", ["reward.terms=[3]", "reward.terms=[a:b]", "reward.terms={fn:a}", "reward.terms.0.weight=2"]
)
def test_what_is_no_list_of_terms_is_refused_by_its_key(argument: str) -> None:
    with refused(ConfigError, key="reward.terms", names=("[{",)):
        compose("ppo", [argument])


def test_every_reward_model_among_the_terms_is_opened_and_checked() -> None:
    config, _ = compose("ppo", ["reward.terms=[{model:runs/a},{fn:b:c},{model:runs/d}]"])
    assert config.more_models() == {"reward.terms[0].model": "runs/a", "reward.terms[2].model": "runs/d"}
