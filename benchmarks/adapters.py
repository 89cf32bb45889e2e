"""Adapters on a CPU: CPU seconds of a training step beside full training, bytes of a quantised base, and the peak of
memory beside the plan's. With --peft: beside PEFT's adapters, with the same weights, batch and optimizer. Prints one
table.

    OMP_NUM_THREADS=1 python -m benchmarks.adapters --peft ../peft/bin/python
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from benchmarks.train_step import describe, live_grid, markdown
from megarl.config.cluster import PlanConfig
from megarl.config.compose import compose
from megarl.models.adapters import quantised_linears, weight_of
from megarl.models.build import build_engine
from megarl.models.exchange.pretrained import Sources, resolve_pretrained
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.sft import SFT
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan
from megarl.parallel.rows import Rows
from megarl.planning.memory import plan_ranks
from megarl.planning.work import work_of

HEADER = [
    "adapters",
    "base",
    "trained parameters",
    "CPU s a step",
    "of full training's",
    "of PEFT's",
    "bytes a base weight",
    "peak GiB",
    "planned GiB",
]
PEER = Path(__file__).parent / "peers" / "peft_lora.py"
VARIANTS: dict[str, list[str]] = {
    "full": [],
    "lora": ["+adapter.kind=lora"],
    "dora": ["+adapter.kind=dora"],
    "lora, 8 bits": ["+adapter.kind=lora", "+adapter.base_bits=8"],
    "lora, 4 bits": ["+adapter.kind=lora", "+adapter.base_bits=4"],
}
"""Our settings by variant; PEFT has those without bits."""
PEFT = ("lora", "dora")
OF_FULL, OF_PEFT, BYTES, WITHIN = 0.80, 1.0, 0.55, 0.10
"""Limits of --check: LoRA over full training, ours over PEFT's, bytes of a weight in 4 bits, measured over planned."""
SAME_LOSS = {16: 1e-4, 8: 1e-3, 4: 1e-2}
"""Relative difference of the first loss from that of full training, by the bits of the base."""


@dataclass(frozen=True)
class Sizes:
    """The model and the batch of all sides."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    ffn: int = 2048
    vocab_size: int = 5000
    batch: int = 8
    length: int = 256
    rank: int = 16
    alpha: int = 32


@dataclass
class Side:
    """What one side found.

    Attributes:
        about: what it printed before its steps: the number of trained parameters and so on.
        cpu: CPU seconds of each step but the first.
        first_loss: the loss of the first step.
        memory: bytes that were measured and planned, for our sides.
    """

    about: dict[str, Any]
    cpu: list[float] = field(default_factory=list)
    first_loss: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """CPU seconds of the fastest step: what else a machine does only ever adds to them."""
        return min(self.cpu)


# --- what all sides are given -----------------------------------------------------------------------------------------


def write_job(sizes: Sizes, folder: Path) -> Path:
    """Write a model with random weights, and the file that names it and has the batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    tokens = torch.randint(sizes.vocab_size, (sizes.batch, sizes.length))
    job = {**asdict(sizes), "model": str(folder / "model"), "lr": 1e-4, "tokens": tokens.tolist()}
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    return path


# --- our side ---------------------------------------------------------------------------------------------------------


def our_run(variant: str, job: dict[str, Any]) -> tuple[Any, Sources]:
    """Return the configuration of a run of ours, and its model."""
    adapters = VARIANTS[variant]
    if adapters:
        adapters = [*adapters, f"+adapter.rank={job['rank']}", f"+adapter.alpha={job['alpha']}"]
    settings = [
        f"model.path={job['model']}",
        f"data.seq_length={job['length']}",
        f"optim.lr={job['lr']}",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "optim.weight_decay=0",
        f"trainer.global_batch_size={job['batch']}",
        f"trainer.micro_batch_size={job['batch']}",
    ]
    config, _ = compose("sft", [*settings, *adapters])
    return resolve_pretrained(config)


