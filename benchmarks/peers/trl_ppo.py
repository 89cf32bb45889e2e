"""Phases of TRL's PPO trainer, for benchmarks/ppo.py, which runs this with the interpreter of an environment that has
TRL. It imports nothing of megarl. Takes the sizes as JSON, prints one line of JSON.

Where TRL leaves a choice it is made in TRL's favour: no checkpointing of activations, the reference and the values of a
whole phase in one pass, a reward model of one narrow layer, no end of sequence, so that no row is ever padded.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


@dataclass(frozen=True)
class Sizes:
    """What both sides are given."""

    layers: int
    width: int
    heads: int
    positions: int
    vocab_size: int
    prompts: int  # in a phase, of one token each
    new_tokens: int
    inner_epochs: int
    minibatch: int
    phases: int  # that are timed, after one that is not


class Marks(TrainerCallback):
    """The clocks at the end of every phase."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def build_trainer(sizes: Sizes, folder: str, marks: Marks) -> PPOTrainer:
    words = {f"t{token}": token for token in range(sizes.vocab_size)}
    # Padding is outside of the model's vocabulary: were it drawn, it would shorten the response.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({**words, "<pad>": sizes.vocab_size}, unk_token="t0")),
        pad_token="<pad>",
        eos_token="t0",
    )
    shape = {"vocab_size": sizes.vocab_size, "n_positions": sizes.positions, "bos_token_id": 0, "eos_token_id": 0}
    trunk = {"n_layer": sizes.layers, "n_embd": sizes.width, "n_head": sizes.heads}
    config = PPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=sizes.prompts,
        num_mini_batches=sizes.prompts // sizes.minibatch,
        local_rollout_forward_batch_size=sizes.prompts,
        total_episodes=sizes.prompts * (sizes.phases + 1),
        num_ppo_epochs=sizes.inner_epochs,
        response_length=sizes.new_tokens,
        temperature=1.0,
        learning_rate=3e-4,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=GPT2LMHeadModel(GPT2Config(**shape, **trunk)),
        ref_model=None,  # a copy of the policy
        reward_model=GPT2ForSequenceClassification(GPT2Config(**shape, n_layer=1, n_embd=8, n_head=1, num_labels=1)),
        value_model=GPT2ForSequenceClassification(GPT2Config(**shape, **trunk, num_labels=1)),
        train_dataset=Dataset.from_dict({"input_ids": [[row % sizes.vocab_size] for row in range(sizes.prompts)]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[0]]}),  # never evaluated on, but wanted
        callbacks=[marks],
    )


def main() -> None:
    sizes = Sizes(**json.loads(sys.argv[1]))
    assert sizes.prompts % sizes.minibatch == 0, "TRL wants minibatches of one size"
    torch.manual_seed(1)
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(sizes, folder, marks)
        trainer.train()
    samples = sizes.prompts * sizes.phases
    found = {
        "wall": samples / (marks.wall[-1] - marks.wall[0]),
        "cpu": samples / (marks.cpu[-1] - marks.cpu[0]),
        "parameters": trainer.policy_model.num_parameters(),
        "versions": f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
