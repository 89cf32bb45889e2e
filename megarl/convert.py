"""`python -m megarl.convert from=A to=B`: convert a model or an adapter to another format, or merge an adapter into a
model, and compare counts and logits."""

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
from megarl.functions.named import resolve
from megarl.progress import waiting, waiting_for_imports

if TYPE_CHECKING:
    import torch

    from megarl.models.exchange.adapters import PeftAdapter
    from megarl.models.exchange.merged import CheckpointAdapter
    from megarl.models.exchange.source import Source

HELP = """usage: python -m megarl.convert from=A to=B [adapter=ADAPTER] [format=FORMAT] [dtype=DTYPE] [family=FAMILY]
                                [families=NAMES] [tp=N] [pp=N]

  from=A         a Hugging Face folder or hub name, a .nemo, a megarl checkpoint or a run's folder (its newest), a PEFT
                 folder
  to=B           a folder, or a file NAME.nemo, that does not exist yet
  adapter=C      merge an adapter into A: a PEFT folder or hub name, a checkpoint or a run's folder (without it: an
                 adapter at A is merged into the model that it names)
  format=FORMAT  huggingface, megarl, nemo, or peft: the adapter alone (without it: nemo for NAME.nemo, megarl from
                 Hugging Face, else huggingface)
  dtype=DTYPE    fp32, bf16 or fp16 (without it: as stored)
  family=FAMILY  the Hugging Face family to write as (without it: the one it came from, else the first that can hold it)
  families=NAMES families of yours beside megarl's: package.module:NAME or path/to/file.py:NAME, joined by commas
  tp=N pp=N      ranks to split a .nemo for (without them: 1, one file)

Exit code 1: the logits of the two differ by more than the dtype allows. 2: bad input; nothing is left under B's name.
"""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
KEYS = ("from", "to", "adapter", "format", "dtype", "family", "families", "tp", "pp")
# The largest difference of a logit, as a share of the largest logit: nothing is rounded, or every weight is.
EXACT, ROUNDED = 1e-4, {"float16": 1e-2, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Settings:
    """The settings of the command line."""

    origin: str
    target: Path
    adapter: str | None = None
    format: str | None = None
    dtype: str | None = None
    family: str | None = None
    tp: int = 1
    pp: int = 1
    families: tuple[str, ...] = ()


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
        values.get("adapter"),
        values.get("format"),
        values.get("dtype"),
        values.get("family"),
        int(values.get("tp", 1)),
        int(values.get("pp", 1)),
        tuple(name for name in values.get("families", "").strip("[]").split(",") if name),
    )


def run(argv: list[str]) -> int:
    """Convert a model and compare the result with the source. Return the exit code: 1 if logits differ too much."""
    settings = parse(argv)
    require_weights(settings.origin, "from")
    require_model(settings.origin, "from")
    require_absent(str(settings.target), "to")
    for name in settings.families:
        resolve(name, "families", "NAME")
    with waiting_for_imports():
        import torch

        from megarl.models.exchange.export import refuse_existing
        from megarl.models.exchange.families import add_families, family_named
        from megarl.models.exchange.formats import open_source
        from megarl.models.exchange.merged import CheckpointAdapter

    refuse_existing(settings.target)
    add_families(settings.families)
    if settings.family is not None:
        family_named(settings.family)
    dtype = getattr(torch, DTYPES[settings.dtype]) if settings.dtype else None
    source = opened(settings)
    if isinstance(source, CheckpointAdapter):
        return write_alone(source, settings, dtype)
    require_whole(source)
    write(source, settings, dtype)
    target = open_source(settings.target)
    with waiting("comparing logits", after_s=0):
        difference, largest = compare(source, target)
    bound = tolerance(*dtypes(source, target)) * max(1.0, largest)
    report(source, target, difference, bound)
    return 0 if difference <= bound else 1


def opened(settings: Settings) -> "Source":
    """Open the model to convert, with its adapter.

    Returns:
        The model. With format=peft, the adapter of a checkpoint whose other weights cannot be opened: it can be written
        without them.
    """
    from megarl.disk import exists, local
    from megarl.models.exchange.formats import merged, open_adapter, open_source
    from megarl.models.exchange.merged import CheckpointAdapter, MergedSource

    if settings.adapter is not None:
        base = open_source(settings.origin)
        name = None if exists(local(settings.origin)) else settings.origin  # a hub name is right on every machine
        source: Source = merged(base, open_adapter(settings.adapter), name)
    else:
        try:
            source = open_source(settings.origin)
        except CheckpointError:
            adapter = open_adapter(settings.origin) if settings.format == "peft" else None
            if not isinstance(adapter, CheckpointAdapter):
                raise
            return adapter
    if isinstance(source, MergedSource):
        source.exact = True  # what is written is rounded once, and compared with what was not
    return source


def require_whole(source: "Source") -> None:
    """Compare the checksums of the checkpoints that a model is read from. Raise if they differ."""
    from megarl.checkpoint import verify

    for folder in source.checkpoints:
        with waiting(f"checking {folder.name}", after_s=0):
            problem = verify(folder)
        if problem:
            raise CheckpointError(
                f"checkpoint {folder} is not whole: {problem}", key=problem.key, value=problem.value, where=folder
            )


