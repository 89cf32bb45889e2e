"""Write a stored model as a megarl checkpoint of weights alone, which `model.path` reads in any layout."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.checkpoint import COMMON, INDEX, seal
from megarl.models.exchange.export import cast_checked, keep_tokenizer, written_whole
from megarl.models.exchange.parameters import EMBEDDING, OUTPUT, OUTPUT_BIAS, parameters
from megarl.models.exchange.source import Source, tokenizer_of
from megarl.models.exchange.stored import Stored, write_safetensors
from megarl.parallel.shards import Part
from megarl.parallel.vocab import padded_vocab

FILE = "rank-00000.safetensors"
TOKENIZER = "tokenizer"


def write_checkpoint(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    family: str | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write every tensor as one whole part, in this process alone. Vocabularies are padded with rows as in a run.

    `family` is the family in which the checkpoint will be exported (None: the source's).
    """
    dtype = dtype or source.dtype
    rows = padded_vocab(source.vocab_size, 1)
    shapes = parameters(source.model, source.vocab_size, output=source.has_output)
    shapes |= {name: (rows, *shapes[name][1:]) for name in (EMBEDDING, OUTPUT, OUTPUT_BIAS) if name in shapes}
    shapes |= {name: stored.shape for name, stored in source.heads.items()}
    word = str(dtype).removeprefix("torch.")
    parts = {
        name: Part(f"policy.{name}", shape, (0,) * len(shape), shape, word, FILE) for name, shape in shapes.items()
    }

    def tensors() -> Iterator[Tensor]:
        for name, shape in shapes.items():
            progress(name)
            whole = cast_checked(name, source.read(name), dtype)
            missing = shape[0] - whole.shape[0] if shape else 0
            yield F.pad(whole, (0, 0) * (whole.dim() - 1) + (0, missing)) if missing else whole

    with written_whole(folder) as aside:
        described = [(part.name, Stored(part.shape, dtype)) for part in parts.values()]
        write_safetensors(aside / FILE, described, tensors(), {"format": "pt"})
        (aside / INDEX).write_text(json.dumps({"parts": [part.to_json() for part in parts.values()]}))
        (aside / TOKENIZER).mkdir()
        keep_tokenizer(source, aside / TOKENIZER)
        torch.save(_common(source, folder, aside, family), aside / COMMON)
        seal(aside, step=0)
        aside.rename(folder)


def _common(source: Source, folder: Path, aside: Path, family: str | None) -> dict[str, object]:
    """Return the plain values that `CheckpointSource` reads; `run.resume` rejects such a checkpoint."""
    kept = tokenizer_of(aside / TOKENIZER)
    tokenizer = None
    if kept is not None:
        kind, path = kept
        tokenizer = {"kind": kind, "path": None if path is None else str(folder / TOKENIZER)}
    card = {
        "config": asdict(source.model),
        "vocab_size": source.vocab_size,
        "family": family or (source.family.name if source.family else None),
        "tokenizer": tokenizer,
        "token_ids": source.token_ids,
        "score_moments": source.score_moments,
        "score_reads_eos": source.score_reads_eos,
        "reward_kind": source.reward_kind,
    }
    return {"model": card, "weights_only": True, "global_step": 0, "layout": "TP1", "sharded_common": {}}
