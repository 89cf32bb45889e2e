"""Checkpoints are whole or not there, whatever breaks while they are written; and which of them are kept."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megarl import checkpoint as checkpoints
from megarl.callbacks.checkpoints import Checkpoints
from megarl.checkpoint import COMMON, INDEX, MANIFEST, find, step_folder, step_of, tensors, tidy, verify
from megarl.config.sections.run import BestCheckpointsConfig, CheckpointConfig
from megarl.errors import CheckpointError
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel import shards
from tests.parallel.engines import batches, small_engine
from tests.refusals import assert_refusal
from tests.tiny_runs import checkpoint_io, load, run_tiny, save
from tests.worlds import Worlds

SHARD = "rank-00000.safetensors"


def values(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(1000.0) + step, "b": torch.full((3, 4), float(step))}


def save_steps(folder: Path, *steps: int) -> None:
    io = checkpoint_io()
    for step in steps:
        save(io, step_folder(folder, step), values(step), global_step=step)


def chosen(path: Path) -> str:
    """The name of the checkpoint that is taken at `path`, after its tensors were seen to be those of its step."""
    found = load(checkpoint_io(), path, like=values(0))
    for key, tensor in values(found["global_step"]).items():
        assert torch.equal(found["tensors"][key], tensor)
    return Path(found["folder"]).name


def refusal(action: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointError:
    """The `CheckpointError` that must come."""
    try:
        action(*args, **kwargs)
    except CheckpointError as error:
        return error
    raise AssertionError("no CheckpointError was raised")


def assert_all_refused(errors: list[CheckpointError], **data: Any) -> None:
    """Every rank says the same."""
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert_refusal(error, **data)


@pytest.fixture(scope="module")
def two_steps(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    worlds.run(1, save_steps, folder, 9, 10)
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> Path:
    """A folder of its own with whole checkpoints of steps 9 and 10."""
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


# --- which checkpoint is taken --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def without_index(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][INDEX]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def size(path: Path) -> int:
    return path.stat().st_size


def checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def absent(path: Path) -> None:
    assert not path.exists()


def unread(path: Path) -> None:
    """The value of a file that says nothing of itself."""


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], int | None]]] = {
    "shard truncated": (lambda folder: truncate(folder / SHARD), SHARD, size),
    "bit flipped in a shard": (lambda folder: flip_a_bit(folder / SHARD), SHARD, checksum),
    "bit flipped in the plain values": (lambda folder: flip_a_bit(folder / COMMON), COMMON, checksum),
    "shard missing": (lambda folder: (folder / SHARD).unlink(), SHARD, absent),
    "index missing": (lambda folder: (folder / INDEX).unlink(), INDEX, absent),
    "index not listed": (without_index, INDEX, unread),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST, absent),
    "manifest broken": (lambda folder: truncate(folder / MANIFEST), MANIFEST, unread),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1]"), MANIFEST, unread),
    "manifest empty of files": (
        lambda folder: (folder / MANIFEST).write_text('{"format": 1, "files": []}'),
        COMMON,
        unread,
    ),
    "another format": (lambda folder: (folder / MANIFEST).write_text('{"format": 99}'), "format", lambda path: 99),
}
"""What is done to a checkpoint, the key of the error that must come of it, and that of its value by the key's file."""


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_torn_checkpoint_is_passed_over_and_refused_by_name(damage: str, worlds: Worlds, folder: Path) -> None:
    harm, key, value = DAMAGE[damage]
    torn = step_folder(folder, 10)
    harm(torn)
    assert worlds.run(1, chosen, folder) == ["step-0000009"]
    error = worlds.run(1, refusal, chosen, torn)[0]
    assert_refusal(error, key=key, value=value(torn / key), where=str(torn))


def test_the_newest_is_the_one_of_the_highest_step(worlds: Worlds, folder: Path) -> None:
    step_folder(folder, 9).rename(folder / "step-123456789")  # longer than the padding, and first by name
    os.utime(step_folder(folder, 10))  # and not the last that was written
    assert [path.name for path in find(folder)] == ["step-0000010", "step-123456789"]
    assert worlds.run(1, chosen, folder) == ["step-123456789"]


