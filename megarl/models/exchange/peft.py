"""Write adapters as folders that PEFT loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import temp_sibling
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.models.adapter_spec import ADAPTER, AdapterSpec
from megarl.models.exchange.adapters import (
    ADAPTER_MODEL,
    PREFIX,
    PeftAdapter,
    peft_config,
    their_tensors,
    write_config,
)
from megarl.models.exchange.export import (
    cast_checked,
    gathered,
    keep_tokenizer,
    prepare,
    refuse_existing,
    removed_on_error,
    written_whole,
)
from megarl.models.exchange.merged import CheckpointAdapter, MergedSource
from megarl.models.exchange.parameters import SCORE
from megarl.models.exchange.source import HEADS, Source
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
    log.info("exported the adapter to %s", folder)


def write_adapter(
    adapter: PeftAdapter | CheckpointAdapter,
    folder: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a stored adapter as a PEFT folder, in this process.

    Args:
        adapter: the adapter of a megarl checkpoint, or a PEFT folder that was fitted to its model.
        folder: the target, which must not exist.
        base: path or hub name of the model that it belongs to (None: the one that the adapter names).
        dtype: dtype of the factors (None: as stored).
        progress: called with the name of every tensor.
    """
    if isinstance(adapter, PeftAdapter):
        adapter.require_complete()
    kind = dtype or adapter.dtype

    def read(name: str) -> Tensor:
        progress(name)
        return cast_checked(name, adapter.read(name), kind)

    with written_whole(folder) as aside:
        _write(aside, adapter.spec, adapter.model, base or adapter.base, sorted(adapter.names), read)
        if isinstance(adapter, CheckpointAdapter):
            keep_tokenizer(adapter, aside)
        refuse_existing(folder)
        aside.rename(folder)


def write_peft(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write the adapter of a stored model as a PEFT folder. Raise if the model has none."""
    if not isinstance(source, MergedSource):
        raise ConfigError(
            f"format=peft writes an adapter, and {source.path} is a whole model: add adapter=ADAPTER, or use "
            "format=huggingface or megarl",
            key="format",
            value="peft",
            where=source.path,
            offers={"format": ["huggingface", "megarl"]},
        )
    own = source.adapter.spec.family
    if family not in (None, own):
        raise ConfigError(
            f"family={family} is not available with format=peft: the adapter's modules are those of {own}",
            key="family",
            value=family,
            offers={"family": [own]},
        )
    write_adapter(source.adapter, folder, base=source.base_name, dtype=dtype, progress=progress)


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


__all__ = ["export_adapter", "write_adapter", "write_peft"]
