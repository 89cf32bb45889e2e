"""`python -m megarl.selftest tp=2 pp=2`: check that a parallel layout gives the same numbers as one process on this
machine.

Trains a tiny random GPT both ways and compares losses, gradient norms and log-probs. Exit code 1 if they differ. With
`--all`, it does so for every pair of features (`megarl/conformance/`).
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megarl.command import process_number, run_command, say
from megarl.config.launcher import check_launcher
from megarl.conformance.settings import ALL, Suite
from megarl.conformance.settings import HELP as HELP_OF_ALL
from megarl.conformance.settings import parse as parse_suite
from megarl.errors import ConfigError
from megarl.report.shell import SELFTEST
from megarl.report.write import page_path, write_page

HELP = (
    """python -m megarl.selftest [key=value ...]

  tp=1 pp=1 cp=1 dp=1 vpp=1   the layout to test; it starts tp x pp x cp x dp processes, or takes torchrun's world
  sequence_parallel=false     split activations over time between tensor-parallel regions
  recompute=none              none, selective or full
  precision=fp32              fp32 or bf16
  steps=8                     optimizer steps that are compared
  html=FILE                   draw the differences beside their tolerances into FILE, one page that needs no network;
                              an earlier page of megarl selftest is replaced, no other file

"""
    + HELP_OF_ALL
)
# (relative, absolute) differences of losses, gradient norms and log-probs that count as rounding.
TOLERANCES = {
    "fp32": {"loss": (1e-5, 1e-6), "grad_norm": (1e-4, 1e-6), "logprobs": (1e-5, 1e-5)},
    "bf16": {"loss": (1e-2, 1e-3), "grad_norm": (5e-2, 1e-3), "logprobs": (5e-2, 5e-2)},
}
VOCAB, ROWS, TIME = 131, 8, 32


@dataclass(frozen=True)
class Settings:
    """The layout and the training to test."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    vpp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    precision: str = "fp32"
    steps: int = 8
    html: str = ""

    @property
    def world(self) -> int:
        """Number of processes of the layout."""
        return self.tp * self.pp * self.cp * self.dp

    def alone(self) -> "Settings":
        """Return the settings of the same training in one process."""
        return Settings(precision=self.precision, steps=self.steps)


def parse(argv: list[str]) -> Settings | Suite:
    """Parse key=value words, with --all those of the whole suite. Refuse unknown keys and invalid values."""
    if ALL in argv:
        return parse_suite([word for word in argv if word != ALL])
    return parse_layout(argv)


def parse_layout(argv: list[str]) -> Settings:
    """Parse key=value words of one layout. Refuse unknown keys and invalid values."""
    known: dict[str, Any] = {field.name: field.default for field in fields(Settings)}
    values: dict[str, Any] = {}
    for word in argv:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"unknown setting '{word}': use key=value with {', '.join(known)}", key=word)
        kind = type(known[key])
        try:
            values[key] = text.lower() in ("true", "1", "yes") if kind is bool else kind(text)
        except ValueError:
            raise ConfigError(f"{key}={text} is not a whole number", key=key, value=text) from None
        if key == "html":
            page_path(text, key, SELFTEST)
        if kind is int and values[key] < 1:
            raise ConfigError(f"{key}={text} must be at least 1", key=key, value=values[key])
    settings = Settings(**values)
    for key, choices in (("recompute", ("none", "selective", "full")), ("precision", tuple(TOLERANCES))):
        if getattr(settings, key) not in choices:
            raise ConfigError(
                f"{key}={getattr(settings, key)} is not a valid value: choose from {', '.join(choices)}",
                key=key,
                value=getattr(settings, key),
                offers={key: choices},
            )
    if 4 % settings.tp:
        raise ConfigError(
            f"tp={settings.tp} does not divide the test model's 4 heads: use 1, 2 or 4",
            key="tp",
            value=settings.tp,
            offers={"tp": [1, 2, 4]},
        )
    if 4 % (settings.pp * settings.vpp):
        raise ConfigError(
            f"pp={settings.pp} x vpp={settings.vpp} does not divide the test model's 4 layers: use 1, 2 or 4",
            key="pp",
            value=settings.pp,
            offers={"pp": [1, 2, 4]},
        )
    if settings.vpp > 1 and settings.pp == 1:
        raise ConfigError(
            f"vpp={settings.vpp} needs pp of 2 or more", key="vpp", value=settings.vpp, offers={"pp": [2]}
        )
    if ROWS // 2 % settings.dp:
        raise ConfigError(
            f"dp={settings.dp} does not divide the test's {ROWS // 2} microbatches: use 1, 2 or 4",
            key="dp",
            value=settings.dp,
            offers={"dp": [1, 2, 4]},
        )
    return settings


