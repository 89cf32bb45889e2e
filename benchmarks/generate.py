"""Generation beside transformers' `generate` with its KV cache: same weights, same prompts, same threads, greedy, turn
about. Prints one table, with the floor that reading memory or multiplying matrices sets on this machine.

    OMP_NUM_THREADS=1 python -m benchmarks.generate
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rates import copy_bandwidth, product_rate
from benchmarks.train_step import describe, live_grid, markdown
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.formats import open_source
from megarl.models.roles import Role
from megarl.parallel.grid import Grid, start_world
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling

NO_EOS = -1


@dataclass(frozen=True)
class Case:
    """A GPT-2 and what it is asked for: `rows` prompts, answered with `shortest` to `longest` tokens, drawn evenly."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    rows: int
    prompt: int
    shortest: int
    longest: int

    @property
    def name(self) -> str:
        new = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        return f"{self.layers}L x {self.width}, vocab {self.vocab_size}, {self.rows} x ({self.prompt} + {new})"

    @property
    def lengths(self) -> list[int]:
        """New tokens of each row."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shortest, self.longest + 1, (self.rows,), generator=generator).tolist()

    @property
    def prompts(self) -> torch.Tensor:
        return torch.randint(self.vocab_size, (self.rows, self.prompt), generator=torch.Generator().manual_seed(1))


CASES = {
    "walks": Case(6, 144, 12, 23, rows=128, prompt=1, shortest=9, longest=9),
    "small-equal": Case(6, 144, 12, 23, rows=128, prompt=8, shortest=64, longest=64),
    "small-varied": Case(6, 144, 12, 23, rows=128, prompt=8, shortest=8, longest=128),
    "large-equal": Case(12, 768, 12, 50257, rows=16, prompt=32, shortest=64, longest=64),
    "large-varied": Case(12, 768, 12, 50257, rows=16, prompt=32, shortest=8, longest=128),
    "tiny": Case(2, 32, 4, 23, rows=4, prompt=3, shortest=2, longest=6),  # for the test of this script
}
HEADER = [
    "model and request",
    "transformers tok/s",
    "megarl tok/s",
    "ratio (wall)",
    "ratio (CPU)",
    "floor tok/s",
    "of it",
]

Answers = list[list[int]]


@dataclass
class Side:
    """One implementation: how it answers, and what its repetitions took."""

    answer: Callable[[], Answers]
    wall: list[float]
    cpu: list[float]

    def run(self) -> Answers:
        wall, cpu = time.perf_counter(), time.process_time()
        answers = self.answer()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return answers


def theirs(model: Any, case: Case) -> Side:
    """`generate` stops a row where it is told to and pads it until the longest is done: that is how it batches."""
    import transformers

    lengths = torch.tensor(case.lengths)

    class RowLengths(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return input_ids.shape[1] - case.prompt >= lengths

    prompts = case.prompts

    def answer() -> Answers:
        with torch.no_grad():
            tokens = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                use_cache=True,
                max_new_tokens=case.longest,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([RowLengths()]),
            )
        new = tokens[:, case.prompt :].tolist()
        return [row[:length] for row, length in zip(new, case.lengths, strict=True)]

    return Side(answer, [], [])


def ours(folder: Path, grid: Grid, case: Case) -> Side:
    source = open_source(folder)
    engine = build_engine(
        Role("policy", source.model, case.vocab_size, source=source), grid, ParallelConfig(), precision="fp32", seed=1
    )
    generator = Generator(engine, NO_EOS, seed=1, limits=Limits(slots=case.rows))
    requests = [
        Request(row, 0, tuple(prompt), Sampling(temperature=0.0, max_new_tokens=length))
        for row, (prompt, length) in enumerate(zip(case.prompts.tolist(), case.lengths, strict=True))
    ]
    return Side(lambda: [rollout.response for rollout in generator.generate(requests)], [], [])


def compare(case: Case, grid: Grid, seconds: float) -> list[str]:
    """One line of the table."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=case.vocab_size,
        n_embd=case.width,
        n_layer=case.layers,
        n_head=case.heads,
        n_positions=max(128, case.prompt + case.longest),
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        sides = [theirs(model, case), ours(Path(folder), grid, case)]
        check_same(sides[0].run(), sides[1].run())
        stop = time.monotonic() + seconds
        for side in sides:  # the first repetition warmed up
            side.wall.clear()
            side.cpu.clear()
        while len(sides[0].wall) < 3 or time.monotonic() < stop:
            for side in sides:
                side.run()
    tokens = sum(case.lengths)
    wall, cpu = ([statistics.median(getattr(side, kind)) for side in sides] for kind in ("wall", "cpu"))
    limit = tokens / floor(case, model)
    return [
        case.name,
        f"{tokens / wall[0]:,.0f}",
        f"{tokens / wall[1]:,.0f}",
        f"{wall[0] / wall[1]:.2f}",
        f"{cpu[0] / cpu[1]:.2f}",
        f"{limit:,.0f}",
        f"{tokens / wall[1] / limit:.0%}",
    ]


def check_same(left: Answers, right: Answers) -> None:
    """The same model must give the same tokens; a row may part where two candidates are within rounding."""
    parted = sum(a != b for a, b in zip(left, right, strict=True))
    if parted > 0.05 * len(left):
        raise SystemExit(f"benchmarks.generate: {parted} of {len(left)} answers differ, so the two are no comparison")


# --- the floor --------------------------------------------------------------------------------------------------------


def floor(case: Case, model: Any) -> float:
    """Seconds below which no implementation that decodes rows together can come on this machine: per decode step, the
    larger of reading the weights and the cache once, and of the operations; and the prompts' operations."""
    bandwidth, rate = copy_bandwidth(), product_rate(case.rows, case.width, 4 * case.width)
    weights = sum(p.numel() for p in model.transformer.h.parameters()) + case.vocab_size * case.width
    seconds = 0.0
    for step in range(case.longest):
        rows = sum(length > step for length in case.lengths)
        context = case.prompt + step
        cache = rows * context * 2 * case.layers * case.width
        read = 4 * (weights + cache) / bandwidth
        flops = rows * (2 * weights + 4 * context * case.layers * case.width)
        seconds += max(read, flops / rate)
    return seconds + case.rows * (case.prompt - 1) * 2 * weights / product_rate(1024, 1024, 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="of both sides")
    parser.add_argument("--seconds", type=float, default=20.0, help="spent on each case, at least 3 repetitions")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name != "tiny"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = start_world()
    if device.type != "cpu":
        print("benchmarks.generate compares on the CPU: set CUDA_VISIBLE_DEVICES= (empty)")
        return 2
    print(describe(device))
    rows = []
    for name in options.cases:
        with live_grid(device) as grid:
            rows.append(compare(CASES[name], grid, options.seconds))
    print(markdown(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
