"""Adapters in files: PEFT's folders, and the adapters in megarl's checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megarl.config.offers import either
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import ModelConfig
from megarl.disk import UnreadableError, is_file, parse_object, read_text, shown
from megarl.errors import CheckpointError, ConfigError
from megarl.models.adapter_spec import CROSS_LINEARS, LINEARS, SHARED_LINEARS, AdapterSpec, Parts
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.family import Family, Json
from megarl.models.exchange.parameters import SCORE, parameters
from megarl.models.exchange.source import HEADS, widest_dtype
from megarl.models.exchange.stored import PickledFile, SafetensorsFile, Stored, TensorFile
from megarl.parallel.shards import EXPERTS

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
ADAPTER_FILES: dict[str, type[SafetensorsFile] | type[PickledFile]] = {
    ADAPTER_MODEL: SafetensorsFile,
    "adapter_model.bin": PickledFile,
}
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
ALL = "all-linear"
FACTORS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""PEFT's names of a module's factors."""
_FACTOR = re.compile(r"(.+)\.(?:(lora_[AB])(?:\.default)?\.weight|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?)")
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the weights beside the adapter as they were."""
_OTHER_METHODS = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config", "lora_bias", "target_parameters", "trainable_token_indices"),
)
"""Keys of variants of LoRA that compute something else."""


class StoredAdapter(Protocol):
    """An adapter in files.

    Attributes:
        path: the folder.
        spec: its description.
        heads: tensors of heads that were trained with it, by our names.
        base: path of the model that it was trained beside; None if it is not known.
        model: the shape of that model.
        dtype: dtype of the stored factors.
        stored: number of stored tensors and bytes, including heads.
    """

    path: Path
    spec: AdapterSpec
    heads: dict[str, Stored]
    base: str | None
    model: ModelConfig
    dtype: torch.dtype
    stored: tuple[int, int]

    @property
    def names(self) -> set[str]:
        """Our names of all tensors that it contains."""

    def adapts(self, layer: int, module: str) -> bool:
        """Return whether a part of a linear layer has factors in this layer of the transformer."""

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor, or fewer if it has fewer."""


# --- what is adapted ------------------------------------------------------------------------------------------------


def parts_of(family: Family, model: ModelConfig) -> dict[str, Parts]:
    """Return the parts of every linear layer of a model, as the family stores them, but for experts: these have no
    adapters."""
    known = family.entries_of(model)
    shapes = parameters(model, 1)
    found = {}
    for side, layers, name, place in _linears(model):
        entry = known[f"{side}.layers.{{}}.{place}.weight"]
        count = shapes[f"decoder.layers.{layers[0]}.{place}.weight"][0]
        rows = tuple(piece.view.reshape(-1) for piece in entry.views(torch.arange(count), model))
        modules = tuple(theirs.removesuffix(".weight") for theirs in entry.theirs)
        offset = model.encoder_layers if side == "decoder" else 0
        found[name if model.encoder is None else f"{side}.{name}"] = Parts(modules, rows, count, place, layers, offset)
    return found


def _linears(model: ModelConfig) -> list[tuple[str, Sequence[int], str, str]]:
    """Return the side of every linear layer of a model, the transformer layers that have it, its name and its place."""
    found: list[tuple[str, Sequence[int], str, str]] = []
    decoders = range(model.encoder_layers, model.layers)
    if model.encoder is not None:
        for side, layers in (("encoder", range(decoders.start)), ("decoder", decoders)):
            found += [(side, layers, name, place) for name, place in LINEARS.items()]
        return found + [("decoder", decoders, name, place) for name, place in CROSS_LINEARS.items()]
    plain = tuple(layer for layer in decoders if not model.has_experts(layer))
    for name, place in LINEARS.items():
        of: Sequence[int] = plain if place.startswith("mlp.") and model.experts is not None else decoders
        found += [("decoder", of, name, place)] if of else []
    if model.experts is not None and model.experts.shared_ffn_size is not None:
        mixed = tuple(layer for layer in decoders if layer not in plain)
        found += [("decoder", mixed, name, place) for name, place in SHARED_LINEARS.items()]
    return found


