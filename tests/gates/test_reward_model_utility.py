"""A reward model learns a utility that is known, the share of vowels of a response, from 2,000 comparisons; some of
them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tests.e2e.runs import metrics, run_entry
from tests.worlds import Worlds

pytestmark = pytest.mark.gate

VOWELS = "aeiou"
WORDS = {
    0: ["rhythm", "crypt", "myth", "hymn", "shy", "dry", "why", "pygmy", "lynx"],
    1: ["strength", "bright", "cloth", "storm", "first", "plant", "black"],
    2: ["table", "water", "river", "music", "paper", "lemon"],
    3: ["area", "idea", "audio", "eerie", "queue", "aria", "oboe"],
}
PAIRS, HELD_OUT, STEPS = 2000, 300, 250
FLIPPED = 0.1
SETTINGS = [
    *("model.num_layers=4", "model.hidden_size=128", "model.num_heads=4", "model.max_positions=96"),
    *("data.seq_length=96", "optim.lr=1e-3", "optim.warmup_steps=10", "optim.weight_decay=0"),
    *("trainer.global_batch_size=16", "trainer.micro_batch_size=16", "trainer.log_every=1"),
    *("trainer.progress=none", "logger.tensorboard=false", "checkpoint.every=null", "checkpoint.save_last=false"),
    *(f"trainer.max_steps={STEPS}", f"trainer.eval_every={STEPS}"),
]
ALIKE = ["optim.schedule=constant", "optim.warmup_steps=5"]  # a course that does not depend on the number of steps
FOUR = ["parallel.tp=2", "parallel.pp=2", "trainer.micro_batch_size=8", "trainer.max_steps=10", "trainer.eval_every=10"]


def utility(text: str) -> float:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter in VOWELS for letter in letters) / len(letters)


def response(random: Random) -> str:
    """Four to eight words, from few vowels to many."""
    weights = [random.random() ** 2 for _ in WORDS]
    kinds = random.choices(list(WORDS), weights, k=random.randint(4, 8))
    return " ".join(random.choice(WORDS[kind]) for kind in kinds)


def pair(random: Random, flipped: float) -> dict[str, str]:
    worse, better = "", ""
    while utility(better or "b") - utility(worse or "b") < 0.02:
        worse, better = sorted((response(random), response(random)), key=utility)
    chosen, rejected = (worse, better) if random.random() < flipped else (better, worse)
    return {"prompt": f"{random.choice(WORDS[2])}: ", "chosen": chosen, "rejected": rejected}


def write(folder: Path, flipped: float) -> Path:
    folder.mkdir()
    for name, count, seed in (("train", PAIRS, 1), ("eval", HELD_OUT, 2)):
        random = Random(seed)
        records = [json.dumps(pair(random, flipped)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(records))
    return folder


def learn(run_dir: Path, data: Path, *overrides: str) -> None:
    files = [f"data.train=[{data / 'train.jsonl'}]", f"data.eval=[{data / 'eval.jsonl'}]", f"run.dir={run_dir}"]
    run_entry("rm", [*SETTINGS, *files, *overrides])


def scored(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "scores.jsonl").read_text().splitlines()]


def correlation(run_dir: Path) -> float:
    """Between score and utility, over all responses of the held-out set."""
    both = [[row["score"], utility(row["response"])] for row in scored(run_dir)]
    return float(torch.corrcoef(torch.tensor(both, dtype=torch.float64).t())[0, 1])


def truly_right(run_dir: Path) -> float:
    """Share of held-out pairs whose truly better response has the higher score."""
    rows = scored(run_dir)
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    right = [
        (one["score"] > two["score"]) is (utility(one["response"]) > utility(two["response"])) for one, two in pairs
    ]
    return sum(right) / len(right)


def measured(run_dir: Path, name: str) -> tuple[float, float, float]:
    """Accuracy against the held-out labels and against the truth, and the correlation."""
    ((accuracy,),) = metrics(run_dir, "eval/accuracy")[-1:]
    found = accuracy, truly_right(run_dir), correlation(run_dir)
    words = "accuracy against labels {:.3f} and truth {:.3f}, correlation with utility {:.3f}".format(*found)
    print(f"{name}: {words}")  # noqa: T201
    return found


@pytest.mark.timeout(1200)
def test_it_learns_the_utility_alike_in_one_process_and_in_four(worlds: Worlds, tmp_path: Path) -> None:
    data = write(tmp_path / "data", 0.0)
    worlds.run(1, learn, tmp_path / "one", data, *ALIKE)
    worlds.run(4, learn, tmp_path / "four", data, *ALIKE, *FOUR)
    losses = [[row[0] for row in metrics(tmp_path / name, "train/loss")][:10] for name in ("one", "four")]
    gap = max(abs(ours / theirs - 1) for ours, theirs in zip(*losses, strict=True))
    print(f"losses of the first 10 steps: largest relative difference {gap:.1e}")  # noqa: T201
    accuracy, right, agreement = measured(tmp_path / "one", "true labels")
    assert accuracy >= 0.95
    assert right == pytest.approx(accuracy)
    assert agreement >= 0.9
    assert len(losses[1]) == 10
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=2e-6)


@pytest.mark.timeout(1200)
def test_it_learns_through_wrong_labels(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, learn, tmp_path / "run", write(tmp_path / "data", FLIPPED))
    accuracy, right, agreement = measured(tmp_path / "run", f"{FLIPPED:.0%} flipped")
    assert accuracy >= 0.86
    assert right >= 0.93
    assert agreement >= 0.9
