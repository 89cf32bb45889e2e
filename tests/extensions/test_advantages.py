"""`ppo.advantages` of one's own: what the parameters ask for is required, given and whitened like any other kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megarl.config.advantages import Needs, critic_kind, needs_of, without_effect
from megarl.config.compose import compose as composed
from megarl.config.ppo import PPOConfig
from megarl.config.rules import check
from megarl.errors import ConfigError
from megarl.experience.advantages import PhaseResults, compute
from tests.refusals import assert_entry_refuses, refused

OWN = str(Path(__file__).with_name("advantages.py"))
MEDIAN, DISCOUNTED = f"{OWN}:above_median", f"{OWN}:discounted"
KEY = "ppo.advantages"


@pytest.fixture
def results() -> PhaseResults:
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    return PhaseResults(rewards, mask, torch.tensor([7, 7, 9, 9]), gamma=0.5)


def test_a_number_for_each_response_reaches_all_of_its_tokens_and_no_others(results: PhaseResults) -> None:
    expected = torch.tensor([0.0, 2.0, 0.0, 6.0])[:, None] * results.mask
    torch.testing.assert_close(compute(MEDIAN, results), expected)


def test_a_number_for_each_token_stays_where_it_is(results: PhaseResults) -> None:
    expected = torch.tensor([[0.5, 1.0, 0.0], [0.75, 1.5, 3.0], [2.0, 0.0, 0.0], [4.0, 8.0, 0.0]])
    torch.testing.assert_close(compute(DISCOUNTED, results), expected)


def test_parameters_say_what_a_phase_must_have(tmp_path: Path) -> None:
    assert needs_of(MEDIAN) == Needs(groups=True, unread=("gamma", "lam", "clip_value", "vf_coef"))
    assert needs_of(DISCOUNTED).unread == ("lam", "clip_value", "vf_coef")
    file = tmp_path / "td.py"
    file.write_text("def td(rewards, values, gamma, lam): ...\ndef best(scores, greedy): ...\n")
    assert needs_of(f"{file}:td") == Needs(values=True, unread=())
    assert needs_of(f"{file}:best").greedy
    config = PPOConfig()
    config.ppo.advantages, config.ppo.gamma = f"{file}:td", 0.5
    assert critic_kind(config) == "shared"
    assert without_effect(config) == {}
    config.ppo.advantages = f"{file}:best"
    assert critic_kind(config) == "none"
    assert without_effect(config) == {f"{KEY}={file}:best": ["ppo.gamma"]}


def test_a_function_that_its_file_does_not_describe_is_asked_itself(tmp_path: Path, results: PhaseResults) -> None:
    file = tmp_path / "wrapped.py"
    file.write_text(
        "import functools\n"
        "def scaled(scores, groups, factor): return factor * scores\n"
        "def everything(**given): return given['scores'] * 0 + len(given)\n"
        "class Half:\n    def __call__(self, scores): return scores / 2\n"
        "half, twice = Half(), functools.partial(scaled, factor=2.0)\n"
    )
    assert needs_of(f"{file}:half") == Needs(unread=("gamma", "lam", "clip_value", "vf_coef"))
    torch.testing.assert_close(compute(f"{file}:half", results)[3], torch.tensor([4.0, 4.0, 0.0]))
    assert compute(f"{file}:everything", results).max() == 6  # neither values nor greedy
    with refused(ConfigError, key=KEY, value=f"{file}:twice", names=("factor",)):
        needs_of(f"{file}:twice")


def test_the_results_of_a_phase_are_not_the_functions_to_change(tmp_path: Path, results: PhaseResults) -> None:
    file = tmp_path / "greedy.py"
    file.write_text("def changes(rewards, scores): rewards.zero_(); scores.zero_(); return scores\n")
    compute(f"{file}:changes", results)
    assert results.rewards.sum() == 14


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def own(scores): return scores[:1]", ("[1]", "[4, 3]")),
        ("def own(scores): return missing", ("NameError", "own.py:1")),
        ("def own(scores): raise SystemExit(1)", ("SystemExit",)),
        ("def own(scores): return 'much'", ()),
    ],
)
def test_what_is_not_advantages_is_refused_with_its_line(
    text: str, names: tuple[str, ...], tmp_path: Path, results: PhaseResults
) -> None:
    file = tmp_path / "own.py"
    file.write_text(text)
    with refused(ConfigError, key=KEY, value=f"{file}:own", names=(f"{KEY}={file}:own", *names)):
        compute(f"{file}:own", results)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("above_median", (f"{KEY}=above_median", "package.module:function", "grpo")),
        (f"{OWN}:above_medium", ("above_median",)),
        ("nowhere.advantages:own", ("nowhere",)),
        ("nowhere.py:own", ("nowhere.py",)),
        (f"{OWN}:torch", (f"{KEY}={OWN}:torch", "rewards")),
        (f"{__file__}:refused", (KEY, "groups")),
    ],
)
def test_a_name_that_is_no_such_function_is_refused_before_anything_is_built(
    value: str, names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["+conf=randomwalks", f"{KEY}={value}"]
    assert_entry_refuses("ppo", settings, names, capsys)


def test_groups_need_several_responses_to_a_prompt() -> None:
    config, _ = composed("ppo", ["+conf=randomwalks", f"{KEY}={MEDIAN}", "rollout.n=1"])
    with refused(ConfigError, key="rollout.n", value=1):
        check(config, 1)
