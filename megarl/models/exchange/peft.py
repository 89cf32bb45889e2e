"""Write adapters as folders that PEFT loads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import temp_sibling
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.models.adapter_spec import ADAPTER, LINEARS, AdapterSpec
from megarl.models.exchange.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    FACTORS,
    PREFIX,
    PeftAdapter,
    split_name,
    their_targets,
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
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.family import Json
from megarl.models.exchange.merged import CheckpointAdapter, MergedSource
from megarl.models.exchange.parameters import SCORE
from megarl.models.exchange.source import HEADS, Source
from megarl.models.exchange.stored import SafetensorsFile, Stored, write_safetensors
from megarl.models.exchange.views import fused_query_key_value_transposed, transposed
from megarl.models.heads import head_of
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.shards import run_on_all_ranks
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)
_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/([0-9a-f]{7,64})/?")
"""The folder in which the hub's client keeps a published model."""


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
    scores = SCORE in names and FAMILIES[spec.family].trunk is None

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for name in factors:
            yield from their_tensors(name, read(name), spec).items()
        if scores:
            yield f"{PREFIX}score.weight", read(SCORE)

    described = [(name, Stored(tuple(tensor.shape), tensor.dtype)) for name, tensor in pieces()]
    write_safetensors(aside / ADAPTER_MODEL, described, (tensor for _, tensor in pieces()), {"format": "pt"})
    others = [name for name in names if ADAPTER not in name and not (scores and name == SCORE)]
    if others:
        heads = {name: read(name) for name in others}
        described = [(name, Stored(tuple(tensor.shape), tensor.dtype)) for name, tensor in heads.items()]
        write_safetensors(aside / HEADS, described, heads.values(), {"format": "pt"})
    write_config(aside, peft_config(spec, model, base, scores=SCORE in names))


def peft_config(spec: AdapterSpec, model: ModelConfig, base: str | None, *, scores: bool) -> Json:
    """Return adapter_config.json of an adapter; `scores` is whether it is of a reward model. Where transformers has no
    class with its score head, it is an adapter of the layers alone, and the head is in a file beside it."""
    # PEFT counts the layers of encoder and decoder alike, so there the modules of some layers are named one by one.
    targets = their_targets(spec, model)
    by_name = model.encoder is not None and (spec.first_layer > 0 or any("{}" in target for target in targets))
    some = spec.first_layer > 0 and not by_name
    published = _SNAPSHOT.fullmatch(base or "")  # other machines have that model in another folder
    family = FAMILIES[spec.family]
    known, apart = family.entries_of(model), family.trunk is not None
    turned = known[f"decoder.layers.{{}}.{LINEARS['linear_proj']}.weight"].views in (
        transposed,
        fused_query_key_value_transposed,
    )
    return {
        "peft_type": "LORA",
        "task_type": _task(model, apart=apart, scores=scores),
        "base_model_name_or_path": published[1].replace("--", "/") if published else base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "use_dora": spec.kind == "dora",
        "target_modules": _their_modules(spec, model) if by_name else targets,
        "layers_to_transform": list(range(spec.first_layer, model.num_layers)) if some else None,
        "layers_pattern": _layers_pattern(spec) if some else None,
        "fan_in_fan_out": turned,
        "modules_to_save": ["score"] if scores and not apart else None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": published[2] if published else None,
    }


def _task(model: ModelConfig, *, apart: bool, scores: bool) -> str:
    """Return PEFT's name of what a model does."""
    if scores:
        return "FEATURE_EXTRACTION" if apart else "SEQ_CLS"
    return "CAUSAL_LM" if model.encoder is None else "SEQ_2_SEQ_LM"


def _layers_pattern(spec: AdapterSpec) -> str:
    """Return the name of the list of layers in the family's models."""
    module = next(iter(spec.parts.values())).modules[0]
    return module.partition(".{}")[0].rpartition(".")[2]


def _their_modules(spec: AdapterSpec, model: ModelConfig) -> list[str]:
    """Return the name of every adapted module."""
    layers = range(spec.first_layer, model.layers)
    return [
        parts.module(number, layer)
        for layer in layers
        for parts in spec.at(layer).values()
        for number in range(len(parts.modules))
    ]


def their_tensors(name: str, whole: Tensor, spec: AdapterSpec) -> dict[str, Tensor]:
    """Return the tensors that PEFT stores for one of our factors."""
    layer, place, factor = split_name(name)
    parts, rank = spec.at(layer)[place], spec.rank
    found = {}
    for number, rows in enumerate(parts.rows):
        piece = whole[number * rank : (number + 1) * rank] if factor == "down" else whole[rows]
        found[f"{PREFIX}{parts.module(number, layer)}.{FACTORS[factor]}"] = piece.contiguous()
    return found


def write_config(folder: Path, config: Json) -> None:
    """Write adapter_config.json."""
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


__all__ = ["export_adapter", "peft_config", "write_adapter", "write_peft"]
