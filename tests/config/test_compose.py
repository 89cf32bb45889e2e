"""Where values come from, which one wins, and what surrounds a run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import yaml
from hydra.core.config_store import ConfigStore

import megarl
from megarl.config import renames
from megarl.config.algorithms import ALGORITHMS, entry_point, entry_points
from megarl.config.compose import _Job, _overrides_first, compose
from megarl.config.preset_files import HEADER, preset_files
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN, conf_folder
from megarl.config.rules import check
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sft import SFTConfig
from megarl.config.world import world_size
from megarl.errors import DataError, NumericsError
from tests.refusals import assert_command_refused

REPOSITORY = Path(megarl.__file__).resolve().parents[1]
Start = Callable[..., tuple[int, str, str]]
Preset = Callable[..., None]


def test_without_arguments_the_schemas_defaults_run_on_the_shipped_demo(folder: Path) -> None:
    config, plain = compose("sft", [])
    expected = SFTConfig()
    expected.data.train = [DEMO_TRAIN]
    expected.data.eval = [DEMO_EVAL]
    assert config == expected
    assert plain == asdict(expected)
    check(config, world_size(config, {}))


def test_the_demo_is_evaluated_on_only_where_it_is_trained_on(folder: Path, preset: Preset) -> None:
    preset("mine", "data: {train: [mine.jsonl]}\n")
    for settings, evaluated in (
        (["+conf=mine"], []),
        (["data.train=[mine.jsonl]", "data.eval=['megarl.tasks.demo:held_out']"], [DEMO_EVAL]),
        (["data.train=['megarl.tasks.demo:train',mine.jsonl]"], [DEMO_EVAL]),
        (["data.train=['${resource:data/demo/train.jsonl}']"], [DEMO_EVAL]),
    ):
        config, plain = compose("sft", settings)
        assert (config.data.eval, plain["data"]["eval"]) == (evaluated, evaluated)
        assert config.data.format == "auto"


def test_overrides_beat_presets_and_later_presets_beat_earlier_ones(folder: Path, preset: Preset) -> None:
    preset("mine", "parallel: {tp: 2}\noptim: {lr: 0.5}\n")
    config, _ = compose("sft", ["+conf=gpt20b"])
    assert (config.model.num_layers, config.parallel.tp, config.optim.lr) == (44, 4, 1e-5)
    config, _ = compose("sft", ["+conf=[gpt20b,mine]"])
    assert (config.model.num_layers, config.parallel.tp, config.optim.lr) == (44, 2, 0.5)
    config, _ = compose("sft", ["+conf=[mine,gpt20b]"])
    assert (config.parallel.tp, config.optim.lr) == (4, 1e-5)
    config, _ = compose("sft", ["parallel.tp=8", "+conf=[gpt20b,mine]"])
    assert (config.parallel.tp, config.optim.lr) == (8, 0.5)


def test_presets_beat_groups_and_may_choose_them(folder: Path, preset: Preset) -> None:
    preset("deep", "defaults:\n  - override /model: small\nmodel: {num_layers: 24}\n")
    config, _ = compose("sft", ["+conf=deep"])
    assert (config.model.num_layers, config.model.hidden_size) == (24, 768)
    config, _ = compose("sft", ["model=gpt2", "+conf=gpt20b"])
    assert (config.model.hidden_size, config.model.position) == (6144, "rope")


def test_a_users_preset_replaces_a_shipped_one_and_is_forgotten_in_another_folder(
    folder: Path, preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset("gpt20b", "optim: {lr: 0.25}\n")
    preset("mine", "optim: {lr: 0.5}\n")
    config, _ = compose("sft", ["+conf=gpt20b"])
    assert (config.optim.lr, config.model.num_layers) == (0.25, 4)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    config, _ = compose("sft", ["+conf=gpt20b"])
    assert config.model.num_layers == 44
    assert "mine.yaml" not in ConfigStore.instance().list("conf")


def test_a_broken_file_matters_only_to_the_run_that_asks_for_it(folder: Path, preset: Preset) -> None:
    preset("broken", "optim: [1\n")
    preset("mine", "optim: {lr: 0.5}\n")
    assert compose("sft", ["+conf=mine"])[0].optim.lr == 0.5


TREES = {entry.config: name for name, entry in reversed(entry_points().items())}
"""An entry point for each tree: test_algorithms compares those that share one."""


def sections(entry: str) -> set[str]:
    """The keys of an entry point's tree, but for what all trees have."""
    return {item.name for item in fields(entry_point(entry).config)} - {"trainer", "optim", "checkpoint"}


