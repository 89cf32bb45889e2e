"""Whole runs of DPO, KTO, ORPO and CPO: equal in every layout, exact resume, the reference cached or resident."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from megarl.errors import CheckpointError, DataError
from megarl.experience.response_reference import ENTRY
from tests.e2e.runs import assert_same_bits, final_tensors, metrics, run_preference
from tests.gated import gated
from tests.refusals import refused
from tests.worlds import Worlds

LAYOUTS = {
    "TP2": (2, ["parallel.tp=2"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2+SP": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]),
    "DP2": (2, ["trainer.micro_batch_size=2"]),
    "TP2xDP2": (4, ["parallel.tp=2", "trainer.micro_batch_size=2"]),
    "a pair to a bin": (1, ["data.pack=false"]),
}
MEASURED = ("loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logprob_chosen", "logprob_rejected")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of responses of many lengths, of which the one with more vowels is preferred."""
    folder, random = tmp_path_factory.mktemp("pairs"), Random(5)

    def text(vowels: float, length: int) -> str:
        return "".join(random.choice("aeiou" if random.random() < vowels else "bcdfgklm") for _ in range(length))

    for name, count in (("train", 30), ("eval", 10)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                chosen, rejected = text(0.8, random.randint(1, 24)), text(0.1, random.randint(1, 24))
                record = {"prompt": text(0.4, random.randint(1, 9)), "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def references(worlds: Worlds, data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each algorithm in one process."""
    runs = {}
    for entry in ("dpo", "kto", "orpo", "cpo"):
        runs[entry] = tmp_path_factory.mktemp(entry)
        worlds.run(1, run_preference, runs[entry], entry, data, *settings(entry, cache))
    return runs


def settings(entry: str, cache: Path) -> list[str]:
    return {
        "dpo": [f"dpo.cache={cache}", "dpo.sft_coef=0.1"],
        "kto": [f"kto.cache={cache}", "kto.undesirable_weight=1.5"],
        "orpo": [],
        "cpo": ["cpo.kind=simpo", "cpo.beta=2", "cpo.sft_coef=0"],
    }[entry]


def entries(path: Path) -> dict[bytes, float]:
    return dict(np.frombuffer(path.read_bytes()[32:], dtype=ENTRY).tolist())


def assert_same_course(run_dir: Path, reference: Path, first: int = 0) -> None:
    for names in (
        [*(f"train/{name}" for name in MEASURED), "train/grad_norm"],
        [f"eval/{name}" for name in MEASURED],
    ):
        ours, theirs = metrics(run_dir, *names), metrics(reference, *names)
        theirs = theirs[-len(ours) :]
        assert len(ours) == (12 - first if names[0].startswith("train") else 2 - first // 6)
        for step, (mine, wanted) in enumerate(zip(ours, theirs, strict=True), first):
            for name, value, want in zip(names, mine, wanted, strict=True):
                if step == 0 and name == "train/accuracy":
                    continue  # the policy still equals the reference, so that rounding decides
                relative = 1e-4 if name == "train/grad_norm" else 1e-5
                assert abs(value - want) <= relative * abs(want) + 2e-6, name


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["TP2", "PP2", "TP2xDP2"]))
def test_dpo_is_the_same_in_every_layout(
    layout: str, worlds: Worlds, data: Path, cache: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_preference, tmp_path, "dpo", data, *settings("dpo", tmp_path / "cache"), *overrides)
    assert_same_course(tmp_path, references["dpo"])
    (ours,), (theirs,) = (folder.glob("reference-*.bin") for folder in (tmp_path / "cache", cache))
    assert ours.name == theirs.name  # a digest of the weights; KTO's reference has the same
    computed, wanted = entries(ours), entries(theirs)
    assert len(computed) == 80
    assert all(abs(total - wanted[row]) <= 1e-5 * abs(wanted[row]) for row, total in computed.items())


# KTO's estimate of the KL is over all replicas.
TWO = [("kto", "DP2"), ("orpo", "TP2"), ("cpo", "PP2")]
FOUR = [(entry, layout) for entry in ("kto", "orpo", "cpo") for layout in ("TP2xDP2", "TP2xPP2+SP")]


@pytest.mark.parametrize(("entry", "layout"), gated([*TWO, *FOUR], FOUR))
def test_the_others_are_the_same_in_every_layout(
    entry: str, layout: str, worlds: Worlds, data: Path, cache: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    world, overrides = LAYOUTS[layout]
    worlds.run(world, run_preference, tmp_path, entry, data, *settings(entry, cache), *overrides)
    assert_same_course(tmp_path, references[entry])


def test_the_first_loss_of_a_policy_that_equals_the_reference_is_known(references: dict[str, Path]) -> None:
    (first,) = metrics(references["dpo"], "train/loss", "train/nll", "train/margin")[:1]
    assert first[0] - 0.1 * first[1] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(first[2]) < 1e-5
    assert metrics(references["kto"], "train/kl")[0][0] == pytest.approx(0, abs=1e-4)


def test_every_algorithm_learns_to_prefer(references: dict[str, Path]) -> None:
    for entry, run_dir in references.items():
        accuracy = metrics(run_dir, "eval/accuracy")
        assert accuracy[-1][0] > 0.85, entry
        losses = metrics(run_dir, "train/loss")
        assert losses[-1] < losses[0], entry


def test_a_run_cut_in_two_ends_in_the_same_weights_and_holds_no_second_model(
    worlds: Worlds, data: Path, cache: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    for entry in ("dpo", "kto"):
        run_dir = tmp_path / entry
        command = (1, run_preference, run_dir, entry, data, *settings(entry, cache))
        worlds.run(*command, "trainer.max_steps=6")
        worlds.run(*command)
        ours, theirs = final_tensors(run_dir), final_tensors(references[entry])
        assert_same_bits(ours, theirs)
        assert not [name for name in ours if name.startswith("reference")]


def test_a_resident_reference_gives_the_same_losses_as_a_cached_one(
    worlds: Worlds, data: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    for entry, world, overrides in (("dpo", 2, ["parallel.pp=2"]), ("kto", 1, [])):
        resident = [*settings(entry, tmp_path), f"{entry}.reference=resident", *overrides]
        worlds.run(world, run_preference, tmp_path / entry, entry, data, *resident)
        assert_same_course(tmp_path / entry, references[entry])
    assert not list(tmp_path.glob("reference-*"))


def test_a_broken_record_is_named_by_file_and_line(worlds: Worlds, data: Path, tmp_path: Path) -> None:
    lines = (data / "train.jsonl").read_text().splitlines()
    lines[3] = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    with refused(DataError, where=f"{tmp_path / 'train.jsonl'}:4", offers={"data.on_error": ["drop"]}):
        worlds.run(1, run_preference, tmp_path / "run", "orpo", tmp_path)
    worlds.run(1, run_preference, tmp_path / "run", "orpo", tmp_path, "data.on_error=drop", "trainer.max_steps=1")


def test_a_cache_grows_by_what_is_new_and_is_never_trusted_blindly(worlds: Worlds, data: Path, tmp_path: Path) -> None:
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text((data / f"{name}.jsonl").read_text())
    cache = tmp_path / "cache"

    def said(name: str, *overrides: str) -> str:
        run_dir = tmp_path / name
        command = (run_preference, run_dir, "dpo", tmp_path, f"dpo.cache={cache}", "trainer.max_steps=1", *overrides)
        worlds.run(1, *command)
        return (run_dir / "logs" / "rank-0000.log").read_text()

    assert "reference: 80 responses computed" in said("first")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "new", "chosen": "aaa", "rejected": "b"}) + "\n")
    assert "reference: 2 responses computed, 82 stored" in said("one more")
    (path,) = cache.glob("reference-*.bin")
    whole, before = path.read_bytes(), entries(path)
    path.write_bytes(whole[:-5])
    log = said("damaged")
    assert "is damaged" in log
    assert "reference: 82 responses computed" in log
    # Two rows were computed in a batch of their own before: the same up to rounding.
    assert entries(path) == pytest.approx(before, rel=1e-6)
    whole = path.read_bytes()
    table = np.frombuffer(whole[32:], dtype=ENTRY).copy()
    table["total"] -= 5
    path.write_bytes(hashlib.sha256(table.tobytes()).digest() + table.tobytes())
    assert "computing all again" in said("of another model")
    assert path.read_bytes() == whole
    stale = np.concatenate([table, np.array([(b"x" * 15 + b"\x01", -1.0)], dtype=ENTRY)])
    path.write_bytes(hashlib.sha256(stale.tobytes()).digest() + stale.tobytes())
    assert "computing all again" in said("of another model and more rows")
    assert path.read_bytes() == whole
    said("other weights", "seed=2")
    assert len(list(cache.glob("reference-*.bin"))) == 2


def test_a_reference_of_its_own_is_released_before_the_first_step(
    worlds: Worlds, data: Path, references: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """From another run's weights as reference: not ln 2 at first, and its cached log-probs equal the resident ones."""
    start = [f"dpo.reference_path={references['orpo']}", f"dpo.cache={tmp_path / 'cache'}", "trainer.max_steps=3"]
    for name in ("cached", "resident"):
        command = [*start, f"dpo.reference={name}", "trainer.eval_every=null"]
        worlds.run(1, run_and_count_models, tmp_path / name, data, 2 if name == "resident" else 1, *command)
    ours, theirs = (metrics(tmp_path / name, "train/loss") for name in ("cached", "resident"))
    assert abs(ours[0][0] - math.log(2)) > 1e-3
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(wanted[0], rel=1e-6)


def run_and_count_models(run_dir: Path, data: Path, models: int, *overrides: str) -> None:
    """Run DPO; in the first step, only so many engines exist."""
    import gc

    from megarl.modules.preference import Preference
    from megarl.parallel.engine import Engine

    original = Preference.training_step

    def counted(self: Preference, *args: object) -> None:
        gc.collect()
        alive = [found for found in gc.get_objects() if isinstance(found, Engine)]
        assert len(alive) == models, alive
        original(self, *args)  # type: ignore[arg-type]

    gc.collect()
    Preference.training_step = counted  # type: ignore[method-assign]
    try:
        run_preference(run_dir, "dpo", data, *overrides)
    finally:
        Preference.training_step = original  # type: ignore[method-assign]


def test_what_would_change_the_reference_of_a_resumed_run_is_refused(
    worlds: Worlds, data: Path, cache: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    moved = str(references["orpo"])
    for entry, key, value in (
        ("dpo", "seed", 2),
        ("dpo", "dpo.reference_path", moved),
        ("kto", "trainer.global_batch_size", 12),
    ):
        half = [f"run.resume={references[entry] / 'checkpoints'}", f"{key}={value}", "trainer.max_steps=14"]
        with refused(CheckpointError, key=key, value=value):
            worlds.run(1, run_preference, tmp_path / entry, entry, data, *settings(entry, cache), *half)


def test_other_weights_behind_the_same_path_are_noticed_at_a_resume(
    worlds: Worlds, data: Path, references: dict[str, Path], tmp_path: Path
) -> None:
    start, run_dir = tmp_path / "start", tmp_path / "run"
    for which, kind in (("cpo", "cached"), ("orpo", "cached"), ("orpo", "resident")):
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(references[which] / "checkpoints" / "step-0000012", start)
        own = [f"model.path={start}", f"dpo.cache={tmp_path / 'cache'}", f"dpo.reference={kind}"]
        command = (1, run_preference, run_dir, "dpo", data, *own, "trainer.eval_every=null")
        if which == "cpo":
            worlds.run(*command, "trainer.max_steps=2")
        else:
            with refused(CheckpointError, key="model.path", value=str(start)):
                worlds.run(*command, "trainer.max_steps=4")
