"""Write adapters as folders that PEFT loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import temp_sibling
from megarl.logging import get_logger
from megarl.models.adapter_spec import ADAPTER, AdapterSpec
from megarl.models.exchange.adapters import ADAPTER_MODEL, PREFIX, peft_config, their_tensors, write_config
from megarl.models.exchange.export import gathered, prepare, refuse_existing, removed_on_error
from megarl.models.exchange.merged import CheckpointAdapter
from megarl.models.exchange.parameters import SCORE
from megarl.models.exchange.source import HEADS
from megarl.models.exchange.stored import SafetensorsFile, Stored, write_safetensors
from megarl.models.heads import head_of
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.shards import run_on_all_ranks
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)


def export_adapter(
    engine: Engine, folder: Path, *, model: ModelConfig, base: str | None, tokenizer: Tokenizer | None = None
) -> None:
    """Write an engine's adapters and heads as a PEFT folder. All ranks call this together, and all raise if one fails.

    Each pipeline stage writes its tensors to a file beside the others', from which the first rank makes the folder.
    """
    grid, spec = engine.grid, engine.config.adapter
    assert spec is not None
    wanted = [(name, value) for name, value in engine.parameters() if ADAPTER in name or head_of(name) is not None]
    aside = temp_sibling(folder)
    grid.run_on_rank0(lambda: prepare(folder, aside))
    with removed_on_error(aside, grid):
        run_on_all_ranks(grid, lambda: _write_stage(aside, wanted, grid))
        grid.run_on_rank0(lambda: _join(aside, folder, spec, model, base, tokenizer, grid.layout.pp))
    log.info("exported the adapter to %s: %d tensors in this stage", folder, len(wanted))


def write_adapter(source: CheckpointAdapter, folder: Path) -> None:
    """Write the adapter in a megarl checkpoint as a PEFT folder, in this process."""
    aside = temp_sibling(folder)
    prepare(folder, aside)
    with removed_on_error(aside):
        _write(aside, source.spec, source.model, source.base, sorted(source.names), source.read)
        refuse_existing(folder)
        aside.rename(folder)


def _write_stage(aside: Path, wanted: Iterable[tuple[str, Tensor]], grid: Grid) -> None:
    """Write the whole tensors of this stage; tensor-parallel ranks send their slices to the first."""
    if grid.groups.dp_cp.rank() != 0:
        return
    found = {name: gathered(value, grid) for name, value in wanted}
    if grid.tp_rank == 0:
        described = [
            (name, Stored(tuple(value.shape), value.dtype)) for name, value in found.items() if value is not None
        ]
        tensors = (value for value in found.values() if value is not None)
        write_safetensors(_stage_file(aside, grid.pp_rank), described, tensors, {})


def _stage_file(aside: Path, stage: int) -> Path:
    return aside / f"stage-{stage}.safetensors"


def _join(
    aside: Path,
    folder: Path,
    spec: AdapterSpec,
    model: ModelConfig,
    base: str | None,
    tokenizer: Tokenizer | None,
    stages: int,
) -> None:
    files = [SafetensorsFile(_stage_file(aside, stage)) for stage in range(stages)]
    where = {name: file for file in files for name in file.tensors}
    _write(aside, spec, model, base, sorted(where), lambda name: where[name].read(name))
    for stage in range(stages):
        _stage_file(aside, stage).unlink()
    if tokenizer is not None:
        tokenizer.save(aside)
    refuse_existing(folder)
    aside.rename(folder)


def _write(
    aside: Path,
    spec: AdapterSpec,
    model: ModelConfig,
    base: str | None,
    names: list[str],
    read: Callable[[str], Tensor],
) -> None:
    """Write the files of a PEFT folder, one of our tensors after another."""
    factors = [name for name in names if ADAPTER in name]
    scores = SCORE in names

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for name in factors:
            yield from their_tensors(name, read(name), spec).items()
        if scores:
            yield f"{PREFIX}score.weight", read(SCORE)

    described = [(name, Stored(tuple(tensor.shape), tensor.dtype)) for name, tensor in pieces()]
    write_safetensors(aside / ADAPTER_MODEL, described, (tensor for _, tensor in pieces()), {"format": "pt"})
    others = [name for name in names if ADAPTER not in name and name != SCORE]
    if others:
        heads = {name: read(name) for name in others}
        described = [(name, Stored(tuple(tensor.shape), tensor.dtype)) for name, tensor in heads.items()]
        write_safetensors(aside / HEADS, described, heads.values(), {"format": "pt"})
    write_config(aside, peft_config(spec, model, base, scores=scores))


__all__ = ["export_adapter", "write_adapter"]
