"""One call from Python, `megarl.train(model, reward_fn=..., prompts=...)`, which runs the entry points themselves."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megarl.command import INTERRUPTED, NOTICED, process_number
from megarl.config.checks import check_values
from megarl.config.compose import compose, typed
from megarl.config.leaf import leaves
from megarl.config.presets import DEMO_EVAL, resource
from megarl.config.schema import ENTRIES
from megarl.errors import ConfigError, DataError

ALGORITHMS = ("ppo", "ilql", "sft", "rft")
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
            raise DataError(f"{self.run_dir} holds no checkpoint: set checkpoint.save_last=true, or checkpoint.every")
        return found[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        content: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text(encoding="utf-8"))
        return content

    @property
    def history(self) -> list[dict[str, float]]:
        """Logged metrics, a row per step that has any."""
        with (self.run_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]

    def generate(self, prompts: str | Sequence[str], *, n: int = 1, **settings: Any) -> list[Any]:
        """Responses as text: one for each prompt, or with n above 1 a list of n for each.

        Args:
            settings: of the `rollout` section, such as temperature, max_new_tokens or ilql_beta.
        """
        from megarl.generate import opened
        from megarl.rollout.noise import EVALUATION
        from megarl.rollout.requests import fit_prompts, repeat, sampling_from

        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        own = getattr(self.config, "rollout", None)
        rollout = {key: getattr(own, key) for key in DRAWN_BY if getattr(own, key, None) is not None}
        config, _ = compose("generate", ["trainer.progress=none"])
        config.model.path = str(self.checkpoint)
        _fill(config.rollout, {**rollout, **settings}, "rollout")
        check_values(config)
        for key in ("tp", "pp"):
            setattr(config.parallel, key, getattr(self.config.parallel, key))
        with opened(config) as (generator, tokenizer, _):
            tokens = [tokenizer.encode_prompt(text) for text in asked]
            requests = repeat(tokens, n, sampling_from(config.rollout))
            rollouts = generator.generate(
                fit_prompts(requests, generator.config.max_positions, "truncate"), stream=EVALUATION
            )
            texts = [tokenizer.decode(rollout.spoken) for rollout in rollouts]
        return texts if n == 1 else [texts[start : start + n] for start in range(0, len(texts), n)]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a new folder that `transformers.AutoModelForCausalLM` loads."""
        from megarl.models.exchange.formats import FORMATS, open_source

        if process_number() == 0:
            FORMATS["huggingface"].write(open_source(str(self.checkpoint)), Path(folder))


def train(
    model: str | Path | Mapping[str, Any] | None = None,
    *,
    reward_fn: Function | str | None = None,
    prompts: Sequence[str | Mapping[str, Any]] | None = None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None = None,
    samples: Sequence[Sample] | None = None,
    rewards: Sequence[float | Sequence[float]] | None = None,
    metric_fn: Function | str | None = None,
    stop_sequences: Sequence[str] | None = None,
    config: DictConfig | None = None,
) -> Trained:
    """Train by PPO (a reward function), ILQL (samples with rewards) or SFT (samples alone).

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
        metric_fn: called as reward_fn is; a list of numbers, or a mapping of such lists by name.
        stop_sequences: texts that end a response.
        config: from `default_config`; it says which algorithm unless the arguments do.
    """
    entry = _algorithm(reward_fn, samples, rewards, config)
    if samples is None and rewards is not None:
        raise ConfigError("rewards= are of samples, and there are none: give samples=, or leave rewards out")
    if samples is not None and prompts is not None:
        raise ConfigError(
            "prompts= are for a reward function, and samples= are given: use eval_prompts=, or leave one out"
        )
    if rewards is not None and samples is not None and len(samples) != len(rewards):
        raise DataError(f"{len(samples)} samples have {len(rewards)} rewards: give one for each")
    tree = default_config(entry) if config is None else config
    filled, _ = typed(entry, tree)
    if isinstance(model, Mapping):
        _fill(filled.model, model, "model")
    elif model is not None:
        filled.model.path = str(model)
    if stop_sequences is not None:
        _section(filled, "rollout", "stop_sequences", entry).stop = list(stop_sequences)
    run_dir = _run_dir(entry, filled)
    filled.run.dir = str(run_dir)
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
    if eval_prompts is not None:
        _section(filled, "eval", "eval_prompts", entry)
    with _owned(run_dir, filled):  # another run's inputs must stay as they are
        _write_inputs(run_dir / "inputs", entry, filled, prompts, samples, rewards, eval_prompts)
        _run(entry, filled, functions)
    return Trained(filled, run_dir)


