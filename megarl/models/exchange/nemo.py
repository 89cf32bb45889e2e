"""NeMo's GPT archives (.nemo): shards of tensor- and pipeline-parallel ranks, merged while reading.

Their tensor names are Megatron's, like ours, except for layer numbers and the names of norms.
"""

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
import yaml
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import UnreadableError, check_yaml, written_aside
from megarl.errors import CheckpointError
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.family import Json
from megarl.models.exchange.nemo_archive import Archive, TensorMember
from megarl.models.exchange.nemo_config import read_config
from megarl.models.exchange.parameters import EMBEDDING, OUTPUT, VOCABULARY, parameters
from megarl.models.exchange.source import Source, tokenizer_of, unfit_dtype, widest_dtype
from megarl.models.exchange.stored import Stored
from megarl.parallel.initialise import is_sharded, join_slices, partition_dim

CONFIG, WEIGHTS, HEADS, TOKENIZER = "model_config.yaml", "model_weights.ckpt", "megarl_heads.ckpt", "tokenizer"
OURS = "megarl"
"""A key of model_config.yaml that NeMo ignores: the family to export as, and the tokenizer's ids."""
# With transformer_engine, NeMo stores a norm within the projection that follows it.
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_LEFT_OUT = {
    r".*\._extra_state": "state of Transformer Engine, not a weight",
    r"rotary_pos_emb\.inv_freq": "computed from the configuration",
}


class Place(NamedTuple):
    """The stored name of a parameter, and the files of all tensor-parallel ranks that contain it."""

    name: str
    files: list[TensorMember]


