"""Checkpoints as folders that are whole or not there: written aside, checked, and committed by a rename.

Behind Lightning's public `CheckpointIO`. A folder holds one shard file per writing rank, `common.pt` (plain values,
read with weights_only), `index.json` (where every tensor lies) and `manifest.json` (sizes and checksums), last of all.
"""

import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.io import CheckpointIO

from megarl.errors import CheckpointError
from megarl.logging import get_logger
from megarl.parallel import shards
from megarl.parallel.grid import Grid
from megarl.parallel.shards import Part

MANIFEST, INDEX, COMMON = "manifest.json", "index.json", "common.pt"
FORMAT = 1
log = get_logger(__name__)


class ShardedCheckpointIO(CheckpointIO):
    """Saves and loads on every rank together. With `asynchronous`, files are written by a thread from host copies."""

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.grid: Grid | None = None  # set by the strategy once the world is up
        self.pending: _Save | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """`checkpoint["state_dict"]` is a sharded state dict; the rest is Lightning's and is common to all ranks."""
        assert self.grid is not None
        self.wait()
        self.pending = _Save(Path(path), checkpoint, self.grid, copy=self.asynchronous)
        if self.asynchronous:
            self.pending.start()
        else:
            self.pending.run()
            self.wait()

    def poll(self) -> None:
        """Commit a background save once every rank has written its file. All ranks call this together."""
        if self.pending is not None and self.grid is not None and not self.grid.any_rank(not self.pending.done):
            self.wait()

    def wait(self) -> None:
        """Finish and commit the pending save, if there is one."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.commit()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Lightning's part of the newest whole checkpoint at `path` (one checkpoint, or a folder of them).

        `state_dict` in the result is a function that fills a template with this rank's shards.
        """
        grid = self.grid
        assert grid is not None
        folder = _agree(grid, lambda: _choose(Path(path)))
        common = torch.load(folder / COMMON, map_location="cpu", weights_only=True)
        index = json.loads((folder / INDEX).read_text())
        parts = [Part.from_json(fields) for fields in index["parts"]]
        sharded_common = common.pop("sharded_common")

        def fill(template: dict[str, Any]) -> dict[str, Any]:
            return shards.read(template, sharded_common, parts, folder, grid)

        log.info("restoring from %s (step %s, written at %s)", folder, common.get("global_step"), common.get("layout"))
        return {**common, "state_dict": fill, "folder": str(folder)}

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))

    def teardown(self) -> None:
        """Lightning is done: a background save that still runs must not be lost."""
        self.wait()