def _of_experts(family: Family, model: ModelConfig) -> list[tuple[str, str]]:
    """Return the linear layers of experts: our names, and those of their modules with `{}` for layer and expert."""
    entries = family.entries_of(model).values() if model.experts is not None else ()
    pairs = [(item.ours, theirs) for item in entries if EXPERTS in item.ours for theirs in item.theirs]
    return [(ours.removesuffix(".weight"), theirs.removesuffix(".weight")) for ours, theirs in pairs]


def family_of_parts(model: ModelConfig, family: str | None) -> Family:
    """Return the family whose modules the adapters of a model follow: its own, else the first that can represent it."""
    if family is not None:
        return FAMILIES[family]
    last = "t5" if model.encoder is not None else "qwen2_moe" if model.experts is not None else "llama"
    return next((known for known in FAMILIES.values() if known.holds(model)), FAMILIES[last])


def chosen_parts(whole: Mapping[str, Parts], wanted: Iterable[tuple[str, str]]) -> dict[str, Parts]:
    """Return the parts of each linear layer that are in `wanted`, pairs of the layer's name and a module's."""
    wanted = set(wanted)
    found = {}
    for name, parts in whole.items():
        kept = [number for number, module in enumerate(parts.modules) if (name, module) in wanted]
        if kept:
            modules, rows = zip(*((parts.modules[number], parts.rows[number]) for number in kept), strict=True)
            found[name] = replace(parts, modules=modules, rows=rows)
    return found


def new_spec(config: AdapterConfig, model: ModelConfig, family: str | None) -> AdapterSpec:
    """Return the description of the adapters that a run's settings ask for."""
    kind = family_of_parts(model, family)
    whole = parts_of(kind, model)
    modules = [(name, module) for name, parts in whole.items() for module in parts.modules]
    wanted: set[tuple[str, str]] = set()
    for target in config.targets:
        matched = {(name, module) for name, module in modules if _matches(target, name, module)}
        if not matched:
            offered = [ALL, *whole, *dict.fromkeys(module.rpartition(".")[2] for _, module in modules)]
            of_experts = any(_matches(target, name, module) for name, module in _of_experts(kind, model))
            what = "in the experts alone, which have no adapters," if of_experts else "not a linear layer"
            raise ConfigError(
                f"adapter.targets: {shown(target)} is {what} of this {kind.name}'s transformer: choose from "
                f"{', '.join(offered)}, or use adapter.targets={[ALL]}",
                key="adapter.targets",
                value=target,
                offers={"adapter.targets": [[ALL]]},
            )
        wanted |= matched
    unfrozen, chosen = model.num_layers_unfrozen, chosen_parts(whole, wanted)
    first = 0 if unfrozen < 0 else max(0, model.layers - unfrozen)
    if all(parts.layers[-1] < first for parts in chosen.values()):
        raise ConfigError(
            f"model.num_layers_unfrozen={unfrozen} leaves no layer for adapter.targets={config.targets}: use "
            f"model.num_layers_unfrozen=-1 or adapter.targets={[ALL]}",
            key="model.num_layers_unfrozen",
            value=unfrozen,
            offers={"model.num_layers_unfrozen": [-1], "adapter.targets": [[ALL]]},
        )
    return AdapterSpec(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        rslora=config.rslora,
        parts=chosen,
        dropout=config.dropout,
        first_layer=first,
        base_bits=config.base_bits,
        family=kind.name,
    )


def targets_of(spec: AdapterSpec, model: ModelConfig) -> list[str]:
    """Return the targets of an adapter: the same list for the same modules, whatever they were named by."""
    whole = parts_of(FAMILIES[spec.family], model)
    everything = all(spec.parts.get(name) == parts for name, parts in whole.items())
    return [ALL] if everything else their_targets(spec, model)


def _matches(target: str, name: str, module: str) -> bool:
    return target in (ALL, name, module) or name.endswith(f".{target}") or module.endswith(f".{target}")


