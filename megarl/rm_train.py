"""`rm_train`: EasyRLHF's command for reward models, as a front to `python -m megarl.train_rm`."""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from megarl.command import printable, process_number, run_command
from megarl.config.compose import run
from megarl.errors import ConfigError
from megarl.training import train

HELP = """usage: rm_train --train_data A,B,C [--valid_data D,E] [flags] [key=value ...]

Train a reward model on pairs, as EasyRLHF's command of this name does. It prints and runs python -m megarl.train_rm
with the keys on the right. key=value words are passed on, and replace what flags set.

  --train_data A,B,C   data.train: .jsonl or .jsonl.gz files of hh-rlhf's form; also --train_file
  --valid_data D,E     data.eval; also --valid_file
  --output_dir DIR     run.dir
  --model NAME         model.path: a folder, a run, or a hub name (default gpt2-xl); also --model_name,
                       --model_name_or_path
  --devices 0,1,2,3    numbers of the GPUs: CUDA_VISIBLE_DEVICES, and how many there are as trainer.devices
  --epochs N           trainer.max_steps, from the number of records (default 1); also --num_train_epochs
  --batch_size N       trainer.global_batch_size: pairs per step over all devices (default 8 for each)
  --lr X               optim.lr (default 1e-5); also --learning_rate
  --max_length N       data.seq_length: longer pairs are left out (default 1024); also --max_seq_length
  --seed N             seed

All keys: python -m megarl.train_rm --help
"""
SAME = {
    "train_file": "train_data",
    "valid_file": "valid_data",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_train_epochs": "epochs",
    "learning_rate": "lr",
    "max_seq_length": "max_length",
}
"""Other spellings of flags."""
KEYS = {
    "train_data": "data.train",
    "valid_data": "data.eval",
    "output_dir": "run.dir",
    "model": "model.path",
    "devices": "trainer.devices",
    "epochs": "trainer.max_steps",
    "batch_size": "trainer.global_batch_size",
    "lr": "optim.lr",
    "max_length": "data.seq_length",
    "seed": "seed",
}
"""The key that each flag sets."""
MODEL = "gpt2-xl"
PAIRS_PER_DEVICE = 8
EVAL_EVERY = 1000
_PLAIN = re.compile(r"[\w./:@+~-]+")


@dataclass(frozen=True)
class Translation:
    """A command line for `megarl.train_rm`.

    Attributes:
        words: its settings.
        gpus: value of CUDA_VISIBLE_DEVICES; None leaves the variable as it is.
        uses_default_model: no model was named.
    """

    words: list[str]
    gpus: str | None
    uses_default_model: bool

    def __str__(self) -> str:
        command = shlex.join(["python", "-m", "megarl.train_rm", *self.words])
        return command if self.gpus is None else f"CUDA_VISIBLE_DEVICES={self.gpus} {command}"


