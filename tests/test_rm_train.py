"""EasyRLHF's command line becomes one of `megarl.train_rm`."""

from __future__ import annotations

import gzip
import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megarl import rm_train
from megarl.config.compose import compose
from megarl.errors import ConfigError, DataError
from megarl.rm_train import Translation, translate
from tests.hh import write_hh
from tests.refusals import refused

README = (
    '--devices "0,1,2,3" --output_dir "outputs/my-model" '
    "--train_data data/helpful-base/train.jsonl,data/helpful-online/train.jsonl,data/sampled/train.jsonl "
    "--valid_data data/helpful-base/test.jsonl,data/helpful-online/test.jsonl"
)
"""The command of EasyRLHF's README, with shorter names of files."""


def translated(line: str, records: int = 1000) -> Translation:
    return translate(shlex.split(line), lambda files: records)


def settings(line: str, records: int = 1000) -> dict[str, str]:
    return dict(word.split("=", 1) for word in translated(line, records).words)


def test_the_command_of_the_readme_becomes_keys() -> None:
    assert settings(README) == {
        "data.train": "[data/helpful-base/train.jsonl,data/helpful-online/train.jsonl,data/sampled/train.jsonl]",
        "data.eval": "[data/helpful-base/test.jsonl,data/helpful-online/test.jsonl]",
        "data.seq_length": "1024",
        "data.too_long": "drop",
        "data.on_error": "drop",
        "model.path": "gpt2-xl",
        "run.dir": "outputs/my-model",
        "trainer.devices": "4",
        "trainer.global_batch_size": "32",
        "trainer.micro_batch_size": "1",
        "trainer.max_steps": "32",  # 1000 records in batches of 32
        "trainer.eval_every": "32",
    }
    found = translated(README)
    assert found.gpus == "0,1,2,3"
    assert str(found).startswith("CUDA_VISIBLE_DEVICES=0,1,2,3 python -m megarl.train_rm ")
    config, _ = compose("rm", found.words)
    assert config.data.train[2] == "data/sampled/train.jsonl"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("--model gpt2", "model.path", "gpt2"),
        ("--model_name=gpt2", "model.path", "gpt2"),
        ("--model_name_or_path gpt2", "model.path", "gpt2"),  # the flag of EasyRLHF.reward_model
        ("--model-name-or-path gpt2", "model.path", "gpt2"),
        ("--batch_size 10", "trainer.global_batch_size", "10"),
        ("--batch_size 10 --epochs 3", "trainer.max_steps", "300"),
        ("--num_train_epochs 2 --batch_size 3", "trainer.max_steps", "667"),
        ("trainer.global_batch_size=10", "trainer.max_steps", "100"),
        ("--devices 0,1 --epochs 10", "trainer.eval_every", "625"),
        ("--devices 0 --epochs 10", "trainer.eval_every", "1000"),
        ("--lr 3e-6", "optim.lr", "3e-6"),
        ("--max_length 256", "data.seq_length", "256"),
        ("--max_length 256 data.seq_length=64", "data.seq_length", "64"),
        ("--seed 7", "seed", "7"),
        ("rm.center_coef=0.01", "rm.center_coef", "0.01"),
        ("trainer.max_steps=5", "trainer.max_steps", "5"),
    ],
)
def test_a_flag_or_a_key_is_passed_on(line: str, key: str, value: str) -> None:
    assert settings(f"--train_file a.jsonl {line}")[key] == value


def test_without_devices_the_environment_stays_as_it_is() -> None:
    found = translated("--train_data a.jsonl")
    assert found.gpus is None
    assert "trainer.devices" not in settings("--train_data a.jsonl")


@pytest.mark.parametrize("given", ["--model x", "model.path=x", "model.num_layers=2", "+conf=hh", "model=gpt2"])
def test_a_model_that_is_named_replaces_the_default(given: str) -> None:
    found = translated(f"--train_data a.jsonl {given}")
    assert not found.uses_default_model
    assert "model.path=gpt2-xl" not in found.words


@pytest.mark.parametrize(
    ("line", "key", "names"),
    [
        ("--train_dta a.jsonl", "--train_dta", ("--train_data",)),
        ("--train_data a.jsonl --learning-rat 1", "--learning-rat", ("--learning_rate",)),
        ("--train_data a.jsonl --deepspeed x", "--deepspeed", ("--output_dir", "key=value")),
        ("-devices 0", "-devices", ("--devices",)),
        ("--valid_data a.jsonl", "--train_data", ()),
        ("--train_data", "--train_data", ()),
        ("--train_data --lr 1", "--train_data", ()),
        ("--train_data ,", "--train_data", ()),
        ("--train_data a.jsonl --train_file b.jsonl", "--train_data", ("b.jsonl",)),
        ("--train_data a.jsonl --devices gpu", "--devices", ("gpu",)),
        ("--train_data a.jsonl --epochs 0", "--epochs", ("0",)),
        ("--train_data a.jsonl --batch_size 0", "--batch_size", ("0",)),
        ("--train_data a.jsonl --epochs 1 trainer.max_steps=5", "--epochs", ("trainer.max_steps",)),
    ],
)
def test_what_cannot_be_translated_is_refused_with_its_flag(line: str, key: str, names: tuple[str, ...]) -> None:
    with refused(ConfigError, key=key, names=names):
        translated(line)


def test_names_of_files_may_have_any_character(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a b.jsonl", "it's [new].jsonl", "c={d}.jsonl")]
    found = translated(shlex.join(["--train_data", ",".join(names), "--model", "x"]))
    assert compose("rm", found.words)[0].data.train == names


def test_records_of_compressed_files_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hh(tmp_path)
    Path("train.jsonl.gz").write_bytes(gzip.compress(Path("train.jsonl").read_bytes()))
    records = len(Path("train.jsonl").read_text().splitlines())
    found = translate(["--train_data", "train.jsonl.gz,train.jsonl", "--batch_size", "2"], rm_train._count)
    assert f"trainer.max_steps={records}" in found.words
    with refused(DataError, names=("absent.jsonl", "--train_data")):
        translate(["--train_data", "absent.jsonl"], rm_train._count)


def test_the_command_is_printed_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"chosen": "a b", "rejected": "a c"}) + "\n")
    ran = []
    monkeypatch.setattr(rm_train, "run", lambda entry, words, main: ran.append((entry, words)))
    monkeypatch.setattr(sys, "argv", ["rm_train", "--train_data", str(tmp_path / "a.jsonl"), "seed=3"])
    with pytest.raises(SystemExit) as end:
        rm_train.main()
    assert end.value.code == 0
    about, command = capsys.readouterr().out.splitlines()
    assert "gpt2-xl" in about
    ((entry, words),) = ran
    assert (entry, shlex.split(command)) == ("rm", ["python", "-m", "megarl.train_rm", *words])
    assert words[-1] == "seed=3"


def test_its_help_comes_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-m", "megarl.rm_train", "--help"], capture_output=True, text=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2
    assert all(f"--{name} " in done.stdout for name in rm_train.KEYS)


def test_it_is_a_console_script() -> None:
    project = (Path(rm_train.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'rm_train = "megarl.rm_train:main"' in project.splitlines()