# --- PEFT's folders -------------------------------------------------------------------------------------------------


class PeftAdapter:
    """A folder that PEFT's `save_pretrained` wrote. Opening it finds every error that can be found without the
    weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_config(path)
        self.base: str | None = self.config.get("base_model_name_or_path") or None
        self._file = self._open()
        self._heads = SafetensorsFile(path / HEADS) if is_file(path / HEADS) else None
        self._factors: dict[tuple[str, str], str] = {}  # (module, factor) -> the stored name
        self._others: dict[str, str] = {}  # a tensor's name without PEFT's prefix -> the stored name
        for stored in self._file.tensors:
            name = stored.removeprefix(PREFIX)
            match = _FACTOR.fullmatch(name)
            if match is None:
                self._others[name] = stored
            else:
                factor = {"lora_A": "down", "lora_B": "up"}.get(match[2], "magnitude")
                self._factors[match[1], factor] = stored
        if not self._factors:
            raise CheckpointError(f"{path} has no tensor of LoRA: it is not an adapter of PEFT's", where=path)
        all_stored = [*self._file.tensors.values(), *(self._heads.tensors.values() if self._heads else ())]
        self.stored = (len(all_stored), sum(item.bytes for item in all_stored))

    def fit(self, model: ModelConfig, family: Family) -> None:
        """Find the place of every tensor in a model of a family. Raise if one has none, or if its shape is wrong."""
        whole = parts_of(family, model)
        shapes = parameters(model, 1)
        places = {
            parts.module(number, layer): (layer, name, number)
            for name, parts in whole.items()
            for number in range(len(parts.modules))
            for layer in parts.layers
        }
        where: dict[str, tuple[int, str, int]] = {}  # the module's name in the file -> its place
        for module, _ in self._factors:
            place = places.get(module) or places.get(family.prefix + module)
            if place is not None:
                where[module] = place
        strange = sorted({module for module, _ in self._factors if module not in where})
        heads = {"score.weight": SCORE}
        strange += sorted(name for name in self._others if name.removesuffix(".default") not in heads)
        if strange:
            raise CheckpointError(
                f"{self.path}: {either(strange[:3])} ({len(strange)} in all) has no place in this {family.name}: its "
                "linear layers are "
                + ", ".join(dict.fromkeys(m.rpartition(".")[2] for parts in whole.values() for m in parts.modules))
                + ". If it is of this model, merge it with PEFT (merge_and_unload) and use the result",
                key=strange[0],
                where=self.path,
            )
        self.heads = {
            ours: self._file.tensors[self._others[name]] for name, ours in heads.items() if name in self._others
        }
        self.heads |= self._heads.tensors if self._heads is not None else {}
        self._head_names = {ours: self._others[name] for name, ours in heads.items() if name in self._others}
        modules = {(name, whole[name].modules[number]) for _, name, number in where.values()}
        ranks = {module: self._rank(module) for module in where}
        rank = max(ranks.values())
        self.spec = AdapterSpec(
            kind="dora" if self.config.get("use_dora") else "lora",
            rank=rank,
            alpha=float(self._number("lora_alpha", 8)),
            rslora=bool(self.config.get("use_rslora")),
            parts=chosen_parts(whole, modules),
            dropout=float(self._number("lora_dropout", 0.0)),
            family=family.name,
        )
        first = min(layer for layer, _, _ in where.values())
        if first > self.spec.first_adapted:
            self.spec = replace(self.spec, first_layer=first)
        self._columns = {
            parts.place: shapes[f"decoder.layers.{parts.layers[0]}.{parts.place}.weight"][1] for parts in whole.values()
        }
        self._by_place = {
            (layer, whole[name].modules[number]): module for module, (layer, name, number) in where.items()
        }
        self._check_shapes(model)
        self.model = model
        # Exceptions in rank or alpha change numbers while they are read, which a narrower dtype would round.
        changed = self.config.get("alpha_pattern") or self.config.get("rank_pattern")
        dtypes = [self._file.tensors[stored].dtype for stored in self._factors.values()]
        self.dtype = torch.float32 if changed else widest_dtype(dtypes)

    def _rank(self, module: str) -> int:
        stored = self._factors.get((module, "down"))
        if stored is None or (module, "up") not in self._factors:
            raise CheckpointError(
                f"{self.path} has only one of the factors of {module}: fetch it again", key=module, where=self.path
            )
        shape = self._file.tensors[stored].shape
        if len(shape) != 2 or shape[0] < 1:
            raise CheckpointError(
                f"{self.path}: {stored} has shape {list(shape)}, which no factor has: fetch it again",
                key=stored,
                value=list(shape),
                where=self.path,
            )
        said = _pattern(self.config.get("rank_pattern"), module, self._number("r", 8), self.path)
        if shape[0] != said:
            raise CheckpointError(
                f"{self.path}: {stored} has rank {shape[0]}, and {ADAPTER_CONFIG} says r={said:g}, on which its scale "
                "depends: fetch it again",
                key="r",
                value=said,
                where=self.path,
            )
        return shape[0]

    def _number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(
                f"{self.path / ADAPTER_CONFIG} has {key}={shown(repr(value))}, which is not a number: restore it",
                key=key,
                value=value,
                where=self.path,
            )
        return value

    def _scaling(self, module: str, rank: int) -> float:
        """Return what a module's factors are multiplied by: rank and alpha may have exceptions."""
        alpha = _pattern(self.config.get("alpha_pattern"), module, self.spec.alpha, self.path)
        return float(alpha / (rank**0.5 if self.spec.rslora else rank))

    def _check_shapes(self, model: ModelConfig) -> None:
        parts_of_module = {module: parts for parts in self.spec.parts.values() for module in parts.modules}
        for (_, module), theirs in self._by_place.items():
            parts = parts_of_module[module]
            rows, rank = len(parts.rows[parts.modules.index(module)]), self._rank(theirs)
            wanted: dict[str, tuple[int, ...]] = {"down": (rank, self._columns[parts.place]), "up": (rows, rank)}
            if self.spec.kind == "dora":
                wanted["magnitude"] = (rows,)
            for factor, shape in wanted.items():
                stored = self._factors.get((theirs, factor))
                if stored is None:
                    raise CheckpointError(
                        f"{self.path} lacks {theirs}.{FACTORS[factor]}: fetch it again", key=theirs, where=self.path
                    )
                found = self._file.tensors[stored]
                if found.shape != shape:
                    raise CheckpointError(
                        f"{self.path}: {stored} has shape {list(found.shape)}, and this model needs {list(shape)}: it "
                        "is an adapter of another model",
                        key=stored,
                        value=list(found.shape),
                        where=self.path,
                    )
                if not isinstance(found.dtype, torch.dtype):
                    raise CheckpointError(f"{self.path}: {stored} has dtype {found.dtype}", key=stored, where=self.path)

    def require_complete(self) -> None:
        """Raise if some layers lack a module's factors that others have: only the whole model can have them so."""
        absent = self.incomplete()
        if absent:
            raise CheckpointError(
                f"{self.path} has no factors for {absent[0]} ({len(absent)} modules in all), but for other layers: "
                f"merge it first (python -m megarl.convert from=MODEL adapter={self.path} to=FOLDER)",
                key=absent[0],
                where=self.path,
            )

    def incomplete(self) -> list[str]:
        """Return the modules of the description that the file lacks: other layers have them."""
        return [
            parts.module(number, layer)
            for layer in range(self.model.layers)
            for parts in self.spec.at(layer).values()
            for number, module in enumerate(parts.modules)
            if not self.adapts(layer, module)
        ]

    def adapts(self, layer: int, module: str) -> bool:
        """Return whether a part of a linear layer has factors in this layer of the transformer."""
        return (layer, module) in self._by_place

    @property
    def names(self) -> set[str]:
        """Our names of all tensors that it contains."""
        factors = ("down", "up", "magnitude") if self.spec.kind == "dora" else ("down", "up")
        place_of = {module: parts.place for parts in self.spec.parts.values() for module in parts.modules}
        places = {(layer, place_of[module]) for layer, module in self._by_place}
        return {
            f"decoder.layers.{layer}.{place}.adapter.{factor}" for layer, place in places for factor in factors
        } | set(self.heads)

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name, joined from those of its parts, in float32.

        Parts without factors in this layer are zeros; see `adapts`. Where ranks differ, smaller ones are filled with
        zeros; where scales differ, `up` makes up for it.
        """
        if self._heads is not None and name in self._heads.tensors:
            return self._heads.read(name)
        if name in self.heads:
            return self._file.read(self._head_names[name]).float()
        layer, place, factor = split_name(name)
        parts, rank = self.spec.at(layer)[place], self.spec.rank
        whole = torch.zeros(self.spec.shapes(parts, self._columns[place])[factor])
        for number, (module, rows) in enumerate(zip(parts.modules, parts.rows, strict=True)):
            theirs = self._by_place.get((layer, module))
            if theirs is None:
                continue
            tensor = self._file.read(self._factors[theirs, factor]).float()
            if factor == "down":
                whole[number * rank : number * rank + tensor.shape[0]] = tensor
            elif factor == "up":
                whole[rows, : tensor.shape[1]] = tensor * (self._scaling(theirs, tensor.shape[1]) / self.spec.scaling)
            else:
                whole[rows] = tensor
        return whole

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor, or fewer if it has fewer."""
        return self.read(name)[first:last]

    def _open(self) -> TensorFile:
        for name, kind in ADAPTER_FILES.items():
            if is_file(self.path / name):
                return kind(self.path / name)
        raise CheckpointError(
            f"{self.path} has none of {', '.join(ADAPTER_FILES)}: fetch the adapter again", where=self.path
        )


