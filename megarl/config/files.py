"""Check the files and folders that a configuration names, before slow imports."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarl.config.reward_terms import FN
from megarl.config.tokens import read_token
from megarl.disk import (
    UnreadableError,
    exists,
    is_file,
    local,
    read_json,
    read_text,
    shown,
    why_missing,
    why_no_name,
    writable,
)
from megarl.errors import CheckpointError, ConfigError, DataError
from megarl.functions.named import (
    check_options,
    check_scoring_function,
    check_spelling,
    data_source,
    parameters,
    resolve,
)
from megarl.logging import get_logger, warn_once

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
"""Suffixes of files with records; a text file may be compressed, as in .jsonl.gz."""
WRITTEN = ("run.dir", "export.hf", "export.peft", "rollout.dump", "data.cache")
"""Keys of the files and folders that a run writes."""
_HUB_DATA = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?(:[\w.-]{1,96})?")
_HUB_MODEL = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_HERE = (".", "/", "~")


def check_files(config: Any) -> None:
    """Refuse data or weights that are neither on this machine nor a name on a hub, a chat template that cannot be read,
    and a path that cannot be written."""
    written = {key: _value(config, key) for key in WRITTEN}
    for key, path in {**written, **config.more_folders()}.items():
        if path is not None:
            writable(path, key)
    _check_data(config)
    _check_rewards(config)
    _check_callbacks(config)
    _check_named(config)
    load_chat_template(_value(config, "data.chat_template"))
    load_chat_template(getattr(config, "chat_template", None), "chat_template")  # of `generate`
    vote = _value(config, "eval.vote")
    if vote is not None and ":" in vote:
        resolve(vote, "eval.vote")
    if (token := _value(config, "serve.token_file")) is not None:
        read_token(token, "serve.token_file")
    for key, path in {"model.path": config.model.path, **config.more_models()}.items():
        if path is not None:
            require_weights(path, key)
            require_model(path, key)
    if (path := _value(config, "adapter.path")) is not None:
        require_adapter(path, "adapter.path")
    for key, folder in config.exports.folders.items() if hasattr(config, "exports") else ():
        require_absent(folder, key)
    resume = _value(config, "run.resume")
    if resume not in (None, "auto", "never"):
        require_checkpoint(Path(resume))


def check_functions(config: Any) -> None:
    """Refuse scoring functions that do not exist or cannot be called, by reading their files.

    It is for command lines: in Python the keys may hold the names of callables that were passed.
    """
    reward = getattr(config, "reward", None)
    for term in reward.sources if reward is not None else ():
        if term.kind == FN:
            check_scoring_function(term.value, term.key)
    if (metric := _value(config, "metric.fn")) is not None:
        check_scoring_function(metric, "metric.fn")


def _check_data(config: Any) -> None:
    """Refuse a data source that does not exist, and options that the functions among the sources do not accept."""
    options, functions = _value(config, "data.options") or {}, 0
    for key in ("data.train", "data.eval", "clone.data"):
        if key == "data.eval" and getattr(config.trainer, "eval_every", 1) is None:
            continue
        for path in _value(config, key) or ():
            function = data_source(path, key)
            if function is None:
                require_data(path, key)
            else:
                check_options(function, options, "data.options")
                functions += 1
    if options and not functions:
        warn_once(
            get_logger(__name__),
            "data.options has no effect, because no data source is a function: remove data.options",
        )


def _check_rewards(config: Any) -> None:
    """Refuse misspelled options of ready-made reward functions."""
    reward = getattr(config, "reward", None)
    for term in reward.sources if reward is not None else ():
        if term.kind == FN and term.options and str(term.value).startswith("megarl.rewards."):
            check_spelling(resolve(term.value, term.key), term.options, f"{term.key.removesuffix('.fn')}.options")


def _check_named(config: Any) -> None:
    """Refuse families of models, and an orchestrator, that do not exist."""
    if (orchestrator := _value(config, "extensions.orchestrator")) is not None:
        resolve(orchestrator, "extensions.orchestrator", "class")
    for name in _value(config, "extensions.families") or ():
        resolve(name, "extensions.families", "NAME")


def _check_callbacks(config: Any) -> None:
    """Refuse callbacks that do not exist or are named twice, and options that certainly none of them takes."""
    names, options = _value(config, "extensions.callbacks") or [], _value(config, "extensions.callback_options") or {}
    takes = [parameters(resolve(name, "extensions.callbacks", "class")) for name in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"extensions.callbacks={shown(names)} names {twice[0]} twice: name it once",
            key="extensions.callbacks",
            value=names,
        )
    known = [argument for arguments in takes for argument in arguments or ()]
    for option in options if None not in takes else ():
        if option not in known:
            meant = f"they take {', '.join(known)}" if known else "they take no options"
            raise ConfigError(
                f"extensions.callback_options.{option}: none of extensions.callbacks={shown(names)} has such an "
                f"option; {meant}",
                key=f"extensions.callback_options.{option}",
                value=options[option],
                offers={"extensions.callback_options": known} if known else None,
            )


def data_suffix(path: Path) -> str:
    """Return the suffix that says how a file of records is read: of a compressed file, the one before .gz."""
    inner = path.with_suffix("")
    return inner.suffix if path.suffix == ".gz" and inner.suffix in (".jsonl", ".json", ".txt") else path.suffix


def require_data(path: str, key: str = "data.train and data.eval") -> None:
    """Refuse a data source that does not exist on this machine and cannot be a name on the hub."""
    place = local(path)
    if exists(place) or not (data_suffix(place) in SUFFIXES or path.startswith(_HERE) or not _HUB_DATA.fullmatch(path)):
        return
    raise DataError(
        f"{shown(path)}: {_why(place)} (current folder: {Path.cwd()}); check {key}",
        key=key,
        value=path,
        where=shown(path),
    )


def require_weights(path: str, key: str = "") -> None:
    """Refuse a model that does not exist on this machine and cannot be a name on the hub."""
    place = local(path)
    if exists(place) or not (path.startswith(_HERE) or not _HUB_MODEL.fullmatch(path)):
        return
    named = f"{key}={shown(path)}" if key else shown(path)
    raise CheckpointError(
        f"{named} does not exist ({_why(place)}): give a folder, or a hub name such as org/model",
        key=key or None,
        value=path,
        where=shown(path),
    )


def require_adapter(path: str, key: str) -> None:
    """Refuse a path that is neither on this machine nor a name on the hub, and a folder in which no adapter can be."""
    require_weights(path, key)
    folder = local(path)
    runs = any(
        is_file(one) for name in ("", "step-*/", "checkpoints/step-*/") for one in folder.glob(f"{name}index.json")
    )
    if exists(folder) and not runs and not is_file(folder / "adapter_config.json"):
        raise CheckpointError(
            f"{key}={shown(path)} contains no adapter: name a PEFT folder (with adapter_config.json), or the folder "
            "or a checkpoint of a run with adapter.*",
            key=key,
            value=path,
            where=shown(path),
        )


def require_model(path: str, key: str) -> None:
    """Refuse a folder or file on this machine that is no stored model, as far as names of files tell."""
    place = local(path)
    if not exists(place):
        return
    marks = ("config.json", "adapter_config.json", "manifest.json", "checkpoints")
    if is_file(place):
        whole = place.suffix == ".nemo"
    else:
        whole = any(exists(place / name) for name in marks) or any(named_like_checkpoints(place))
    if not whole:
        raise CheckpointError(
            f"{key}={shown(path)} contains no model: no Hugging Face folder (with config.json), .nemo archive or "
            "megarl checkpoint",
            key=key,
            value=path,
            where=place.absolute(),
        )


def named_like_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield what is named like a checkpoint in a folder."""
    yield from (*folder.glob("step-*"), *folder.glob(".step-*"))