class NemoSource(Source):
    """A .nemo archive of one GPT, in any tensor- and pipeline-parallel split."""

    kind = "nemo"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = Archive(path)
        config = _yaml(self._archive)
        self.model = read_config(config)
        ours = config.get(OURS)
        ours = ours if isinstance(ours, dict) else {}
        family, token_ids = ours.get("family"), ours.get("token_ids")
        self.family = FAMILIES.get(family) if isinstance(family, str) else None
        self.token_ids = dict(token_ids) if isinstance(token_ids, dict) else {}
        self.left_out: dict[str, str] = {}
        self._places = self._find(_rank_files(self._archive, config))
        self.vocab_size = self._vocab_size(config)
        self._check()
        self._heads = self._archive.tensors(HEADS) if HEADS in self._archive.members else None
        self.heads = self._heads.tensors if self._heads else {}
        self.tokenizer = _unpacked_tokenizer(self._archive, config)
        self.model.vocab_size = self.vocab_size

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, joined from its shards; vocabularies without padding rows."""
        if self._heads is not None and name in self.heads:
            return self._heads.read(name)
        place = self._places[name]
        if len(place.files) == 1:
            whole = place.files[0].read(place.name)
        else:
            whole = join_slices([file.read(place.name) for file in place.files], marker(name, self.model))
        return whole[: self.vocab_size] if name in VOCABULARY else whole

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1; of a vocabulary, only the shards that contain them are read."""
        if name not in VOCABULARY:
            return super().rows(name, first, last)
        place, last = self._places[name], min(last, self.vocab_size)
        parts: list[Tensor] = []
        start = 0
        for file in place.files:
            count = file.tensors[place.name].shape[0]
            low, high = max(first - start, 0), min(last - start, count)
            if low < high or not parts:  # an empty part has the width and the dtype
                parts.append(file.rows(place.name, low, max(low, high)))
            start += count
        return torch.cat(parts)

    def _find(self, stages: list[list[TensorMember]]) -> dict[str, Place]:
        """Return where our parameters are stored: NeMo counts layers within a stage, we count over all stages."""
        places: dict[str, Place] = {}
        offset = 0
        for files in stages:
            layers = 0
            for theirs in [*files[0].tensors, *files[0].others]:
                name, layer = _our_name(theirs, offset)
                layers = max(layers, layer + 1)
                reason = next((why for pattern, why in _LEFT_OUT.items() if re.fullmatch(pattern, name)), None)
                if name == OUTPUT and self.model.tie_embeddings:
                    reason = "tied to the embedding, which is read instead"
                if reason:
                    self.left_out[theirs] = reason
                    continue
                lacking = next((file for file in files if theirs not in file.tensors), None)
                if lacking:
                    raise CheckpointError(
                        f"{lacking.label} lacks the tensor {theirs}, which other ranks contain",
                        key=theirs,
                        where=lacking.label,
                    )
                split = is_sharded(marker(name, self.model))
                places[name] = Place(theirs, files if split else files[:1])
            offset += layers
        if offset != self.model.num_layers:
            raise CheckpointError(
                f"{self.path} has {offset} layers and its {CONFIG} says num_layers={self.model.num_layers}: they do "
                "not belong together",
                key="num_layers",
                value=self.model.num_layers,
                where=self.path,
            )
        return places

    def _vocab_size(self, config: Json) -> int:
        if EMBEDDING not in self._places:
            raise CheckpointError(
                f"{self.path} lacks {EMBEDDING}: the model is incomplete", key=EMBEDDING, where=self.path
            )
        place = self._places[EMBEDDING]
        rows = sum(file.tensors[place.name].shape[0] for file in place.files)
        size = int(config.get("override_vocab_size") or rows)
        if size > rows:
            raise CheckpointError(
                f"{self.path} has {rows} rows of embeddings and {CONFIG} override_vocab_size={size}",
                key="override_vocab_size",
                value=size,
                where=self.path,
            )
        return size

    def _check(self) -> None:
        """Raise for tensors that are missing, unknown, misshapen or not weights."""
        wanted = parameters(self.model, self.vocab_size)
        missing = [name for name in wanted if name not in self._places]
        unknown = [place.name for name, place in self._places.items() if name not in wanted]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {missing[0]} ({len(missing)} in all), which {CONFIG} requires",
                key=missing[0],
                where=self.path,
            )
        if unknown:
            raise CheckpointError(
                f"{self.path} has a tensor {unknown[0]} that a model of its {CONFIG} does not",
                key=unknown[0],
                where=self.path,
            )
        found: list[Stored] = []
        for name, place in self._places.items():
            shape, dim = list(wanted[name]), partition_dim(marker(name, self.model))
            parts = [file.tensors[place.name] for file in place.files]
            whole = list(parts[0].shape)
            if len(whole) == len(shape):
                whole[dim] = sum(part.shape[dim] for part in parts)
            if name in VOCABULARY:  # padded
                shape[0] = max(shape[0], whole[0])
            if whole != shape or any(part.shape != parts[0].shape for part in parts):
                raise CheckpointError(
                    f"{self.path}: {place.name} has shape {whole} over all ranks, but {CONFIG} requires {shape}",
                    key=place.name,
                    value=whole,
                    where=self.path,
                )
            bad = next((part.dtype for part in parts if not isinstance(part.dtype, torch.dtype)), None)
            if bad:
                raise unfit_dtype(self.path, place.name, bad)
            found += parts
        self.dtype = widest_dtype([part.dtype for part in found])
        self.stored = (len(found), sum(part.bytes for part in found))


def _our_name(theirs: str, offset: int) -> tuple[str, int]:
    """Return our name of a stored tensor, and its layer within the stage (-1 if it belongs to none)."""
    if ".language_model." in theirs:
        raise CheckpointError(
            f"{theirs} is a name from before Megatron Core (mcore_gpt: false), which cannot be read: convert the "
            "archive with NeMo's scripts/checkpoint_converters (mcore_gpt: true) first",
            key=theirs,
            offers={"mcore_gpt": [True]},
        )
    name = theirs.removeprefix("model.").removeprefix("module.")
    layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return name, -1
    rest = layer[2]
    for ours, fused in FUSED_NORMS.items():
        rest = ours + rest.removeprefix(fused) if rest.startswith(fused) else rest
    return f"decoder.layers.{int(layer[1]) + offset}.{rest}", int(layer[1])


def marker(name: str, model: ModelConfig) -> Tensor:
    """Return a tensor without data but with Megatron's attributes for how a parameter of this name is split."""
    mark = torch.empty(0, device="meta")
    column = name in VOCABULARY or ".linear_qkv." in name or ".linear_fc1." in name
    row = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    gated = ".linear_fc1." in name and model.activation == "swiglu"
    set_tensor_model_parallel_attributes(mark, column or row, 1 if row else 0, 2 if gated else 1)
    return mark


