"""The parts of benchmarks/gpu.py, each in a process of its own: `python -m benchmarks.gpu_parts NAME --out FILE`."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import decode, train_step
from benchmarks.rates import copy_bandwidth, seconds
from benchmarks.train_step import GPU_SHAPES, Shape, describe, live_grid
from megarl import selftest
from megarl.config.cluster import PlanConfig
from megarl.config.compose import compose
from megarl.config.sections.model import ModelConfig
from megarl.modules.sft import SFT
from megarl.parallel.device import VARIABLE, device_settings
from megarl.parallel.grid import Grid, start_world
from megarl.planning.hardware import GIB, KINDS
from megarl.planning.memory import plan_ranks
from megarl.planning.work import work_of
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Rollout, Sampling
from megarl.tasks.randomwalks import task

BOUNDS = {"fp32": 1e-3, "bf16": 5e-2}
"""Difference of losses and gradient norms, relative above 1, that passes as rounding between a GPU and a CPU."""
SAME_DEVICE = {"fp32": 1e-5, "bf16": 5e-2}
"""The same where both run on a CPU, one with a GPU's settings."""
MEAN_NORMS = {"ppo": 1e-4}
"""Tasks whose first gradient norm is a mean over a phase of eight steps, which follow four of cloning, and the bound of
it in float32. Adam multiplies rounding from step to step: on one CPU, microbatches of another size move it by 2e-5."""
PLANNED = (0.8, 1.15)
"""Measured over planned bytes that count as right."""
QUIET = ("trainer.progress=none", "trainer.log_every=1", "logger.tensorboard=false", "checkpoint.best.keep=0")


@dataclass(frozen=True)
class Outcome:
    """What a part found: a table, whether it is as it should be, and a sentence."""

    ok: bool
    says: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Options:
    """Where parts run. `small`: on a CPU with a GPU's settings, at sizes so small that times mean nothing."""

    small: bool

    @property
    def accelerator(self) -> str:
        return "cpu" if self.small else "gpu"

    def shape(self, name: str) -> Shape:
        return GPU_SHAPES["tiny" if self.small else name]


QWEN3 = Shape(
    "Qwen3-0.6B, 1x16384",
    ModelConfig(
        num_layers=28,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=3072,
        max_positions=16384,
        position="rope",
        rope_base=1e6,
        norm="rmsnorm",
        activation="swiglu",
        qk_norm=True,
        tie_embeddings=True,
    ),
    vocab_size=151936,
    batch=1,
    length=16384,
)
"""A published model's shape at a length at which attention is most of the work."""


# --- right ------------------------------------------------------------------------------------------------------------


def layouts(options: Options) -> Outcome:
    """The self-test in what one device allows: each way to recompute beside none."""
    steps = 3 if options.small else 8
    rows, ok = [], True
    for precision in selftest.TOLERANCES:
        alone = selftest.train(selftest.Settings(precision=precision, steps=steps))
        for recompute in ("none", "selective", "full"):
            other = selftest.train(selftest.Settings(recompute=recompute, precision=precision, steps=steps))
            found, same = selftest.compare(alone, other, precision)
            ok &= same
            worst = max(float(row[3]) for row in found)
            rows.append([precision, recompute, f"{worst:.1e}", "same" if same else "DIFFERENT"])
    says = "every way to recompute gives the same numbers" if ok else "a way to recompute changes the numbers"
    return Outcome(ok, says, ["precision", "recompute", "largest difference", ""], rows)


TASKS: dict[str, tuple[str, ...]] = {
    "sft": ("data.seq_length=16", "trainer.max_steps=4"),
    "ilql": ("trainer.max_steps=4",),
    "ppo": ("trainer.max_phases=1", "clone.steps=4", "ppo.rollouts=64", "ppo.stop_at_kl=null"),
    # One optimizer step a phase, and none before: the first phase's gradient norm is that of equal weights.
    "ppo_steps": ("trainer.max_phases=3", "clone.data=[]", "ppo.inner_epochs=1", "ppo.rollouts=32"),
}
_WALKS = ("data.eval=[]", "trainer.eval_every=null", "trainer.global_batch_size=32", "trainer.micro_batch_size=8")


def parity(options: Options) -> Outcome:
    """Losses and gradient norms of the first steps of each algorithm, beside the same run on a CPU."""
    wanted = [(algorithm, precision) for algorithm in TASKS for precision in BOUNDS]
    with TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        found = list(pool.map(lambda case: _beside_cpu(options, Path(folder, *case), *case), wanted))
    rows = [row for part in found for row in part]
    ok = all(row[-1] == "same" for row in rows)
    says = "losses are the CPU's" if ok else "losses differ from the CPU's by more than rounding"
    return Outcome(ok, says, ["algorithm", "precision", "series", "largest difference", "bound", ""], rows)


