"""Forward and backward of one optimizer step, without the optimizer: on the CPU beside transformers' GPT-2 of the same
shape, on a GPU beside a matrix product measured in the same run. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.train_step
    python -m benchmarks.train_step --device cuda --peak-tflops 989
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rates import product_rate, synchronize
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.flops import flops_per_token
from megarl.models.roles import Role
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan
from megarl.parallel.rows import Rows
from megarl.parallel.vocab import padded_vocab

Step = Callable[[], float]  # runs forward and backward, returns the loss


@dataclass(frozen=True)
class Shape:
    """A model and the batch it is trained on."""

    name: str
    model: ModelConfig
    vocab_size: int
    batch: int
    length: int

    @property
    def flops(self) -> float:
        """Model FLOPs of one step."""
        return flops_per_token(self.model, self.vocab_size, self.length) * self.batch * self.length

    def tokens(self, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocab_size, (self.batch, self.length), generator=generator).to(device)


def gpt2(layers: int, width: int, heads: int, vocab_size: int, batch: int, length: int) -> Shape:
    """A GPT-2 and a batch of `batch` sequences of `length` tokens."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        max_positions=length,
        position="learned",
        norm="layernorm",
        activation="gelu_tanh",
        tie_embeddings=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    return Shape(f"{layers}L x {width}, vocab {vocab_size}, {batch}x{length}", model, vocab_size, batch, length)


def llama(name: str, layers: int, width: int, heads: int, kv_heads: int, ffn: int, batch: int, length: int) -> Shape:
    """A slice of a Llama: its width and proportions with fewer layers and a vocabulary of 32000."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=ffn,
        max_positions=length,
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
    )
    vocab_size = 32000 if width >= 1024 else 128
    label = f"{name}: {layers}L x {width}, vocab {vocab_size}, {batch}x{length}"
    return Shape(label, model, vocab_size, batch, length)


CPU_SHAPES = {
    "small": gpt2(6, 144, heads=12, vocab_size=23, batch=128, length=10),
    "medium": gpt2(6, 384, heads=6, vocab_size=1024, batch=16, length=128),
    "large": gpt2(12, 768, heads=12, vocab_size=50304, batch=2, length=128),
    "tiny": gpt2(2, 32, heads=4, vocab_size=23, batch=4, length=8),  # for the test of this script
}
GPU_SHAPES = {
    "1b": llama("1B slice", 8, 2048, heads=32, kv_heads=8, ffn=8192, batch=8, length=2048),
    "7b": llama("7B slice", 4, 4096, heads=32, kv_heads=32, ffn=11008, batch=4, length=2048),
    "tiny": llama("tiny", 2, 64, heads=4, kv_heads=2, ffn=128, batch=2, length=16),
}


# --- the two sides ----------------------------------------------------------------------------------------------------


def engine_of(shape: Shape, grid: Grid, precision: str) -> Engine:
    return build_engine(
        Role("policy", shape.model, shape.vocab_size, optim=OptimConfig()),
        grid,
        ParallelConfig(),
        precision=precision,
        seed=1,
    )


def our_step(engine: Engine, shape: Shape) -> Step:
    """`Engine.train_step` over one microbatch: gradient buffers and Megatron's schedule included."""
    tokens = shape.tokens(torch.device("cpu"))
    mask = torch.ones(shape.batch, shape.length)
    mask[:, 0] = 0.0  # nothing stands before a first token that could predict it
    rows = Rows(tokens, torch.full((shape.batch,), shape.length), mask)
    # The last token is read too, as transformers reads it: both do the same work.
    plan = MicrobatchPlan(
        rows.lengths, engine.grid.layout, 0, per_microbatch=shape.batch, share_bins=False, read_last=True
    )
    microbatches = [batch.to(engine.grid.device) for batch in plan.microbatches(rows)]
    return lambda: engine.train_step(microbatches, cross_entropy, count_targets)["loss"]


def their_step(shape: Shape, device: torch.device) -> tuple[Step, int]:
    """transformers' GPT-2 with its default attention and loss, and the number of its parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.length,
        n_embd=shape.model.hidden_size,
        n_layer=shape.model.num_layers,
        n_head=shape.model.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.loss_type = "ForCausalLM"  # what it would choose anyway, but with a warning
    model = GPT2LMHeadModel(config).to(device).train()
    tokens = shape.tokens(device)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return float(loss.detach())

    return step, sum(parameter.numel() for parameter in model.parameters())


def check_same_size(engine: Engine, shape: Shape, theirs: int) -> None:
    """Both sides must have the same weights to train, but for the rows that pad our vocabulary."""
    padding = (padded_vocab(shape.vocab_size, 1) - shape.vocab_size) * shape.model.hidden_size
    ours = sum(parameter.numel() for _, parameter in engine.parameters())
    if ours != theirs + padding:
        raise AssertionError(f"{shape.name}: {ours} parameters here, {theirs} (+ {padding} of padding) in transformers")


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Timing:
    """Seconds of each repetition: on the wall, and of this process on all its cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def measure(
    steps: Sequence[Step], device: torch.device, seconds: float, least: int = 5, warmup: int = 2
) -> list[Timing]:
    """Time the steps in turn (A, B, A, B, ...), so that what else the machine does falls on all of them."""
    for _ in range(warmup):
        for step in steps:
            step()
    gc.collect()
    timings = [Timing() for _ in steps]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(timings[0].wall) < least:
        for step, timing in zip(steps, timings, strict=True):
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            synchronize(device)
            timing.wall.append(time.perf_counter() - wall)
            timing.cpu.append(time.process_time() - cpu)
    return timings


