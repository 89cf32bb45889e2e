"""Prompts and experience of one's own: a class as a data source, and a class that makes the experience of a phase."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.data.sources import read_records
from megarl.errors import ConfigError
from megarl.experience.collection import Scored
from megarl.experience.orchestrator import Orchestrator, build_orchestrator, checked
from megarl.rewards.scores import Scores
from tests.e2e.runs import metrics, run_ppo
from tests.refusals import assert_entry_refuses, refused
from tests.worlds import Worlds

HERE = Path(__file__).parent
RANKED, SUMS = f"{HERE / 'orchestrator.py'}:Ranked", f"{HERE / 'pipeline.py'}:Sums"
KEY = "extensions.orchestrator"
PHASE = [
    *("clone=null", "ppo.kl_coef=0", "ppo.rollouts=8", "ppo.inner_epochs=1", "trainer.global_batch_size=8"),
    *("trainer.micro_batch_size=2", "rollout.n=4", "ppo.advantages=grpo", "critic.kind=none"),
    *("data.options={below:3}", "reward.fn=megarl.rewards.builtin:length", "trainer.max_phases=1", "metric.fn=null"),
]


def test_own_prompts_are_answered_and_scored_by_an_own_orchestrator(worlds: Worlds, tmp_path: Path) -> None:
    own = [f"data.train=[{SUMS}]", "data.eval=[]", f"{KEY}={RANKED}", "model.max_positions=64", "tokenizer.kind=bytes"]
    own += ["tokenizer.path=null", "rollout.max_new_tokens=4", f"rollout.dump={tmp_path / 'dump'}"]
    worlds.run(2, run_ppo, tmp_path / "run", *PHASE, *own)
    ((mean, deviation),) = metrics(tmp_path / "run", "rollout/score", "rollout/score_std")
    assert mean == 1.5, "the ranks of four responses are 0, 1, 2, 3"
    assert deviation == pytest.approx(1.195, abs=1e-3)
    described = json.loads((tmp_path / "run" / "extensions.json").read_text())
    assert described[KEY]["name"] == RANKED


def test_a_class_is_a_source_of_records_with_the_options_that_it_takes() -> None:
    records = list(read_records([SUMS], options={"below": 2}))
    assert [record.fields["prompt"] for record in records] == ["0+0=", "0+1=", "1+0=", "1+1="]
    with refused(ConfigError, key="data.options.bellow", value=2, offers={"data.options": ["below"]}):
        list(read_records([SUMS], options={"bellow": 2}))


def test_a_class_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from megarl.experience.orchestrator import Orchestrator\n"
        "class Plain: ...\n"
        "class Broken(Orchestrator):\n    def __init__(self, module): self.pipe = module.pipe\n"
    )
    with refused(ConfigError, key=KEY, value=f"{file}:Plain", names=("Plain", "Orchestrator")):
        build_orchestrator(f"{file}:Plain", None)
    with refused(ConfigError, key=KEY, value=f"{file}:Broken", names=("AttributeError", "own.py:4")):
        build_orchestrator(f"{file}:Broken", SimpleNamespace())
    assert type(build_orchestrator(None, None)) is Orchestrator


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([1.0], ("list", "Scored")),
        (Scored([SimpleNamespace(prompt_id=0)], Scores(values=[])), ("1 responses and 0 scores",)),  # type: ignore[list-item]
        (Scored([SimpleNamespace(prompt_id=3)], Scores(values=[1.0])), ("prompt_id",)),  # type: ignore[list-item]
    ],
)
def test_experience_that_a_phase_cannot_train_on_is_refused(found: Any, names: tuple[str, ...]) -> None:
    with refused(ConfigError, key=KEY, value="own.py:Own", names=names):
        checked(found, [None, None], "own.py:Own")  # type: ignore[list-item]


def test_an_orchestrator_that_does_not_exist_is_refused_before_anything_is_imported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_entry_refuses("ppo", ["+conf=randomwalks", f"{KEY}={RANKED}d"], (f"{KEY}={RANKED}d", "Ranked"), capsys)