def our_engine(variant: str, job: dict[str, Any], grid: Grid) -> Engine:
    config, sources = our_run(variant, job)
    (policy,) = SFT.roles(config, job["vocab_size"], sources)
    engine = build_engine(policy, grid, config.parallel, precision="fp32", seed=1, total_steps=1000)
    sources.close()
    return engine


def our_step(engine: Engine, job: dict[str, Any]) -> float:
    """Take a training step, the optimizer's included, and return its loss."""
    tokens = torch.tensor(job["tokens"])
    mask = torch.ones(tokens.shape)
    mask[:, 0] = 0.0
    rows = Rows(tokens, torch.full((job["batch"],), job["length"]), mask)
    # The last token is read too, as transformers reads it: both do the same work.
    plan = MicrobatchPlan(rows.lengths, Layout(), 0, per_microbatch=job["batch"], share_bins=False, read_last=True)
    metrics = engine.train_step(list(plan.microbatches(rows)), cross_entropy, count_targets)
    engine.apply_gradients()
    return metrics["loss"]


def steps(variant: str, job: dict[str, Any], grid: Grid) -> None:
    """Do what peers/peft_lora.py does: print a line about the model, and one after every step until this is ended."""
    engine = our_engine(variant, job, grid)
    trained = sum(parameter.numel() for _, parameter in engine.parameters() if parameter.requires_grad)
    quantised = [linear for model in engine.models for _, linear in quantised_linears(model)]
    weights = sum(weight_of(linear).numel() for linear in quantised)
    size = sum(linear.quantised.bytes for linear in quantised) / weights if quantised else 4.0
    print(json.dumps({"trained": trained, "bytes": size}), flush=True)
    while True:
        begun = time.process_time()
        loss = our_step(engine, job)
        print(json.dumps({"cpu": time.process_time() - begun, "loss": loss}), flush=True)


def allocated(variant: str, job: dict[str, Any], grid: Grid) -> int:
    """Return the largest number of bytes that torch's allocator hands out while an engine is built and takes a step."""
    with profile(profile_memory=True) as recorder:
        engine = our_engine(variant, job, grid)
        our_step(engine, job)
        del engine
        gc.collect()
    events: list[Any] = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def planned(variant: str, job: dict[str, Any]) -> float:
    """Return the bytes that the plan predicts for the same run."""
    config, sources = our_run(variant, job)
    work = work_of(SFT, config, PlanConfig(algorithm="sft"), 1, job["vocab_size"], sources)
    sources.close()
    return plan_ranks(work, on_cpu=True)[0].total("train")


# --- measuring --------------------------------------------------------------------------------------------------------