def train(settings: Settings) -> dict[str, Any]:
    """Train in the current world. Return losses and gradient norms of every step, and log-probs under the last
    weights."""
    import torch
    import torch.distributed as dist

    from megarl.config.sections.model import ModelConfig
    from megarl.config.sections.optim import OptimConfig
    from megarl.config.sections.parallel import ParallelConfig
    from megarl.experience.rows import forward_rows
    from megarl.models.build import build_engine
    from megarl.models.roles import Role
    from megarl.modules.losses import count_targets, cross_entropy
    from megarl.parallel.grid import Grid, start_world
    from megarl.parallel.layout import Layout
    from megarl.parallel.microbatches import make_microbatches
    from megarl.parallel.rows import Microbatch, Rows

    device = start_world()
    layout = Layout.for_world(
        dist.get_world_size(),
        tp=settings.tp,
        pp=settings.pp,
        cp=settings.cp,
        vpp=settings.vpp,
        sequence_parallel=settings.sequence_parallel,
    )
    grid = Grid(layout, device)
    engine = build_engine(
        Role(
            "policy",
            ModelConfig(num_layers=4, hidden_size=64, num_heads=4, max_positions=TIME),
            VOCAB,
            optim=OptimConfig(lr=1e-3, warmup_steps=2),
        ),
        grid,
        ParallelConfig(recompute=settings.recompute),
        precision=settings.precision,
        seed=1,
        total_steps=settings.steps,
    )

    def rows(step: int) -> Rows:
        tokens = torch.randint(0, VOCAB, (ROWS, TIME), generator=torch.Generator().manual_seed(step))
        mask = torch.ones(ROWS, TIME)
        mask[:, 0] = 0.0
        mask[::3, TIME // 2 :] = 0.0
        return Rows(tokens, torch.full((ROWS,), TIME), mask)

    def microbatches(step: int) -> list[Microbatch]:
        return make_microbatches(rows(step), torch.arange(ROWS), engine, per_microbatch=2, share_bins=False)

    def logprobs(model: Any, hidden: Any, batch: Microbatch) -> Any:
        return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

    losses, norms = [], []
    for step in range(settings.steps):
        metrics = engine.train_step(microbatches(step), cross_entropy, count_targets)
        losses.append(metrics["loss"])
        norms.append(engine.apply_gradients())
    final = forward_rows(engine, rows(0), logprobs, per_microbatch=2, share_bins=False)["logprobs"]
    result = {"loss": losses, "grad_norm": norms, "logprobs": final.flatten().tolist()}
    grid.close()
    dist.destroy_process_group()
    return result


def _write(settings: Settings, out: str) -> None:
    """Train in one process of a world that this command starts. The first rank writes the result to `out`."""
    result = train(settings)
    if process_number() == 0:
        Path(out).write_text(json.dumps(result, allow_nan=False))


def started(settings: Settings) -> dict[str, Any]:
    """Train in new processes on this machine and return the result."""
    from megarl.parallel.processes import launched_workers

    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "result.json")
        launched_workers(settings.world, _write, settings, out)
        result: dict[str, Any] = json.loads(Path(out).read_text())
    return result