def require_absent(path: str, key: str) -> None:
    """Refuse a folder to export to that exists."""
    if exists(local(path)):
        raise CheckpointError(
            f"{key}={shown(path)} exists and is not overwritten: remove it, or name another folder",
            key=key,
            value=path,
            where=local(path).absolute(),
        )


def require_checkpoint(path: Path) -> None:
    """Refuse a path for run.resume that is not a checkpoint and contains none, as far as names of files tell."""
    whole = any(is_file(path / name) for name in ("manifest.json", "index.json", "common.pt"))
    if not whole and not (exists(path) and any(named_like_checkpoints(path))):
        raise no_checkpoint(path)


def no_checkpoint(path: Path) -> CheckpointError:
    """Return the error for a path for run.resume that is not a checkpoint and contains none."""
    return CheckpointError(
        f"run.resume={shown(str(path))}: there is no checkpoint; give one (RUN/checkpoints/step-...), a folder of them "
        "(RUN/checkpoints), auto or never",
        key="run.resume",
        value=str(path),
        offers={"run.resume": ["auto", "never"]},
    )


def require_score_head(path: str, key: str) -> None:
    """Refuse a model on this machine that has no score head, as far as it can be told without reading weights."""
    folder = local(path)
    newest = [sorted(folder.glob(name))[-1:] for name in ("step-*", "checkpoints/step-*")]
    indices = [one / "index.json" for one in (folder, *newest[0], *newest[1]) if is_file(one / "index.json")]
    try:
        if indices:
            has_one = any(part["key"].endswith(".score_head.outer.weight") for part in read_json(indices[0])["parts"])
        else:
            names = read_json(folder / "config.json")["architectures"]
            has_one = any(name.endswith("ForSequenceClassification") for name in names)
    except (UnreadableError, ValueError, LookupError, TypeError, AttributeError):
        return  # whoever opens the model says what is wrong with it
    if not has_one:
        raise no_score_head(key, path)


def no_score_head(key: str, path: str) -> ConfigError:
    """Return the error for a model that gives no scores."""
    return ConfigError(
        f"{key}={shown(path)} has no score head: name a reward model, such as a checkpoint of train_rm",
        key=key,
        value=path,
        where=path,
    )


def load_chat_template(value: str | None, key: str = "data.chat_template") -> str | None:
    """Return the Jinja template of a key: its value, or the content of the file that it names."""
    if value is None or "{" in value:
        return value
    path = local(value)
    if not is_file(path):
        raise ConfigError(
            f"{key}={shown(value)!r} is neither a Jinja template nor a file; "
            "give a template with {{ }} or {% %}, or the path of a file that contains one",
            key=key,
            value=value,
        )
    try:
        return read_text(path)
    except UnreadableError as problem:
        raise ConfigError(
            f"{key}={value!r} {problem}: give a text file that contains a Jinja template",
            key=key,
            value=value,
            where=value,
        ) from None


def _why(place: Path) -> str:
    return why_no_name(place) or why_missing(place) or "no such file or folder"


def _value(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part, None)
    return config