def test_a_folder_without_a_whole_checkpoint_says_what_to_do(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    error = worlds.run(1, refusal, chosen, elsewhere)[0]
    assert_refusal(error, key="run.resume", value=str(elsewhere), offers={"run.resume": ["auto", "never"]})
    for step in (9, 10):
        truncate(step_folder(folder, step) / SHARD)
    error = worlds.run(1, refusal, chosen, folder)[0]
    assert_refusal(error, key="run.resume", value=str(folder), offers={"run.resume": ["never"]}, names=("2",))


def test_copies_under_other_names_are_the_users_own(worlds: Worlds, folder: Path) -> None:
    copy = shutil.copytree(step_folder(folder, 9), folder / "step-0000010-before-the-change")
    assert [path.name for path in find(folder)] == ["step-0000009", "step-0000010"]
    assert worlds.run(1, chosen, copy) == ["step-0000010-before-the-change"]


# --- what a kill leaves behind --------------------------------------------------------------------------------------


def test_an_unfinished_folder_is_not_seen_and_the_step_can_be_saved_again(worlds: Worlds, folder: Path) -> None:
    unfinished = folder / ".step-0000011.writing"
    shutil.copytree(step_folder(folder, 10), unfinished)  # as whole as it gets before its rename
    (unfinished / "left over").write_text("x")
    assert [path.name for path in find(folder)] == ["step-0000009", "step-0000010"]
    worlds.run(1, save_steps, folder, 11)
    assert names(folder) == ["step-0000009", "step-0000010", "step-0000011"]
    assert names(step_folder(folder, 11)) == sorted([COMMON, INDEX, MANIFEST, SHARD])
    assert worlds.run(1, chosen, folder) == ["step-0000011"]


def test_two_runs_that_save_the_same_step_do_not_write_into_the_same_folder(worlds: Worlds, tmp_path: Path) -> None:
    """Ranks of a run that lost its folder go on with their files for a while after the other run has begun."""

    def save_while_another_does() -> None:
        owner = checkpoint_io(asynchronous=True)
        lost = checkpoint_io_of(owner.grid, asynchronous=True)
        with HeldWriter():
            save(lost, step_folder(tmp_path, 1), values(7))
            save(owner, step_folder(tmp_path, 1), values(1))
        for io in (owner, lost):
            assert io.pending is not None
            assert io.pending.thread is not None
            io.pending.thread.join()
        assert lost.pending is not None
        lost.pending.run()  # the last to write, before the owner commits
        owner.wait()

    worlds.run(1, save_while_another_does)
    assert [path.name for path in find(tmp_path)] == ["step-0000001"]
    assert checkpoints.verify(step_folder(tmp_path, 1)) is None
    found = tensors(step_folder(tmp_path, 1))
    assert all(torch.equal(found[name], tensor) for name, tensor in values(1).items())


def test_saving_over_a_step_replaces_it(worlds: Worlds, folder: Path) -> None:
    (step_folder(folder, 10) / "left over").write_text("x")
    worlds.run(1, lambda: save(checkpoint_io(), step_folder(folder, 10), {"only": torch.ones(2)}))
    assert names(folder) == ["step-0000009", "step-0000010"]
    assert names(step_folder(folder, 10)) == sorted([COMMON, INDEX, MANIFEST, SHARD])
    assert tensors(step_folder(folder, 10)).keys() == {"only"}


def test_a_kill_between_the_renames_that_replace_a_step_loses_nothing(worlds: Worlds, folder: Path) -> None:
    shutil.rmtree(step_folder(folder, 9))
    step_folder(folder, 10).rename(folder / ".step-0000010.replaced")
    assert worlds.run(1, chosen, folder) == [".step-0000010.replaced"]
    worlds.run(1, save_steps, folder, 10)
    assert names(folder) == ["step-0000010"]


def test_training_starts_in_a_tidy_folder(folder: Path) -> None:
    for name in (".step-0000011.writing", ".step-0000003.removed", ".step-0000010.replaced", ".step-0000008.replaced"):
        shutil.copytree(step_folder(folder, 9), folder / name)
    (folder / "mine").mkdir()
    tidy(folder, 10)
    kept = [".step-0000008.replaced", "mine", "step-0000009", "step-0000010"]
    assert names(folder) == kept  # the replaced step 8 has no successor: it is all there is of it


def test_checkpoints_of_a_course_that_was_given_up_are_set_aside(worlds: Worlds, folder: Path) -> None:
    worlds.run(1, run_tiny, folder.parent, 5, resume="never", keep_last=2, best={"keep": 0})
    assert [path.name for path in find(folder)] == ["step-0000004", "step-0000005"]
    assert [path.name for path in find(folder / "earlier-1")] == ["step-0000009", "step-0000010"]
    worlds.run(1, run_tiny, folder.parent, 6, resume=str(step_folder(folder, 4)), keep_last=1, best={"keep": 0})
    assert [path.name for path in find(folder)] == ["step-0000006"]
    assert [path.name for path in find(folder / "earlier-2")] == ["step-0000005"]


def test_a_torn_newest_checkpoint_does_not_push_out_whole_ones(worlds: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    unbroken = worlds.run(1, run_tiny, tmp_path / "unbroken", 8)[0]
    worlds.run(1, run_tiny, tmp_path, 6, every=3, keep_last=2)
    truncate(step_folder(folder, 6) / SHARD)
    worlds.run(1, run_tiny, tmp_path, 4, every=1, keep_last=1)
    assert [path.name for path in find(folder)] == ["step-0000004"]
    assert torch.equal(worlds.run(1, run_tiny, tmp_path, 8)[0]["weight"], unbroken["weight"])


# --- failing while saving -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs rights that are not there")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before_it_whole(
    asynchronous: bool, worlds: Worlds, small_disk: Path
) -> None:
    def save_two() -> CheckpointError:
        io = checkpoint_io(asynchronous)
        save(io, step_folder(small_disk, 1), values(1), global_step=1)
        io.wait()

        def too_much() -> None:
            save(io, step_folder(small_disk, 2), {"w": torch.zeros(1 << 20)}, global_step=2)
            io.wait()

        return refusal(too_much)

    error = worlds.run(1, save_two)[0]
    assert_refusal(error, key="run.dir", where="step-0000002", names=(os.strerror(errno.ENOSPC),))
    assert names(small_disk) == ["step-0000001"]
    assert worlds.run(1, chosen, small_disk) == ["step-0000001"]


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_shard_that_hits_the_users_file_size_limit_is_not_committed(limit: int, worlds: Worlds, folder: Path) -> None:
    """A shard takes 4.2 kB."""

    def save_within_limit() -> CheckpointError:
        io = checkpoint_io()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return refusal(save, io, step_folder(folder, 11), values(11))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    error = worlds.run(1, save_within_limit)[0]
    assert_refusal(error, key="run.dir", where="step-0000011", names=(os.strerror(errno.EFBIG),))
    assert names(folder) == ["step-0000009", "step-0000010"]
    assert worlds.run(1, chosen, folder) == ["step-0000010"]


@pytest.mark.parametrize(
    ("method", "name"),
    [("write_bytes", COMMON), ("write_text", INDEX), ("write_text", MANIFEST), ("rename", ".step-0000010.*.writing")],
)
def test_failing_at_any_file_leaves_what_was_there(method: str, name: str, worlds: Worlds, folder: Path) -> None:
    def save_with_a_failure() -> CheckpointError:
        original = getattr(Path, method)

        def full(path: Path, *args: Any) -> Any:
            if path.match(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(path, *args)

        io = checkpoint_io()
        setattr(Path, method, full)
        try:
            return refusal(save, io, step_folder(folder, 10), values(0), global_step=10)
        finally:
            setattr(Path, method, original)

    errors = worlds.run(2, save_with_a_failure)
    assert_all_refused(errors, key="run.dir", where="step-0000010", names=(os.strerror(errno.ENOSPC),))
    assert step_of(find(folder)[-1]) == 10
    assert worlds.run(1, chosen, folder) == [find(folder)[-1].name]
    assert not list(folder.glob(".*.writing"))


def test_a_folder_that_cannot_be_made_is_named(worlds: Worlds, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    errors = worlds.run(2, refusal, save_steps, tmp_path / "file", 1)
    assert_all_refused(errors, key="run.dir", where=str(tmp_path / "file"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_rank_that_cannot_write_fails_the_save_on_all(asynchronous: bool, worlds: Worlds, folder: Path) -> None:
    def save_on_a_bad_disk() -> CheckpointError:
        io = checkpoint_io(asynchronous)
        assert io.grid is not None
        original = shards.write

        def broken(path: Path, parts: Any) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        shards.write = broken if io.grid.rank == 1 else original  # type: ignore[assignment]
        try:
            return refusal(lambda: (save(io, step_folder(folder, 11), values(11)), io.wait()))
        finally:
            shards.write = original

    errors = worlds.run(2, save_on_a_bad_disk)
    assert_all_refused(errors, key="run.dir", where="step-0000011", names=("rank 1", os.strerror(errno.EIO)))
    assert names(folder) == ["step-0000009", "step-0000010"]


def test_one_rank_that_cannot_read_fails_the_load_on_all(worlds: Worlds, folder: Path) -> None:
    def load_from_a_bad_disk() -> CheckpointError:
        io = checkpoint_io()
        assert io.grid is not None
        original = shards.safe_open

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise FileNotFoundError("not on this machine")

        shards.safe_open = broken if io.grid.rank == 1 else original
        try:
            return refusal(load, io, folder, like=values(0))
        finally:
            shards.safe_open = original

    errors = worlds.run(2, load_from_a_bad_disk)
    assert_all_refused(errors, where=SHARD, names=("not on this machine",))


def test_a_state_that_could_not_be_restored_is_refused_when_it_is_saved(worlds: Worlds, folder: Path) -> None:
    def save_a_function() -> CheckpointError:
        return refusal(save, checkpoint_io(), step_folder(folder, 11), values(11), callbacks={"a": threading.Event})

    assert_all_refused(worlds.run(2, save_a_function), key="state", where="step-0000011")
    assert names(folder) == ["step-0000009", "step-0000010"]


# --- what is in a checkpoint ----------------------------------------------------------------------------------------


class Payload:
    """Pickles into a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    common, manifest = step_folder(folder, 10) / COMMON, step_folder(folder, 10) / MANIFEST
    torch.save({"sharded_common": Payload(tmp_path / "mark")}, common)
    listed = json.loads(manifest.read_text())
    listed["files"][COMMON] = [common.stat().st_size, zlib.crc32(common.read_bytes())]
    manifest.write_text(json.dumps(listed))
    assert verify(step_folder(folder, 10)) is None  # so that nothing but the loading itself stands in its way
    assert_all_refused(worlds.run(2, refusal, chosen, folder), key=COMMON, where=str(step_folder(folder, 10)))
    assert not (tmp_path / "mark").exists()


def missing_from(template: dict[str, torch.Tensor], folder: Path) -> CheckpointError:
    return refusal(load, checkpoint_io(), folder, like=template)


def test_tensors_that_are_not_the_models_are_refused(worlds: Worlds, folder: Path) -> None:
    both, where = values(0), str(step_folder(folder, 10))
    more, fewer, turned = {**both, "c": torch.ones(1)}, {"w": both["w"]}, {**both, "b": torch.ones(4, 3)}
    assert_refusal(worlds.run(1, missing_from, more, folder)[0], key="c", value=None, where=where)
    assert_refusal(worlds.run(1, missing_from, fewer, folder)[0], key="b", value=None, where=where)
    error = worlds.run(1, missing_from, turned, folder)[0]
    assert_refusal(error, key="b", value=[3, 4], where=where, names=("[4, 3]",))


def test_a_tensor_that_one_rank_misses_is_refused_on_all(worlds: Worlds, folder: Path) -> None:
    def load_more_on_rank_1() -> CheckpointError:
        io = checkpoint_io()
        assert io.grid is not None
        more = {"c": torch.ones(1)} if io.grid.rank == 1 else {}
        return refusal(load, io, folder, like={**values(0), **more})

    assert_all_refused(worlds.run(2, load_more_on_rank_1), key="c", where=str(step_folder(folder, 10)))


def test_plain_values_come_back_as_they_were(worlds: Worlds, tmp_path: Path) -> None:
    plain = {"none": None, "numbers": [1, 2.5, True], "nested": {"text": "ä", 3: (1, 2)}, "tensor": torch.arange(3)}

    def round_trip() -> Any:
        io = checkpoint_io()
        save(io, step_folder(tmp_path, 1), values(1), callbacks=plain)
        return load(io, tmp_path)["callbacks"]

    for found in worlds.run(2, round_trip):
        assert torch.equal(found.pop("tensor"), plain["tensor"])  # type: ignore[arg-type]
        assert found == {key: value for key, value in plain.items() if key != "tensor"}


@pytest.mark.parametrize(
    ("name", "wrong"), [("weights_version", {}), ("rows", 2.5), ("consumed", -1), ("scorers", []), ("clock", None)]
)
def test_a_value_of_another_kind_than_a_run_stores_is_refused(
    name: str, wrong: Any, worlds: Worlds, tmp_path: Path
) -> None:
    def load_wrong() -> CheckpointError:
        io = checkpoint_io()
        save(io, step_folder(tmp_path, 1), values(1), **{name: wrong})
        return refusal(load, io, tmp_path, like=values(1))

    where = str(step_folder(tmp_path, 1))
    assert_refusal(worlds.run(1, load_wrong)[0], key=name, value=wrong, where=where)


def engine_checkpoint(layout: dict[str, Any], path: Path) -> None:
    engine = small_engine(layout)
    io = checkpoint_io_of(engine.grid)
    engine.train_step(batches(engine, 0), cross_entropy, count_targets)
    engine.apply_gradients()
    io.save_checkpoint({"state_dict": {"policy": engine.sharded_state_dict()}, "global_step": 1, "layout": "x"}, path)


def test_data_parallel_ranks_share_the_writing(worlds: Worlds, tmp_path: Path) -> None:
    path = step_folder(tmp_path, 1)
    worlds.run(2, engine_checkpoint, {}, path)
    index = json.loads((path / INDEX).read_text())["parts"]
    places = [(part["key"], tuple(part["offset"])) for part in index]
    assert len(places) == len(set(places))
    sizes = [(path / f"rank-0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes)
    torch.load(path / COMMON, weights_only=True)
    one = step_folder(tmp_path, 2)
    worlds.run(1, engine_checkpoint, {}, one)
    assert tensors(one).keys() == tensors(path).keys()


# --- in the background ----------------------------------------------------------------------------------------------


def checkpoint_io_of(grid: Any, asynchronous: bool = False) -> checkpoints.ShardedCheckpointIO:
    io = checkpoints.ShardedCheckpointIO(asynchronous)
    io.grid = grid
    return io


class HeldWriter:
    """Lets background threads write only once it is released."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.original = shards.write

    def __enter__(self) -> "HeldWriter":
        def write(path: Path, parts: Any) -> None:
            assert self.released.wait(60)
            self.original(path, parts)

        shards.write = write
        return self

    def __exit__(self, *_: Any) -> None:
        self.released.set()
        shards.write = self.original


def test_training_on_does_not_change_what_is_being_saved(worlds: Worlds, tmp_path: Path) -> None:
    now, later = step_folder(tmp_path / "now", 1), step_folder(tmp_path / "later", 1)

    def save_and_train() -> list[bool]:
        engine = small_engine({})
        background = checkpoint_io_of(engine.grid, asynchronous=True)

        def step(number: int) -> None:
            engine.train_step(batches(engine, number), cross_entropy, count_targets)
            engine.apply_gradients()

        def saved_by(io: checkpoints.ShardedCheckpointIO, path: Path) -> None:
            state = {"policy": engine.sharded_state_dict()}
            io.save_checkpoint({"state_dict": state, "global_step": 1, "layout": "x", "callbacks": scores}, path)

        scores = {"eval/loss": 1.0}
        step(0)
        saved_by(checkpoint_io_of(engine.grid), now)
        seen = []
        with HeldWriter() as writer:
            saved_by(background, later)
            for number in (1, 2):
                step(number)
                scores["eval/loss"] = 0.0
                background.poll()
                seen.append(later.exists())
            writer.released.set()
            assert background.pending is not None
            assert background.pending.thread is not None
            background.pending.thread.join()
            seen.append(later.exists())
            background.poll()
            seen.append(later.exists())
        return seen

    for seen in worlds.run(2, save_and_train):
        assert seen == [False, False, False, True]
    ours, theirs = tensors(later), tensors(now)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (later / COMMON).read_bytes() == (now / COMMON).read_bytes()
    assert names(later) == names(now)


def test_a_checkpoint_is_deleted_only_after_its_successor_is_committed(worlds: Worlds, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def train_while_step_4_is_held() -> list[list[str]]:
        seen = []
        writer = HeldWriter()

        def look(step: int) -> None:
            if step == 3:
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()  # step 2 is written
                writer.__enter__()
            if step in (4, 5):
                seen.append([path.name for path in find(folder)])
            if step == 5:
                writer.__exit__()

        run_tiny(tmp_path, 6, each_step=look, async_save=True, every=2, keep_last=1, best={"keep": 0})
        return seen

    assert worlds.run(1, train_while_step_4_is_held) == [[["step-0000002"], ["step-0000002"]]]
    assert [path.name for path in find(folder)] == ["step-0000006"]


def test_a_run_that_ends_in_a_failure_keeps_what_all_ranks_have_written(worlds: Worlds, tmp_path: Path) -> None:
    def end_alone() -> bool:
        io = checkpoint_io(asynchronous=True)
        assert io.grid is not None
        save(io, step_folder(tmp_path, 1), values(1))
        if io.grid.rank == 0:
            io.teardown()  # says nothing to rank 1, which may be gone
        there = step_folder(tmp_path, 1).is_dir()
        io.grid.barrier()
        return there

    assert worlds.run(2, end_alone)[0]
    assert verify(step_folder(tmp_path, 1)) is None
    assert names(tmp_path) == ["step-0000001"]
    assert names(step_folder(tmp_path, 1)) == sorted([COMMON, INDEX, MANIFEST, SHARD, "rank-00001.safetensors"])


def test_a_background_save_is_given_up_when_another_rank_never_writes(worlds: Worlds, tmp_path: Path) -> None:
    def end_alone() -> None:
        io = checkpoint_io(asynchronous=True)
        assert io.grid is not None
        with HeldWriter() as writer:
            save(io, step_folder(tmp_path, 1), values(1))
            patience, checkpoints.PATIENCE_S = checkpoints.PATIENCE_S, 0.3
            try:
                if io.grid.rank == 0:
                    writer.released.set()
                    io.teardown()
                io.grid.barrier()  # until then rank 1 has written nothing
            finally:
                checkpoints.PATIENCE_S = patience

    worlds.run(2, end_alone)
    assert find(tmp_path) == []


# --- which are kept -------------------------------------------------------------------------------------------------

SCORES = {1: 0.5, 2: 0.2, 3: 0.9, 4: 0.4, 5: 0.3, 6: 0.6, 7: 0.7, 8: 0.8}


@pytest.mark.parametrize(
    ("mode", "kept", "best"),
    [("min", [2, 5, 7, 8], "step-0000002"), ("max", [3, 7, 8], "step-0000003")],
)
def test_the_last_and_the_best_are_kept(mode: str, kept: list[int], best: str, worlds: Worlds, tmp_path: Path) -> None:
    """Of the scores the lowest two are those of 2 and 5, the highest two those of 3 and 8."""
    ended = worlds.run(
        1, run_tiny, tmp_path, 8, evals=SCORES, eval_every=1, keep_last=2, best={"keep": 2, "mode": mode}
    )[0]
    assert [path.name for path in find(tmp_path / "checkpoints")] == [f"step-{step:07d}" for step in kept]
    assert ended["best"] == best


def test_scores_are_known_again_after_a_resume(worlds: Worlds, tmp_path: Path) -> None:
    settings = {"evals": SCORES, "eval_every": 1, "keep_last": 1, "best": {"keep": 1, "mode": "max"}}
    worlds.run(2, run_tiny, tmp_path, 4, **settings)
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-0000003", "step-0000004"]
    ended = worlds.run(2, run_tiny, tmp_path, 6, **settings)
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-0000003", "step-0000006"]
    assert {rank["best"] for rank in ended} == {"step-0000003"}


def test_scores_of_checkpoints_that_are_elsewhere_do_not_bar_new_ones(worlds: Worlds, tmp_path: Path) -> None:
    settings = {"evals": SCORES, "eval_every": 1, "every": 100, "keep_last": 1, "best": {"keep": 1}}
    worlds.run(1, run_tiny, tmp_path / "first", 2, **settings)  # 0.2 at step 2
    resumed = worlds.run(
        1, run_tiny, tmp_path / "second", 6, resume=str(tmp_path / "first" / "checkpoints"), **settings
    )
    assert resumed[0]["best"] == "step-0000005"
    assert [path.name for path in find(tmp_path / "second" / "checkpoints")] == ["step-0000005", "step-0000006"]


def test_scores_of_another_metric_do_not_rank_checkpoints(tmp_path: Path) -> None:
    """What was measured of each is known by its name: by another metric the best is another, or none."""
    callback = Checkpoints(tmp_path, CheckpointConfig(), 1)
    callback.measured = {
        "step-0000001": {"eval/loss": 1.0, "eval/accuracy": 0.5},
        "step-0000002": {"eval/loss": 2.0, "eval/accuracy": 0.9},
        "step-0000003": {"eval/loss": 0.1},
    }
    best = {}
    for metric, mode in (("eval/loss", "min"), ("eval/loss", "max"), ("eval/accuracy", "max"), ("eval/other", "max")):
        resumed = Checkpoints(tmp_path, CheckpointConfig(best=BestCheckpointsConfig(metric, mode)), 1)
        resumed.load_state_dict(callback.state_dict())
        best[metric, mode] = None if resumed.best() is None else str(resumed.best().name)[-1]
    assert best == {
        ("eval/loss", "min"): "3",
        ("eval/loss", "max"): "2",
        ("eval/accuracy", "max"): "2",
        ("eval/other", "max"): None,
    }


def warned(run_dir: Path, metric: str) -> list[str]:
    """What a run says of the metric that its best checkpoints go by."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megarl.callbacks.checkpoints")
    logger.addHandler(handler)
    try:
        run_tiny(run_dir, 3, evals=SCORES, eval_every=1, best={"metric": metric})
    finally:
        logger.removeHandler(handler)
    return said


def test_a_metric_that_is_not_logged_is_told_of_once(worlds: Worlds, tmp_path: Path) -> None:
    ((line,),) = worlds.run(1, warned, tmp_path / "misspelt", "eval/skore")
    assert "checkpoint.best.metric=eval/skore" in line
    assert "eval/loss" in line
    assert worlds.run(1, warned, tmp_path / "right", "eval/loss") == [[]]


def test_a_best_checkpoint_is_saved_outside_the_schedule(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, run_tiny, tmp_path, 8, evals=SCORES, eval_every=1, every=4, keep_last=1)
    assert [path.name for path in find(tmp_path / "checkpoints")] == ["step-0000002", "step-0000008"]


@pytest.mark.parametrize("world", [1, 2])
def test_many_resumes_come_to_the_unbroken_runs_end(world: int, worlds: Worlds, tmp_path: Path) -> None:
    unbroken = worlds.run(world, run_tiny, tmp_path / "unbroken", 9)[0]
    for steps in (2, 5, 6, 9):
        ended = worlds.run(world, run_tiny, tmp_path / "broken", steps, async_save=steps == 5)[0]
    assert torch.equal(ended["weight"], unbroken["weight"])
    assert ended["consumed"] == unbroken["consumed"] == 9


def test_a_finished_run_goes_on_from_its_last_checkpoint(worlds: Worlds, tmp_path: Path) -> None:
    """It was saved when training had ended, in another state of the loop than after a step."""
    settings = {"evals": SCORES, "eval_every": 2, "every": None, "best": {"keep": 0}}
    unbroken = worlds.run(1, run_tiny, tmp_path / "unbroken", 8, **settings)[0]
    for steps in (3, 4, 4, 8):
        ended = worlds.run(1, run_tiny, tmp_path / "broken", steps, **settings)[0]
        assert ended["step"] == steps
    assert torch.equal(ended["weight"], unbroken["weight"])
    assert [path.name for path in find(tmp_path / "broken" / "checkpoints")] == ["step-0000004", "step-0000008"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_part_of_a_tensor_is_what_it_was_after_json_and_before_it() -> None:
    part = shards.Part("policy.weight", (4, 6), (0, 3), (4, 3), "float32", "rank-00001.safetensors")
    assert shards.Part.from_json(part.to_json()) == part
    assert shards.Part.from_json(json.loads(json.dumps(part.to_json()))) == part
