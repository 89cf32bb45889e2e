"""Checkpoints: every file of a real one, spoilt without and with a manifest that is put right afterwards."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from megarl.checkpoint import COMMON, INDEX, MANIFEST, _size_and_checksum, find, plain_content, tensors, verify
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.shape import check_shape
from megarl.errors import CheckpointError
from megarl.models.exchange.pretrained import Sources
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case
from tests.gates.fuzz.runs import sft_run

STEP = "step-0000002"


def cases(seed: int, count: int, store: Path) -> list[Case]:
    original = sft_run(store) / "checkpoints" / STEP
    made = []
    for number in range(count):
        draw = Random(f"checkpoints {seed} {number}")
        what, change = draw.choices((_file, _json_file, _common, _manifest), (4, 4, 5, 3))[0](draw, original)
        mended = draw.random() < 0.6

        def lay(folder: Path, change: Callable[[Path], Any] = change, mended: bool = mended) -> None:
            shutil.copytree(original, folder / STEP)
            change(folder / STEP)
            if mended:
                mend(folder / STEP)

        label = f"checkpoints {STEP} {seed}.{number}: {what}{', manifest put right' if mended else ''}"
        made.append(Case(label, lay, read, ("model.",)))
    return made


def mend(folder: Path) -> None:
    """Sizes and checksums of the files as they are now, as far as the manifest can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in manifest["files"]:
            if (folder / name).is_file():
                manifest["files"][name] = _size_and_checksum(folder / name)
        (folder / MANIFEST).write_text(json.dumps(manifest))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return


def read(folder: Path) -> None:
    """Look for it, verify it, and read all that it holds, as a run, `model.path` and `convert` do."""
    path = folder / STEP
    for found in find(folder):
        assert isinstance(verify(found), CheckpointError | None)
    problem: Exception | None = None
    for reader in (plain_content, tensors, _opened):
        try:
            reader(path)
        except Exception as caught:  # the last is raised, after all have been tried
            from megarl.errors import MegarlError

            if not isinstance(caught, MegarlError):
                raise
            problem = caught
    if problem is not None:
        raise problem


def _opened(path: Path) -> None:
    source = Sources().whole(str(path), "model.path")
    check_shape(source.model, ParallelConfig())
    for name in sorted(source.names):
        source.read(name)
        source.rows(name, 1, 3)


Change = tuple[str, Callable[[Path], Any]]


def _file(draw: Random, original: Path) -> Change:
    name = draw.choice(sorted(path.name for path in original.iterdir()))
    ways: dict[str, Callable[[Path], Any]] = {
        "is missing": lambda path: path.unlink(),
        "is a folder": lambda path: (path.unlink(), path.mkdir()),
        "is a broken link": lambda path: (path.unlink(), path.symlink_to("gone")),
        "is another file": lambda path: path.write_bytes((original / draw.choice((INDEX, COMMON))).read_bytes()),
    }
    if draw.random() < 0.4:
        what = draw.choice(list(ways))
        return f"{name} {what}", lambda folder: ways[what](folder / name)
    what, spoilt = mutate.data(draw, (original / name).read_bytes())
    return f"{name} {what}", lambda folder: mutate.put(folder / name, spoilt)


def _json_file(draw: Random, original: Path) -> Change:
    what, tree = mutate.tree(draw, json.loads((original / INDEX).read_text()))
    return f"{INDEX} {what}", lambda folder: mutate.put(folder / INDEX, mutate.dumps(tree))


def _manifest(draw: Random, original: Path) -> Change:
    what, tree = mutate.tree(draw, json.loads((original / MANIFEST).read_text()))
    return f"{MANIFEST} {what}", lambda folder: mutate.put(folder / MANIFEST, mutate.dumps(tree))


def _common(draw: Random, original: Path) -> Change:
    common: dict[str, Any] = torch.load(original / COMMON, weights_only=True)
    values = [(label, value) for label, value in mutate.VALUES if not isinstance(value, mutate.Raw)]
    values += [("a tensor", torch.zeros(3)), ("an empty tensor", torch.empty(0))]
    section = draw.choice(("model", "model", "model", *common))
    what, changed = mutate.tree(draw, {section: common[section]}, values)
    whole = (
        {**{key: value for key, value in common.items() if key != section}, **changed}
        if isinstance(changed, dict)
        else changed
    )
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    return f"{COMMON} {what}", lambda folder: mutate.put(folder / COMMON, buffer.getvalue())
