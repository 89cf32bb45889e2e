"""`python -m megarl.plan +conf=gpt20b cluster.gpus=64 cluster.gpu=h100`: what a run would take, before it is queued.

It accepts the keys of the run that it plans, and its own. No GPU is needed.
"""

import difflib
import json
import sys
from typing import Any

import megarl
from megarl.command import run_command, say
from megarl.config.algorithms import find_algorithm
from megarl.config.cluster import PlanConfig
from megarl.config.compose import compose
from megarl.config.elastic import fitted
from megarl.config.leaf import leaves, sections
from megarl.config.own_keys import read_own_keys
from megarl.config.world import local_devices
from megarl.errors import ConfigError
from megarl.progress import waiting_for_imports
from megarl.report.shell import PLAN
from megarl.report.write import page_path, write_page

_OWN = {leaf.key.partition(".")[0] for leaf in leaves(PlanConfig)}


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the plan's own and those of the run."""
    own: list[str] = []
    theirs: list[str] = []
    for word in argv:
        word = "json=true" if word == "--json" else word
        if word.startswith("-"):
            raise ConfigError(
                f"unknown flag '{word}': flags are --help, --version and --json; keys are key=value", key=word
            )
        (own if word.partition("=")[0].partition(".")[0] in _OWN else theirs).append(word)
    return own, theirs


def read(own: list[str]) -> PlanConfig:
    """Return the plan's own keys, typed and checked."""
    return read_own_keys(PlanConfig, own)


def compose_run(plan: PlanConfig, argv: list[str]) -> tuple[Any, int]:
    """Return the run's configuration, validated as the run itself would, and its number of GPUs."""
    tree = find_algorithm(plan.algorithm, "algorithm").config
    for word in argv:
        head = word.lstrip("+~").partition("=")[0].partition(".")[0]
        near = difflib.get_close_matches(head, [*_OWN, *sections(tree)], n=1, cutoff=0.7)
        if near and near[0] in _OWN:
            raise ConfigError(
                f"unknown key '{head}' in '{word}': did you mean {near[0]}?", key=head, offers={head: near}
            )
    config, _ = compose(plan.algorithm, argv)
    gpus = plan.cluster.gpus or local_devices(config) * int(config.trainer.num_nodes)
    _without_files(config)
    taken, fit = fitted(config, gpus)
    if fit is not None:
        say(fit.told(config))
    return taken, gpus


def _without_files(config: Any) -> None:
    """Fill in file paths: a plan reads no data, so the files need not exist."""
    config.data.train = config.data.train or ["to be named"]
    if config.tokenizer.path is None:
        config.tokenizer.kind = "bytes"
    if hasattr(config, "reward") and not config.reward.sources:
        config.reward.fn = "to.be:named"


def vocabulary_of(config: Any) -> int:
    """Return the size of the model's vocabulary."""
    if config.model.vocab_size is not None:
        return int(config.model.vocab_size)
    from megarl.tokenizers import tokenizer_of

    return tokenizer_of(config).size


def show(argv: list[str]) -> None:
    """Plan the run that the arguments describe and print the plan."""
    own, theirs = split(argv)
    config = read(own)
    name = "" if "html=" in own else config.html  # an empty value would be read as null
    path = None if name is None else page_path(name, "html", PLAN)
    run, gpus = compose_run(config, theirs)
    with waiting_for_imports():  # only once the configuration is known to be good
        from rich.console import Console

        from megarl.models.exchange.pretrained import resolve_pretrained
        from megarl.planning import show as tables
        from megarl.planning.hardware import Cluster
        from megarl.planning.page import page
        from megarl.planning.plain import as_json
        from megarl.planning.plan import make_plan, remedies, suggest
        from megarl.planning.times import Rates
        from megarl.planning.work import work_of
        from megarl.training import module_of

    run, sources = resolve_pretrained(run)
    cluster = Cluster.of(config.cluster, gpus)
    rates = Rates(config.mfu or cluster.gpu.products, config.host_us_per_layer * 1e-6)
    work = work_of(module_of(config.algorithm), run, config, gpus, vocabulary_of(run), sources)
    plan = make_plan(work, cluster, rates)
    helps = remedies(plan)
    layouts = suggest(plan) if config.suggest else None
    if config.json:
        sys.stdout.write(json.dumps(as_json(plan, helps, layouts), indent=1) + "\n")
    else:
        tables.write(plan, helps, layouts, Console(width=None if sys.stdout.isatty() else 160))
    if path is not None:
        write_page(page(plan, helps, layouts), path, "html", PLAN)
        say(f"page: {path}")


def help_text() -> str:
    """Return the help text, with every key of the plan."""
    lines = ["usage: python -m megarl.plan [key=value ...] [+conf=preset or [a,b]] [--json]", ""]
    for leaf in leaves(PlanConfig):
        lines += [
            f"  {leaf.key}={json.dumps(leaf.default)}  [{'|'.join(leaf.choices) or leaf.type}]",
            f"      {leaf.doc}",
        ]
    lines += ["", "All other keys are those of the run: python -m megarl.train_ppo --help", ""]
    return "\n".join(lines)


def main() -> None:
    """Entry point of `python -m megarl.plan`."""
    argv = sys.argv[1:]

    def work() -> None:
        if "--help" in argv or "-h" in argv:
            sys.stdout.write(help_text())
        elif "--version" in argv:
            sys.stdout.write(f"megarl {megarl.__version__}\n")
        else:
            show(argv)

    run_command(work, lambda: "debug=true" in argv)


if __name__ == "__main__":
    main()