def _pattern(patterns: Any, module: str, default: float, path: Path) -> float:
    """Return the value of the first pattern that a module's name ends with, as PEFT matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(value)
        except (re.error, TypeError, ValueError):
            raise CheckpointError(
                f"{path / ADAPTER_CONFIG} has {shown(repr(value))} for {shown(pattern)} in alpha_pattern, which is no "
                "number for a name: restore it",
                key="alpha_pattern",
                value=value,
                where=path,
            ) from None
    return default


def _read_config(path: Path) -> Json:
    where = path / ADAPTER_CONFIG
    try:
        config: Json = parse_object(read_text(where))
    except (UnreadableError, ValueError) as problem:
        raise CheckpointError(f"{where} {problem}: fetch it again", where=where) from None
    wrong = {
        "peft_type": config.get("peft_type") != "LORA",
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": config.get("init_lora_weights") not in _STARTS,
        **{key: bool(config.get(key)) for key in _OTHER_METHODS},
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointError(
                f"{where} has {key}={shown(repr(config.get(key)))}, which megarl cannot compute: merge the adapter "
                "with PEFT (merge_and_unload) and use the model",
                key=key,
                value=config.get(key),
                where=where,
            )
    return config


def split_name(name: str) -> tuple[int, str, str]:
    """Return the number of the layer, the place of the linear layer in it and the name of the factor from our name."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.adapter\.(\w+)", name)
    assert match is not None, name
    return int(match[1]), match[2], match[3]


def their_targets(spec: AdapterSpec, model: ModelConfig) -> list[str]:
    """Return the shortest names that mean the adapted modules of all layers and no others. Where encoder and decoder
    differ, those are names with `{}` for the number of the layer."""
    family = FAMILIES[spec.family]
    every = {module for parts in parts_of(family, model).values() for module in parts.modules}
    every.update(
        module for _, module in _of_experts(family, model)
    )  # modules for PEFT beside older versions of transformers
    mine = [module for parts in spec.parts.values() for module in parts.modules]
    found = []
    for module in mine:
        words = module.partition("{}.")[2].split(".")
        names = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        found.append(next((name for name in names if all(o in mine for o in every if o.endswith(f".{name}"))), module))
    return sorted(set(found))