def member_of(rank: int, tp: int, stage: int, pp: int) -> str:
    """Return the path of a rank's weights within the archive."""
    if pp > 1:
        return f"tp_rank_{rank:02d}_pp_rank_{stage:03d}/{WEIGHTS}"
    return f"mp_rank_{rank:02d}/{WEIGHTS}" if tp > 1 else WEIGHTS


def _rank_files(archive: Archive, config: Json) -> list[list[TensorMember]]:
    """Return the files by stage and tensor-parallel rank; raise unless they are exactly those of the configuration."""
    if any(name.startswith("model_weights/") for name in archive.members):
        raise CheckpointError(
            f"{archive.path} holds a distributed checkpoint (model_weights/), which cannot be read: save it from NeMo "
            "with dist_ckpt_format unset, or convert it to Hugging Face there",
            key="dist_ckpt_format",
            where=archive.path,
        )
    sizes = [config.get(f"{kind}_model_parallel_size") or 1 for kind in ("tensor", "pipeline")]
    if config.get("virtual_pipeline_model_parallel_size"):
        raise CheckpointError(
            f"{archive.path} has virtual pipeline stages (virtual_pipeline_model_parallel_size), which cannot be read: "
            "save it without them",
            key="virtual_pipeline_model_parallel_size",
            value=config["virtual_pipeline_model_parallel_size"],
            where=archive.path,
        )
    tp, pp = (int(size) for size in sizes)
    if tp * pp > len(archive.members):
        raise CheckpointError(
            f"{archive.path} lacks some of the {tp * pp} files of TP{tp} x PP{pp}: fetch it again",
            where=archive.path,
        )
    wanted = [[member_of(rank, tp, stage, pp) for rank in range(tp)] for stage in range(pp)]
    flat = [name for names in wanted for name in names]
    found = {name for name in archive.members if PurePosixPath(name).name == WEIGHTS}
    missing, extra = [name for name in flat if name not in found], sorted(found - set(flat))
    if missing:
        raise CheckpointError(
            f"{archive.path} lacks {missing[0]}, one of {len(flat)} (TP{tp} x PP{pp}): fetch it again",
            key=missing[0],
            where=archive.path,
        )
    if extra:
        raise CheckpointError(
            f"{archive.path} has {extra[0]}, which its {CONFIG} (TP{tp} x PP{pp}) does not include",
            key=extra[0],
            where=archive.path,
        )
    return [[archive.tensors(name) for name in names] for names in wanted]


def _yaml(archive: Archive) -> Json:
    where = f"{archive.path}: {CONFIG}"
    if CONFIG not in archive.members:
        raise CheckpointError(
            f"{archive.path} has no {CONFIG}: it is not a NeMo archive", key=CONFIG, where=archive.path
        )
    try:
        text = archive.content(CONFIG).decode("utf-8")
        check_yaml(text)
        config = yaml.safe_load(text)
    except UnreadableError as problem:
        raise CheckpointError(f"{where} {problem}: fetch it again", where=where) from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as problem:
        raise CheckpointError(f"{where} cannot be read ({' '.join(str(problem).split())})", where=where) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{where} contains no settings", where=where)
    return config


def _unpacked_tokenizer(archive: Archive, config: Json) -> tuple[str, str | None] | None:
    """Unpack the archive's tokenizer into a cache folder named by its content, as later runs refer to it; return its
    kind and folder."""
    files = {name: Path(name).name for name in archive.members if Path(name).parent.as_posix() == TOKENIZER}
    theirs = config.get("tokenizer")
    theirs = theirs if isinstance(theirs, dict) else {}
    model = os.path.normpath(str(theirs.get("model") or "").removeprefix("nemo:"))
    if not files and theirs.get("library") == "sentencepiece" and model in archive.members:
        files = {model: "tokenizer.model"}
    if not files:
        return None
    contents = {target: archive.content(name) for name, target in sorted(files.items())}
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "megarl" / "nemo"
    folder = root / digest
    if not folder.is_dir():
        try:
            with written_aside(folder) as aside:
                for target, content in contents.items():
                    (aside / target).write_bytes(content)
        except OSError as problem:
            if not folder.is_dir():  # otherwise another process was faster
                raise CheckpointError(
                    f"the tokenizer of {archive.path} could not be unpacked in {root} ({problem})", where=root
                ) from None
    return tokenizer_of(folder)
