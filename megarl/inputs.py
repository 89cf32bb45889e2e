"""What a call from Python asks for: the typed configuration, the functions, and the lists, which become files of the
run folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.command import process_number
from megarl.config.algorithms import ALGORITHMS, LearnsFrom, find_algorithm
from megarl.config.compose import compose, explained, typed
from megarl.config.files import check_files
from megarl.config.leaf import leaves
from megarl.config.messages import nearest_keys, one_of
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.config.settings import algorithm_of, settings_of
from megarl.disk import writable, write_atomically
from megarl.errors import ConfigError, DataError, first_line

Function = Callable[..., Any]
Sample = str | Sequence[str]
DEVICES = {"auto": "auto", "cpu": "cpu", "gpu": "gpu", "cuda": "gpu"}
"""Values of `trainer.accelerator` by the names that people use for devices."""


class Inputs(TypedDict, total=False):
    """The arguments of `megarl.train` and `megarl.Session` that say what to train and on what.

    Attributes:
        reward_fn: called as `fn(samples=..., prompts=..., outputs=..., tokenizer=..., **metadata)`, or its name.
        prompts: texts, or records with a "prompt" whose other fields go to the functions. Without any, those of the
            configuration; if it has none, responses begin with the tokenizer's first token.
        eval_prompts: what evaluations answer.
        samples: texts, [prompt, output] pairs, or longer alternating dialogues (with rewards).
        rewards: one number, or one per output, for each sample.
        pairs: records with the fields prompt, chosen and rejected; for KTO, also prompt, completion and label.
        eval_pairs: the same, for evaluations.
        metric_fn: called as reward_fn is; a list of numbers, or a mapping of such lists by name.
        stop_sequences: texts that end a response.
        device: auto, cpu or gpu (None: trainer.accelerator).
    """

    reward_fn: Function | str | None
    prompts: Sequence[str | Mapping[str, Any]] | None
    eval_prompts: Sequence[str | Mapping[str, Any]] | None
    samples: Sequence[Sample] | None
    rewards: Sequence[float | Sequence[float]] | None
    pairs: Sequence[Mapping[str, Any]] | None
    eval_pairs: Sequence[Mapping[str, Any]] | None
    metric_fn: Function | str | None
    stop_sequences: Sequence[str] | None
    device: str | None


@dataclass(frozen=True)
class Asked:
    """What a call asks for.

    Attributes:
        entry: name of the algorithm.
        config: its typed configuration tree.
        functions: callables to use instead of the functions that `reward.fn` and `metric.fn` name.
        lists: records by the name of the argument that gave them.
        run_dir: folder of the run.
    """

    entry: str
    config: Any
    functions: dict[str, Function]
    lists: dict[str, list[dict[str, Any]]]
    run_dir: Path

    @contextmanager
    def written(self) -> Iterator[None]:
        """Hold the run folder, write the lists into it, and check the configuration that names them."""
        from megarl.config.rules import check
        from megarl.config.world import world_size
        from megarl.data.sources import named_lists

        with _owned(self.run_dir, self.config):  # another run's inputs must stay as they are
            names = _write_inputs(self.run_dir / "inputs", self.lists, self.config)
            check(self.config, world_size(self.config, os.environ))
            check_files(self.config)
            with named_lists(names):
                yield


def asked_for(
    model: str | Path | Mapping[str, Any] | None, config: DictConfig | None, inputs: Mapping[str, Any]
) -> Asked:
    """Return what a call asks for, or refuse what contradicts itself.

    Args:
        model: a folder or hub name, or keys of the `model` section to start from random weights.
        config: from `default_config`; it says which algorithm unless the inputs do.
        inputs: `Inputs`, by name.
    """
    known = Inputs.__annotations__
    for name in inputs:
        if name not in known:
            near = nearest_keys(name, sorted(known)) or sorted(known)
            raise ConfigError(
                f"there is no argument {name}=; did you mean {one_of(near)}?", key=name, offers={name: near}
            )
    given = {name: inputs.get(name) for name in known}
    reward_fn, metric_fn, device = given["reward_fn"], given["metric_fn"], given["device"]
    prompts, eval_prompts, samples = given["prompts"], given["eval_prompts"], given["samples"]
    rewards, pairs, eval_pairs = given["rewards"], given["pairs"], given["eval_pairs"]
    for name in ("prompts", "eval_prompts", "samples", "pairs", "eval_pairs"):
        values = given[name]
        if values is not None and isinstance(values, Sized) and len(values) == 0:
            raise DataError(f"{name}=[] is empty: give some, or leave {name} out", key=name, value=[])
    entry = _algorithm(reward_fn, samples, rewards, config, pairs)
    if eval_pairs is not None and find_algorithm(entry).learns_from != "pairs":
        raise ConfigError(
            f"eval_pairs= has no meaning for {entry}, which does not learn from pairs: leave it out", key="eval_pairs"
        )
    if samples is None and rewards is not None:
        raise ConfigError(
            "rewards= are of samples, and there are none: give samples=, or leave rewards out", key="rewards"
        )
    if pairs is not None and prompts is not None:
        raise ConfigError("prompts= are for a reward function, and pairs= are given: leave one out", key="prompts")
    if samples is not None and prompts is not None:
        raise ConfigError(
            "prompts= are for a reward function, and samples= are given: use eval_prompts=, or leave one out",
            key="prompts",
        )
    if rewards is not None and samples is not None and len(samples) != len(rewards):
        raise DataError(
            f"{len(samples)} samples have {len(rewards)} rewards: give one for each", key="rewards", value=len(rewards)
        )
    tree = default_config(entry) if config is None else config
    with explained(entry, []):
        filled, _ = typed(entry, tree)
    if isinstance(model, Mapping):
        fill(filled.model, model, "model")
    elif model is not None:
        filled.model.path = str(model)
    if device is not None:
        if device not in DEVICES:
            raise ConfigError(
                f"device={device!r} is no kind of device: use {', '.join(DEVICES)}",
                key="device",
                value=device,
                offers={"device": list(DEVICES)},
            )
        filled.trainer.accelerator = DEVICES[device]
    if given["stop_sequences"] is not None:
        _section(filled, "rollout", "stop_sequences", entry).stop = list(given["stop_sequences"])
    run_dir = writable(str(_run_dir(entry, filled)), "run.dir")
    filled.run.dir = str(run_dir)
    lists: dict[str, list[dict[str, Any]]] = {}
    learns_from = find_algorithm(entry).learns_from
    if learns_from == "prompts":
        if prompts is not None or not filled.data.train:
            lists["prompts"] = _records(prompts if prompts is not None else [""])
    elif samples is not None:
        lists["samples"] = _samples(samples, rewards)
        if learns_from == "samples":
            filled.data.format = "auto"  # told by the keys that we write
    if pairs is not None:
        lists["pairs"] = _pairs(pairs, "pairs")
    if eval_pairs is not None:
        lists["eval_pairs"] = _pairs(eval_pairs, "eval_pairs")
    if eval_prompts is not None:
        _section(filled, "eval", "eval_prompts", entry)
        lists["eval_prompts"] = _records(eval_prompts)
    return Asked(entry, filled, named_functions(filled, entry, reward_fn, metric_fn), lists, run_dir)


def named_functions(
    config: Any, entry: str, reward_fn: Function | str | None, metric_fn: Function | str | None
) -> dict[str, Function]:
    """Set `reward.fn` and `metric.fn` to the names of functions, and return those that are callables by their keys."""
    functions: dict[str, Function] = {}
    for key, function in (("reward.fn", reward_fn), ("metric.fn", metric_fn)):
        if function is None:
            continue
        name = key.partition(".")[0]
        if not callable(function) and not isinstance(function, str):
            raise ConfigError(
                f"{name}_fn={function!r} is no function: give a callable, or a name such as package.module:function",
                key=f"{name}_fn",
                value=function,
            )
        section = _section(config, name, f"{name}_fn", entry)
        if callable(function):
            functions[key] = function
            section.fn = getattr(function, "__qualname__", type(function).__qualname__)
        else:
            section.fn = function
    return functions


def write_records(path: Path, prompts: Sequence[str | Mapping[str, Any]], timeout_s: float) -> str:
    """Write prompts as a file of records, by the first process, and return its path."""
    return _write(path, _records(prompts), timeout_s)


def default_config(algorithm: str, *settings: str) -> DictConfig:
    """The configuration of an algorithm, by attribute; unknown keys are refused.

    Args:
        algorithm: NAME of `python -m megarl.train_NAME`, such as ppo, or package.module:NAME of one of yours.
        settings: as on the command line, such as "+conf=randomwalks" or "optim.lr=1e-4".
    """
    name = find_algorithm(algorithm).name
    config, _ = compose(name, list(settings))
    return settings_of(config, name)


def _algorithm(reward_fn: Any, samples: Any, rewards: Any, config: DictConfig | None, pairs: Any = None) -> str:
    """What the arguments ask for."""
    named = None if config is None else _entry_of(config)
    given: LearnsFrom
    if pairs is not None and reward_fn is samples is rewards is None:
        given = "pairs"
    elif pairs is not None:
        raise ConfigError(
            "train() takes pairs without reward_fn, samples and rewards: leave the others out", key="pairs"
        )
    elif reward_fn is not None and samples is None:
        given = "prompts"
    elif samples is not None and rewards is not None and reward_fn is None:
        given = "rewarded samples"
    elif samples is not None and rewards is None and reward_fn is None:
        given = "samples"
    elif named is not None and reward_fn is samples is rewards is None:
        return named
    else:
        raise ConfigError(
            "train() takes reward_fn (PPO), samples with rewards (ILQL), samples alone (SFT) or pairs (DPO), and not "
            "several of them",
            key="train()",
        )
    if named is not None and find_algorithm(named).learns_from == given:
        return named
    asked = next(name for name, algorithm in ALGORITHMS.items() if algorithm.learns_from == given)
    if named is not None:
        raise ConfigError(
            f"config is of {named}, but the arguments ask for {asked}: use default_config({asked!r})",
            key="config",
            value=named,
            offers={"config": [asked]},
        )
    return asked


def _entry_of(config: DictConfig) -> str:
    name = algorithm_of(config)
    if name is None:
        raise ConfigError(
            "config is not from megarl.default_config(...): make it with that, and set its attributes", key="config"
        )
    return name


def _section(config: Any, name: str, argument: str, entry: str) -> Any:
    if not hasattr(config, name):
        raise ConfigError(f"{argument} has no meaning for {entry}, which does not generate: leave it out", key=argument)
    return getattr(config, name)


def fill(section: Any, values: Mapping[str, Any], name: str) -> None:
    """Set keys of a section to values of their types."""
    known = {leaf.key for leaf in leaves(type(section))}
    tree = OmegaConf.structured(section)
    for key, value in values.items():
        if key not in known:
            near = nearest_keys(key, sorted(known)) or sorted(known)
            raise ConfigError(
                f"unknown key '{name}.{key}'; did you mean {one_of(near)}?",
                key=f"{name}.{key}",
                offers={f"{name}.{key}": near},
            )
        try:
            tree[key] = _literal(value)
        except OmegaConfBaseException as problem:
            raise ConfigError(
                f"{name}.{key}={value!r}: {first_line(problem)}", key=f"{name}.{key}", value=value
            ) from None
    filled = OmegaConf.to_object(tree)
    for key in values:
        setattr(section, key, getattr(filled, key))


def _literal(value: Any) -> Any:
    """Texts as they are, where OmegaConf would look for the value of another key."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    return [_literal(one) for one in value] if isinstance(value, list | tuple) else value


