"""The commands and trainers of TRL's README that need no step of their own; `test_trl_ppo.py` has the others.

`trl chat` is `megarl chat`: tests/rollout/test_entry.py and tests/test_cli.py run it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

import megarl
from tests.e2e.runs import metrics
from tests.seeds.conftest import LITTLE, command, script
from tests.worlds import Worlds

TEXTS = ["A film about a river.", "I liked the horse.", "The window was open.", "A kettle and a cloud."]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with imdb.jsonl (texts) and pairs.jsonl (hh-rlhf-trl-style: prompt, chosen and rejected, as chats)."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "imdb.jsonl").write_text("".join(json.dumps({"text": text, "label": 1}) + "\n" for text in TEXTS))
    pairs = [
        {
            "prompt": f"{text} ",
            "chosen": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}],
            "rejected": [{"role": "user", "content": text}, {"role": "assistant", "content": "No."}],
        }
        for text in TEXTS
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def commands(gpt2: Path, data: Path, out: Path) -> None:
    """trl sft --model_name_or_path M --dataset_name D --output_dir O, and trl dpo with the same flags."""
    more = ["trainer.max_steps=1", f"model.path={gpt2}"]
    command("sft", *more, f"data.train=[{data / 'imdb.jsonl'}]", "data.eval=[]", f"export.hf={out / 'opt-sft-imdb'}",
            f"run.dir={out / 'sft'}")  # fmt: skip
    template = "data.chat_template='{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}'"
    command("dpo", *more, f"data.train=[{data / 'pairs.jsonl'}]", f"export.hf={out / 'opt-dpo'}", template,
            "data.prompt_key=none", f"run.dir={out / 'dpo'}")  # fmt: skip


def test_the_commands_sft_and_dpo(worlds: Worlds, gpt2: Path, data: Path, tmp_path: Path) -> None:
    worlds.run(1, commands, gpt2, data, tmp_path)
    for name in ("opt-sft-imdb", "opt-dpo"):
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).config.n_layer == 2
    ((loss,),) = metrics(tmp_path / "dpo", "train/loss")
    assert loss == pytest.approx(0.6931, abs=1e-3), "a policy that equals its reference"


def trainers(gpt2: Path, out: Path) -> list[str]:
    """SFTTrainer(model, train_dataset=..., dataset_text_field="text", max_seq_length=...).train(), and RewardTrainer's
    and DPOTrainer's example."""
    pairs = [{"prompt": text, "chosen": " Yes.", "rejected": " No."} for text in TEXTS]
    found = []
    for entry, given in (("sft", {"samples": TEXTS}), ("rm", {"pairs": pairs}), ("dpo", {"pairs": pairs})):
        config = megarl.default_config(entry, *LITTLE, "trainer.max_steps=1", f"run.dir={out / entry}")
        trained = megarl.train(str(gpt2), config=config, **given)
        found.append(trained.summary["status"])
    return found


def test_the_trainers_of_texts_preferences_and_rewards(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    assert worlds.run(1, script, trainers, [gpt2, tmp_path]) == [["finished"] * 3]
    assert metrics(tmp_path / "rm", "train/accuracy")
