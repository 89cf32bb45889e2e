"""One call from Python, `megarl.train(model, reward_fn=..., prompts=...)`, which runs the entry points themselves."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.command import INTERRUPTED, NOTICED, process_number
from megarl.config.algorithms import ALGORITHMS, LearnsFrom, find_algorithm
from megarl.config.compose import compose, explained, typed
from megarl.config.files import check_files, load_chat_template
from megarl.config.leaf import leaves, or_defaults
from megarl.config.messages import nearest_keys, one_of
from megarl.config.resources import DEMO_EVAL, DEMO_TRAIN
from megarl.config.sections.extensions import ExtensionsConfig
from megarl.config.settings import algorithm_of, settings_of
from megarl.config.values import check_values
from megarl.disk import UnreadableError, parse_object, read_text, writable, write_atomically
from megarl.errors import ConfigError, DataError, first_line
from megarl.logging import get_logger, warn_once

DRAWN_BY = (*("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "ilql_beta"),)
"""Keys of the `rollout` section that say how tokens are drawn."""
Function = Callable[..., Any]
Sample = str | Sequence[str]


class Trained:
    """What a run left behind: its checkpoint answers prompts and leaves for other libraries."""

    def __init__(self, config: Any, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir

    @property
    def checkpoint(self) -> Path:
        """The newest one."""
        from megarl.checkpoint import find

        found = find(self.run_dir / "checkpoints")
        if not found:
            raise DataError(
                f"{self.run_dir} holds no checkpoint: set checkpoint.save_last=true, or checkpoint.every",
                where=self.run_dir,
                offers={"checkpoint.save_last": [True]},
            )
        return found[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        path = self.run_dir / "summary.json"
        try:
            return parse_object(read_text(path))
        except UnreadableError as problem:
            raise DataError(f"{path} {problem}: the run has not ended, or the file was changed", where=path) from None

    @property
    def history(self) -> list[dict[str, float]]:
        """Logged metrics, a row per step that has any."""
        path = self.run_dir / "metrics.csv"
        try:
            rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
            return [{name: float(value) for name, value in row.items() if value} for row in rows]
        except UnreadableError as problem:
            raise DataError(f"{path} {problem}: set logger.csv=true, or restore the file", where=path) from None
        except (ValueError, TypeError, csv.Error) as problem:
            raise DataError(
                f"{path} cannot be read ({problem}): set logger.csv=true, or restore the file", where=path
            ) from None

    def generate(self, prompts: str | Sequence[str], *, n: int = 1, **settings: Any) -> list[Any]:
        """Responses as text: one for each prompt, or with n above 1 a list of n for each.

        Of a prompt that leaves no room for its response, the end is read; with `too_long="error"` it is refused.

        Args:
            settings: of the `rollout` section, such as temperature, max_new_tokens or ilql_beta.
        """
        from megarl.data.formats import RecordFormat
        from megarl.data.prompts import PromptLimits, encode_prompt, fit_prompts
        from megarl.data.sources import Record
        from megarl.generate import open_generator
        from megarl.rollout.noise import EVALUATION
        from megarl.rollout.requests import repeat, sampling_from

        if settings.get("too_long") == "drop":
            raise ConfigError(
                "too_long='drop' would leave prompts without a response: use 'truncate' or 'error'",
                key="too_long",
                value="drop",
                offers={"too_long": ["truncate", "error"]},
            )
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        own = getattr(self.config, "rollout", None)
        rollout = {key: getattr(own, key) for key in DRAWN_BY if getattr(own, key, None) is not None}
        config, _ = compose("generate", ["trainer.progress=none"])
        config.model.path = str(self.checkpoint)
        config.chat_template = load_chat_template(self.config.data.chat_template)  # its end marker ends responses
        _fill(config.rollout, {"too_long": "truncate", **rollout, **settings}, "rollout")
        check_values(config)
        config.extensions = ExtensionsConfig(families=or_defaults(self.config, "extensions").families)
        for key in ("tp", "pp"):
            setattr(config.parallel, key, getattr(self.config.parallel, key))
        with open_generator(config) as (generator, tokenizer, _):
            records = [Record({"prompt": text}, f"prompts[{index}]") for index, text in enumerate(asked)]
            limits = PromptLimits(
                generator.config.max_positions,
                config.rollout.max_new_tokens,
                generator.config.vocab_size,
                config.rollout.too_long,
            )
            encoded = (encode_prompt(record, tokenizer, RecordFormat(section="", settable=())) for record in records)
            tokens = [prompt.tokens for prompt in fit_prompts(encoded, limits, "prompts")]
            rollouts = generator.generate(repeat(tokens, n, sampling_from(config.rollout)), stream=EVALUATION)
            texts = [tokenizer.decode(rollout.response_without_eos) for rollout in rollouts]
        return texts if n == 1 else [texts[start : start + n] for start in range(0, len(texts), n)]

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Write the model as a new folder that `transformers.AutoModelForCausalLM` loads, with its adapter merged.

        Args:
            folder: the folder, which must not exist yet.
            adapter: write the adapter alone instead, as a folder that PEFT loads.
        """
        from megarl.models.exchange.formats import FORMATS, open_adapter, open_source
        from megarl.models.exchange.peft import write_adapter

        if adapter and getattr(self.config, "adapter", None) is None:
            raise ConfigError(
                "save_pretrained(adapter=True) writes an adapter, and this run has none: set adapter.rank before "
                "training, or leave adapter=True out",
                key="adapter",
                value=True,
            )
        if process_number() != 0:
            return
        target = writable(str(folder), "save_pretrained")
        if adapter:
            write_adapter(open_adapter(self.checkpoint), target)
        else:
            FORMATS["huggingface"].write(open_source(str(self.checkpoint)), target)


