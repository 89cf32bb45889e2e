"""One rank asks, all ranks know: which responses are asked about, what is made of the answers, and of failures."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megarl.config.sections.reward import RewardCallsConfig, RewardConfig
from megarl.data.prompts import Prompt
from megarl.errors import ConfigError, RewardError
from megarl.experience import scorers as scoring
from megarl.experience.journal import Journal
from megarl.experience.scorers import FunctionScorer, fingerprint, keep_scored, read_function
from megarl.functions.identity import identity
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.rewards import builtin
from megarl.rewards.combine import Combined
from megarl.rewards.scores import Scores
from megarl.rollout.noise import TRAINING
from megarl.rollout.requests import Rollout
from megarl.tokenizers import CharacterTokenizer
from tests.refusals import refused
from tests.worlds import Worlds

TOKENIZER = CharacterTokenizer("abcd")
A, B, C, D = range(4)
EOS = TOKENIZER.eos_id
PROMPTS = [
    Prompt("a", (A,), {"answer": "x", "only_here": 1}, where="p.jsonl:1"),
    Prompt("b", (B,), {"answer": "y"}, where="p.jsonl:2"),
]
ROLLOUTS = [
    Rollout(0, 0, [A], [C, D, EOS], [-1.0] * 3, "eos"),
    Rollout(0, 1, [A], [C], [-1.0], "length"),
    Rollout(1, 0, [B], [EOS], [-1.0], "eos"),
]
ALONE: Any = SimpleNamespace(rank=0, run_on_rank0=lambda work: work())


class Scripted:
    """Stands for the worker: remembers what it is asked, scores a response by its length, and may fail at a call."""

    name = "scripted"

    def __init__(self) -> None:
        self.questions: list[dict[str, Any]] = []
        self.fail_at = -1
        self.score_of: Callable[[str], float | None] = lambda output: float(len(output))

    def __call__(self, *_: Any, **settings: Any) -> Scripted:
        self.settings = settings
        return self

    def score(self, **question: Any) -> Scores:
        if len(self.questions) == self.fail_at:
            raise RewardError("no more")
        self.questions.append(question)
        values = [self.score_of(output) for output in question["outputs"]]
        return Scores(
            values=list(values), parts={"half": [None if v is None else v / 2 for v in values]}, failed_calls=1
        )

    def close(self) -> None:
        """Nothing is running."""

    @property
    def outputs(self) -> list[list[str]]:
        return [question["outputs"] for question in self.questions]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(scoring, "RewardWorker", scripted)
    return scripted


def make(
    journal: Journal | None = None,
    function: Any = "megarl.rewards.builtin:length",
    **calls: Any,
) -> FunctionScorer:
    settings = RewardConfig(calls=RewardCallsConfig(**calls))
    return FunctionScorer(function, settings, TOKENIZER, ALONE, journal=journal)


def test_a_question_holds_texts_without_the_end_and_every_records_fields(worker: Scripted) -> None:
    scores = make().score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert worker.questions == [
        {
            "samples": ["acd", "ac", "b"],
            "prompts": ["a", "a", "b"],
            "outputs": ["cd", "c", ""],
            "metadata": {"answer": ["x", "x", "y"], "only_here": [1, 1, None]},
            "lengths": [3, 1, 1],
            "places": ["p.jsonl:1", "p.jsonl:1", "p.jsonl:2"],
        }
    ]
    assert scores.values == [2.0, 1.0, 0.0]
    assert scores.parts == {"half": [1.0, 0.5, 0.0]}
    assert scores.totals() == [2.0, 1.0, 0.0]


def test_only_an_end_that_was_drawn_is_no_text() -> None:
    """A tokenizer may decode its end of sequence to something; a stop text stays."""
    assert [rollout.response_without_eos for rollout in ROLLOUTS] == [[C, D], [C], []]
    assert Rollout(0, 0, [A], [C, D], [-1.0] * 2, "stop").response_without_eos == [C, D]


def test_what_was_scored_before_the_end_of_a_process_is_not_asked_again(worker: Scripted, tmp_path: Path) -> None:
    worker.fail_at = 1
    first = make(Journal(tmp_path, "reward"), batch_size=2)
    with pytest.raises(RewardError):
        first.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    worker.fail_at = -1
    second = make(Journal(tmp_path, "reward"), batch_size=2)
    scores = second.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert worker.outputs == [["cd", "c"], [""]]
    assert scores.values == [2.0, 1.0, 0.0]
    assert scores.parts == {"half": [1.0, 0.5, 0.0]}
    second.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert len(worker.questions) == 2
    second.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=1)
    assert worker.outputs[2:] == [["cd", "c"], [""]], "another phase is another question"


def test_samples_without_a_score_are_counted_and_never_a_zero(worker: Scripted, tmp_path: Path) -> None:
    worker.score_of = lambda output: float(len(output)) if output else None
    journal = Journal(tmp_path, "reward")
    scores = make(journal).score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert (scores.values, scores.dropped, scores.failed_calls) == ([2.0, 1.0, None], 1, 1)
    assert scores.totals() == [2.0, 1.0]
    asked = len(worker.questions)
    again = make(journal, on_error="drop").score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert (again.values, again.dropped) == (scores.values, 1), "a resume drops what was dropped"
    assert len(worker.questions) == asked
    make(journal, on_error="error").score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert worker.outputs[asked:] == [[""]], "what has no score is asked for again where that is an error"


def test_rollouts_without_a_score_or_without_what_they_are_compared_with_are_left_out() -> None:
    scores = Scores([2.0, None, 1.0])
    assert keep_scored(ROLLOUTS, scores) == ([ROLLOUTS[0], ROLLOUTS[2]], [2.0, 1.0], None)
    assert keep_scored(ROLLOUTS, scores, {0: 5.0, 1: None}) == ([ROLLOUTS[0]], [2.0], [5.0])


def test_a_part_of_the_scores_has_the_parts_of_its_samples() -> None:
    part = Scores([1.0, None, 3.0], {"a": [1.0, 2.0, 3.0]}, failed_calls=2, repeated_calls=1).part(slice(1, None))
    assert part == Scores([None, 3.0], {"a": [2.0, 3.0]}, failed_calls=2, repeated_calls=1)
    assert (part.dropped, part.totals(), part.means()) == (1, [3.0], {"a": 2.5})


def test_rewards_of_tokens_count_as_their_sum_in_a_mean(worker: Scripted) -> None:
    worker.score_of = lambda output: [1.0] * (len(output) + 1)  # type: ignore[assignment,return-value]
    worker.score = lambda **q: Scores(values=[worker.score_of(o) for o in q["outputs"]])  # type: ignore[method-assign]
    assert make().score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0).totals() == [3.0, 2.0, 1.0]


@pytest.fixture
def scores_file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text("def score(outputs, **_):\n    return [1.0 for _ in outputs]\n")
    return path


def test_a_function_that_was_mended_is_asked_again(worker: Scripted, scores_file: Path, tmp_path: Path) -> None:
    """Its name is the same, and the responses are: only what its file says has changed."""
    for _ in range(2):
        make(Journal(tmp_path, "reward"), f"{scores_file}:score").score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert len(worker.questions) == 1
    scores_file.write_text(scores_file.read_text().replace("1.0", "2.0"))
    make(Journal(tmp_path, "reward"), f"{scores_file}:score").score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0)
    assert len(worker.questions) == 2


def test_options_weights_and_functions_make_a_difference() -> None:
    def of(function: Any, **options: Any) -> str:
        return fingerprint(read_function(function, "reward.fn"), options)

    length, regex = "megarl.rewards.builtin:length", "megarl.rewards.builtin:regex"
    several = {of(length), of(regex), of(length, unit="words"), of(f"2*{length}"), of(f"3*{length}")}
    assert len(several) == 5
    assert of(builtin.length) != of(builtin.regex)
    assert of(f"2*{length} + {regex}") == of(f"2.0*{length} + 1*{regex}") != of(f"2*{length} + 2*{regex}")


def test_a_functions_file_makes_a_difference_even_where_a_pickle_only_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "scores_of_mine.py"
    file.write_text("def f(**_): ...\n")
    function = importlib.import_module("scores_of_mine").f
    before = fingerprint(read_function(function, "reward.fn"), {})
    file.write_text("def f(**_): return 1\n")
    assert fingerprint(read_function(function, "reward.fn"), {}) != before


def typed_in(cell: str) -> Any:
    """What a notebook's cell defines under the name `judge`."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(cell, names)
    return names["judge"]