def homes(keys: set[str], trees: dict[str, set[str]]) -> list[str]:
    """The entry points of presets with these sections: those with one that no other tree has, or else that whose tree
    has the most of them."""
    count = Counter(section for known in trees.values() for section in known)
    own = [entry for entry, known in trees.items() if any(count[key] == 1 for key in known & keys)]
    return own or [max(trees, key=lambda entry: len(trees[entry] & keys))]


def test_every_shipped_preset_composes_where_it_belongs_and_every_option_of_a_group_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of them uses an old key."""
    monkeypatch.setattr(renames, "warn_renamed", pytest.fail)
    trained = {entry: sections(entry) for entry in TREES.values() if entry in ALGORITHMS}
    used = set()
    for name, path in preset_files(conf_folder()).items():
        for entry in homes(set(yaml.safe_load(path.read_text(encoding="utf-8"))), trained):
            compose(entry, [f"+conf={name}"])
            used.add(entry)
    assert {"ppo", "ilql", "dpo", "rm"} <= used
    for option in conf_folder().glob("*/*.yaml"):
        entry = next(entry for entry in trained if option.parent.name in entry_point(entry).groups)
        compose(entry, [f"{option.parent.name}={option.stem}"])
    for file in conf_folder().rglob("*.yaml"):
        assert yaml.safe_load(file.read_text(encoding="utf-8")), f"{file} says nothing"


@pytest.mark.gate
@pytest.mark.parametrize("entry", TREES.values())
def test_every_shipped_preset_and_every_option_of_every_group_composes(
    folder: Path, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of them uses an old key. Presets without a section of the entry point's own are left out."""
    monkeypatch.setattr(renames, "warn_renamed", pytest.fail)
    own = sections(entry)
    for name, path in preset_files(conf_folder()).items() if entry in ALGORITHMS else ():  # presets are of training
        if own & yaml.safe_load(path.read_text(encoding="utf-8")).keys():
            compose(entry, [f"+conf={name}"])
    groups = entry_point(entry).groups
    for option in conf_folder().glob("*/*.yaml"):
        if option.parent.name in groups:
            compose(entry, [f"{option.parent.name}={option.stem}"])


@pytest.mark.parametrize("name", ["qlora", "stackllama"])
def test_the_commands_in_the_first_lines_of_presets_of_adapters_compose(folder: Path, name: str) -> None:
    comment = "".join(line[1:] for line in (conf_folder() / f"{name}.yaml").open() if line.startswith("#"))
    commands = re.findall(r"python -m megarl\.train_(\w+) (.*)", comment.replace("\\\n", ""))
    assert len(commands) >= 2
    for entry, words in commands:
        config, _ = compose(entry, words.split())
        assert config.adapter.base_bits in (4, 8, 16)
        check(config, world_size(config, {}))


def test_qlora_keeps_what_a_model_and_an_algorithm_set(folder: Path) -> None:
    config, _ = compose("ppo", ["+conf=[gpt20b,qlora]", "data.train=[prompts.jsonl]", "reward.fn=rewards.py:score"])
    assert (config.model.num_layers, config.parallel.tp, config.ppo.rollouts) == (44, 4, 512)
    assert asdict(config.adapter) == asdict(AdapterConfig(rank=16, alpha=32.0, base_bits=4))
    check(config, 8)
    assert compose("dpo", ["+conf=[hh,qlora]"])[0].optim.lr == 1e-6


