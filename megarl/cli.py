"""The command `megarl`: runs the program that its first word names, and lists and shows what there is to run.

A program is started as `python -m megarl.PROGRAM` would start it, in this process: the same exit codes, messages and
environment, and the processes that it starts are processes of the program. Nothing heavy is imported before.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import megarl
from megarl.command import run_command
from megarl.commands import ALGORITHMS, PROGRAMS, command_names
from megarl.disk import shown
from megarl.errors import ConfigError

_OTHER_NAMES = {
    "list": "ls",
    "presets": "ls presets",
    "algorithms": "ls algorithms",
    "simpo": "cpo",
    "ipo": "dpo",
    "pretrain": "sft",
    "finetune": "sft",
    "fine-tune": "sft",
    "reward": "rm",
    "reward-model": "rm",
    "eval": "evaluate",
    "diff": "compare",
    "tune": "sweep",
    "search": "sweep",
    "serve": "serve-reward",
    "sample": "generate",
    "export": "convert",
    "check": "doctor",
    "test": "selftest",
    "cat": "show",
    "html": "report",
    "plot": "report",
    "summary": "report",
    "follow": "watch",
    "live": "watch",
    "dashboard": "watch",
    "tensorboard": "watch",
    "monitor": "watch",
    "tail": "watch",
    "init": "new",
    "create": "new",
    "startproject": "new",
}
"""Words that people try, and the commands that do it."""


def help_text() -> str:
    """Return the text of `megarl --help`, at most a screen of 24 lines of 80 characters."""
    trained = [f"{name:<5} {about}" for name, about in ALGORITHMS.items()]
    others = [f"{name:<13} {about}" for name, (_, about) in PROGRAMS.items()]
    return (
        "\n".join(
            [
                "usage: megarl COMMAND [KEY=VALUE ...]         megarl COMMAND --help",
                "Train (by an algorithm of yours: megarl train package.module:NAME):",
                *(f"  {line}" for line in trained),
                "Use a model, or prepare a run:",
                *(f"  {line}" for line in others),
                "  report RUN  watch RUN  new FOLDER  ls [LIST]  show PRESET  doctor  completion",
            ]
        )
        + "\n"
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    program = _program(name)
    if program is not None:
        _start(program, _to_chat(rest) if name == "chat" and not {"--help", "-h"} & set(rest) else rest)
    run_command(lambda: _own(name, rest), lambda: "debug=true" in words)


def _program(command: str) -> str | None:
    """Return the name of the module in megarl that a command starts; None if it starts none."""
    if command in ALGORITHMS:
        return f"train_{command}"
    if command == "train":
        return "algorithm"
    return PROGRAMS[command][0] if command in PROGRAMS else None


def _start(program: str, argv: list[str]) -> NoReturn:
    """Start a program as `python -m megarl.PROGRAM` would."""
    sys.argv[1:] = argv
    runpy.run_module(f"megarl.{program}", run_name="__main__", alter_sys=True)
    sys.exit(0)


def _to_chat(words: list[str]) -> list[str]:
    """Return the arguments of `generate` for a chat, which has nobody to talk to without a model."""
    keys = [word.lstrip("+").partition("=")[0] for word in words if "=" in word]
    if len(keys) == len(words) and not any(key == "conf" or "model" in key for key in keys):
        run_command(_no_model)  # else the program says what is wrong with the other words
    return ["chat=true", *words]


def _no_model() -> int:
    raise ConfigError(
        "model.path is missing: name the model to talk to, as in megarl chat model.path=my-sft", key="model.path"
    )


def _own(name: str, argv: list[str]) -> int:
    """Run a command of this module. Return the exit code."""
    if name in ("--help", "-h", "help"):
        return _help(argv)
    if name in ("--version", "version"):
        return _print(f"megarl {megarl.__version__}\n")
    commands: dict[str, tuple[str, Callable[[list[str]], int]]] = {
        "ls": ("megarl ls [presets|algorithms|rewards|families]", _ls),
        "show": ("megarl show PRESET", _show),
        "report": ("megarl report [--compare] RUN [RUN ...] [out=FILE]", _report),
        "watch": ("megarl watch RUN [port=8899] [open=true]", _watch),
        "new": ("megarl new FOLDER", _new),
        "doctor": ("megarl doctor", _doctor),
        "completion": ("megarl completion bash|zsh|fish", _completion),
        "complete": ("megarl complete SHELL LINE", _complete),
    }
    if name not in commands:
        raise unknown_command(name, argv)
    usage, run = commands[name]
    if {"--help", "-h"} & set(argv):
        return _print(f"usage: {usage}\n\n{' '.join((run.__doc__ or '').split())}\n")
    return run(argv)


def _print(text: str) -> int:
    sys.stdout.write(text)
    return 0


def _help(argv: list[str]) -> int:
    """Print the help of megarl, or of the command that follows: `megarl help ppo`."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        return _print(help_text())
    program = _program(argv[0])
    if program is not None:
        _start(program, ["--help", *argv[1:]])
    return _own(argv[0], ["--help"])