def _run_dir(entry: str, config: Any) -> Path:
    """The run's folder, the same in every process."""
    from megarl.run.run_folder import resolve_run_dir
    from megarl.run.runner import RUN_DIR

    return Path(os.environ.get(RUN_DIR) or resolve_run_dir(entry, config)).absolute()


def _owned(run_dir: Path, config: Any) -> AbstractContextManager[Any]:
    from megarl.run.owner import owned

    return owned(run_dir, config.parallel.timeout_s)


def _write_inputs(folder: Path, lists: dict[str, list[dict[str, Any]]], config: Any) -> dict[str, str]:
    """Put lists into files and the files into the configuration. Returns the name of each list by its file's path."""
    names: dict[str, str] = {}
    for name, records in lists.items():
        path = _write(folder / f"{name}.jsonl", records, config.parallel.timeout_s)
        names[path] = name
        setattr(config.data, "eval" if name.startswith("eval_") else "train", [path])
    if DEMO_TRAIN not in config.data.train:
        config.data.eval = [path for path in config.data.eval if path != DEMO_EVAL]
    return names


def _records(prompts: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]


def _pairs(pairs: Sequence[Any], name: str) -> list[dict[str, Any]]:
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Mapping):
            raise DataError(
                f"{name}[{index}] is a {type(pair).__name__}: give a mapping with prompt, chosen and rejected",
                key=name,
                value=pair,
                where=f"{name}[{index}]",
            )
    return [dict(pair) for pair in pairs]