def test_gpt20b_has_the_shape_of_neox_and_fits_its_own_layout(folder: Path) -> None:
    config, _ = compose("sft", ["+conf=gpt20b"])
    assert asdict(config.model) | {
        "num_layers": 44, "hidden_size": 6144, "num_heads": 64, "ffn_size": 24576, "vocab_size": 50432,
        "max_positions": 2048, "rope_percent": 0.25, "norm": "layernorm", "parallel_residual": "two_norms",
        "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": False,
    } == asdict(config.model)  # fmt: skip
    assert (config.trainer.micro_batch_size, config.trainer.global_batch_size) == (2, 64)
    check(config, 8)
    check(config, 64)


def test_values_are_converted_and_interpolated(folder: Path) -> None:
    config, plain = compose(
        "sft", ["trainer.devices=auto", "optim.lr=3", "data.train=[a.jsonl, b c.jsonl]", "run.name=s${seed}"]
    )
    assert config.trainer.devices == "auto"
    assert isinstance(config.optim.lr, float)
    assert config.data.train == ["a.jsonl", "b c.jsonl"]
    assert plain["run"]["name"] == "s1"


def test_main_gets_the_typed_tree_and_its_code_is_the_exit_code(start: Start, folder: Path) -> None:
    seen: list[Any] = []

    def main(config: Any) -> int:
        seen.append((config, Path.cwd()))
        return 7

    code, out, err = start("seed=5", main=main)
    assert (code, out, err) == (7, "", "")
    config, where = seen[0]
    assert isinstance(config, SFTConfig)
    assert config.seed == 5
    assert where == folder
    assert list(folder.iterdir()) == [], "nothing may be written by composing"


def test_errors_of_a_run_are_one_line_with_their_exit_code(start: Start) -> None:
    def bad_data(config: Any) -> None:
        raise DataError("x.jsonl:3: no key 'prompt'\nfound: text")

    def bad_numbers(config: Any) -> None:
        raise NumericsError("loss is NaN")

    assert start(main=bad_data) == (2, "", "error: x.jsonl:3: no key 'prompt' found: text\n")
    assert start(main=bad_numbers) == (3, "", "error: loss is NaN\n")


def test_debug_shows_the_traceback_too(start: Start, preset: Preset) -> None:
    def bad_data(config: Any) -> None:
        raise DataError("nothing there")

    preset("debugging", "debug: true\n")
    for argument in ("debug=true", "+conf=debugging"):
        _, _, err = start(argument, main=bad_data)
        assert "Traceback" in err
        assert err.endswith("\nerror: nothing there\n")


def test_bugs_keep_their_traceback(folder: Path) -> None:
    from megarl.config.compose import run

    def bug(config: Any) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        run("sft", [], bug)


