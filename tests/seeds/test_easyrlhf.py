"""The command of EasyRLHF's README, with its flags, on files in the layout of hh-rlhf.

tests/test_rm_train.py has the translation of every flag; the chain that the README plans (a reward model, SFT on
self-instruct data, PPO with adapters) is examples/instruct, which tests/e2e/test_instruct_example.py runs.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from megarl.rm_train import translate
from tests.e2e.runs import metrics
from tests.hh import write_hh
from tests.seeds.conftest import LITTLE, command
from tests.worlds import Worlds


def test_rm_train_trains_on_the_files_as_they_are_published(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    for name in ("helpful-base", "helpful-online"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        write_hh(folder)
        for split in ("train", "test"):
            file = folder / f"{split}.jsonl"
            (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    files = {
        split: ",".join(
            str(tmp_path / "data" / name / f"{split}.jsonl.gz") for name in ("helpful-base", "helpful-online")
        )
        for split in ("train", "test")
    }
    flags = ["--output_dir", str(tmp_path / "my-model"), "--train_data", files["train"], "--valid_data", files["test"]]
    words = translate([*flags, "--model_name_or_path", str(gpt2), "--batch_size", "8"], lambda _: 18).words
    kept = [word for word in LITTLE if not word.startswith(("trainer.global", "trainer.micro", "trainer.eval_every"))]
    worlds.run(1, command, "rm", *words, *kept, "data.seq_length=160", "trainer.max_steps=1")
    ((accuracy,),) = metrics(tmp_path / "my-model", "train/accuracy")
    assert 0 <= accuracy <= 1
