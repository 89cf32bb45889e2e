"""`python -m megarl.evaluate`: what is refused before anything is built."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from megarl import evaluate
from megarl.config.compose import compose, run
from megarl.config.leaf import leaves
from megarl.config.sections.data import HeldOutDataConfig, PromptDataConfig
from megarl.errors import ConfigError, DataError
from megarl.run.run_folder import RunFolder
from tests.refusals import assert_entry_refuses, refused

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
        ((*WHOLE, "eval.n=8", "rollout.temperature=0"), ("eval.n=8", "rollout.temperature=0", "eval.n=1")),
        ((*WHOLE, "eval.n=8", "rollout.temperature=0", "eval.sweep.beta=[0,1]"), ("eval.n=8", "eval.n=1")),
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
    assert_entry_refuses("evaluate", argv, names, capsys)


def test_what_can_be_evaluated_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SystemExit) as ended:
        run("evaluate", [*WHOLE, "eval.n=4", "eval.vote=number", "out=result.json"], lambda config: 0)
    assert ended.value.code in (0, None)
    for argv in (["eval.n=4", "eval.sweep.temperature=[0,1]", "rollout.temperature=0"], ["rollout.temperature=0"]):
        with pytest.raises(SystemExit) as ended:
            run("evaluate", [*WHOLE, *argv], lambda config: 0)
        assert ended.value.code in (0, None)


@pytest.mark.parametrize("mark", ["checkpoints", "metrics.csv"])
def test_the_folder_of_a_training_run_is_left_as_it_is(mark: str, tmp_path: Path) -> None:
    (tmp_path / mark).mkdir()
    (tmp_path / "config.yaml").write_text("optim: {}\n")
    config, _ = compose("evaluate", [*WHOLE, f"run.dir={tmp_path}"])
    with refused(ConfigError, key="run.dir", value=str(tmp_path), where=mark):
        evaluate.evaluate_here(config)
    assert {path.name for path in tmp_path.iterdir()} == {mark, "config.yaml"}
    assert (tmp_path / "config.yaml").read_text() == "optim: {}\n"


def test_an_evaluation_continues_beside_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checkpoints", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(evaluate, "_evaluated", lambda config, run_dir, functions: (RESULT, [], []))
    config, _ = compose("evaluate", [*WHOLE, f"run.dir={tmp_path}"])
    assert evaluate.evaluate_here(config) == RESULT


RESULT = {"metrics": {"eval/score": 0.5}, "prompts": 1, "responses": 1}


def test_a_result_that_cannot_be_written_leaves_nothing_that_a_restart_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    config, _ = compose("evaluate", [*WHOLE, f"run.dir={tmp_path}", f"out={out}", f"samples={samples}"])
    folder = RunFolder(tmp_path)
    write = evaluate.write_atomically
    for full, key in ((samples, "samples"), (out, "out")):

        def fails(path: Path, content: Any, full: Path = full) -> None:
            if path == full:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(path, content)

        monkeypatch.setattr(evaluate, "write_atomically", fails)
        with refused(DataError, key=key, where=full.name):
            evaluate._write(config, folder, RESULT, [{"response": "a"}])
        assert not out.exists()
        assert not samples.exists()
    monkeypatch.setattr(evaluate, "write_atomically", write)
    evaluate._write(config, folder, RESULT, [{"response": "a"}])
    assert json.loads(out.read_text()) == RESULT
    assert json.loads(samples.read_text()) == {"response": "a"}


def test_an_earlier_result_in_the_run_folder_is_set_aside(tmp_path: Path) -> None:
    config, _ = compose("evaluate", [*WHOLE, f"run.dir={tmp_path}"])
    other = {**RESULT, "responses": 2}
    for result in (RESULT, RESULT, other):
        evaluate._write(config, RunFolder(tmp_path), result, [])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == other
    assert json.loads((tmp_path / "evaluation.1.json").read_text()) == RESULT
    assert not (tmp_path / "evaluation.2.json").exists()


@pytest.mark.parametrize(
    ("argv", "heads", "keys"),
    [
        ([], ("lm",), []),
        (["rollout.ilql_beta=2"], ("lm",), ["rollout.ilql_beta=2"]),
        (["rollout.ilql_beta=2"], ("lm", "value", "q"), []),
        (["parallel.recompute=full"], ("lm", "value", "q"), ["parallel.recompute=full"]),
        (["parallel.recompute=full", "rollout.ilql_beta=2"], ("lm",), ["parallel.recompute", "rollout.ilql_beta"]),
    ],
)
def test_keys_without_effect_are_named_in_a_warning(
    argv: list[str], heads: tuple[str, ...], keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config, _ = compose("evaluate", [*WHOLE, *argv])
    evaluate._warn_without_effect(config, heads)
    assert len(caplog.messages) == len(keys)
    assert all(key in message for key, message in zip(keys, caplog.messages, strict=True))


def test_records_are_described_as_in_training() -> None:
    training = {leaf.key: leaf for leaf in leaves(PromptDataConfig)}
    held_out = {leaf.key: leaf for leaf in leaves(HeldOutDataConfig)}
    other_texts = {"eval", "options"}  # an evaluation is not empty, and has no other functions
    assert {key: training[key] for key in held_out if key not in other_texts} == {
        key: leaf for key, leaf in held_out.items() if key not in other_texts
    }
    assert all(training[key].default == leaf.default for key, leaf in held_out.items())
