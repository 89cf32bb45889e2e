"""Whole evaluations of a stored model: the same responses and scores in every layout, and after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import MegarlError
from tests.e2e.runs import composed, launched
from tests.models.exchange.published import PUBLISHED, save_published, stirred
from tests.refusals import assert_refusal
from tests.worlds import Worlds

PROMPTS, N = 16, 2
VOCABULARY = 262  # of the byte tokenizer
SHAPE = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a reward model, and prompts of several lengths."""
    import transformers

    root = tmp_path_factory.mktemp("models")
    save_published("llama", root / "policy", **SHAPE)
    config, arguments = PUBLISHED["llama"]
    settings = getattr(transformers, config)(**{**arguments, **SHAPE, "num_labels": 1, "pad_token_id": 256})
    stirred(transformers.AutoModelForSequenceClassification.from_config(settings)).save_pretrained(root / "reward")
    records = [{"prompt": f"{number}: " + "x" * (number % 5)} for number in range(PROMPTS)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return root


def settings_of(models: Path, run_dir: Path, *overrides: str) -> list[str]:
    run_dir.mkdir(exist_ok=True)
    return [
        f"model.path={models / 'policy'}",
        f"data.eval=[{models / 'prompts.jsonl'}]",
        f"run.dir={run_dir}",
        f"samples={run_dir / 'samples.jsonl'}",
        f"eval.n={N}",
        "rollout.max_new_tokens=6",
        "chunk=4",
        *overrides,
    ]


def evaluate(argv: list[str]) -> dict[str, Any]:
    """The entry point in a world that exists already. The result of this rank."""
    from megarl.evaluate import evaluate_here

    with launched():
        return evaluate_here(composed("evaluate", argv))


def error_of(argv: list[str]) -> MegarlError | None:
    try:
        evaluate(argv)
    except MegarlError as problem:
        return problem
    return None


def samples(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


def test_every_layout_gives_the_same_responses_scores_and_measures(
    worlds: Worlds, models: Path, tmp_path: Path
) -> None:
    terms = f"reward.terms=[{{fn: tests.e2e.scores:even}},{{model: {models / 'reward'}, weight: 0.5}}]"
    metric = "metric.fn=tests.e2e.scores:even"
    engine = ["rollout.engine.layout=tp2", "rollout.engine.slots=5", "reward.calls.devices=0"]
    layouts = {"tp2xpp2": (4, ["parallel.tp=2", "parallel.pp=2"]), "dp2": (2, engine), "one": (1, [])}
    found: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for name, (size, layout) in layouts.items():
        ranks = worlds.run(
            size, evaluate, settings_of(models, tmp_path / name, terms, metric, "eval.vote=text", *layout)
        )
        assert all(rank == ranks[0] for rank in ranks)
        written = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert written == json.loads(json.dumps(ranks[0]))
        found[name] = written, samples(tmp_path / name)
    result, lines = found.pop("one")
    assert len(lines) == result["responses"] == PROMPTS * N
    assert result["prompts"] == PROMPTS
    assert {"eval/score", "eval/score_se", "eval/even", "eval/best@2", "eval/vote_se"} <= result["metrics"].keys()
    assert "eval/pass@2" not in result["metrics"], "the scores are not 0 and 1"
    assert result["metrics"]["eval/even"] == sum(line["scores"]["even"] for line in lines) / len(lines)
    for other, theirs in found.values():
        assert other["metrics"] == pytest.approx(result["metrics"], abs=1e-6)
        assert {**other, "metrics": {}} == {**result, "metrics": {}}, "the same weights, settings and numbers"
        for line, ours in zip(theirs, lines, strict=True):
            for name in ("prompt_id", "sample_id", "response", "tokens", "finish_reason"):
                assert line[name] == ours[name]
            assert line["scores"] == pytest.approx(ours["scores"], abs=1e-6)
            assert line["logprob"] == pytest.approx(ours["logprob"], abs=1e-4)


def test_an_evaluation_that_was_killed_continues_with_what_it_has_not_scored(
    worlds: Worlds, models: Path, tmp_path: Path
) -> None:
    def argv(run_dir: Path) -> list[str]:
        score = [
            "reward.fn=tests.e2e.scores:kills_the_run",
            f"reward.options.folder={run_dir}",
            "reward.calls.batch_size=4",
        ]
        return settings_of(models, run_dir, *score)

    worlds.run(1, evaluate, argv(tmp_path / "whole"))
    cut = tmp_path / "cut"
    settings = argv(cut)
    (cut / "kill").touch()
    with pytest.raises(EOFError):  # the process is gone
        worlds.run(1, evaluate, settings)
    scored = (cut / "scored.txt").read_text().splitlines()
    assert 24 <= len(scored) < PROMPTS * N
    assert not (cut / "evaluation.json").exists()
    worlds.run(1, evaluate, settings)
    scored = (cut / "scored.txt").read_text().splitlines()
    assert len(scored) == PROMPTS * N, "no response was scored twice"
    assert (cut / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    ours, theirs = (json.loads((folder / "evaluation.json").read_text()) for folder in (cut, tmp_path / "whole"))
    assert ours["metrics"] == theirs["metrics"]
    assert "eval/pass@2" in ours["metrics"]
    # Another seed gives other responses, which do not belong to these.
    (cut / "samples.jsonl").unlink()
    (error,) = worlds.run(1, error_of, [*settings, "seed=2"])
    assert_refusal(error, key="run.dir", value=str(cut), names=("seed",))


def test_scores_that_were_dropped_are_an_error_once_they_may_not_be(
    worlds: Worlds, models: Path, tmp_path: Path
) -> None:
    argv = settings_of(models, tmp_path, "reward.fn=tests.e2e.scores:picky")
    (result,) = worlds.run(1, evaluate, [*argv, "reward.calls.on_error=drop"])
    assert result["without_score"] == PROMPTS * N
    for name in ("samples.jsonl", "evaluation.json"):
        (tmp_path / name).unlink()
    (error,) = worlds.run(1, error_of, [*argv, "reward.calls.on_error=error"])
    assert_refusal(error, key="reward.fn", value="tests.e2e.scores:picky")