def _samples(samples: Sequence[Sample], rewards: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Records as the entry points read them from files."""
    if rewards is not None:
        plain = [sample if isinstance(sample, str) else list(sample) for sample in samples]
        return [{"samples": sample, "rewards": reward} for sample, reward in zip(plain, rewards, strict=True)]
    records: list[dict[str, Any]] = []
    for number, sample in enumerate(samples, 1):
        if isinstance(sample, str):
            records.append({"text": sample})
        elif len(sample) == 2:
            records.append({"prompt": sample[0], "completion": sample[1]})
        else:
            raise DataError(
                f"samples: record {number} has {len(sample)} parts: give a text or [prompt, output]",
                key="samples",
                value=sample,
                where=f"record {number}",
            )
    return records


def _write(path: Path, records: list[dict[str, Any]], timeout_s: float) -> str:
    """Records as a file of the run folder, so that a resumed run finds the same.

    One process writes. The others, which run the same script and so have the same records, wait until these are there.
    """
    text = "".join(_as_json(record) + "\n" for record in records)
    if process_number() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return str(path)
    give_up = time.monotonic() + timeout_s
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > give_up:
            raise DataError(
                f"{path} of the first process has other records than this one has for {timeout_s:g} s: give all "
                "processes of the script the same lists",
                where=path,
            )
        time.sleep(0.05)
    return str(path)


def _as_json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(record, default=_plain, allow_nan=False)
    except ValueError as problem:
        raise DataError(
            f"record {str(record)[:200]} cannot be kept with the run ({problem}): give finite numbers",
            key="record",
            value=record,
        ) from None


def _plain(value: Any) -> Any:
    """Convert numpy and torch values to plain Python."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(
        f"a {type(value).__name__} cannot be kept with the run: give texts, numbers, lists and mappings",
        key=type(value).__name__,
        value=value,
    )