def compare(alone: dict[str, Any], layout: dict[str, Any], precision: str) -> tuple[list[list[str]], bool]:
    """Return the rows of the table, and whether all numbers agree."""
    rows, agree = [], True
    for name, (relative, absolute) in TOLERANCES[precision].items():
        pairs = list(zip(alone[name], layout[name], strict=True))
        worst = max(abs(a - b) for a, b in pairs)
        # NaN compares as False, so it counts as a difference.
        same = all(abs(a - b) <= relative * abs(a) + absolute for a, b in pairs)
        agree &= same
        shown = [(f"{name} {step}", a, b) for step, (a, b) in enumerate(pairs)] if name != "logprobs" else []
        rows += [[label, f"{a:.6f}", f"{b:.6f}", f"{abs(a - b):.1e}", ""] for label, a, b in shown]
        rows.append([f"{name}: {len(pairs)} values", "", "", f"{worst:.1e}", "same" if same else "DIFFERENT"])
    return rows, agree


def draw(settings: Settings, alone: dict[str, Any], layout: dict[str, Any]) -> None:
    """Write the page of the differences, if the settings name a file."""
    if not settings.html:
        return
    from megarl.parallel.device import device_settings
    from megarl.parallel.megatron_versions import engine
    from megarl.report.agreement import Agreement, agreement_page

    found = {
        name: Agreement(
            alone[name],
            layout[name],
            [relative * abs(value) + absolute for value in alone[name]],
            "token" if name == "logprobs" else "step",
        )
        for name, (relative, absolute) in TOLERANCES[settings.precision].items()
    }
    shown = {name: str(value).lower() for name, value in vars(settings).items() if name != "html"}
    shown |= {"engine": engine(), "settings of the device": str(device_settings())}
    path = page_path(settings.html, "html", SELFTEST)
    write_page(agreement_page(named(settings), list(shown.items()), found), path, "html", SELFTEST)
    say(f"page: {path}")


def named(settings: Settings) -> str:
    """Return the layout as it is printed."""
    return f"tp{settings.tp} pp{settings.pp} cp{settings.cp} dp{settings.dp}"


def report(settings: Settings, rows: list[list[str]], agree: bool) -> None:
    """Print the engine, the settings of the device and the table of differences."""
    from rich.console import Console
    from rich.table import Table

    from megarl.parallel.device import device_settings
    from megarl.parallel.megatron_versions import engine

    table = Table("", "one process", named(settings), "difference", "")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(f"engine: {engine()}")
    console.print(f"settings of the device: {device_settings()}")
    console.print(table)
    console.print("the layout gives the same numbers" if agree else "the layout gives DIFFERENT numbers")


def run(argv: list[str]) -> int:
    """Run the test that the command line describes. Return the exit code."""
    from megarl.parallel.device import device_settings
    from megarl.parallel.processes import set_env_from_slurm

    settings = parse(argv)
    check_launcher(os.environ)
    device_settings()  # refuses invalid values of its environment variable before any process starts
    set_env_from_slurm()
    if isinstance(settings, Suite):
        from megarl.conformance.command import run as run_suite

        return run_suite(settings)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        layout, alone = started(settings), started(settings.alone())
    else:  # torchrun or a SLURM step has started the processes
        if world != settings.world:
            raise ConfigError(
                f"tp x pp x cp x dp = {settings.world} but the world has {world} processes",
                key="tp x pp x cp x dp",
                value=settings.world,
            )
        layout = train(settings)
        if process_number() != 0:
            return 0
        os.environ["WORLD_SIZE"] = "1"
        alone = train(settings.alone())
    rows, agree = compare(alone, layout, settings.precision)
    report(settings, rows, agree)
    draw(settings, alone, layout)
    return 0 if agree else 1


def main() -> None:
    """Run the command."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        sys.stdout.write(HELP)
        sys.exit(0)
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