class _Save:
    """One save: collected at once, written (perhaps by a thread), committed by all ranks together."""

    def __init__(self, folder: Path, checkpoint: dict[str, Any], grid: Grid, *, copy: bool) -> None:
        self.folder, self.grid = folder, grid
        self.aside = folder.with_name(f".{folder.name}.writing")
        self.file = f"rank-{grid.rank:05d}.safetensors"
        self.common = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        parts, common = shards.collect(checkpoint["state_dict"], grid, self.file)
        self.common["sharded_common"] = _union(grid.gather(common))
        if copy:  # training goes on and changes the tensors
            parts = [(part, data.to("cpu", copy=True)) for part, data in parts]
        self.parts = parts
        self.problem: str | None = None
        self.written: dict[str, list[int]] = {}
        self.thread: threading.Thread | None = None
        _agree(grid, self._make_folder)

    def start(self) -> None:
        self.thread = threading.Thread(target=self.run, name="checkpoint")
        self.thread.start()

    @property
    def done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def run(self) -> None:
        """Write this rank's file. A failure is kept for `commit`, which every rank must reach."""
        try:
            if self.parts:
                path = self.aside / self.file
                shards.write(path, self.parts)
                path.chmod(0o644)  # safetensors leaves files that only their owner can read
                self.written[self.file] = _size_and_checksum(path)
        except Exception as problem:
            self.problem = f"{type(problem).__name__}: {problem}"

    def commit(self) -> None:
        if self.thread is not None:
            self.thread.join()
        report = (self.problem, self.written, [part.to_json() for part, _ in self.parts])
        reports = self.grid.gather(report)
        _agree(self.grid, lambda: self._finish(reports))
        self.parts = []

    def _make_folder(self) -> None:
        try:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
        except OSError as problem:
            raise CheckpointError(
                f"cannot write in {self.folder.parent}: {problem.strerror}; set run.dir elsewhere"
            ) from None

    def _finish(self, reports: list[Any]) -> None:
        """On the first rank: the files that make the folder whole, then the rename that makes it a checkpoint."""
        try:
            problems = [f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report[0]]
            if problems:
                raise OSError("; ".join(problems))
            parts = [fields for report in reports for fields in report[2]]
            shards.check_complete([Part.from_json(fields) for fields in parts])
            files = {name: found for report in reports for name, found in report[1].items()}
            torch.save(self.common, self.aside / COMMON)
            (self.aside / INDEX).write_text(json.dumps({"parts": parts}))
            for name in (COMMON, INDEX):
                files[name] = _size_and_checksum(self.aside / name)
            manifest = {"format": FORMAT, "step": self.common.get("global_step"), "files": files}
            (self.aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in self.aside.iterdir():
                _sync(path)
            _sync(self.aside)
            if self.folder.exists():  # the same step again, after a resume from before it
                remove(self.folder)
            self.aside.rename(self.folder)
            _sync(self.folder.parent)
        except (OSError, RuntimeError) as problem:  # torch reports a full disk as RuntimeError
            shutil.rmtree(self.aside, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {self.folder} could not be written ({problem}); earlier checkpoints are whole. "
                "Free space or set run.dir to another disk, then start again: the run resumes"
            ) from None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole and in this process's memory: for inspection and export."""
    index = json.loads((folder / INDEX).read_text())
    return shards.read_whole([Part.from_json(fields) for fields in index["parts"]], folder)


def find(folder: Path) -> list[Path]:
    """Committed checkpoints in a folder, oldest first; unfinished ones are not seen."""
    found = [path.parent for path in folder.glob(f"[!.]*/{MANIFEST}")] if folder.is_dir() else []
    return sorted(found, key=_step)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint (None: it is whole): every file's size and checksum against the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']} is not known to this version (it reads {FORMAT})"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[0]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected[0]}"
            if _size_and_checksum(path) != expected:
                return f"{name} has a wrong checksum"
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"{MANIFEST} cannot be read ({problem})"
    return None


def remove(folder: Path) -> None:
    """Delete a checkpoint so that a half-deleted one is never taken for whole: the manifest goes first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _choose(path: Path) -> Path:
    """`path` itself if it is a checkpoint (an error if it is torn), else the newest whole one in it."""
    if (path / MANIFEST).is_file():
        problem = verify(path)
        if problem:
            raise CheckpointError(f"checkpoint {path} is not whole: {problem}; choose another with run.resume=FOLDER")
        return path
    candidates = find(path)
    for folder in reversed(candidates):
        problem = verify(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is not whole (%s): passed over", folder, problem)
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {path} is whole; start anew with run.resume=never"
        )
    raise CheckpointError(f"there is no checkpoint at {path}: give a checkpoint folder, or run.resume=never")


def _union(commons: list[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks have in common: equal where several have a key, and a stage that trains nothing lacks some."""
    union: dict[str, Any] = {}
    for common in commons:
        for key, value in common.items():
            if isinstance(value, dict) and isinstance(union.get(key), dict):
                union[key] = _union([union[key], value])
            else:
                union.setdefault(key, value)
    return union


def _step(folder: Path) -> tuple[int, str]:
    digits = "".join(ch for ch in folder.name if ch.isdigit())
    return (int(digits) if digits else -1, folder.name)


def _agree(grid: Grid, action: Callable[[], Any]) -> Any:
    """Do something on the first rank and give every rank its result, or its error."""
    outcome: list[Any] = [None, None]
    if grid.rank == 0:
        try:
            outcome[0] = action()
        except CheckpointError as problem:
            outcome[1] = str(problem)
    dist.broadcast_object_list(outcome, src=0, device=grid.device)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


def _sync(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's entries, over a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