def _beside_cpu(options: Options, folder: Path, algorithm: str, precision: str) -> list[list[str]]:
    preset = {"ilql": "randomwalks_ilql"}.get(algorithm, "randomwalks")
    entry = algorithm.partition("_")[0]
    words = [f"+conf={preset}", *TASKS[algorithm], *_WALKS, f"trainer.precision={precision}", "checkpoint.every=null"]
    if algorithm == "sft":
        words.append(walks(folder))
    drawn = ["rollout.dump=" + str(folder / "dump")] if entry == "ppo" else []
    read = ["rollout.replay=" + str(folder / "dump")] if entry == "ppo" else []
    alone = command(entry, [*words, *drawn], folder / "cpu", "cpu", gpu_settings=False)
    there = command(entry, [*words, *read], folder / "device", options.accelerator, gpu_settings=options.small)
    rows = []
    for name in (name for name in alone[0] if name.endswith(("loss", "grad_norm"))):
        pairs = [(float(a[name]), float(b[name])) for a, b in zip(alone, there, strict=True) if a[name]]
        bound = (SAME_DEVICE if options.small else BOUNDS)[precision]
        if name.endswith("grad_norm"):  # Adam multiplies the rounding of a gradient that is nearly 0
            pairs, bound = pairs[:1], max(bound, MEAN_NORMS.get(algorithm, 0.0))
        worst = max(abs(a - b) / max(abs(a), 1.0) for a, b in pairs)
        rows.append(
            [algorithm, precision, name, f"{worst:.1e}", f"{bound:g}", "same" if worst <= bound else "DIFFERENT"]
        )
    return rows


def walks(folder: Path) -> str:
    """Write the walks that PPO clones; the setting that trains on them."""
    folder.mkdir(parents=True)
    path = folder / "walks.jsonl"
    path.write_text("".join(json.dumps({"text": walk}) + "\n" for walk in task(1000).walks), encoding="utf-8")
    return f"data.train=[{path}]"


def graphs(options: Options) -> Outcome:
    """The same tokens with and without CUDA graphs, greedy and drawn at random."""
    rows, ok = [], True
    shape = options.shape("1b")
    for precision in BOUNDS:
        for temperature in (0.0, 1.0):
            with _world() as grid:
                engine = train_step.engine_of(shape, grid, precision)
                left, right = (_answers(engine, shape, temperature, recorded) for recorded in (False, True))
            share = sum(a.response == b.response for a, b in zip(left, right, strict=True)) / len(left)
            ok &= share == 1.0 or precision == "bf16"  # bf16 rounds so much that two candidates can change places
            rows.append([precision, f"{temperature:g}", f"{share:.0%}"])
    says = "graphs give the same tokens in fp32" if ok else "graphs change tokens in fp32"
    return Outcome(ok, says, ["precision", "temperature", "same responses"], rows)


