"""`python -m megarl.convert from=A to=B`: convert a model to another format, and compare counts and logits."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megarl.command import run_command
from megarl.config.files import require_absent, require_model, require_weights
from megarl.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

    from megarl.models.exchange.source import Source

HELP = """usage: python -m megarl.convert from=A to=B [format=FORMAT] [dtype=DTYPE] [family=FAMILY] [tp=N] [pp=N]

  from=A         a Hugging Face folder or hub name, a .nemo, a megarl checkpoint or a run's folder (its newest)
  to=B           a folder, or a file NAME.nemo, that does not exist yet
  format=FORMAT  huggingface, megarl or nemo (without it: nemo for NAME.nemo, megarl from Hugging Face,
                 else huggingface)
  dtype=DTYPE    fp32, bf16 or fp16 (without it: as stored)
  family=FAMILY  the Hugging Face family to write as (without it: the one it came from, else the first that can hold it)
  tp=N pp=N      ranks to split a .nemo for (without them: 1, one file)

Exit code 1: the logits of the two differ by more than the dtype allows. 2: bad input; nothing is left under B's name.
"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
KEYS = ("from", "to", "format", "dtype", "family", "tp", "pp")
# The largest difference of a logit, as a share of the largest logit: nothing is rounded, or every weight is.
EXACT, ROUNDED = 1e-4, {"float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Settings:
    """The settings of the command line."""

    origin: str
    target: Path
    format: str | None = None
    dtype: str | None = None
    family: str | None = None
    tp: int = 1
    pp: int = 1


def parse(argv: list[str]) -> Settings:
    """Parse settings from key=value words; raise `ConfigError` for unknown, missing or invalid ones."""
    values: dict[str, str] = {}
    for word in argv:
        key, equals, text = word.partition("=")
        if not equals or key not in KEYS or not text:
            raise ConfigError(f"unknown setting '{word}': use key=value with {', '.join(KEYS)}", key=word)
        values[key] = text
    for key in ("from", "to"):
        if key not in values:
            raise ConfigError(f"{key}= is missing: python -m megarl.convert from=A to=B", key=key)
    if values.get("dtype", "fp32") not in DTYPES:
        raise ConfigError(
            f"dtype={values['dtype']} is not a valid value: choose from {', '.join(DTYPES)}",
            key="dtype",
            value=values["dtype"],
            offers={"dtype": DTYPES},
        )
    for key in ("tp", "pp"):
        if not re.fullmatch(r"[1-9]\d{0,3}", values.get(key, "1")):
            raise ConfigError(
                f"{key}={values[key]} is not a valid number of ranks: use 1 or more", key=key, value=values[key]
            )
    target = Path(values["to"]).expanduser().absolute()
    return Settings(
        values["from"],
        target,
        values.get("format"),
        values.get("dtype"),
        values.get("family"),
        int(values.get("tp", 1)),
        int(values.get("pp", 1)),
    )


def run(argv: list[str]) -> int:
    """Convert a model and compare the result with the source. Return the exit code: 1 if logits differ too much."""
    settings = parse(argv)
    require_weights(settings.origin, "from")
    require_model(settings.origin, "from")
    require_absent(str(settings.target), "to")
    import torch

    from megarl.checkpoint import verify
    from megarl.models.exchange.export import refuse_existing
    from megarl.models.exchange.families import family_named
    from megarl.models.exchange.formats import open_source

    refuse_existing(settings.target)
    if settings.family is not None:
        family_named(settings.family)
    source = open_source(settings.origin)
    problem = verify(source.path) if source.kind == "megarl" else None
    if problem:
        raise CheckpointError(
            f"checkpoint {source.path} is not whole: {problem}", key=problem.key, value=problem.value, where=source.path
        )
    dtype = getattr(torch, DTYPES[settings.dtype]) if settings.dtype else source.dtype
    write(source, settings, dtype)
    target = open_source(settings.target)
    difference, largest = compare(source, target)
    bound = tolerance(source.dtype, target.dtype) * max(1.0, largest)
    report(source, target, difference, bound)
    return 0 if difference <= bound else 1


def write(source: "Source", settings: Settings, dtype: "torch.dtype") -> None:
    """Write the target, with a progress bar over our parameters."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from megarl.models.exchange.formats import FORMATS
    from megarl.models.exchange.nemo_write import write_nemo

    otherwise = "megarl" if source.kind == "huggingface" else "huggingface"
    name = settings.format or ("nemo" if settings.target.suffix == ".nemo" else otherwise)
    if name not in FORMATS:
        raise ConfigError(
            f"format={name} is not a valid value: choose from {', '.join(FORMATS)}",
            key="format",
            value=name,
            offers={"format": FORMATS},
        )
    if (name == "nemo") != (settings.target.suffix == ".nemo"):
        raise ConfigError(
            f"format={name} does not go with to={settings.target.name}: a .nemo is a file NAME.nemo",
            key="format",
            value=name,
        )
    if name != "nemo" and (settings.tp, settings.pp) != (1, 1):
        raise ConfigError(
            f"tp={settings.tp} pp={settings.pp} split a .nemo only: format={name} suits every layout",
            key="tp",
            value=settings.tp,
        )
    write_as: Callable[..., None] = (
        partial(write_nemo, tp=settings.tp, pp=settings.pp) if name == "nemo" else FORMATS[name].write
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"writing {settings.target.name}", total=len(source.names))

        def progress(_: str) -> None:
            bar.advance(task)

        write_as(source, settings.target, dtype=dtype, family=settings.family, progress=progress)


def compare(source: "Source", target: "Source") -> tuple[float, float]:
    """Return the largest logit difference on the fixed batch (infinite if one is NaN), and the largest logit."""
    import torch

    from megarl.models.exchange.logits import fixed_batch, logits

    tokens = fixed_batch(source)
    before, after = logits(source, tokens), logits(target, tokens)
    differences = (before - after).abs()
    finite = before.shape == after.shape and bool(torch.isfinite(differences).all())
    return float(differences.max()) if finite else float("inf"), float(before.abs().max())


def tolerance(before: "torch.dtype", after: "torch.dtype") -> float:
    """Return the allowed logit difference as a fraction of the largest logit; nonzero if the target must round."""
    import torch

    exact = torch.promote_types(before, after) == after
    return EXACT if exact else ROUNDED.get(str(after).removeprefix("torch."), EXACT)


def report(source: "Source", target: "Source", difference: float, bound: float) -> None:
    """Print a table that compares source and target, the tensors left out, and the verdict on the logits."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "from", "to")
    rows: dict[str, Callable[[Source], object]] = {
        "format": lambda side: side.kind,
        "family": lambda side: side.family.name if side.family else "none",
        "dtype": lambda side: str(side.dtype).removeprefix("torch."),
        "tensors": lambda side: f"{side.stored[0]:,}",
        "bytes": lambda side: f"{side.stored[1]:,}",
        "heads": lambda side: len(side.heads),
    }
    for name, value in rows.items():
        table.add_row(name, str(value(source)), str(value(target)))
    console = Console()
    console.print(table)
    for name, reason in source.left_out.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    if not source.left_out:
        console.print("left out: nothing")
    verdict = "the same" if difference <= bound else "DIFFERENT"
    console.print(f"logits: largest difference {difference:.2e}, allowed {bound:.2e}: {verdict}", highlight=False)
    console.print(f"written: {target.path}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of `python -m megarl.convert`."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        sys.stdout.write(HELP)
        sys.exit(0)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run_command(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