def unknown_command(name: str, rest: Sequence[str]) -> ConfigError:
    """Return the error for a first word that is no command, with what to type instead."""
    command, _, value = name.lstrip("-+").partition("=")
    if name.startswith("-"):
        remedy, near = "a command comes first, as in megarl ppo --help; all commands: megarl --help", "--help"
    elif "=" in name:
        near = "ppo"
        remedy = f"a command comes before settings: megarl ppo {' '.join((name, *rest))}; all commands: megarl --help"
    else:
        word = command.lower().removesuffix(".py").removeprefix("megarl.").removeprefix("megarl-").replace("_", "-")
        word = word.removeprefix("train-")
        near = _OTHER_NAMES.get(word) or next(
            iter(difflib.get_close_matches(word, [*command_names(), *_OTHER_NAMES], n=1, cutoff=0.5)), ""
        )
        near = _OTHER_NAMES.get(near, near)
        remedy = f"did you mean megarl {near}? All commands: megarl --help" if near else "all commands: megarl --help"
    return ConfigError(
        f"megarl has no command '{shown(name)}': {remedy}",
        key=shown(name),
        value=value or None,
        offers={shown(name): [near]} if near else None,
    )


def _ls(argv: list[str]) -> int:
    """List the presets, algorithms, reward functions and families of models that megarl has, with a line each."""
    from megarl.listing import KINDS, listed

    kinds = [word.rstrip("=") for word in argv]
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.5)
            meant = f"did you mean megarl ls {near[0]}? " if near else ""
            raise ConfigError(
                f"megarl ls has no list '{kind}': {meant}lists are {', '.join(KINDS)}",
                key=kind,
                offers={kind: near or list(KINDS)},
            )
    return _print("\n".join(listed(kind) for kind in kinds or KINDS))


def _show(argv: list[str]) -> int:
    """Print a preset: its YAML as it is, and, as comments, the file and what it composes with. Copied to
    ./conf/NAME.yaml, it is a preset of your own."""
    from megarl.listing import shown_preset

    if len(argv) != 1:
        raise ConfigError(
            "megarl show takes the name of one preset, as in megarl show randomwalks; all: megarl ls presets",
            key="PRESET",
            value=" ".join(argv) or None,
        )
    name = argv[0].removeprefix("+conf=")
    return _print(shown_preset(name if not name.endswith(".yaml") else Path(name).stem))


def _report(argv: list[str]) -> int:
    """Write one page that says how a run went: findings, curves, scores, samples and settings. It needs no network. Of
    several runs the page compares curves, last values and settings; --compare may say so. It works while a run trains,
    too. The file is RUN/report.html, for several runs ./report.html, or the one that out= names; it replaces reports,
    no other file."""
    from megarl.report_run import run

    return run(argv)


def _watch(argv: list[str]) -> int:
    """Serve a page that follows a run while it trains: the report's findings, curves and samples, brought up to date a
    second or two after each phase. It reads the run folder and answers browsers of this machine only. port=0 takes any
    free port; open=true opens the page in a browser. Ctrl-C ends it; the run goes on."""
    from megarl.watch_run import run

    return run(argv)


def _new(argv: list[str]) -> int:
    """Write a project of your own into a new or empty folder: a preset, a reward function with its test, prompts, a
    SLURM launcher, and a Makefile with `make demo` and `make test`."""
    from megarl.new import run

    return run(argv)


def _doctor(argv: list[str]) -> int:
    """Print what this machine has, what megarl will use of it, and what is wrong, with the command that mends it. The
    exit code is 1 if something that megarl needs is missing."""
    from megarl.doctor import run

    return run(argv)


def _completion(argv: list[str]) -> int:
    """Print the completion for a shell. For bash: eval "$(megarl completion bash)" in ~/.bashrc; for zsh the same in
    ~/.zshrc; for fish: megarl completion fish > ~/.config/fish/completions/megarl.fish"""
    from megarl.completion import SCRIPTS

    if len(argv) != 1 or argv[0] not in SCRIPTS:
        raise ConfigError(
            f"'{shown(' '.join(argv))}' is not a shell that megarl completes in: write megarl completion bash, zsh or "
            "fish",
            key="SHELL",
            value=" ".join(argv) or None,
            offers={"SHELL": list(SCRIPTS)},
        )
    return _print(SCRIPTS[argv[0]])


def _complete(argv: list[str]) -> int:
    """Print what may follow a line that is typed in a shell; the scripts of `megarl completion` call it."""
    from megarl.completion import completed

    shell, line = (argv[0], argv[1]) if len(argv) == 2 else ("bash", "")
    return _print("".join(f"{each}\n" for each in completed(line, bash=shell == "bash")))


if __name__ == "__main__":
    main()