@contextmanager
def running(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """Run a side in its own process, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            yield process
        except EOFError:
            errors.seek(0)
            ended = process.wait()
            raise RuntimeError(f"{' '.join(command)} ended with {ended}:\n{errors.read()[-3000:]}") from None
        finally:
            process.kill()
            process.wait()


def answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Return the next line of a side."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    found: dict[str, Any] = json.loads(line)
    return found


def ours(what: str, variant: str, job: Path) -> list[str]:
    return [sys.executable, "-m", "benchmarks.adapters", "--one", what, variant, str(job)]


def compare(job: Path, python: str | None, rounds: int, steps: int) -> dict[tuple[str, str], Side]:
    """Run all sides in turn, `rounds` times, one at a time (several do not fit in memory), and then measure ours."""
    commands = {("megarl", variant): ours("steps", variant, job) for variant in VARIANTS}
    if python is not None:
        commands |= {("PEFT", kind): [python, str(PEER), kind, str(job)] for kind in PEFT}
    sides: dict[tuple[str, str], Side] = {}
    for _ in range(rounds):
        for which, command in commands.items():
            with running(command) as process:
                about = answer(process)
                side = sides.setdefault(which, Side(about))
                for step in range(steps + 1):
                    found = answer(process)
                    if step:  # the first allocates
                        side.cpu.append(found["cpu"])
                    else:
                        side.first_loss = found["loss"]
    check_same_losses(sides)
    for variant in VARIANTS:
        with running(ours("memory", variant, job)) as process:
            sides["megarl", variant].memory = answer(process)
    return sides


def check_same_losses(sides: dict[tuple[str, str], Side]) -> None:
    """All sides must start with the same model and batch."""
    expected = sides["megarl", "full"].first_loss
    for (whose, variant), side in sides.items():
        within = SAME_LOSS[bits_of(variant)]
        if abs(side.first_loss / expected - 1) > within:
            raise AssertionError(f"{whose} {variant} starts with the loss {side.first_loss}, full training {expected}")


def bits_of(variant: str) -> int:
    return next((bits for bits in (4, 8) if f"{bits} bits" in variant), 16)


# --- the table --------------------------------------------------------------------------------------------------------


def rows_of(sides: dict[tuple[str, str], Side]) -> list[list[str]]:
    full = sides["megarl", "full"].seconds
    rows = []
    for (whose, variant), side in sides.items():
        peer = sides.get(("PEFT", variant)) if whose == "megarl" else None
        kind, _, bits = variant.partition(", ")
        rows.append(
            [
                f"{whose} {kind}",
                bits or "fp32",
                f"{side.about['trained']:,}",
                f"{side.seconds:.2f}",
                f"{side.seconds / full:.3f}",
                "" if peer is None else f"{side.seconds / peer.seconds:.3f}",
                f"{side.about['bytes']:.3f}" if "bytes" in side.about else "",
                *(f"{side.memory[name] / 2**30:.2f}" if side.memory else "" for name in ("measured", "planned")),
            ]
        )
    return rows


def broken_limits(sides: dict[tuple[str, str], Side]) -> list[str]:
    """Return the limits that are not kept, each with its number."""
    found = []
    share = sides["megarl", "lora"].seconds / sides["megarl", "full"].seconds
    if share > OF_FULL:
        found.append(f"LoRA takes {share:.3f} of full training's CPU seconds, more than {OF_FULL}")
    for kind in PEFT:
        if ("PEFT", kind) in sides:
            share = sides["megarl", kind].seconds / sides["PEFT", kind].seconds
            if share > OF_PEFT:
                found.append(f"{kind} takes {share:.3f} of PEFT's CPU seconds, more than {OF_PEFT}")
    size = sides["megarl", "lora, 4 bits"].about["bytes"]
    if size > BYTES:
        found.append(f"a weight in 4 bits takes {size:.3f} bytes, more than {BYTES}")
    for variant in VARIANTS:
        memory = sides["megarl", variant].memory
        share = memory["measured"] / memory["planned"]
        if abs(share - 1) > WITHIN:
            found.append(f"{variant} takes {share:.3f} of the planned memory, not within {WITHIN:.0%} of it")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--peft", metavar="PYTHON", help="interpreter of an environment with PEFT: compare with it")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run")
    parser.add_argument("--sizes", type=json.loads, default={}, help="JSON with other sizes of the model and the batch")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a number is outside its limits")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "VARIANT", "JOB"), help="one side; used internally")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.one is not None:
        what, variant, job = options.one[0], options.one[1], json.loads(Path(options.one[2]).read_text())
        expected = planned(variant, job) if what == "memory" else 0.0  # planning needs a process without a world
        with live_grid(start_world()) as grid:
            if what == "memory":
                print(json.dumps({"planned": expected, "measured": allocated(variant, job, grid)}))
            else:
                steps(variant, job, grid)
        return 0
    print(describe(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        sides = compare(write_job(Sizes(**options.sizes), Path(folder)), options.peft, options.rounds, options.steps)
    for side in sides.values():
        if "versions" in side.about:
            print(f"beside {side.about['versions']}")
            break
    print(markdown(HEADER, rows_of(sides)))
    broken = broken_limits(sides)
    for line in broken:
        print(line)
    return int(options.check and bool(broken))


if __name__ == "__main__":
    sys.exit(main())
