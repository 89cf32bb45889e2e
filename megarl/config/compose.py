"""Compose a typed configuration from a command line, and run an entry point with it.

Hydra composes. Its errors, and all of megarl's, become one line and an exit code here. Hydra and OmegaConf are imported
inside the functions that use them, so that `--help` and a misspelt key are answered before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import megarl
from megarl.command import INTERRUPTED, NOTICED, run_command
from megarl.config.algorithms import entry_point
from megarl.config.arguments import check_arguments
from megarl.config.defaults import defaults
from megarl.config.devices import hide_gpus
from megarl.config.elastic import fitted
from megarl.config.files import check_files, check_functions
from megarl.config.help import help_text, key_help, short_help
from megarl.config.launcher import check_launcher
from megarl.config.leaf import leaves
from megarl.config.messages import unknown_flag
from megarl.config.renames import renamed_arguments
from megarl.config.resources import conf_folder
from megarl.config.values import check_values
from megarl.config.world import world_size
from megarl.errors import ConfigError, MegarlError

if TYPE_CHECKING:
    from omegaconf import DictConfig

_PATH_FLAGS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
_OTHER_FLAGS = ("--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m", "--info", "-i")
_MODES = ("--cfg", "-c", "--run", "-r", "--multirun", "-m", "--info", "-i", "--shell-completion", "-sc")
HYDRA_FLAGS = frozenset((*_PATH_FLAGS, *_OTHER_FLAGS, "--hydra-help", "--shell-completion", "-sc"))
_VERSION_BASE = "1.3"


class JobError(MegarlError):
    """One job of a multirun ended with a non-zero exit code."""


def compose(entry: str, argv: list[str]) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of one run.

    Args:
        entry: name of an entry point, as in `algorithms.entry_points()`.
        argv: overrides as on the command line, `["+conf=gpt20b", "parallel.tp=2"]`.

    Returns:
        The typed tree (an instance of the entry point's `config`) and the same, resolved, as plain dicts and lists.
    """
    check_arguments(argv, entry_point(entry).config)
    with explained(entry, argv):
        argv = _current(argv, entry)
        program = entry_point(entry).program
        import hydra

        from megarl.config.explain import EXPLAINED, explain

        with hydra.initialize_config_dir(str(conf_folder()), version_base=_VERSION_BASE, job_name=program):
            try:
                tree = hydra.compose(program, argv)
            except (*EXPLAINED, MegarlError):
                raise
            except Exception as error:  # any other error of Hydra is caused by the settings, too
                raise explain(error, entry_point(entry).config, argv) from error
        return typed(entry, tree, argv)


def _current(argv: list[str], entry: str, *, every: bool = False) -> list[str]:
    """Register the schema and presets (the ones that the command line names, or every one) with Hydra; return the
    command line with today's keys, in a form for Hydra."""
    from megarl.config.optional import reopened
    from megarl.config.presets import register

    tree = entry_point(entry).config
    argv = renamed_arguments(argv, tree)
    register(argv, entry, every=every)
    return reopened(_with_new_entries(argv, tree), tree)


def _with_new_entries(argv: list[str], tree: type) -> list[str]:
    """Return a command line in which an entry of a mapping may be new, which Hydra allows with ++ only."""
    mappings = [leaf.key for leaf in leaves(tree) if leaf.type.startswith("dict")]
    beginnings = tuple(f"{key}{mark}" for key in mappings for mark in (".", "="))
    return [f"++{argument}" if argument.startswith(beginnings) else argument for argument in argv]


