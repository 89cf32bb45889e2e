"""The documentation's Python runs as it is written: the blocks of each page in order, on a small model and few steps.

A block whose first line is a comment with a file's name, such as `# my_rewards.py`, is written to that file as well. A
block that cannot run has a comment above it that says why: `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tests.byte_level import byte_level
from tests.doc_blocks import Block, all_blocks

pytestmark = pytest.mark.gate
BLOCKS = [block for block in all_blocks() if block.kind == "python" and not block.reason]
PAGES = {page: list(blocks) for page, blocks in groupby(BLOCKS, lambda block: block.page)}
PRELUDE = """
import megarl

_default_config, _train = megarl.default_config, megarl.train
_FEW = ["trainer.progress=none", "logger.tensorboard=false", "trainer.eval_every=null"]


def default_config(name, *settings):
    units = "trainer.max_phases=1" if name in ("ppo", "grpo", "rft") else "trainer.max_steps=2"
    return _default_config(name, *settings, *_FEW, units)


def train(model=None, *, config=None, **inputs):
    if config is None:
        config = default_config("ppo" if "reward_fn" in inputs else "sft", "rollout.max_new_tokens=8")
    return _train(model, config=config, **inputs)


megarl.default_config, megarl.train = default_config, train
samples, prompts, outputs, answers = ["Hi? thank you"], ["Hi? "], ["thank you"], ["thank you"]
"""
RECORDS = {
    "pairs.jsonl": [{"prompt": f"{n} + 1 = ", "chosen": str(n + 1), "rejected": str(n)} for n in range(40)],
    "prompts.jsonl": [{"prompt": f"{n} + 1 = "} for n in range(40)],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama under every name that the pages use, and data."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("pages")
    tokenizer = byte_level("</s>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    for name in ("my-sft", "my-llama", "gpt2"):
        tokenizer.save_pretrained(folder / name)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    for name, records in RECORDS.items():
        (folder / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


def script_of(blocks: list[Block], folder: Path) -> str:
    """Return a page's blocks as one script; those that name a file are written to it."""
    parts = [PRELUDE]
    for block in blocks:
        if named := re.match(r"# (\w+\.py)\n", block.text):
            (folder / named[1]).write_text(block.text)
        if not block.unrun:
            parts.append(block.text.replace("range(20)", "range(1)").replace("trainer.max_phases=20", "seed=1"))
    return "\n".join(parts)


def test_a_reason_stands_beside_every_block_that_is_not_run() -> None:
    assert [str(block) for block in BLOCKS if block.unrun and len(block.unrun.split()) < 3] == []
    assert sum(not block.unrun for block in BLOCKS) >= 12


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(place: Path, tmp_path: Path, page: str) -> None:
    for entry in place.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "page.py").write_text(f"if __name__ == '__main__':\n    exec({script_of(PAGES[page], tmp_path)!r})\n")
    done = subprocess.run(
        [sys.executable, "page.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