def dtypes(source: "Source", target: "Source") -> "tuple[torch.dtype, torch.dtype]":
    """Return the dtypes of what was read and of what was written."""
    import torch

    from megarl.models.exchange.merged import MergedSource

    if isinstance(source, MergedSource):
        if isinstance(target, MergedSource):  # the adapter alone was written
            return source.adapter.dtype, target.adapter.dtype
        return torch.float32, target.dtype
    return source.dtype, target.dtype


def write_alone(adapter: "CheckpointAdapter", settings: Settings, dtype: "torch.dtype | None") -> int:
    """Write the adapter of a checkpoint whose other weights cannot be opened, and compare the factors instead of
    logits. Return the exit code."""
    from rich.console import Console

    from megarl.models.exchange.adapters import PeftAdapter
    from megarl.models.exchange.families import FAMILIES
    from megarl.models.exchange.peft import write_adapter

    require_whole(adapter)
    write_adapter(adapter, settings.target, dtype=dtype)
    target = PeftAdapter(settings.target)
    target.fit(adapter.model, FAMILIES[adapter.spec.family])
    difference, largest = compare_factors(adapter, target)
    bound = tolerance(adapter.dtype, target.dtype) * max(1.0, largest)
    verdict = "the same" if difference <= bound else "DIFFERENT"
    console = Console()
    console.print(
        f"logits: not compared, as the model beside the adapter ({adapter.base or 'random weights'}) cannot be opened",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"factors: largest difference {difference:.2e}, allowed {bound:.2e}: {verdict}", highlight=False)
    console.print(f"written: {settings.target}", highlight=False, soft_wrap=True)
    return 0 if difference <= bound else 1


def compare_factors(source: "CheckpointAdapter", target: "PeftAdapter") -> tuple[float, float]:
    """Return the largest difference of two adapters' factors and heads, and the largest value."""
    if source.names != target.names:
        return float("inf"), 0.0
    difference = largest = 0.0
    for name in source.names:
        before, after = source.read(name).float(), target.read(name).float()
        difference = max(difference, float((before - after).abs().max()))
        largest = max(largest, float(before.abs().max()))
    return difference, largest


def write(source: "Source", settings: Settings, dtype: "torch.dtype | None") -> None:
    """Write the target, with a progress bar over our parameters; a dtype of None leaves it as stored."""
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
    with waiting(f"writing {settings.target.name}", len(source.names)) as tensor_done:
        write_as(source, settings.target, dtype=dtype, family=settings.family, progress=lambda _: tensor_done())


def compare(source: "Source", target: "Source") -> tuple[float, float]:
    """Return the largest logit difference on the fixed batch (infinite if one is NaN), and the largest logit."""
    import torch

    from megarl.models.exchange.logits import fixed_batch, logits

    tokens = fixed_batch(source)
    # Where rounded weights send a token to other experts, its logits are others: both sides are rounded.
    rounded = None if source.model.experts is None else target.dtype
    before, after = logits(source, tokens, rounded), logits(target, tokens)
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

    from megarl.models.exchange.merged import MergedSource

    table = Table("", "from", "to")
    rows: dict[str, Callable[[Source], object]] = {
        "format": _format,
        "family": lambda side: side.family.name if side.family else "none",
        "dtype": lambda side: str(side.dtype).removeprefix("torch."),
        "tensors": lambda side: f"{side.stored[0]:,}",
        "bytes": lambda side: f"{side.stored[1]:,}",
        "heads": lambda side: len(side.heads),
    }
    if isinstance(source, MergedSource):
        rows["adapter"] = _adapter
    for name, value in rows.items():
        table.add_row(name, str(value(source)), str(value(target)))
    console = Console()
    console.print(table)
    for name, reason in source.left_out.items():
        console.print(f"left out: {name}: {reason}", highlight=False)
    if not source.left_out:
        console.print("left out: nothing")
    verdict = "the same" if difference <= bound else "DIFFERENT"
    compared = "logits" if source.has_output else "scores"
    console.print(f"{compared}: largest difference {difference:.2e}, allowed {bound:.2e}: {verdict}", highlight=False)
    console.print(f"written: {target.path}", highlight=False, soft_wrap=True)


def _format(side: "Source") -> str:
    """Name the format of one side: of an adapter, with that of the model beside it."""
    from megarl.models.exchange.adapters import PeftAdapter
    from megarl.models.exchange.merged import MergedSource

    if not isinstance(side, MergedSource):
        return side.kind
    return f"{side.base.kind} + {'peft' if isinstance(side.adapter, PeftAdapter) else 'megarl'}"


def _adapter(side: "Source") -> str:
    """Describe the adapter of one side in the table."""
    from megarl.models.exchange.merged import MergedSource

    if not isinstance(side, MergedSource):
        return "merged"
    adapter, (tensors, size) = side.adapter, side.adapter.stored
    dtype = str(adapter.dtype).removeprefix("torch.")
    return f"{adapter.spec.kind}, rank {adapter.spec.rank}, {dtype}: {tensors:,} tensors, {size:,} bytes"


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