def test_a_rank_other_than_0_says_who_it_is(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    assert start("parallel.tpp=2")[2].startswith("[rank 3] error: ")


def test_multirun_calls_main_once_per_value_in_folders_of_their_own(start: Start, folder: Path) -> None:
    runs: list[tuple[float, str]] = []

    def main(config: Any) -> None:
        runs.append((config.optim.lr, config.run.dir))

    code, _, err = start("--multirun", "optim.lr=0.1,0.2", main=main)
    assert (code, err) == (0, "")
    assert [lr for lr, _ in runs] == [0.1, 0.2]
    folders = [Path(where) for _, where in runs]
    assert [path.name for path in folders] == ["0", "1"]
    assert all(path.parent.parent == folder / "runs" for path in folders)
    assert sorted(path.name for path in folder.iterdir()) == ["runs"]


def test_multirun_with_a_run_folder_numbers_the_jobs_below_it(start: Start, preset: Preset) -> None:
    runs: list[tuple[float, str]] = []
    preset("a", "optim: {lr: 0.1}\n")
    preset("b", "optim: {lr: 0.2}\n")
    code, _, _ = start(
        "+conf=a,b", "-m", "run.dir=sweep", main=lambda config: runs.append((config.optim.lr, config.run.dir))
    )
    assert code == 0
    assert runs == [(0.1, "sweep/0"), (0.2, "sweep/1")]


def test_multirun_ends_with_the_code_of_a_failed_job_after_running_the_others(start: Start) -> None:
    seen: list[int] = []

    def main(config: Any) -> int:
        seen.append(config.seed)
        return 3 if config.seed == 1 else 0

    code, _, err = start("-m", "seed=1,2", main=main)
    assert (code, seen) == (3, [1, 2])
    assert "exit code 3" in err.splitlines()[-1]


def test_jobs_can_be_sent_to_another_machine() -> None:
    job = cloudpickle.loads(cloudpickle.dumps(_Job("sft", lambda config: 0)))
    assert (job.entry, job.main(None)) == ("sft", 0)


def test_settings_may_stand_on_both_sides_of_a_flag() -> None:
    assert _overrides_first(["a=1", "-m", "b=2", "-cd", "/x=y", "~c", "--cfg", "job"]) == [
        "a=1", "b=2", "~c", "-m", "-cd", "/x=y", "--cfg", "job",
    ]  # fmt: skip


def test_hydras_flags_answer_without_running(start: Start, folder: Path) -> None:
    def main(config: Any) -> None:
        pytest.fail("must not run")

    code, out, _ = start("--cfg", "job", "+conf=gpt20b", main=main)
    assert code == 0
    assert yaml.safe_load(out)["model"]["num_layers"] == 44
    code, out, _ = start("--cfg", "job", "--resolve", "-p", "parallel", "parallel.tp=2", main=main)
    assert yaml.safe_load(out)["tp"] == 2
    assert list(folder.iterdir()) == []


def test_shell_completion_knows_keys_options_and_presets(
    start: Start, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset("mine", "seed: 2\n")
    for line, expected in (("optim.l", "optim.lr="), ("model=s", "model=small"), ("+conf=min", "+conf=mine")):
        command = f"megarl-train-sft {line}"
        monkeypatch.setenv("COMP_LINE", command)
        monkeypatch.setenv("COMP_POINT", str(len(command)))
        code, out, _ = start("-sc", "query=bash")
        assert (code, out.split()) == (0, [expected])


SCRIPT = """
import sys
from megarl.config.compose import run

def main(config):
    heavy = {"torch", "megatron", "transformers", "lightning"} & set(sys.modules)
    assert not heavy, heavy
    print("lr", config.optim.lr, "from", config.data.train[0])

run("sft", sys.argv[1:], main)
"""


def in_process(folder: Path, package_parent: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a fresh Python that finds megarl below `package_parent`."""
    (folder / "entry.py").write_text(SCRIPT, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "entry.py", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package_parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_fresh_process_composes_without_importing_what_is_heavy(folder: Path) -> None:
    done = in_process(folder, REPOSITORY, "optim.lr=0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("lr 0.5 from ")
    assert [path.name for path in folder.iterdir()] == ["entry.py"]


def test_a_typo_in_a_fresh_process_is_one_line_and_exit_code_2(folder: Path) -> None:
    done = in_process(folder, REPOSITORY, "parallel.tpp=2")
    assert_command_refused(done, "'parallel.tpp'", "'parallel.tp'")
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_an_installed_package_finds_its_own_conf_and_the_users(folder: Path, preset: Preset) -> None:
    package = folder / "site" / "megarl"
    for room in ("config", "functions", "tasks"):
        shutil.copytree(REPOSITORY / "megarl" / room, package / room)
    for name in ("__init__.py", "command.py", "disk.py", "errors.py", "logging.py"):
        shutil.copy(REPOSITORY / "megarl" / name, package)
    shutil.copytree(conf_folder(), package / "conf")
    shipped = package / "conf" / "only_here.yaml"
    shipped.write_text(HEADER + "\noptim: {lr: 0.5}\n", encoding="utf-8")
    preset("mine", "optim: {lr: 0.25}\n")
    done = in_process(folder, folder / "site", "+conf=only_here")
    assert (done.returncode, done.stdout) == (0, f"lr 0.5 from {DEMO_TRAIN}\n")
    done = in_process(folder, folder / "site", "+conf=[only_here,mine]")
    assert (done.returncode, done.stdout) == (0, f"lr 0.25 from {DEMO_TRAIN}\n")
