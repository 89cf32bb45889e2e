"""The output of `--cfg job`: Hydra's composed configuration, with optional sections null or complete."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import yaml
from omegaconf import OmegaConf

from megarl.config.optional import settle


@contextmanager
def settled_output(tree: type, argv: list[str]) -> Iterator[None]:
    """Complete the configuration that Hydra prints in the block, if the command line asks for it.

    Args:
        tree: the schema of the entry point.
        argv: the command line.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (("--cfg", "-c"), ("--package", "-p"), ("-cd",), ("-cp",), ("-cn",)):
        flags.add_argument(*names, nargs="?")
    given, rest = flags.parse_known_args(argv)
    if given.cfg not in ("job", "all"):
        yield
        return
    with redirect_stdout(io.StringIO()) as printed:
        yield
    sys.stdout.write(_settled(printed.getvalue(), given.package or "_global_", tree, rest))


def _settled(printed: str, package: str, tree: type, argv: list[str]) -> str:
    path = [] if package == "_global_" else package.split(".")
    part = yaml.safe_load(printed)
    plain: Any = OmegaConf.to_container(OmegaConf.create(printed)) if isinstance(part, dict) else part
    for name in reversed(path):
        plain = {name: plain}
    settle(plain, tree, argv)
    for name in path:
        plain = None if plain is None else plain[name]
    if not isinstance(plain, dict):
        return printed if part == plain else f"{json.dumps(plain)}\n"
    head = f"# @package {package}\n" if printed.startswith("# @package") else ""
    return head + OmegaConf.to_yaml(OmegaConf.create(plain))