def translate(argv: Sequence[str], count: Callable[[list[str]], int]) -> Translation:
    """Return the command line of `megarl.train_rm` for one of `rm_train`.

    Args:
        count: returns the number of records in some files.
    """
    flags, overrides = _parse(argv)
    overridden = {word.lstrip("+~").partition("=")[0]: word.partition("=")[2] for word in overrides}
    if "train_data" not in flags and "data.train" not in overridden:
        raise ConfigError("--train_data is missing: rm_train --train_data A.jsonl,B.jsonl", key="--train_data")
    gpus = flags.pop("devices", None)
    has_model = "model" in flags or any(key == "conf" or key.startswith("model") for key in overridden)
    values = {"model.path": MODEL} if not has_model else {}
    files = {name: _files(f"--{name}", flags[name]) for name in ("train_data", "valid_data") if name in flags}
    values |= {KEYS[name]: text for name, text in flags.items() if name not in ("epochs", *files)}
    values |= {KEYS[name]: f"[{','.join(map(_quoted, found))}]" for name, found in files.items()}
    if gpus is not None:
        values["trainer.devices"] = str(len(_devices(gpus)))
    devices = overridden.get("trainer.devices", values.get("trainer.devices", "1"))
    defaults = {
        "data.seq_length": "1024",
        "data.too_long": "drop",
        "data.on_error": "drop",
        "trainer.global_batch_size": str(PAIRS_PER_DEVICE * (int(devices) if devices.isdecimal() else 1)),
        "trainer.micro_batch_size": "1",
    }
    values = {**defaults, **values}
    if "trainer.max_steps" not in overridden and "data.train" not in overridden:
        batch = _whole("--batch_size", overridden.get("trainer.global_batch_size", values["trainer.global_batch_size"]))
        epochs = _whole("--epochs", flags.get("epochs", "1"))
        steps = -(-epochs * count(files["train_data"]) // batch)
        values |= {"trainer.max_steps": str(steps), "trainer.eval_every": str(min(EVAL_EVERY, steps))}
    elif "epochs" in flags:
        raise ConfigError(
            "--epochs sets trainer.max_steps from the records of --train_data: leave out "
            f"{'trainer.max_steps' if 'trainer.max_steps' in overridden else 'data.train'}=, or --epochs",
            key="--epochs",
            value=flags["epochs"],
        )
    words = [f"{key}={value}" for key, value in sorted(values.items()) if key not in overridden]
    return Translation([*words, *overrides], gpus, not has_model)


def _parse(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the values of flags by their first spelling, and the other words."""
    flags: dict[str, str] = {}
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        typed, equals, value = word.partition("=")
        name = typed.lstrip("-").replace("-", "_")
        name = SAME.get(name, name)
        if name not in KEYS or not typed.startswith("--"):
            raise _unknown(typed)
        if not equals:
            value = next(words, "")
        if not value or value.startswith("--"):
            raise ConfigError(f"{typed} has no value: write {typed} VALUE", key=typed)
        if flags.setdefault(name, value) != value:
            raise ConfigError(f"--{name} is given twice, as {flags[name]} and {value}: leave one out", key=f"--{name}")
    return flags, overrides


def _unknown(typed: str) -> ConfigError:
    known = [f"--{name}" for name in (*KEYS, *SAME)]
    near = difflib.get_close_matches(typed.replace("-", "_").replace("__", "--", 1), known, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]}? " if near else ""
    return ConfigError(
        f"unknown flag '{typed}'; {meant}flags are --help, {', '.join(f'--{name}' for name in KEYS)}; all else is "
        "written key=value, as for python -m megarl.train_rm",
        key=typed,
        offers={typed: near or known},
    )


def _files(flag: str, text: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ConfigError(f"{flag}={text} names no file: write {flag} A.jsonl,B.jsonl", key=flag, value=text)
    return found


def _devices(text: str) -> list[str]:
    found = text.split(",")
    if not all(number.strip().isdecimal() for number in found):
        raise ConfigError(
            f"--devices={text} is not a list of GPU numbers: write --devices 0,1,2,3", key="--devices", value=text
        )
    return found


def _whole(flag: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise ConfigError(f"{flag}={text} is not a whole number above 0", key=flag, value=text)
    return int(text)


def _quoted(name: str) -> str:
    """Return a file's name as an element of a list on the command line."""
    if _PLAIN.fullmatch(name):
        return name
    escaped = name.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _count(files: list[str]) -> int:
    from megarl.data.sources import read_records

    return sum(1 for _ in read_records(files, key="--train_data"))


def _lines(translation: Translation) -> Iterator[str]:
    if translation.uses_default_model:
        yield (
            f"no --model: {MODEL}, as in EasyRLHF. It is downloaded from the Hugging Face hub (6.4 GB) and needs a GPU "
            "with 40 GB or more; --model gpt2 is a small one"
        )
    yield str(translation)


def main() -> None:
    """Translate the command line, print the result, and train."""

    def work() -> None:
        argv = sys.argv[1:]
        if "--help" in argv or "-h" in argv or not argv:
            sys.stdout.write(HELP)
            return
        translation = translate(argv, _count)
        if process_number() == 0:
            sys.stdout.writelines(f"{printable(line)}\n" for line in _lines(translation))
            sys.stdout.flush()
        if translation.gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = translation.gpus
        run("rm", translation.words, partial(train, "rm"))

    run_command(work)


if __name__ == "__main__":
    main()
