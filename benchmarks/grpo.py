"""GRPO on a CPU: responses per CPU second, generation and training, beside TRL's GRPO trainer with the same model,
prompts, group size and lengths. Responses end where EOS falls, or are all equally long. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.grpo --trl ../trl/bin/python
"""

import argparse
import json
import os
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ilql import fitted
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.modules.ppo import PPO
from megarl.tokenizers import Tokenizer

HEADER = ["GRPO", "lengths", "mean tokens", "responses/s (CPU)", "tokens/s (CPU)", "of TRL's"]
TRL_SCRIPT = Path(__file__).parent / "peers" / "trl_grpo.py"
LETTERS = string.ascii_letters + string.digits
LETTER = "e"  # the reward of a response counts it
VARIANTS = {"as EOS falls": False, "all equal": True}


@dataclass(frozen=True)
class Sizes:
    """The model and the phases of both sides."""

    layers: int = 6
    width: int = 256
    heads: int = 8
    prompt: int = 8
    longest: int = 256
    prompts: int = 16
    group: int = 8
    phases: int = 4  # that are timed, after one that is not

    @property
    def responses(self) -> int:
        return self.prompts * self.group


def write_model(folder: Path, sizes: Sizes) -> None:
    """Write a GPT-2 with random weights over letters, padding and EOS: a response ends after 64 tokens on average."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {letter: index for index, letter in enumerate([*LETTERS, "<pad>", "<eos>"])}
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=len(words),
        n_positions=sizes.prompt + sizes.longest,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=words["<eos>"],
    )
    GPT2LMHeadModel(shape).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def prompts(sizes: Sizes) -> list[str]:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(len(LETTERS), (sizes.prompts, sizes.prompt), generator=generator)
    return ["".join(LETTERS[index] for index in row) for row in drawn.tolist()]


class Timed(PPO):
    """GRPO that reads the clock at the end of every phase and counts the tokens of its responses."""

    def prepare(self) -> None:
        super().prepare()
        self.marks: list[float] = []
        self.tokens: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.process_time())
        self.tokens.append(float(self.trainer.callback_metrics["rollout/response_tokens"]))


class WithoutEnd(Timed):
    """The same without an end of sequence, so that all responses are equally long."""

    def __init__(self, config: Any, tokenizer: Tokenizer, **given: Any) -> None:
        tokenizer.eos_id = tokenizer.size
        super().__init__(config, tokenizer, **given)


def our_run(equal: bool, model: str, sizes: Sizes, overrides: Sequence[str]) -> dict[str, Any]:
    """CPU seconds of each timed phase, and the mean length of its responses."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "prompts.jsonl")
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(sizes)))
        settings = [
            f"model.path={model}",
            f"data.train=[{data}]",
            f"reward.fn={Path(__file__).parent / 'peers' / 'letters.py'}:count",
            f"reward.options.letter={LETTER}",
            f"rollout.n={sizes.group}",
            f"rollout.max_new_tokens={sizes.longest}",
            f"ppo.rollouts={sizes.responses}",
            "ppo.inner_epochs=1",
            "ppo.kl_coef=0",
            f"trainer.global_batch_size={sizes.responses}",
            f"trainer.micro_batch_size={sizes.responses // 4}",
            f"trainer.max_phases={sizes.phases + 1}",
            "trainer.eval_every=null",
            "trainer.progress=none",
            "checkpoint.every=null",
            "checkpoint.save_last=false",
            "logger.tensorboard=false",
            f"run.dir={folder}/run",
        ]
        config, _ = compose("grpo", [*settings, *overrides])
        module = fitted("grpo", config, WithoutEnd if equal else Timed)
    seconds = [after - before for before, after in zip(module.marks, module.marks[1:], strict=False)]
    return {"cpu": seconds, "tokens": module.tokens[1:]}


def their_run(python: str, equal: bool, model: str, sizes: Sizes) -> dict[str, Any]:
    """The same of TRL's trainer; its choices are those that are fastest there."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": sizes.responses,
        "num_generations": sizes.group,
        "max_completion_length": sizes.longest,
        "max_steps": sizes.phases + 1,
        "num_iterations": 1,
        "beta": 0.0,
        "temperature": 1.0,
        "gradient_checkpointing": False,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    if equal:
        settings["generation_kwargs"] = {"min_new_tokens": sizes.longest}
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.json"), Path(folder, "result.json")
        job.write_text(json.dumps({"model": model, "prompts": prompts(sizes), "letter": LETTER, "settings": settings}))
        away = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        command = [python, str(TRL_SCRIPT), str(job), str(result)]
        done = subprocess.run(command, env={**os.environ, **away}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        found = json.loads(result.read_text())
    lengths = [sum(len(one["response"]) for one in phase) / len(phase) for phase in found["responses"]]
    seconds = [after - before for before, after in zip(found["cpu"], found["cpu"][1:], strict=False)]
    return {"cpu": seconds, "tokens": lengths[1 : len(seconds) + 1], "versions": found["versions"]}


def rows(runs: dict[tuple[str, str], dict[str, Any]], sizes: Sizes) -> list[list[str]]:
    """A row for each side and kind of lengths."""
    rates = {which: sizes.responses * len(found["cpu"]) / sum(found["cpu"]) for which, found in runs.items()}
    table = []
    for (side, lengths), found in runs.items():
        rate, mean = rates[side, lengths], sum(found["tokens"]) / len(found["tokens"])
        theirs = rates.get(("TRL", lengths))
        ratio = "" if theirs is None or side == "TRL" else f"{rate / theirs:.2f}"
        table.append([side, lengths, f"{mean:.0f}", f"{rate:.2f}", f"{rate * mean:.0f}", ratio])
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL: compare with its GRPO")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON with other sizes of the model and phases")
    parser.add_argument("--least", type=float, help="exit with 1 if ours over TRL's is below this as EOS falls")
    parser.add_argument("overrides", nargs="*", help="settings of our runs, such as rollout.engine.slots=64")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes = Sizes(**options.sizes)
    print(describe(torch.device("cpu")))
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), sizes)
        for lengths, equal in VARIANTS.items():
            if options.trl is not None:  # first, as a run of ours leaves variables of torch.distributed behind
                runs["TRL", lengths] = their_run(options.trl, equal, folder, sizes)
            runs["megarl", lengths] = our_run(equal, folder, sizes, options.overrides)
    if options.trl is not None:
        print(f"beside {runs['TRL', 'as EOS falls']['versions']}")
    table = rows(runs, sizes)
    print(markdown(HEADER, table))
    ratios = [float(row[-1]) for row in table if row[:2] == ["megarl", "as EOS falls"] and row[-1]]
    return int(options.least is not None and any(ratio < options.least for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
