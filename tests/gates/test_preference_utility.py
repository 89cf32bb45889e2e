"""DPO, KTO and SimPO raise a utility that is known: the share of vowels in what the model writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

pytestmark = pytest.mark.gate

VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvw"
MODEL = ["model.num_layers=2", "model.hidden_size=64", "model.num_heads=4"]
QUIET = ["data.seq_length=32", "trainer.progress=none", "trainer.eval_every=null", "logger.tensorboard=false"]
ALGORITHMS = {
    "dpo": ["dpo.beta=0.1"],
    "kto": ["kto.beta=0.1"],
    "simpo": ["cpo.kind=simpo", "cpo.beta=2", "cpo.sft_coef=0"],
}


def text(random: Random, share: float) -> str:
    length = random.randint(6, 14)
    return "".join(random.choice(VOWELS if random.random() < share else CONSONANTS) for _ in range(length))


def write(folder: Path, seed: int) -> None:
    """Texts with fewer vowels than consonants, and pairs of them: the one with more vowels is preferred."""
    random = Random(seed)
    with (folder / "texts.jsonl").open("w") as file:
        for _ in range(600):
            record = {"prompt": text(random, 0.3), "completion": text(random, random.choice((0.1, 0.3, 0.6)))}
            file.write(json.dumps(record) + "\n")
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(600):
            both = sorted((text(random, random.choice((0.1, 0.3, 0.6))) for _ in range(2)), key=share)
            if share(both[0]) < share(both[1]):
                record = {"prompt": text(random, 0.3), "chosen": both[1], "rejected": both[0]}
                file.write(json.dumps(record) + "\n")
    prompts = [{"prompt": text(random, 0.3)} for _ in range(200)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in prompts))


def share(written: str) -> float:
    letters = [letter for letter in written if letter.isalpha()]
    return sum(letter in VOWELS for letter in letters) / max(len(letters), 1)


def command(program: str, *settings: str) -> None:
    subprocess.run([sys.executable, "-m", f"megarl.{program}", *settings], check=True, capture_output=True, text=True)


def utility(folder: Path, run_dir: Path) -> float:
    """Mean share of vowels in sampled responses of a run's model."""
    out = run_dir / "responses.jsonl"
    command(
        *("generate", f"model.path={run_dir}", f"prompts={folder / 'prompts.jsonl'}", f"out={out}"),
        *("rollout.max_new_tokens=16", "trainer.progress=none"),
    )
    return sum(share(json.loads(line)["response"]) for line in out.open()) / 200


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_utility_rises_by_half_of_what_is_possible(seed: int, tmp_path: Path) -> None:
    write(tmp_path, seed)
    start = tmp_path / "sft"
    command(
        *("train_sft", *MODEL, *QUIET, f"data.train=[{tmp_path / 'texts.jsonl'}]", "data.eval=[]"),
        *(f"run.dir={start}", f"seed={seed}", "trainer.max_steps=300", "optim.lr=3e-3"),
    )
    before, found = utility(tmp_path, start), {}
    for name, settings in ALGORITHMS.items():
        entry, run_dir = "cpo" if name == "simpo" else name, tmp_path / name
        cache = [] if entry == "cpo" else [f"{entry}.cache={tmp_path / 'cache'}"]
        command(
            *(f"train_{entry}", *QUIET, f"model.path={start}", f"data.train=[{tmp_path / 'pairs.jsonl'}]", *cache),
            *(f"run.dir={run_dir}", f"seed={seed}", "optim.lr=5e-4", "trainer.max_steps=100", *settings),
        )
        found[name] = utility(tmp_path, run_dir)
    assert all(after - before >= 0.5 * (1 - before) for after in found.values()), (before, found)
