"""The formats of stored models, recognised by the files at a path. A new format is a line in `FORMATS`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megarl.checkpoint import MANIFEST, find, plain_content
from megarl.config.files import require_weights
from megarl.disk import exists, is_file, local
from megarl.errors import CheckpointError, MegarlError, UnavailableError, first_line
from megarl.logging import get_logger
from megarl.models.exchange.adapters import ADAPTER_CONFIG, PeftAdapter, family_of_parts
from megarl.models.exchange.checkpoints import write_checkpoint
from megarl.models.exchange.export import write_folder
from megarl.models.exchange.merged import CheckpointAdapter, MergedSource
from megarl.models.exchange.nemo import NemoSource
from megarl.models.exchange.nemo_write import write_nemo
from megarl.models.exchange.peft import write_adapter, write_peft
from megarl.models.exchange.source import CONFIG, CheckpointSource, HuggingFaceSource, Source, family_name

log = get_logger(__name__)
_WEIGHTS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


class Write(Protocol):
    """Write a stored model to a sibling path and rename it; `progress` is called with the name of every tensor."""

    def __call__(
        self,
        source: Source,
        target: Path,
        /,
        *,
        dtype: torch.dtype | None = None,
        family: str | None = None,
        progress: Callable[[str], None] = ...,
    ) -> None:
        """Write `source` to `target`, optionally in another dtype, for a later export as `family`."""


@dataclass(frozen=True)
class Format:
    """How to recognise a format, open it and write it."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Source]
    write: Write


def _newest(path: Path) -> Path:
    """Return a checkpoint, or the newest in its folder, or the newest in a run's folder."""
    if is_file(path / MANIFEST):
        return path
    found = find(path) or find(path / "checkpoints")
    return found[-1]


def _is_checkpoint(path: Path) -> bool:
    return is_file(path / MANIFEST) or bool(find(path) or find(path / "checkpoints"))


def _open_checkpoint(path: Path) -> Source:
    """Open a checkpoint; one of a run with an adapter is read with the model that it was trained beside."""
    folder = _newest(path)
    return with_base(CheckpointAdapter(folder)) if has_adapter(folder) else CheckpointSource(folder)


def has_adapter(folder: Path) -> bool:
    """Return whether a megarl checkpoint contains an adapter instead of a whole model."""
    card = plain_content(folder)[0].get("model")
    return isinstance(card, dict) and card.get("adapter") is not None


def with_base(adapter: PeftAdapter | CheckpointAdapter) -> MergedSource:
    """Open the model that an adapter was trained beside."""
    remedy = (
        f"python -m megarl.convert from=MODEL adapter={adapter.path} to=FOLDER merges it with a model that you name"
    )
    if adapter.base is None:
        why = "was trained beside random weights, which are not stored: export.hf writes the whole model in training"
        if isinstance(adapter, PeftAdapter):
            why = f"does not say of which model (base_model_name_or_path): {remedy}"
        raise CheckpointError(f"{adapter.path} is an adapter and {why}", key="adapter", where=adapter.path)
    try:
        base = open_source(adapter.base)
    except MegarlError as problem:
        raise CheckpointError(
            f"{adapter.path} is an adapter of {adapter.base}, which cannot be opened ({problem}): {remedy}",
            key="adapter",
            value=adapter.base,
            where=adapter.path,
        ) from None
    return merged(base, adapter, adapter.base)


def merged(base: Source, adapter: PeftAdapter | CheckpointAdapter, base_name: str | None = None) -> MergedSource:
    """Return a stored model with an adapter. Raise if they do not fit.

    `base_name` is the path or hub name of the model, which an adapter written from it contains (None: its path).
    """
    if isinstance(adapter, PeftAdapter):
        adapter.fit(base.model, family_of_parts(base.model, family_name(base)))
    return MergedSource(base, adapter, base_name or str(base.path))


def open_adapter(path: str | Path) -> PeftAdapter | CheckpointAdapter:
    """Open the adapter at a path: a PEFT folder, a hub name, or a megarl checkpoint or run folder."""
    folder = resolve(str(path))
    if is_file(folder / ADAPTER_CONFIG):
        return PeftAdapter(folder)
    if _is_checkpoint(folder) and has_adapter(_newest(folder)):
        return CheckpointAdapter(_newest(folder))
    raise CheckpointError(
        f"{folder} contains no adapter: neither a PEFT folder (with {ADAPTER_CONFIG}) nor a checkpoint of a run with "
        "adapter.*",
        where=folder,
    )


FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Format("megarl", _is_checkpoint, _open_checkpoint, write_checkpoint),
        Format("nemo", lambda path: path.suffix == ".nemo" and is_file(path), NemoSource, write_nemo),
        Format("huggingface", lambda path: is_file(path / CONFIG), HuggingFaceSource, write_folder),
        Format(
            "peft",
            lambda path: is_file(path / ADAPTER_CONFIG),
            lambda path: with_base(PeftAdapter(path)),
            write_peft,
        ),
    )
}


def open_source(path: str | Path) -> Source:
    """Open the model at a path: a Hugging Face folder or hub name, a .nemo, a megarl checkpoint or run folder."""
    folder = resolve(str(path))
    for known in FORMATS.values():
        if known.matches(folder):
            return known.open(folder)
    raise CheckpointError(
        f"{folder} contains no model: no Hugging Face folder (with config.json), .nemo archive or megarl checkpoint",
        where=folder,
    )


def resolve(path: str) -> Path:
    """Return the path of a local folder, or the snapshot folder of a hub name."""
    place = local(path)
    if exists(place):
        return place.absolute()
    require_weights(path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UnavailableError(
            f"{path} is not a local folder, and a hub name needs: pip install huggingface_hub",
            key="huggingface_hub",
            where=path,
        ) from None
    try:
        folder = Path(snapshot_download(path, allow_patterns=_WEIGHTS))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(path, allow_patterns=[*_WEIGHTS, "*.bin"]))
    except Exception as problem:  # the hub's client and the network raise many types
        raise CheckpointError(
            f"{path} is neither a local folder nor a model on the hub ({first_line(problem)[:160]}): check "
            "the name, or download it on a machine with network access and use its folder",
            where=path,
        ) from None
    log.info("model %s is at %s", path, folder)
    return folder


def write_pretrained(checkpoint: Path, target: Path, *, adapter: bool = False) -> None:
    """Write the model of a checkpoint as a folder that transformers loads, or its adapter as one that PEFT loads."""
    if adapter:
        write_adapter(open_adapter(checkpoint), target)
    else:
        FORMATS["huggingface"].write(open_source(str(checkpoint)), target)