def default_config(algorithm: str, *settings: str) -> DictConfig:
    """The configuration of an algorithm, by attribute; unknown keys are refused.

    Args:
        algorithm: ppo, ilql, sft or rft.
        settings: as on the command line, such as "+conf=randomwalks" or "optim.lr=1e-4".
    """
    if algorithm not in ALGORITHMS:
        raise ConfigError(f"algorithm {algorithm!r} is not known here: use {', '.join(ALGORITHMS)}")
    config, _ = compose(algorithm, list(settings))
    tree = OmegaConf.structured(config)
    assert isinstance(tree, DictConfig)
    return tree


def _algorithm(reward_fn: Any, samples: Any, rewards: Any, config: DictConfig | None) -> str:
    """What the arguments ask for."""
    named = None if config is None else _entry_of(config)
    if reward_fn is not None and samples is None:
        asked = "rft" if named == "rft" else "ppo"
    elif samples is not None and rewards is not None and reward_fn is None:
        asked = "ilql"
    elif samples is not None and rewards is None and reward_fn is None:
        asked = "sft"
    elif named is not None and reward_fn is samples is rewards is None:
        return named
    else:
        raise ConfigError(
            "train() takes reward_fn (PPO), samples with rewards (ILQL) or samples alone (SFT), and not several of them"
        )
    if named is not None and named != asked:
        raise ConfigError(f"config is of {named}, but the arguments ask for {asked}: use default_config({asked!r})")
    return asked


def _entry_of(config: DictConfig) -> str:
    kind = OmegaConf.get_type(config)
    for entry in ALGORITHMS:
        if ENTRIES[entry] is kind:
            return entry
    raise ConfigError("config is not from megarl.default_config(...): make it with that, and set its attributes")


def _section(config: Any, name: str, argument: str, entry: str) -> Any:
    if not hasattr(config, name):
        raise ConfigError(f"{argument} has no meaning for {entry}, which does not generate: leave it out")
    return getattr(config, name)


def _fill(section: Any, values: Mapping[str, Any], name: str) -> None:
    """Set keys of a section to values of their types."""
    known = {leaf.key for leaf in leaves(type(section))}
    tree = OmegaConf.structured(section)
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key '{name}.{key}': it has the keys {', '.join(sorted(known))}")
        try:
            tree[key] = _literal(value)
        except OmegaConfBaseException as problem:
            raise ConfigError(f"{name}.{key}={value!r}: {str(problem).splitlines()[0]}") from None
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
    from megarl.callbacks.run_folder import resolve_run_dir
    from megarl.modules.fit import RUN_DIR

    return Path(os.environ.get(RUN_DIR) or resolve_run_dir(entry, config)).absolute()


def _owned(run_dir: Path, config: Any) -> AbstractContextManager[Any]:
    from megarl.callbacks.owner import owned

    return owned(run_dir, config.parallel.timeout_s)


def _write_inputs(
    folder: Path,
    entry: str,
    config: Any,
    prompts: Sequence[str | Mapping[str, Any]] | None,
    samples: Sequence[Sample] | None,
    rewards: Sequence[Any] | None,
    eval_prompts: Sequence[str | Mapping[str, Any]] | None,
) -> None:
    """Put the arguments into files, and the files into the configuration."""
    if entry in ("ppo", "rft"):
        config.data.train = [_write(folder / "prompts.jsonl", _records(prompts if prompts is not None else [""]))]
    elif samples is not None:
        config.data.train = [_write(folder / "samples.jsonl", _samples(samples, rewards))]
        if entry == "sft":
            config.data.format = "auto"  # told by the keys that we write
            config.data.eval = [path for path in config.data.eval if path != resource(DEMO_EVAL)]
    if eval_prompts is not None:
        config.data.eval = [_write(folder / "eval_prompts.jsonl", _records(eval_prompts))]


def _records(prompts: Sequence[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]


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
            raise DataError(f"samples: record {number} has {len(sample)} parts: give a text or [prompt, output]")
    return records


def _write(path: Path, records: list[dict[str, Any]]) -> str:
    """Records as a file of the run folder, so that a resumed run finds the same; written by one process."""
    if process_number() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.unfinished")
        aside.write_text("".join(json.dumps(record, default=_plain) + "\n" for record in records), encoding="utf-8")
        aside.replace(path)
    return str(path)


def _plain(value: Any) -> Any:
    """What json has no words for: numbers and arrays of numpy and torch."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise DataError(f"a {type(value).__name__} cannot be kept with the run: give texts, numbers, lists and mappings")


def _run(entry: str, config: Any, functions: dict[str, Function]) -> None:
    from megarl import train_ilql, train_ppo, train_rft, train_sft
    from megarl.config.checks import check, world_size

    check(config, world_size(config, os.environ))
    if entry == "sft":
        code = train_sft.train(config)
    else:
        code = {"ppo": train_ppo, "ilql": train_ilql, "rft": train_rft}[entry].train(config, functions)
    # The run is saved, but what follows the call is for a trained model.
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == NOTICED:
        raise SystemExit(0)