@pytest.mark.parametrize(
    "cell",
    [
        "bonus = 1\ndef judge(outputs, **_): return [bonus for _ in outputs]",
        "def help(): return 1\ndef judge(outputs, **_): return [help() for _ in outputs]",
        "class Judge:\n    def __call__(self, outputs, **_): return [1 for _ in outputs]\njudge = Judge()",
    ],
)
def test_a_notebooks_function_is_another_one_when_a_cell_is_changed(cell: str) -> None:
    before = identity(typed_in(cell))
    assert identity(typed_in(cell)) == before
    assert identity(typed_in(cell.replace("1", "2"))) != before


@pytest.mark.parametrize(
    ("written", "names", "weights"),
    [
        ("0.7*a.py:f + 0.3*b.py:g", ("f", "g"), (0.7, 0.3)),
        ("a.py:f + b.py:f", ("f", "f_2"), (1.0, 1.0)),
        ("-2 * a.py:f   +   1e-3*b.py:g", ("f", "g"), (-2.0, 0.001)),
        ("5*a.py:f", ("f",), (5.0,)),
    ],
)
def test_a_weighted_sum_is_written_as_one(
    written: str, names: tuple[str, ...], weights: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.py").write_text("def f(**_): ...\ndef g(**_): ...\n")
    combined = read_function(written, "reward.fn")
    assert isinstance(combined, Combined)
    assert (combined.names, combined.weights) == (names, weights)


@pytest.mark.parametrize(
    "written", ["0.5*", "0.5*a.py:f + ", "a:f * b:g", "+ a:f", "x*megarl.rewards.builtin:length", "1.2.3*a:f"]
)
def test_what_is_no_sum_of_functions_is_refused_by_its_key(written: str) -> None:
    with refused(ConfigError, names=("reward.fn",)):
        read_function(written, "reward.fn")


def test_a_metric_never_takes_the_place_of_the_score(scores_file: Path) -> None:
    path = scores_file
    metric = FunctionScorer(f"{path}:score", RewardConfig(), TOKENIZER, ALONE, key="metric.fn")
    assert metric.name == "score_metric"


def across_ranks(function: str, **calls: Any) -> Any:
    """Scores, and whether this rank has a worker; or the failure."""
    grid = Grid(Layout.for_world(dist.get_world_size()), start_world())
    scorer = FunctionScorer(function, RewardConfig(calls=RewardCallsConfig(**calls)), TOKENIZER, grid)
    try:
        return scorer.score(PROMPTS, ROLLOUTS, stream=TRAINING, phase=0).values, scorer.worker is not None
    except RewardError as problem:
        return str(problem)
    finally:
        scorer.close()
        grid.close()


def test_every_rank_gets_the_scores_or_the_error_of_the_one_that_asks(worlds: Worlds) -> None:
    first, second = worlds.run(2, across_ranks, "tests.rewards.functions:lengths")
    assert first == ([2.0, 1.0, 0.0], True)
    assert second == ([2.0, 1.0, 0.0], False)
    assert worlds.run(2, across_ranks, "tests.rewards.functions:lengths", batch_size=1) == [first, second]
    first, second = worlds.run(2, across_ranks, "tests.rewards.functions:raises", retries=0)
    assert "cannot judge this" in first
    assert second == first


def test_the_settings_of_a_run_reach_the_worker(worker: Scripted) -> None:
    make(timeout=7.0, retries=3, on_error="drop", batch_size=5, devices="1")
    wanted = {"timeout_s": 7.0, "retries": 3, "on_error": "drop", "devices": "1", "key": "reward.fn"}
    assert wanted.items() <= worker.settings.items()


CALLABLES = """
import os, sys
sys.path.insert(0, os.getcwd())
from megarl.experience.scorers import fingerprint, read_function

class Judge:
    def __init__(self, bonus):
        self.bonus, self.known = bonus, {"yes", "no", "maybe"}
    def __call__(self, outputs, **_):
        return [self.bonus + (output in self.known) for output in outputs]

def closed(bonus):
    return lambda outputs, **_: [bonus + (output in {"yes", "no", "maybe"}) for output in outputs]

for function in (Judge(1.0), Judge(2.0), Judge(1.0).__call__, closed(1.0), closed(2.0)):
    print(fingerprint(read_function(function, "reward.fn"), {}))
"""


def test_a_callable_is_known_again_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here and there, where sets have another order."""
    script = tmp_path / "script.py"
    script.write_text(CALLABLES)
    runpy.run_path(str(script), run_name="__main__")
    first = capsys.readouterr().out.splitlines()
    environ = {**os.environ, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == first
    assert len(set(first)) == len(first) == 5
