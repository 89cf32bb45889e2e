"""Decoding on a GPU: tokens per second in bfloat16, with and without CUDA graphs, beside what reading the weights and
the cache once per step would allow at the measured copy bandwidth. Prints one table.

    python -m benchmarks.decode
    python -m benchmarks.decode --shapes tiny --batches 2 --device cpu
"""

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch

from benchmarks.rates import copy_bandwidth, seconds
from benchmarks.train_step import GPU_SHAPES, Shape, describe, live_grid, llama, markdown
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.roles import Role
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling

NO_EOS = -1
BYTES = 2  # of a bfloat16
# Batch and length are set by the options.
SHAPES = {
    "1b": llama("1B", 16, 2048, heads=32, kv_heads=8, ffn=8192, batch=1, length=2048),
    "7b": llama("7B", 32, 4096, heads=32, kv_heads=32, ffn=11008, batch=1, length=2048),
    "tiny": GPU_SHAPES["tiny"],
}
HEADER = ["model", "rows", "prompt + new", "graphs", "tokens/s", "ms per step", "bound tokens/s", "of it", "peak GiB"]


def generator_of(engine: Engine, rows: int, graphs: bool) -> Generator:
    return Generator(engine, NO_EOS, seed=1, limits=Limits(slots=rows, graphs=graphs))


def requests(shape: Shape, rows: int, prompt: int, new: int) -> list[Request]:
    tokens = torch.randint(shape.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(1)).tolist()
    return [Request(row, 0, tuple(text), Sampling(max_new_tokens=new)) for row, text in enumerate(tokens)]


def decode_seconds(generator: Generator, shape: Shape, rows: int, prompt: int, new: int, repeats: int) -> float:
    """Of all steps after the first token: the time for `new` tokens less that for one. The median of some."""
    long, short = (requests(shape, rows, prompt, count) for count in (new, 1))
    generator.generate(long)  # records the graphs, chooses the kernels
    device = generator.grid.device
    return statistics.median(
        seconds(lambda: generator.generate(long), device) - seconds(lambda: generator.generate(short), device)
        for _ in range(repeats)
    )


def bound_seconds(engine: Engine, shape: Shape, rows: int, prompt: int, new: int, bandwidth: float) -> float:
    """Of the same steps: weights and cache are read once in each. Of the input embedding only the rows' lines are."""
    model = shape.model
    weights = sum(p.numel() for name, p in engine.parameters() if not name.startswith("embedding."))
    heads = model.kv_heads
    entry = 2 * model.num_layers * heads * (model.hidden_size // model.num_heads)  # numbers of a token in the cache
    read = [weights + rows * (prompt + step) * entry for step in range(1, new)]
    return BYTES * sum(read) / bandwidth


def lines(
    shape: Shape, grid: Grid, batches: Sequence[int], prompt: int, new: int, repeats: int, bandwidth: float
) -> list[list[str]]:
    engine = build_engine(
        Role("policy", shape.model, shape.vocab_size), grid, ParallelConfig(), precision="bf16", seed=1
    )
    found = []
    for rows in batches:
        bound = bound_seconds(engine, shape, rows, prompt, new, bandwidth)
        for graphs in (False, True):
            generator = generator_of(engine, rows, graphs)
            seconds = decode_seconds(generator, shape, rows, prompt, new, repeats)
            generator.close()
            tokens, memory = rows * (new - 1), "-"
            if grid.device.type == "cuda":
                memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
                torch.cuda.reset_peak_memory_stats()
            found.append(
                [
                    shape.name.partition(":")[0],
                    str(rows),
                    f"{prompt} + {new}",
                    "yes" if graphs else "no",
                    f"{tokens / seconds:,.0f}",
                    f"{1e3 * seconds / (new - 1):.2f}",
                    f"{tokens / bound:,.0f}",
                    f"{bound / seconds:.0%}",
                    memory,
                ]
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.partition(":")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256], help="responses in flight")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copy-mib", type=int, default=4096, help="size of the copy that measures bandwidth")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.decode: --device cuda, but torch sees no GPU here: run it on one, or use --device cpu")
        return 2
    device = start_world()
    if device.type != options.device:
        print("benchmarks.decode: --device cpu needs a machine without a GPU: set CUDA_VISIBLE_DEVICES= (empty)")
        return 2
    bandwidth = copy_bandwidth(options.copy_mib, device)
    print(f"{describe(device)}; copies {bandwidth / 1e9:,.0f} GB/s")
    rows = []
    for name in options.shapes:
        with live_grid(device) as grid:
            asked = (options.batches, options.prompt, options.new, options.repeats)
            rows += lines(SHAPES[name], grid, *asked, bandwidth)
    print(markdown(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