def typed(entry: str, tree: DictConfig, argv: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """Return a composed tree as an instance of the entry's schema and as plain dictionaries. Refuse unknown keys.

    Args:
        argv: the command line from which Hydra composed the tree.
    """
    from omegaconf import OmegaConf

    from megarl.config.optional import schema, settle

    # Hydra lets `+section.key=value` add keys even to a typed tree; merging into a fresh schema does not.
    untyped = cast("dict[str, Any]", OmegaConf.to_container(tree, resolve=False))
    settle(untyped, entry_point(entry).config, argv)
    merged = OmegaConf.merge(schema(entry_point(entry).config), OmegaConf.create(untyped))
    plain = cast("dict[str, Any]", OmegaConf.to_container(merged, resolve=True))
    config = OmegaConf.to_object(merged)
    check_values(config)
    return config, plain


def run(entry: str, argv: list[str], main: Callable[[Any], int | None]) -> NoReturn:
    """Run an entry point and exit: handle flags, compose, call `main` with the typed configuration."""
    debug = any(part.lstrip("+").lower() in ("debug=true", "debug=yes", "debug=on", "debug=1") for part in argv)

    def work() -> int | None:
        nonlocal debug
        if "--version" in argv:
            sys.stdout.write(f"megarl {megarl.__version__}\n")
            return 0
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(_help(entry, [part for part in argv if part not in ("--help", "-h")]))
            return 0
        if _needs_hydra(argv, entry_point(entry).config):
            return _run_hydra(entry, argv, main)
        config, _ = compose(entry, argv)
        debug = config.debug
        return _checked(config, main)

    run_command(work, lambda: debug)


def _help(entry: str, argv: Sequence[str]) -> str:
    """Return the text of `--help`, with the values that the settings of the command line give.

    Args:
        argv: settings; words without "=" are what to explain: keys, sections, or `all`.
    """
    settings = _settings(list(argv))
    topics = [part for part in argv if "=" not in part and not part.startswith(("-", "~"))]
    if topics == ["all"]:
        return help_text(entry, compose(entry, settings)[1])
    plain = compose(entry, settings)[1] if settings else defaults(entry_point(entry))
    return key_help(entry, plain, topics) if topics else short_help(entry, plain)


def _checked(config: Any, main: Callable[[Any], int | None]) -> int | None:
    """Check a configuration, then call `main` with it. The checks come before slow imports."""
    check_launcher(os.environ)
    with hide_gpus(config.trainer.accelerator):
        fitted(config, world_size(config, os.environ))
        check_files(config)
        check_functions(config)
        return main(config)


class _Job:
    """The function that Hydra calls once per job, on this machine or, pickled by a launcher plugin, on another."""

    def __init__(self, entry: str, main: Callable[[Any], int | None]) -> None:
        self.entry = entry
        self.main = main

    def __call__(self, tree: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from megarl.config.presets import register

        register([], self.entry, every=True)  # Hydra composes the next job from them, too
        settings = HydraConfig.get()
        with explained(self.entry, list(settings.overrides.task)):
            config, _ = typed(self.entry, tree, list(settings.overrides.task))
        if settings.mode == RunMode.MULTIRUN:
            # Jobs that shared a run folder would resume from, and overwrite, each other's checkpoints.
            number = str(settings.job.num)
            config.run.dir = str(Path(config.run.dir, number)) if config.run.dir else settings.runtime.output_dir
        code = _checked(config, self.main)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # skip the remaining jobs
        if code and code != NOTICED:
            error = JobError(f"a job of the multirun ended with exit code {code}", key="exit code", value=code)
            error.exit_code = code
            raise error


def _needs_hydra(argv: list[str], tree: type) -> bool:
    """Return whether Hydra's command line must run, for its flags or settings. Refuse unknown flags."""
    flags = [part.partition("=")[0] for part in argv if part.startswith("-")]
    for flag in flags:
        if flag == "--experimental-rerun":
            raise ConfigError(
                f"{flag} unpickles a file and is not supported: use run.resume, or repeat the command", key=flag
            )
        if flag not in HYDRA_FLAGS:
            raise unknown_flag(
                flag, tree, ("--help", "--version", *sorted(each for each in HYDRA_FLAGS if each[1] == "-"))
            )
    modes = [flag for flag in flags if flag in _MODES]
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} and {modes[1]} cannot be combined: remove one", key=modes[1])
    if "--resolve" in flags and not {"--cfg", "-c"} & set(flags):
        raise ConfigError("--resolve needs --cfg: write --cfg job --resolve", key="--resolve")
    return bool(flags) or any(part.lstrip("+~").startswith(("hydra.", "hydra/")) for part in argv)


def _run_hydra(entry: str, argv: list[str], main: Callable[[Any], int | None]) -> int:
    """Pass the command line to Hydra: multirun, --cfg, --info, shell completion."""
    flags = {part.partition("=")[0] for part in argv}
    if not flags & {"-sc", "--shell-completion"}:  # the setting after these is Hydra's own
        check_arguments(_settings(argv), entry_point(entry).config, other_folders=bool(flags & set(_PATH_FLAGS)))
    import hydra

    from megarl.config.printed import settled_output

    with (
        explained(entry, argv),
        settled_output(entry_point(entry).config, argv),
        _hydra_environment(_current(argv, entry, every=True)),
    ):
        start = hydra.main(
            version_base=_VERSION_BASE, config_path=str(conf_folder()), config_name=entry_point(entry).program
        )
        start(_Job(entry, main))()
    return 0


@contextmanager
def _hydra_environment(argv: list[str]) -> Iterator[None]:
    """Make Hydra read `argv`, and raise its errors instead of printing them and exiting with 1."""
    arguments, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *_overrides_first(argv)]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = arguments
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _overrides_first(argv: list[str]) -> list[str]:
    """Return the arguments with settings before flags, as argparse refuses settings on both sides of a flag."""
    settings = set(_settings(argv))
    return [part for part in argv if part in settings] + [part for part in argv if part not in settings]


def _settings(argv: list[str]) -> list[str]:
    """Return the arguments that are neither flags nor values of flags."""
    return [
        part
        for before, part in zip(["", *argv], argv, strict=False)
        if ("=" in part or part.startswith("~")) and not part.startswith("-") and before not in _PATH_FLAGS
    ]


@contextmanager
def explained(entry: str, argv: list[str]) -> Iterator[None]:
    """Convert errors of composition inside the block to a `ConfigError` of one line."""
    try:
        yield
    except MegarlError:
        raise
    except Exception as error:
        from megarl.config.explain import EXPLAINED, explain

        if not isinstance(error, EXPLAINED):
            raise
        raise explain(error, entry_point(entry).config, argv) from error
