"""Checkpoints as folders that are either complete or absent: written under a temporary name and committed by a rename.

This implements Lightning's `CheckpointIO`. A folder contains one shard file per writing rank, `common.pt` (plain
values, read with weights_only), `index.json` (the position of every shard) and `manifest.json` (sizes and checksums),
which is written last.
"""

import io
import json
import re
import secrets
import shutil
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from megarl.config.files import no_checkpoint
from megarl.disk import UnreadableError, is_dir, is_file, load_plain, read_json, shown, sync
from megarl.errors import CheckpointError, NumericsError, first_line
from megarl.logging import get_logger
from megarl.parallel import shards
from megarl.parallel.finite import is_finite
from megarl.parallel.grid import Grid
from megarl.parallel.shards import Part, run_on_all_ranks

MANIFEST, INDEX, COMMON = "manifest.json", "index.json", "common.pt"
FORMAT = 1
PATIENCE_S = 60.0  # seconds for which a failing run waits for the other ranks' files of a background save
_NAME = re.compile(r"step-(\d+)")
log = get_logger(__name__)


class ShardedCheckpointIO(CheckpointIO):
    """Saves and loads on all ranks together. If `asynchronous`, a thread writes the files from host copies."""

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.grid: Grid | None = None  # set by the strategy once the world is up
        self.pending: _Save | None = None
        self.restoring: Path | None = None
        """The checkpoint that is being restored, until training starts."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint. Its `state_dict` is sharded; the rest is Lightning's and is common to all ranks."""
        assert self.grid is not None
        self.wait()
        self.pending = _Save(Path(path), checkpoint, self.grid, copy=self.asynchronous)
        if self.asynchronous:
            self.pending.start()
        else:
            self.pending.run()
            self.wait()

    def poll(self) -> None:
        """Commit a background save once every rank has written its file. Call on all ranks."""
        if self.pending is not None and self.grid is not None and not self.grid.any_rank(not self.pending.done):
            self.wait()

    def wait(self) -> None:
        """Finish and commit the pending save, if there is one."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.commit()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load Lightning's values of the newest intact checkpoint at `path` (one checkpoint, or a folder of them).

        `state_dict` in the result is a function that fills a template with this rank's shards.
        """
        grid = self.grid
        assert grid is not None
        folder = grid.run_on_rank0(lambda: _choose(Path(path)))
        contents: list[tuple[dict[str, Any], list[Part]]] = []
        run_on_all_ranks(grid, lambda: contents.append(plain_content(folder)))
        common, parts = contents[0]
        if common.get("weights_only"):
            raise CheckpointError(
                f"checkpoint {folder} contains weights only, no run to resume: pass it as model.path, not run.resume",
                key="run.resume",
                where=folder,
            )
        _check_run(common, folder)
        sharded_common = common.pop("sharded_common")
        self.restoring = folder

        def fill(template: dict[str, Any]) -> dict[str, Any]:
            return shards.read(template, sharded_common, parts, folder, grid)

        steps = common.get("global_step")  # in a run with phases, the folder's name counts those
        log.info("restoring from %s (%s optimizer steps, written at %s)", folder, steps, common.get("layout"))
        return {**common, "state_dict": fill, "folder": str(folder)}

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        remove(Path(path))

    def teardown(self) -> None:
        """Finish a pending background save when Lightning ends, also after a failure."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.salvage()


class _Save:
    """One save: tensors are collected at once, written (possibly by a thread) and committed by all ranks together."""

    def __init__(self, folder: Path, checkpoint: dict[str, Any], grid: Grid, *, copy: bool) -> None:
        self.folder, self.grid = folder, grid
        self.rank, self.world = grid.rank, grid.layout.world_size
        self.step = checkpoint.get("global_step")
        self.file = f"rank-{self.rank:05d}.safetensors"
        common = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        parts, sharded_common = shards.collect(checkpoint["state_dict"], grid, self.file)
        self._refuse_not_finite(parts)
        common["sharded_common"] = shards.union(grid.gather(sharded_common))
        if copy:  # training continues and changes the tensors
            parts = [(part, data.to("cpu", copy=True)) for part, data in parts]
        self.parts = parts
        self.problem: str | None = None
        self.written: dict[str, list[int]] = {}
        self.thread: threading.Thread | None = None
        self.common = b""  # on the first rank
        self.aside: Path = grid.run_on_rank0(lambda: self._prepare(common))

    def _refuse_not_finite(self, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Raise on all ranks if a tensor is not finite, before anything is written or deleted."""
        mine = next((part.key for part, data in parts if not is_finite(data)), None)
        found = next((key for key in self.grid.gather(mine) if key is not None), None)
        if found is not None:
            raise NumericsError(
                f"{found} holds NaN or infinity at step {self.step}, so no checkpoint is written: resume from "
                "an earlier one with a lower optim.lr",
                key=found,
            )

    def start(self) -> None:
        self.thread = threading.Thread(target=self.run, name="checkpoint")
        self.thread.start()

    @property
    def done(self) -> bool:
        return self.thread is None or not self.thread.is_alive()

    def run(self) -> None:
        """Write this rank's file. A failure is stored for `commit`, which every rank must reach."""
        try:
            if self.parts:
                path = self.aside / self.file
                shards.write(path, self.parts)
                path.chmod(0o644)  # safetensors leaves files that only their owner can read
                sync(path)
                self.written[self.file] = _size_and_checksum(path)
            if self.thread is not None:
                self._report_path(self.rank).write_text(json.dumps(self._report()))
        except Exception as problem:
            self.problem = f"{type(problem).__name__}: {problem}"

    def commit(self) -> None:
        """Commit the save; all ranks call this together."""
        if self.thread is not None:
            self.thread.join()
        reports = self.grid.gather(self._report())
        self.grid.run_on_rank0(lambda: self._finish(reports))
        self.parts = []

    def salvage(self) -> None:
        """Commit without communication, as other ranks may have failed. Their reports are read from the folder."""
        if self.thread is not None:
            self.thread.join()
        if self.rank != 0:
            return
        deadline = time.monotonic() + PATIENCE_S
        while (reports := self._reports()) is None and self.problem is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if reports is None:
            log.warning("the checkpoint of step %s was not complete when the run ended: it is deleted", self.step)
            shutil.rmtree(self.aside, ignore_errors=True)
            return
        try:
            self._finish(reports)
        except CheckpointError as problem:  # the run ends for another reason, which must not be hidden
            log.error("%s", problem)

    def _report(self) -> list[Any]:
        return [self.problem, self.written, [part.to_json() for part, _ in self.parts]]

    def _report_path(self, rank: int) -> Path:
        return self.aside / f"rank-{rank:05d}.report"

    def _reports(self) -> list[Any] | None:
        """Return every rank's report from the folder; None while one is missing or incomplete."""
        try:
            return [json.loads(self._report_path(rank).read_text()) for rank in range(self.world)]
        except (OSError, ValueError):
            return None

    def _prepare(self, common: dict[str, Any]) -> Path:
        """On the first rank, create the temporary folder and serialize the plain values as they are now.

        Each save has a separate folder: ranks of a run that lost its run.dir may still write, and must not write into
        the checkpoint of the run that took it over.
        """
        buffer = io.BytesIO()
        try:
            torch.save(common, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)  # fail now, not at the resume, if it cannot be read back
        except Exception as problem:
            raise CheckpointError(
                f"checkpoint {self.folder}: a module's or callback's state cannot be saved "
                f"({first_line(problem, kind=True)}): "
                "use only plain values and tensors in it",
                key="state",
                where=self.folder,
            ) from None
        self.common = buffer.getvalue()
        aside = _hidden(self.folder, f"{secrets.token_hex(4)}.writing")
        try:
            for left in self.folder.parent.glob(_hidden(self.folder, "*writing").name):
                shutil.rmtree(left, ignore_errors=True)
            aside.mkdir(parents=True)
        except OSError as problem:
            raise CheckpointError(
                f"cannot write in {self.folder.parent}: {problem.strerror}; set run.dir to another folder",
                key="run.dir",
                where=self.folder.parent,
            ) from None
        return aside

    def _finish(self, reports: list[Any]) -> None:
        """On the first rank, write the files that complete the folder, then rename it, which makes it a checkpoint."""
        try:
            problems = [f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report[0]]
            if problems:
                raise OSError("; ".join(problems))
            parts = [fields for report in reports for fields in report[2]]
            shards.check_complete([Part.from_json(fields) for fields in parts], self.folder)
            files = {name: found for report in reports for name, found in report[1].items()}
            (self.aside / COMMON).write_bytes(self.common)
            (self.aside / INDEX).write_text(json.dumps({"parts": parts}))
            for name in (COMMON, INDEX):
                files[name] = _size_and_checksum(self.aside / name)
            manifest = {"format": FORMAT, "step": self.step, "files": files}
            (self.aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for rank in range(self.world):
                self._report_path(rank).unlink(missing_ok=True)
            for name in (COMMON, INDEX, MANIFEST):
                sync(self.aside / name)
            sync(self.aside)
            self._put_in_place()
        except CheckpointError:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise
        except OSError as problem:
            shutil.rmtree(self.aside, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {self.folder} could not be written ({problem}); earlier checkpoints are intact. "
                "Free disk space and start again, or set run.dir to a folder on another disk and "
                f"run.resume={self.folder.parent}",
                key="run.dir",
                where=self.folder,
            ) from None

    def _put_in_place(self) -> None:
        """Rename the finished folder. Until then `find` returns an older checkpoint of the same step."""
        replaced = _hidden(self.folder, "replaced")
        if self.folder.exists():
            remove(replaced)
            self.folder.rename(replaced)
        self.aside.rename(self.folder)
        sync(self.folder.parent)
        remove(replaced)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, unsharded and in this process's memory, for inspection and export."""
    return shards.read_whole(plain_content(folder)[1], folder)


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of a step's checkpoint among a run's checkpoints."""
    return folder / f"step-{step:07d}"


def find(folder: Path) -> list[Path]:
    """Return the committed checkpoints in a folder, oldest first. Unfinished ones are ignored.

    A checkpoint that is being replaced (the same step is saved again) counts until its successor is in place.
    """
    if not is_dir(folder):
        return []
    found = []
    for manifest in [*folder.glob(f"step-*/{MANIFEST}"), *folder.glob(f".step-*.replaced/{MANIFEST}")]:
        path = manifest.parent
        successor = _successor(path)
        if _NAME.fullmatch(successor.name) and (successor == path or not (successor / MANIFEST).is_file()):
            found.append(path)
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.search(folder.name)
    return int(match.group(1)) if match else -1


def tidy(folder: Path, step: int) -> None:
    """Before training continues from `step`, delete unfinished saves and move checkpoints of later steps away.

    Checkpoints of later steps are damaged or belong to an abandoned course of training. They would count as the newest,
    so that they would be kept instead of future ones, and be resumed from.
    """
    for path in folder.glob(".step-*"):
        successor = _successor(path)
        if path.suffix in (".writing", ".removed") or (path.suffix == ".replaced" and (successor / MANIFEST).is_file()):
            shutil.rmtree(path, ignore_errors=True)
    ahead = [path for path in find(folder) if step_of(path) > step]
    if not ahead:
        return
    number = 1
    while (shelf := folder / f"earlier-{number}").exists():
        number += 1
    try:
        shelf.mkdir()
        for path in ahead:
            path.rename(shelf / _successor(path).name)
    except OSError as problem:
        raise CheckpointError(
            f"{len(ahead)} checkpoints in {folder} are of steps after {step} and cannot be moved "
            f"({problem.strerror}): set run.dir to another folder",
            key="run.dir",
            where=folder,
        ) from None
    log.warning("training continues from step %d: moved %d checkpoints of later steps to %s", step, len(ahead), shelf)


def verify(folder: Path) -> CheckpointError | None:
    """Compare the size and checksum of every file with the manifest. Return the error, or None; the caller adds the
    name of the checkpoint."""
    try:
        manifest = read_json(folder / MANIFEST)
        if (number := manifest["format"]) != FORMAT:
            return CheckpointError(
                f"format {shown(number)} is not known to this version (it reads {FORMAT})", key="format", value=number
            )
        unlisted = [name for name in (COMMON, INDEX) if name not in manifest["files"]]
        if unlisted:
            return CheckpointError(f"{unlisted[0]} is not in its {MANIFEST}", key=unlisted[0])
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.name != name:
                return CheckpointError(f"{shown(name)} in its {MANIFEST} is not the name of a file", key=shown(name))
            if not is_file(path):
                return CheckpointError(f"{shown(name)} is missing", key=shown(name))
            size = path.stat().st_size
            if size != expected[0]:
                return CheckpointError(f"{name} has {size} bytes instead of {expected[0]}", key=name, value=size)
            checksum = _size_and_checksum(path)[1]
            if checksum != expected[1]:
                return CheckpointError(f"{name} has checksum {checksum}, not {expected[1]}", key=name, value=checksum)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        return CheckpointError(f"{MANIFEST} cannot be read ({problem})", key=MANIFEST)
    return None


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a folder that contains all of its files, and flush everything to disk."""
    files = {path.name: _size_and_checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
    for path in folder.iterdir():
        sync(path)
    sync(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half-deleted one never counts as complete."""
    if not folder.exists():
        return
    doomed = _hidden(_successor(folder), "removed")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as problem:  # one rank deletes: it must not fail alone
        log.warning("checkpoint %s could not be deleted: %s", folder, problem)


def refuse_empty(path: Path) -> None:
    """Refuse a path for run.resume that is not a checkpoint and contains none, before anything is built or written."""
    if not _is_checkpoint(path) and not find(path):
        raise no_checkpoint(path)


def _is_checkpoint(path: Path) -> bool:
    return any(is_file(path / name) for name in (MANIFEST, INDEX, COMMON))


def _choose(path: Path) -> Path:
    """Return `path` if it is a checkpoint (raise if it is damaged), else the newest intact one in it."""
    refuse_empty(path)
    if _is_checkpoint(path):
        problem = verify(path)
        if problem:
            raise CheckpointError(
                f"checkpoint {path} is incomplete or damaged: {problem}; choose another with run.resume=FOLDER",
                key=problem.key,
                value=problem.value,
                where=path,
            )
        return path
    candidates = find(path)
    for folder in reversed(candidates):
        problem = verify(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is incomplete or damaged (%s): skipped", folder, problem)
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoints in {path} is intact; start a new run with run.resume=never",
        key="run.resume",
        value=str(path),
        where=path,
        offers={"run.resume": ["never"]},
    )


def plain_content(folder: Path) -> tuple[dict[str, Any], list[Part]]:
    """Return a checkpoint's plain values and its index, without executing anything from them."""
    reading = COMMON
    try:
        common = load_plain(folder / COMMON, map_location="cpu")
        if not isinstance(common, dict) or not isinstance(common.get("sharded_common"), dict):
            raise UnreadableError("does not contain what megarl stores there")
        reading = INDEX
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not isinstance(index.get("parts"), list):
            raise UnreadableError("has no list of parts")
        parts = [Part.from_json(fields) for fields in index["parts"]]
        reading = MANIFEST
        unlisted = {part.file for part in parts} - set(read_json(folder / MANIFEST)["files"])
        if unlisted:
            raise UnreadableError(f"does not list {sorted(unlisted)[0]}, which {INDEX} names")
    except (OSError, ValueError, LookupError, TypeError) as problem:
        raise CheckpointError(
            f"checkpoint {folder}: {reading} {_completed(problem)}; it was not written by megarl, or is "
            "damaged: choose another",
            key=reading,
            where=folder,
        ) from None
    shards.check_complete(parts, folder)
    return common, parts


def _check_run(common: dict[str, Any], folder: Path) -> None:
    """Raise if a value is not of the type that Lightning or megarl saves."""
    counters = dict.fromkeys(("global_step", "epoch", "consumed", "rows", "weights_version"), int)
    mappings = dict.fromkeys(("loops", "callbacks", "clock", "scorers"), dict)
    for name, kind in {**counters, **mappings}.items():
        if name in common and (not isinstance(common[name], kind) or (kind is int and common[name] < 0)):
            raise CheckpointError(
                f"checkpoint {folder}: {COMMON} has no valid {name}: it is damaged, or was not written by megarl; "
                "choose another",
                key=name,
                value=common[name],
                where=folder,
            )


def _hidden(folder: Path, state: str) -> Path:
    """Return the folder's temporary name while it is being written, replaced or removed."""
    return folder.with_name(f".{folder.name}.{state}")


def _successor(path: Path) -> Path:
    """Return the final path of a temporary one; other paths are unchanged."""
    return path.with_name(path.stem[1:]) if path.name.startswith(".") else path


def _completed(problem: Exception) -> str:
    if isinstance(problem, UnreadableError):
        return str(problem)
    return f"cannot be used ({problem if type(problem) is ValueError else first_line(problem, kind=True)})"


def _size_and_checksum(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]
