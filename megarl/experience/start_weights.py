"""The initial weights of a run with a reference: stored if they cannot be read again from elsewhere.

They are stored as `RUN/reference/NAME`, a checkpoint of weights alone. The name is a hash of the content, so that a
checkpoint with this name finds exactly these weights or none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megarl.checkpoint import MANIFEST, ShardedCheckpointIO, remove, verify
from megarl.disk import written_aside
from megarl.errors import CheckpointError
from megarl.logging import get_logger
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.formats import has_adapter
from megarl.models.exchange.load import load, start_adapters
from megarl.models.exchange.merged import CheckpointAdapter
from megarl.models.exchange.source import CheckpointSource
from megarl.parallel.engine import Engine

FOLDER, UNNAMED = "reference", "unnamed"
log = get_logger(__name__)


def keep(engine: Engine, card: ModelCard, run_dir: Path) -> str:
    """Write the policy's present weights, all or nothing, and return their name. All ranks call this together."""
    unnamed = run_dir / FOLDER / UNNAMED
    files = ShardedCheckpointIO()
    files.grid = engine.grid
    described = {"global_step": 0, "layout": str(engine.grid.layout), "model": card.plain(), "weights_only": True}
    files.save_checkpoint({**described, "state_dict": engine.sharded_weights()}, unnamed)
    name: str = engine.grid.run_on_rank0(lambda: _named(unnamed))
    return name


def take(engine: Engine, name: str, run_dir: Path, checkpoint: Path) -> bool:
    """Load the stored weights of this name into the engine. Return whether they were found intact. All ranks call this
    together.

    They are in this run's folder or in that of the checkpoint, from which they are copied into this run's folder.
    """
    here = run_dir / FOLDER / name
    found: Path | None = engine.grid.run_on_rank0(lambda: _copied(name, here, checkpoint))
    if found is None:
        return False
    if has_adapter(found):
        adapter = CheckpointAdapter(found)
        for model in engine.models:
            start_adapters(model, adapter, engine.grid)
    else:
        source = CheckpointSource(found)
        for model in engine.models:
            load(model, source, engine.grid)
    return True


def _named(unnamed: Path) -> str:
    """Rename the folder that was just written to the hash of its content. An earlier start may have left the same
    content."""
    files = json.loads((unnamed / MANIFEST).read_text())["files"]
    weights = sorted((name, *found) for name, found in files.items() if name.endswith(".safetensors"))
    name = hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:12]
    folder = unnamed.with_name(name)
    if folder.exists() and verify(folder) is None:
        remove(unnamed)
    else:
        remove(folder)
        unnamed.rename(folder)
    return name


def _copied(name: str, here: Path, checkpoint: Path) -> Path | None:
    """Return a folder with intact weights of this name, copied into this run's folder first; None if there is none."""
    for folder in _candidates(name, here, checkpoint):
        problem = verify(folder)
        if problem is not None:
            log.warning("the reference's weights %s are damaged (%s) and are skipped", folder, problem)
            continue
        if folder != here:
            try:
                with written_aside(here) as aside:
                    shutil.copytree(folder, aside, dirs_exist_ok=True)
                    remove(here)
            except OSError as problem:
                raise CheckpointError(
                    f"the reference's weights {folder} cannot be copied to {here} ({problem}): free space, or set "
                    "run.dir elsewhere",
                    where=folder,
                ) from None
        return here
    return None


def _candidates(name: str, here: Path, checkpoint: Path) -> Iterator[Path]:
    """Yield the folders that may have the weights. A checkpoint is in RUN/checkpoints or RUN/checkpoints/earlier-N."""
    for folder in (here, *(parent / FOLDER / name for parent in list(checkpoint.parents)[1:3])):
        if folder.is_dir():
            yield folder
