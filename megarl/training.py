"""The code of every `python -m megarl.train_NAME`: compose the configuration, make the algorithm's module, train it."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from megarl.config.algorithms import find_algorithm
from megarl.config.compose import run
from megarl.functions.extensions import load, wrong_kind
from megarl.progress import choose_display, waiting_for_imports

if TYPE_CHECKING:
    from megarl.models.exchange.pretrained import Sources
    from megarl.modules.base import Module
    from megarl.run.runner import Build


def command(name: str) -> Callable[[], None]:
    """Return the `main` of an algorithm's entry point, which reads the command line."""
    return partial(_main, name)


def _main(name: str) -> None:
    run(name, sys.argv[1:], partial(train, name))


def train(name: str, config: Any, functions: Mapping[str, Callable[..., Any]] | None = None) -> int:
    """Train and return the exit code.

    Args:
        name: name of the algorithm.
        config: typed configuration tree.
        functions: callables to use instead of the functions that `reward.fn` and `metric.fn` name.
    """
    choose_display(config.trainer.progress)
    with waiting_for_imports():  # only after the configuration is checked
        from megarl.run.runner import run_training

        module_of(name)
    return run_training(name, config, builder(name, functions))


def builder(name: str, functions: Mapping[str, Callable[..., Any]] | None = None) -> "Build":
    """Return the function that builds an algorithm's module from a configuration and open models."""
    from megarl.tokenizers import tokenizer_of

    def build(config: Any, sources: "Sources") -> "Module":
        tokenizer = tokenizer_of(config)
        return module_of(name)(config, tokenizer, functions, sources)

    return build


def module_of(name: str) -> "type[Module]":
    """Import and return the module class of an algorithm. This imports torch, Megatron and Lightning."""
    from megarl.modules.base import Module

    algorithm = find_algorithm(name)
    module = load(f"module of {name}", algorithm.module, "class")
    if not (isinstance(module, type) and issubclass(module, Module)):
        raise wrong_kind(f"module of {name}", algorithm.module, "a subclass of megarl.modules.base.Module", module)
    return module
