"""Short runs of every algorithm on a small T5 that transformers saved."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from tests.e2e.runs import run_entry

STEPS = 3
SHARED = [
    "seed=7",
    "tokenizer.kind=bytes",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.eval_every=null",
    "trainer.log_every=1",
    "trainer.progress=none",
    "logger.tensorboard=false",
    "checkpoint.every=null",
    "checkpoint.save_last=false",
    "checkpoint.best.keep=0",
    "optim.lr=1e-3",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
]
ROLLOUTS = [
    "rollout.max_new_tokens=7",
    "trainer.max_phases=3",
    "reward.fn=megarl.rewards.builtin:length",
    "data.eval=[]",
]
UPDATES = ["ppo.rollouts=8", "ppo.inner_epochs=2", "ppo.stop_at_kl=null"]
SUPERVISED = [f"trainer.max_steps={STEPS}", "data.seq_length=64"]
PREFERENCES = [*SUPERVISED, "data.train=[{data}/pairs.jsonl]", "data.eval=[]"]
ALGORITHMS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "sft": ([*SUPERVISED, "data.train=[{data}/completions.jsonl]", "data.eval=[]"], ("train/loss", "train/grad_norm")),
    "ppo": (
        [*ROLLOUTS, *UPDATES, "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "rollout/kl", "rollout/entropy", "policy/loss", "value/loss", "train/grad_norm"),
    ),
    "grpo": (
        [*ROLLOUTS, *UPDATES, "rollout.n=4", "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "rollout/entropy", "policy/loss", "train/grad_norm"),
    ),
    "rft": (
        [*ROLLOUTS, "rollout.n=2", "data.train=[{data}/prompts.jsonl]"],
        ("rollout/score", "train/loss"),
    ),
    "ilql": (
        [*SUPERVISED, "data.train=[{data}/rewarded.jsonl]", "data.eval=[]", "data.cache=null"],
        ("train/loss", "train/loss_q", "train/loss_v", "train/loss_cql", "train/grad_norm"),
    ),
    "dpo": ([*PREFERENCES, "dpo.reference=resident"], ("train/loss", "train/margin", "train/grad_norm")),
    "kto": ([*PREFERENCES, "kto.reference=resident"], ("train/loss", "train/grad_norm")),
    "orpo": (PREFERENCES, ("train/loss", "train/grad_norm")),
    "cpo": (PREFERENCES, ("train/loss", "train/grad_norm")),
    "rm": (PREFERENCES, ("train/loss", "train/grad_norm")),
}
"""Settings of each algorithm, and the metrics that must not depend on the layout."""


def save_model(folder: Path) -> None:
    """Save a random T5 1.1 for the bytes tokenizer, whose output layer is not the embedding."""
    torch.manual_seed(3)
    shape = {"d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 262}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**shape, **kind, decoder_start_token_id=0))
    model.lm_head.weight = nn.Parameter(torch.randn(262, 32) / 8)
    model.save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Write prompts, completions, pairs and rewarded samples of unequal lengths."""
    random = Random(5)

    def text(letters: str) -> str:
        return "".join(random.choices(letters, k=random.randint(2, 16)))

    kinds = {
        "prompts": lambda: {"prompt": text("abcde")},
        "completions": lambda: {"prompt": text("abcde"), "completion": text("fghij")},
        "pairs": lambda: {"prompt": text("abcde"), "chosen": text("aeiou"), "rejected": text("xyzwv")},
        "rewarded": lambda: {"samples": [text("abcde"), text("fghij")], "rewards": random.random()},
    }
    for name, record in kinds.items():
        lines = [json.dumps(record()) for _ in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def run(run_dir: Path, entry: str, folder: Path, *overrides: str) -> None:
    """Train in the current world on the model and the data of a folder."""
    settings = [setting.format(data=folder) for setting in ALGORITHMS[entry][0]]
    run_entry(entry, [*SHARED, f"model.path={folder / 'model'}", *settings, f"run.dir={run_dir}", *overrides])
