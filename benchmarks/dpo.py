"""DPO on a CPU: pairs per CPU second, with the reference's log-probs cached and with a resident reference. With --trl:
beside TRL's DPO trainer, with the same weights, batches and optimizer. Prints one table, and one of the padding in
microbatches.

    OMP_NUM_THREADS=1 python -m benchmarks.dpo --trl ../trl/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ilql import fitted
from benchmarks.train_step import describe, markdown
from megarl.config.compose import compose
from megarl.modules.dpo import DPO
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan

HEADER = ["DPO", "reference", "pairs/s (CPU)", "of TRL's, resident", "ms per pair for the cache, once"]
PADDING_HEADER = ["global batch", "microbatch", "pack=true", "pack=false", "padded to the longest row of 8 pairs"]
PADDING_LENGTHS = (8, 512)
TRL_SCRIPT = Path(__file__).parent / "peers" / "trl_dpo.py"
VARIANTS = ("cached", "resident")
SAME_LOSS = 1e-3  # relative difference that rounding may cause in a few steps


@dataclass(frozen=True)
class Sizes:
    """The model and the batches of both sides."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    vocab_size: int = 5000
    prompt: int = 16
    shortest: int = 8
    longest: int = 256
    pairs: int = 8  # in a batch
    warm_up: int = 2
    steps: int = 10  # that are timed, after the warm-up

    @property
    def positions(self) -> int:
        return self.prompt + self.longest

    @property
    def total(self) -> int:
        """Number of pairs of a run."""
        return self.pairs * (self.warm_up + self.steps)


@dataclass
class Speed:
    """CPU seconds of the timed steps of each round, and per pair those before training, for the reference."""

    rounds: list[list[float]] = field(default_factory=list)
    once: list[float] = field(default_factory=list)

    def rate(self, pairs: int) -> float:
        """Pairs per CPU second. Each step has the same batch in all rounds, so the median over rounds is its time."""
        steps = [statistics.median(times) for times in zip(*self.rounds, strict=True)]
        return pairs * len(steps) / sum(steps)


# --- what both sides are given ----------------------------------------------------------------------------------------