def train(
    model: str | Path | Mapping[str, Any] | None = None,
    *,
    reward_fn: Function | str | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
    samples: Sequence[Sample] | None = None,
    rewards: Sequence[float | Sequence[float]] | None = None,
    pairs: Sequence[Mapping[str, Any]] | None = None,
    eval_pairs: Sequence[Mapping[str, Any]] | None = None,
    metric_fn: Function | str | None = None,
    stop_sequences: Sequence[str] | None = None,
    config: DictConfig | None = None,
) -> Trained:
    """Train by PPO (a reward function), ILQL (samples with rewards), SFT (samples alone) or DPO (pairs).

    Runs in a script, a notebook, or every process that torchrun started. A notice or Ctrl-C saves the run and ends the
    script; the same call with the same run.dir goes on.

    Args:
        model: a folder or hub name, or keys of the `model` section to start from random weights.
        reward_fn: called as `fn(samples=..., prompts=..., outputs=..., tokenizer=..., **metadata)`, or its name.
        prompts: texts, or records with a "prompt" whose other fields go to the functions; without any, responses
            begin with the tokenizer's first token.
        eval_prompts: what evaluations answer.
        samples: texts, [prompt, output] pairs, or longer alternating dialogues (with rewards).
        rewards: one number, or one per output, for each sample.
        pairs: records with the fields prompt, chosen and rejected; for KTO, also prompt, completion and label.
        eval_pairs: the same, for evaluations.
        metric_fn: called as reward_fn is; a list of numbers, or a mapping of such lists by name.
        stop_sequences: texts that end a response.
        config: from `default_config`; it says which algorithm unless the arguments do.
    """
    entry = _algorithm(reward_fn, samples, rewards, config, pairs)
    if eval_pairs is not None and ALGORITHMS[entry].learns_from != "pairs":
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
        _fill(filled.model, model, "model")
    elif model is not None:
        filled.model.path = str(model)
    if stop_sequences is not None:
        _section(filled, "rollout", "stop_sequences", entry).stop = list(stop_sequences)
    run_dir = writable(str(_run_dir(entry, filled)), "run.dir")
    filled.run.dir = str(run_dir)
    lists: dict[str, list[dict[str, Any]]] = {}
    learns_from = ALGORITHMS[entry].learns_from
    if learns_from == "prompts":
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
    functions: dict[str, Function] = {}
    for key, function in (("reward.fn", reward_fn), ("metric.fn", metric_fn)):
        if function is None:
            continue
        name = key.partition(".")[0]
        section = _section(filled, name, f"{name}_fn", entry)
        if callable(function):
            functions[key] = function
            section.fn = getattr(function, "__qualname__", type(function).__qualname__)
        else:
            section.fn = function
    if filled.model.path is None and filled.export.hf is None:
        _warn_of_no_family(filled)
    with _owned(run_dir, filled):  # another run's inputs must stay as they are
        names = _write_inputs(run_dir / "inputs", lists, filled)
        _run(entry, filled, functions, names)
    return Trained(filled, run_dir)


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
    if named is not None and ALGORITHMS[named].learns_from == given:
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


def _warn_of_no_family(config: Any) -> None:
    """Before training, as `save_pretrained` would refuse after it."""
    from megarl.models.exchange.families import add_families, require_family

    add_families(or_defaults(config, "extensions").families)
    try:
        require_family(config.model, None, "save_pretrained will not work")
    except ConfigError as problem:
        warn_once(get_logger(__name__), str(problem))


def _section(config: Any, name: str, argument: str, entry: str) -> Any:
    if not hasattr(config, name):
        raise ConfigError(f"{argument} has no meaning for {entry}, which does not generate: leave it out", key=argument)
    return getattr(config, name)


def _fill(section: Any, values: Mapping[str, Any], name: str) -> None:
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


def _run(entry: str, config: Any, functions: dict[str, Function], names: dict[str, str]) -> None:
    """Run the entry point; `names` are those of the lists that were written to files, by path."""
    from megarl import training
    from megarl.config.rules import check
    from megarl.config.world import world_size
    from megarl.data.sources import named_lists

    check(config, world_size(config, os.environ))
    check_files(config)
    with named_lists(names):
        code = training.train(entry, config, functions)
    # The run is saved, but what follows the call is for a trained model.
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == NOTICED:
        raise SystemExit(0)