def _answers(engine: Any, shape: Shape, temperature: float, recorded: bool) -> list[Rollout]:
    generator = Generator(engine, decode.NO_EOS, seed=1, limits=Limits(slots=4, graphs=recorded))
    longest = min(32, shape.length // 2)
    requests = [
        Request(row, 0, tuple(prompt), Sampling(temperature=temperature, max_new_tokens=longest - row))
        for row, prompt in enumerate(shape.tokens(torch.device("cpu"))[:, : longest // 2].repeat(4, 1)[:8].tolist())
    ]
    try:
        return list(generator.generate(requests))
    finally:
        generator.close()


def resume(options: Options) -> Outcome:
    """A run that is stopped and goes on, beside one that is not."""
    words = ["+conf=randomwalks", *TASKS["sft"], *_WALKS, "checkpoint.every=2", "trainer.precision=bf16"]
    words.append("optim.schedule=constant")  # any other depends on where a run is to end
    with TemporaryDirectory() as folder:
        words.append(walks(Path(folder, "data")))
        whole = command("sft", words, Path(folder, "whole"), options.accelerator, gpu_settings=options.small)
        again = command("sft", words, Path(folder, "again"), options.accelerator, gpu_settings=options.small)
        command(
            "sft",
            [*words, "trainer.max_steps=2"],
            Path(folder, "parted"),
            options.accelerator,
            gpu_settings=options.small,
        )
        parted = command("sft", words, Path(folder, "parted"), options.accelerator, gpu_settings=options.small)
    series = [[float(row["train/loss"]) for row in rows] for rows in (whole, again, parted)]
    noise, apart = (max(abs(a - b) for a, b in zip(series[0], other, strict=True)) for other in series[1:])
    ok = apart <= 2 * noise  # a GPU's fused attention does not give the same bits twice
    rows = [[str(step), *map(str, losses)] for step, losses in enumerate(zip(*series, strict=True), 1)]
    says = f"a resumed run's losses are {apart:.1e} from the whole run's, and a second whole run's {noise:.1e}"
    return Outcome(ok, says, ["step", "whole run", "whole run again", "stopped after 2"], rows)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(options: Options) -> Outcome:
    """Bytes of training one model, beside the plan's."""
    shape = options.shape("1b")
    planned = _planned(shape)
    with _world() as grid:
        engine = train_step.engine_of(shape, grid, "bf16")
        step = train_step.our_step(engine, shape)
        for _ in range(2):
            step()
            engine.apply_gradients()
        if grid.device.type == "cpu":
            rows = [[shape.name, f"{planned / GIB:.2f}", "-", "-"]]
            return Outcome(True, "planned; nothing is measured without a GPU", _MEMORY, rows)
        measured = torch.cuda.max_memory_allocated()
    ratio = measured / planned
    ok = PLANNED[0] <= ratio <= PLANNED[1]
    says = "memory is what the plan says" if ok else f"measured over planned is not in {PLANNED[0]} to {PLANNED[1]}"
    return Outcome(ok, says, _MEMORY, [[shape.name, f"{planned / GIB:.2f}", f"{measured / GIB:.2f}", f"{ratio:.2f}"]])


_MEMORY = ["model and batch", "planned GiB", "measured GiB", "ratio"]


def _planned(shape: Shape) -> float:
    model = [f"model.{key}={value}" for key, value in asdict(shape.model).items() if value is not None]
    config, _ = compose(
        "sft",
        [
            *model,
            f"model.vocab_size={shape.vocab_size}",
            f"data.seq_length={shape.length}",
            f"trainer.micro_batch_size={shape.batch}",
            f"trainer.global_batch_size={shape.batch}",
            "trainer.precision=bf16",
        ],
    )
    ranks = plan_ranks(work_of(SFT, config, PlanConfig(algorithm="sft"), 1, shape.vocab_size))
    return max(rank.total("train") for rank in ranks)


# --- fast -------------------------------------------------------------------------------------------------------------


def train(options: Options) -> Outcome:
    """Forward and backward of training steps, beside a matrix product of this machine."""
    shapes = [options.shape("1b")] if options.small else [GPU_SHAPES["1b"], GPU_SHAPES["7b"], QWEN3]
    peak = _peak()
    rows = []
    for shape in shapes:
        with _world() as grid:
            spent, size = (0.1, 64) if options.small else (10.0, 8192)
            rows.append(train_step.beside_matmul(shape, grid, spent, size, peak))
    return Outcome(
        True, "measured" if not options.small else "runs; times mean nothing here", train_step.GPU_HEADER, rows
    )


def _peak() -> float | None:
    """TFLOP/s that the maker of this GPU states, where it is known."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    return next((kind.flops / 1e12 for key, kind in KINDS.items() if key in name), None)


def decoding(options: Options) -> Outcome:
    """Tokens per second, beside what reading the weights and the cache allows."""
    rows: list[list[str]] = []
    batches, prompt, new, repeats = ((1, 2), 3, 4, 1) if options.small else ((1, 32, 256), 128, 64, 2)
    for name in ["tiny"] if options.small else ["1b", "7b"]:
        with _world() as grid:
            bandwidth = copy_bandwidth(1 if options.small else 4096, grid.device)
            rows += decode.lines(decode.SHAPES[name], grid, batches, prompt, new, repeats, bandwidth)
    return Outcome(True, "measured" if not options.small else "runs; times mean nothing here", decode.HEADER, rows)


def swap(options: Options) -> Outcome:
    """Putting a reference's weights in a policy's place and back, in bytes per second."""
    shape = options.shape("1b")
    with _world() as grid:
        engine = train_step.engine_of(shape, grid, "bf16")
        reference = engine.trainable_copy()
        size = sum(weight.numel() * weight.element_size() for weight in reference.values())

        def there_and_back() -> None:
            with engine.with_weights(reference):
                pass

        there_and_back()  # locks the memory
        spent = min(seconds(there_and_back, grid.device) for _ in range(3))
    moved = 3 * size  # the present weights out, the reference in, the present weights in
    rows = [[shape.name, f"{size / 1e9:.2f}", f"{spent:.3f}", f"{moved / spent / 1e9:.1f}"]]
    return Outcome(True, "measured", ["model", "GB of weights", "seconds", "GB/s"], rows)


# --- how they run -----------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[Options], Outcome], float]] = {
    "layouts": (layouts, 90),
    "parity": (parity, 240),
    "graphs": (graphs, 60),
    "resume": (resume, 120),
    "memory": (memory, 60),
    "train": (train, 120),
    "decode": (decoding, 150),
    "swap": (swap, 60),
}
"""Each with the seconds after which it is ended."""


def command(
    algorithm: str, words: Sequence[str], folder: Path, accelerator: str, *, gpu_settings: bool
) -> list[dict[str, str]]:
    """Train in a process of its own; the lines of its metrics.csv."""
    where = (f"run.dir={folder}", f"trainer.accelerator={accelerator}")
    done = subprocess.run(
        [sys.executable, "-m", f"megarl.train_{algorithm}", *words, *QUIET, *where],
        env={**os.environ, "OMP_NUM_THREADS": "1", VARIABLE: "1" if gpu_settings else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"train_{algorithm} on {accelerator} ended with {done.returncode}: {done.stderr[-1500:]}")
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _world() -> AbstractContextManager[Grid]:
    return live_grid(start_world())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    outcome = PARTS[options.part][0](Options(options.small))
    found = {**asdict(outcome), "seconds": round(time.monotonic() - began, 1)}
    device = torch.device("cpu" if options.small else "cuda")
    found |= {"machine": describe(device), "settings": str(device_settings())}
    options.out.write_text(json.dumps(found), encoding="utf-8")
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