# --- the table --------------------------------------------------------------------------------------------------------


def beside_transformers(shape: Shape, grid: Grid, seconds: float, matmul_size: int) -> tuple[list[str], float]:
    """A row of the CPU table, and the ratio of process times."""
    limit = product_rate(*[matmul_size] * 3, grid.device, torch.float32)
    engine = engine_of(shape, grid, "fp32")
    theirs, size = their_step(shape, grid.device)
    check_same_size(engine, shape, size)
    ours_timing, theirs_timing = measure([our_step(engine, shape), theirs], grid.device, seconds)
    limit = max(limit, product_rate(*[matmul_size] * 3, grid.device, torch.float32))  # the quieter moment of the two
    rates = [shape.flops / timing.median_wall for timing in (ours_timing, theirs_timing)]
    cpu_ratio = ours_timing.median_cpu / theirs_timing.median_cpu
    return [
        shape.name,
        f"{1e3 * ours_timing.median_wall:.1f}",
        f"{1e3 * theirs_timing.median_wall:.1f}",
        f"{ours_timing.median_wall / theirs_timing.median_wall:.3f}",
        f"{1e3 * ours_timing.median_cpu:.1f}",
        f"{1e3 * theirs_timing.median_cpu:.1f}",
        f"{cpu_ratio:.3f}",
        *(f"{rate / 1e9:.1f}" for rate in rates),
        f"{limit / 1e9:.1f}",
        *(f"{rate / limit:.0%}" for rate in rates),
        str(len(ours_timing.wall)),
    ], cpu_ratio


CPU_HEADER = [
    "shape",
    "megarl ms",
    "transformers ms",
    "ratio",
    "megarl CPU ms",
    "transformers CPU ms",
    "CPU ratio",
    "megarl GFLOP/s",
    "transformers GFLOP/s",
    "matmul GFLOP/s",
    "megarl MFU",
    "transformers MFU",
    "repeats",
]


def beside_matmul(shape: Shape, grid: Grid, seconds: float, matmul_size: int, peak_tflops: float | None) -> list[str]:
    """A row of the GPU table."""
    limit = product_rate(*[matmul_size] * 3, grid.device, torch.bfloat16)
    engine = engine_of(shape, grid, "bf16")
    (timing,) = measure([our_step(engine, shape)], grid.device, seconds)
    limit = max(limit, product_rate(*[matmul_size] * 3, grid.device, torch.bfloat16))
    rate = shape.flops / timing.median_wall
    memory = "-"
    if grid.device.type == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    return [
        shape.name,
        f"{1e3 * timing.median_wall:.1f}",
        f"{shape.batch * shape.length / timing.median_wall:.0f}",
        f"{rate / 1e12:.3g}",
        f"{limit / 1e12:.3g}",
        f"{rate / limit:.0%}",
        "-" if peak_tflops is None else f"{rate / (peak_tflops * 1e12):.0%}",
        memory,
        str(len(timing.wall)),
    ]


GPU_HEADER = [
    "shape",
    "ms",
    "tokens/s",
    "TFLOP/s",
    "matmul TFLOP/s",
    "MFU of matmul",
    "MFU of stated peak",
    "peak GiB",
    "repeats",
]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def describe(device: torch.device) -> str:
    """The machine, in one line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {versions}"
    named = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {versions}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of both sides (CPU)")
    parser.add_argument("--seconds", type=float, default=30.0, help="time spent on each shape, at least 5 repetitions")
    parser.add_argument("--shapes", nargs="+", choices=CPU_SHAPES, help="beside transformers, float32")
    parser.add_argument("--gpu-shapes", nargs="+", choices=GPU_SHAPES, help="alone, bfloat16 (also runs on a CPU)")
    parser.add_argument("--matmul-size", type=int, help="side of the measured matrix product (CPU 1024, GPU 8192)")
    parser.add_argument("--peak-tflops", type=float, help="peak that the GPU's maker states for dense bfloat16")
    parser.add_argument("--limit", type=float, help="exit with 1 if a ratio of process times is above this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.train_step: --device cuda, but torch sees no GPU here: run it on one, or leave --device out")
        return 2
    torch.set_num_threads(options.threads)
    device = start_world()
    if device.type != options.device:
        print("benchmarks.train_step: the CPU table needs a machine without a GPU: set CUDA_VISIBLE_DEVICES= (empty)")
        return 2
    alone = options.gpu_shapes or (["1b", "7b"] if device.type == "cuda" else [])
    beside = options.shapes or ([] if alone else ["small", "medium", "large"])
    matmul_size = options.matmul_size or (8192 if device.type == "cuda" else 1024)
    print(describe(device))
    ratios: list[float] = []
    if beside:
        rows = []
        for name in beside:
            with live_grid(device) as grid:
                row, ratio = beside_transformers(CPU_SHAPES[name], grid, options.seconds, matmul_size)
            rows.append(row)
            ratios.append(ratio)
        print(markdown(CPU_HEADER, rows))
    if alone:
        rows = []
        for name in alone:
            with live_grid(device) as grid:
                rows.append(beside_matmul(GPU_SHAPES[name], grid, options.seconds, matmul_size, options.peak_tflops))
        print(markdown(GPU_HEADER, rows))
    return 1 if options.limit is not None and any(ratio > options.limit for ratio in ratios) else 0


@contextmanager
def live_grid(device: torch.device) -> Iterator[Grid]:
    """A grid of one rank; what was built on it is freed before the next shape."""
    grid = Grid(Layout(), device)
    try:
        yield grid
    finally:
        grid.close()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
