"""`python -m megarl.evaluate`: what is refused before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarl.config.compose import run
from megarl.config.leaf import leaves
from megarl.config.sections.data import HeldOutDataConfig, PromptDataConfig

WHOLE = ("model.path=model", "data.eval=[prompts.jsonl]", "reward.fn=megarl.rewards.builtin:length")


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (WHOLE[1:], ("model.path",)),
        ((WHOLE[0], WHOLE[2]), ("data.eval",)),
        (WHOLE[:2], ("reward.fn", "reward.model", "reward.url")),
        ((*WHOLE, "eval.n=0"), ("eval.n=0",)),
        ((*WHOLE, "chunk=0"), ("chunk=0",)),
        ((*WHOLE, "model.path=nowhere/at/all"), ("model.path=nowhere/at/all",)),
        ((*WHOLE, "data.eval=[missing.jsonl]"), ("missing.jsonl", "data.eval")),
        ((*WHOLE, "eval.vote=most"), ("eval.vote=most", "boxed")),
        ((*WHOLE, "eval.vote=missing.py:answer"), ("eval.vote=missing.py:answer",)),
        ((*WHOLE, "rollout.dump=there"), ("rollout.dump",)),
        ((*WHOLE, "rollout.n=8"), ("rollout.n",)),
        ((*WHOLE, "trainer.progress=none"), ("trainer.progress",)),
        ((*WHOLE, "out=prompts.jsonl"), ("out=prompts.jsonl",)),
        ((*WHOLE, "samples=prompts.jsonl"), ("samples=prompts.jsonl",)),
        ((*WHOLE, "rollout.top_p=0"), ("rollout.top_p=0",)),
        ((*WHOLE, "eval.k=3"), ("eval.k",)),
        ((*WHOLE, "parallel.tp=3", "trainer.devices=2"), ("parallel.tp=3",)),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(
    argv: tuple[str, ...],
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as ended:
        run("evaluate", list(argv), lambda config: 0)
    error = capsys.readouterr().err
    assert ended.value.code == 2, error
    assert all(name in error for name in names), error
    assert error.count("\n") == 1


def test_what_can_be_evaluated_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as ended:
        run("evaluate", [*WHOLE, "eval.n=4", "eval.vote=number", "out=result.json"], lambda config: 0)
    assert ended.value.code in (0, None)


def test_records_are_described_as_in_training() -> None:
    training = {leaf.key: leaf for leaf in leaves(PromptDataConfig)}
    held_out = {leaf.key: leaf for leaf in leaves(HeldOutDataConfig)}
    other_texts = {"eval", "options"}  # an evaluation is not empty, and has no other functions
    assert {key: training[key] for key in held_out if key not in other_texts} == {
        key: leaf for key, leaf in held_out.items() if key not in other_texts
    }
    assert all(training[key].default == leaf.default for key, leaf in held_out.items())