def write_job(sizes: Sizes, folder: Path) -> Path:
    """Write the model, its tokenizer and the pairs; the file that names them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=sizes.vocab_size,
        n_positions=sizes.positions,
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=sizes.vocab_size - 1,
    )
    GPT2LMHeadModel(shape).save_pretrained(folder / "model")
    words = {f"t{token}": token for token in range(sizes.vocab_size - 2)}
    words |= {"<pad>": sizes.vocab_size - 2, "<eos>": sizes.vocab_size - 1}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder / "model")
    generator = np.random.default_rng(1)

    def text(tokens: int) -> str:
        return "".join(f" t{token}" for token in generator.integers(sizes.vocab_size - 2, size=tokens))

    def response() -> str:
        return text(int(generator.integers(sizes.shortest, sizes.longest + 1)) - 1)  # and its EOS

    records = [{"prompt": text(sizes.prompt), "chosen": response(), "rejected": response()} for _ in range(sizes.total)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    job = {
        **asdict(sizes),
        "positions": sizes.positions,
        "model": str(folder / "model"),
        "data": str(folder / "pairs.jsonl"),
        "lr": 1e-4,
        "beta": 0.1,
        "beta2": 0.95,
    }
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


# --- the two sides ----------------------------------------------------------------------------------------------------


class Timed(DPO):
    """DPO that reads the clock and the loss at the end of every step."""

    def prepare(self) -> None:
        super().prepare()
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.marks.append(time.process_time())
        self.losses.append(float(self.trainer.callback_metrics["train/loss"]))


def our_run(reference: str, job: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What one run of ours found, in the form of peers/trl_dpo.py."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"model.path={job['model']}",
            f"data.train=[{job['data']}]",
            f"data.seq_length={job['positions']}",
            "data.shuffle=false",
            f"dpo.reference={reference}",
            f"dpo.cache={folder}/cache",
            f"dpo.beta={job['beta']}",
            f"optim.lr={job['lr']}",
            f"optim.beta2={job['beta2']}",
            "optim.schedule=constant",
            "optim.warmup_steps=0",
            "optim.weight_decay=0",
            f"trainer.global_batch_size={job['pairs']}",
            f"trainer.micro_batch_size={job['pairs']}",
            f"trainer.max_steps={job['warm_up'] + job['steps']}",
            "trainer.eval_every=null",
            "trainer.log_every=1",
            "trainer.progress=none",
            "checkpoint.every=null",
            "checkpoint.save_last=false",
            "logger.tensorboard=false",
            f"run.dir={folder}/run",
        ]
        config, _ = compose("dpo", [*settings, *overrides])
        module = fitted("dpo", config, Timed)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    once = summary["seconds"].get("reference", {}).get("cpu_s", 0.0)
    steps = [after - before for before, after in zip(module.marks, module.marks[1:], strict=False)]
    return {"cpu": steps, "once": once, "losses": module.losses}


def measured(command: Sequence[str]) -> dict[str, Any]:
    """What a run in its own process printed in its last line."""
    with tempfile.TemporaryDirectory() as folder:
        away = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        done = subprocess.run(command, env={**os.environ, **away}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(sizes: Sizes, python: str | None, rounds: int, overrides: Sequence[str]) -> dict[tuple[str, str], Speed]:
    """Run all variants in turn, `rounds` times, each in its own process."""
    speeds: dict[tuple[str, str], Speed] = {}
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        job = str(write_job(sizes, Path(folder)))
        commands = {}
        for variant in VARIANTS:
            commands["megarl", variant] = [sys.executable, "-m", "benchmarks.dpo", "--one", variant, job, *overrides]
            if python is not None:
                commands["TRL", variant] = [python, str(TRL_SCRIPT), variant, job]
        for turn in range(rounds):
            for which, command in commands.items():
                found = measured(command)
                if turn == 0 and "versions" in found and which[1] == "resident":
                    print(f"beside {found['versions']}")
                check_same_losses(which, found["losses"], losses or found["losses"])
                losses = losses or found["losses"]
                speed = speeds.setdefault(which, Speed())
                speed.rounds.append(found["cpu"][-sizes.steps :])
                speed.once.append(found["once"] / sizes.total)
    return speeds


def check_same_losses(which: tuple[str, str], losses: Sequence[float], expected: Sequence[float]) -> None:
    """All runs must train on the same batches in the same way."""
    if not np.allclose(losses, expected, rtol=SAME_LOSS, atol=0):
        raise AssertionError(f"{' '.join(which)} has the losses {losses}, the first run {expected}")


# --- the tables -------------------------------------------------------------------------------------------------------


def speed_rows(speeds: dict[tuple[str, str], Speed], pairs: int) -> list[list[str]]:
    beside = speeds.get(("TRL", "resident"))
    rows = []
    for which, speed in speeds.items():
        ratio = "" if beside is None else f"{speed.rate(pairs) / beside.rate(pairs):.2f}"
        once = statistics.mean(speed.once)
        rows.append([*which, f"{speed.rate(pairs):.2f}", ratio, f"{1000 * once:.0f}" if once else ""])
    return rows


def padding_rows(batches: int = 50) -> list[list[str]]:
    """Share of the tokens in microbatches that are padding, over batches of pairs whose two rows have lengths drawn
    evenly."""
    rows = []
    for global_batch, per_microbatch in ((8, 8), (8, 2), (32, 8), (128, 8)):
        generator = np.random.default_rng(2)
        present, used, laid, padded = 0, 0, {True: 0, False: 0}, 0
        for _ in range(batches):
            lengths = generator.integers(PADDING_LENGTHS[0], PADDING_LENGTHS[1] + 1, size=2 * global_batch)
            present, used = present + int(lengths.sum()), used + int((lengths - 1).sum())
            padded += sum(len(part) * int(part.max()) for part in np.split(lengths, global_batch // 8))
            for pack in (True, False):
                plan = MicrobatchPlan(
                    lengths,
                    Layout(),
                    0,
                    per_microbatch=per_microbatch,
                    share_bins=pack,
                    keep_together=np.arange(len(lengths)) // 2,
                )
                laid[pack] += plan.count * plan.bins * plan.time
        shares = [f"{1 - used / laid[True]:.0%}", f"{1 - used / laid[False]:.0%}", f"{1 - present / padded:.0%}"]
        rows.append([str(global_batch), str(per_microbatch), *shares])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment with TRL: compare with its DPO")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, in turn")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="timed steps of a run")
    parser.add_argument(
        "--least",
        type=float,
        nargs=2,
        metavar=("CACHED", "RESIDENT"),
        help="exit with 1 if ours cached or resident over TRL's resident is below this",
    )
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON with other sizes of the model and batches")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "JOB"), help="a single run, as JSON; used internally")
    parser.add_argument("overrides", nargs="*", help="settings of our runs, such as trainer.micro_batch_size=4")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one is not None:
        job = json.loads(Path(options.one[1]).read_text())
        print(json.dumps(our_run(options.one[0], job, options.overrides)))
        return 0
    print(describe(torch.device("cpu")))
    sizes = Sizes(**{"steps": options.steps, **options.sizes})
    speeds = compare(sizes, options.trl, options.rounds, options.overrides)
    print(markdown(HEADER, speed_rows(speeds, sizes.pairs)))
    print(f"\npadding, two rows of {PADDING_LENGTHS[0]} to {PADDING_LENGTHS[1]} tokens in a pair")
    print(markdown(PADDING_HEADER, padding_rows()))
    beside = speeds.get(("TRL", "resident"))
    if options.least is None or beside is None:
        return 0
    ratios = [speeds["megarl", variant].rate(sizes.pairs) / beside.rate(sizes.pairs) for variant in VARIANTS]
    return int(any(ratio < least for ratio, least in zip(ratios, options.least, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
