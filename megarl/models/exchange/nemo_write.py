"""Writing NeMo's GPT archives (.nemo): tensors are split into the files of tensor- and pipeline-parallel ranks."""

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from megarl.config.sections.model import ModelConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.export import cast_checked, keep_tokenizer, refuse_existing, written_whole
from megarl.models.exchange.family import Json
from megarl.models.exchange.nemo import CONFIG, FUSED_NORMS, HEADS, OURS, TOKENIZER, marker, member_of
from megarl.models.exchange.nemo_archive import finish, reserve
from megarl.models.exchange.nemo_config import VOCAB_MULTIPLE, write_config
from megarl.models.exchange.parameters import EMBEDDING, OUTPUT, VOCABULARY, parameters
from megarl.models.exchange.source import Source, tokenizer_of
from megarl.models.exchange.stored import Stored
from megarl.parallel.initialise import local_slice


def write_nemo(
    source: Source,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
    tp: int = 1,
    pp: int = 1,
) -> None:
    """Write a stored model as an archive for `tp` x `pp` ranks. `family` is the family for a later export.

    The files of one pipeline stage at a time are beside the archive, which is renamed when it is complete.
    """
    if not source.has_output:
        raise CheckpointError(
            f"{source.path} is a reward model, which a .nemo archive cannot hold: write a Hugging Face folder or a "
            "megarl checkpoint",
            where=source.path,
        )
    if source.model.experts is not None:
        raise ConfigError(
            f"{source.path} has model.experts.count={source.model.experts.count}, and megarl writes no mixture of "
            "experts as a .nemo archive: write a Hugging Face folder or a megarl checkpoint",
            key="model.experts.count",
            value=source.model.experts.count,
            where=source.path,
        )
    dtype = dtype or source.dtype
    config = write_config(source.model, source.vocab_size, dtype, tp, pp)
    _check_split(source.model, tp, pp)
    named = family or (source.family.name if source.family else None)
    config[OURS] = {"family": named, "token_ids": source.token_ids}
    with written_whole(path) as aside:
        with tarfile.open(aside / "archive", "w:") as tar:
            (aside / TOKENIZER).mkdir()
            keep_tokenizer(source, aside / TOKENIZER)
            (aside / TOKENIZER / "generation_config.json").unlink(missing_ok=True)
            config["tokenizer"] = _describe_tokenizer(aside / TOKENIZER)
            (aside / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
            tar.add(aside / CONFIG, f"./{CONFIG}")
            for file in sorted((aside / TOKENIZER).iterdir()):
                tar.add(file, f"./{TOKENIZER}/{file.name}")
            for stage in range(pp):
                _write_stage(source, aside, tar, dtype, progress, (stage, pp), tp)
            if source.heads:
                _write_heads(source, aside, tar, dtype)
        refuse_existing(path)
        (aside / "archive").rename(path)


def _write_stage(
    source: Source,
    aside: Path,
    tar: tarfile.TarFile,
    dtype: torch.dtype,
    progress: Callable[[str], None],
    stage: tuple[int, int],
    tp: int,
) -> None:
    """Write the files of one stage's ranks together, so that every tensor is read once."""
    number, pp = stage
    names = _stage_names(source.model, source.vocab_size, number, pp)
    rows = -(-source.vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE * tp
    described = {}
    for theirs, (name, shape) in names.items():
        whole = (rows, *shape[1:]) if name in VOCABULARY else shape
        part = local_slice(torch.empty(whole, device="meta"), marker(name, source.model), 0, tp)
        described[theirs] = Stored(tuple(part.shape), dtype)
    files = [aside / f"{rank}.ckpt" for rank in range(tp)]
    ranks = [reserve(file, described) for file in files]
    try:
        for theirs, (name, _) in names.items():
            progress(name)
            tensor = cast_checked(name, source.read(name), dtype)
            if name in VOCABULARY:
                tensor = F.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
            for rank, member in enumerate(ranks):
                member.write(theirs, local_slice(tensor, marker(name, source.model), rank, tp))
    finally:
        for member in ranks:
            finish(member)
    for rank, file in enumerate(files):
        tar.add(file, f"./{member_of(rank, tp, number, pp)}")
        file.unlink()


def _write_heads(source: Source, aside: Path, tar: tarfile.TarFile, dtype: torch.dtype) -> None:
    member = reserve(aside / HEADS, {name: Stored(stored.shape, dtype) for name, stored in source.heads.items()})
    try:
        for name in source.heads:
            member.write(name, cast_checked(name, source.read(name), dtype))
    finally:
        finish(member)
    tar.add(aside / HEADS, f"./{HEADS}")


def _stage_names(model: ModelConfig, vocab_size: int, stage: int, pp: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return NeMo's names of a stage's tensors, with our names and whole shapes."""
    per_stage = model.num_layers // pp
    shapes = parameters(model, vocab_size)
    if pp > 1 and model.tie_embeddings:  # the last stage has a copy of the embedding to compute logits with
        shapes[OUTPUT] = shapes[EMBEDDING]
    names = {}
    for name, shape in shapes.items():
        layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
        if layer is None:
            if (0 if name.startswith("embedding.") else pp - 1) == stage:
                names[f"model.{name}"] = (EMBEDDING if name == OUTPUT and model.tie_embeddings else name, shape)
        elif int(layer[1]) // per_stage == stage:
            rest = layer[2]
            for ours, theirs in FUSED_NORMS.items():
                rest = rest.replace(ours, theirs, 1) if rest.startswith(ours) else rest
            names[f"model.decoder.layers.{int(layer[1]) % per_stage}.{rest}"] = (name, shape)
    return names


def _check_split(model: ModelConfig, tp: int, pp: int) -> None:
    counts = {
        "num_heads": model.num_heads,
        "num_kv_heads": model.kv_heads,
        "ffn_size": model.ffn_width,
    }
    for key, count in counts.items():
        if count % tp:
            raise _does_not_divide("tp", tp, key, count)
    if model.num_layers % pp:
        raise _does_not_divide("pp", pp, "num_layers", model.num_layers)


def _does_not_divide(axis: str, size: int, key: str, count: int) -> ConfigError:
    return ConfigError(
        f"{axis}={size} does not divide the model's {key}={count}: use a {axis} that does", key=axis, value=size
    )


def _describe_tokenizer(folder: Path) -> Json:
    """Return NeMo's `tokenizer` section; a kind that NeMo lacks (bytes) is recorded for megarl only."""
    kind = tokenizer_of(folder)
    if kind is not None and kind[0] == "sentencepiece":
        return {"library": "sentencepiece", "type": None, "model": f"nemo:{TOKENIZER}/tokenizer.model"}
    return {"library": "huggingface" if kind is not None and kind[0] == "huggingface" else None, "type": None}
