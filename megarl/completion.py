"""Completion in bash, zsh and fish: the scripts, and what may follow a line.

A script asks `megarl complete SHELL LINE` at every TAB. The answer needs the schema and names of files, no Hydra.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megarl.commands import ALGORITHMS, PROGRAMS, command_names

SCRIPTS = {
    "bash": r"""_megarl() {
    local each
    COMPREPLY=()
    while IFS= read -r each; do COMPREPLY+=("$each"); done \
        < <(megarl complete bash "${COMP_LINE:0:COMP_POINT}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -gt 0 && "${COMPREPLY[0]}" == *[=/,] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -F _megarl megarl
""",
    "zsh": r"""#compdef megarl
_megarl() {
    local -a found keys
    found=("${(@f)$(megarl complete zsh "$LBUFFER" 2>/dev/null)}")
    keys=("${(@M)found:#*[=/,]}")
    found=("${(@)found:#*[=/,]}")
    [[ -n "${keys[*]}" ]] && compadd -Q -S '' -- "${keys[@]}"
    [[ -n "${found[*]}" ]] && compadd -Q -- "${found[@]}"
    [[ -z "${keys[*]}${found[*]}" ]] && _files
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _megarl megarl
""",
    "fish": r"""function __megarl_complete
    megarl complete fish (commandline -cp) 2>/dev/null
end
complete -c megarl -a '(__megarl_complete)'
""",
}
"""The script to source, by shell."""

_SHELLS = tuple(SCRIPTS)
_KINDS = ("algorithms", "families", "presets", "rewards")
_FLAGS = ("--help", "--version")
_TREES = {"chat": "generate", "serve-reward": "serve_reward"}
_PLAIN = {
    "convert": ("from=", "to=", "format=", "dtype=", "family=", "families=", "tp=", "pp="),
    "selftest": (
        *("tp=", "pp=", "cp=", "dp=", "vpp=", "sequence_parallel=", "recompute=", "precision=", "steps=", "html="),
        *("--all", "only=", "limit="),
    ),
    "why-stuck": ("beat=",),
}
"""The settings of programs that have no configuration tree."""


def completed(line: str, *, bash: bool = False) -> list[str]:
    """Return what the last word of a line can become, sorted.

    Args:
        line: what is typed up to the cursor, with the name of the program.
        bash: return only what follows the last "=" or ":" of the word, at which bash splits words.
    """
    words = line.split()
    typed = "" if not words or line[-1].isspace() else words.pop()
    found = sorted({each for each in _candidates(words[1:], typed) if each.startswith(typed) and each != typed})
    if bash:
        kept = max(typed.rfind("="), typed.rfind(":")) + 1
        found = [each[kept:] for each in found]
    return found


def _candidates(before: list[str], typed: str) -> Iterator[str]:
    """Yield what a word can be after others; some may not fit what is typed of it."""
    if not before:
        yield from (*command_names(), *_FLAGS)
        return
    command = before[0]
    words = {
        "ls": _KINDS,
        "completion": _SHELLS,
        "help": (*ALGORITHMS, *PROGRAMS),
        **_PLAIN,
    }
    if command == "show":
        yield from _presets()
    elif command == "report":
        yield "out="
        yield from ("--compare",) if typed.startswith("-") else ()
        yield from _runs(typed)
    elif command == "watch":
        yield from ("port=", "open=true")
        yield from _runs(typed)
    elif command in ("sweep", "compare"):
        yield from _settings_of_many(command, before[1:], typed)
    elif command in words:
        yield from words[command]
    elif command in ALGORITHMS or command in PROGRAMS:
        yield from _settings(command, typed, asks="--help" in before)


def _settings_of_many(command: str, before: list[str], typed: str) -> Iterator[str]:
    """Yield algorithms, then the keys of a sweep or a comparison, and those of the algorithm."""
    from megarl.config.compare import CompareConfig
    from megarl.config.leaf import leaves
    from megarl.config.sweep import SweepConfig

    if not before or before[0] not in ALGORITHMS:
        yield from (*ALGORITHMS, *_FLAGS[:1])
        return
    tree = SweepConfig if command == "sweep" else CompareConfig
    own = {f"{command}.{leaf.key}": leaf.choices for leaf in leaves(tree)}
    key, equals, _ = typed.partition("=")
    if equals and key in own:
        yield from (f"{key}={choice}" for choice in own[key])
    elif typed.startswith(f"{command}.") and not equals:
        yield from (f"{name}=" for name in own)
        if command == "sweep":
            yield from (f"sweep.{each}" for each in _settings(before[0], typed.removeprefix("sweep."), asks=False))
    else:
        yield f"{command}."
        yield from _presets() if command == "compare" and len(before) < 3 else ()
        yield from _settings(before[0], typed, asks=False)


def _settings(command: str, typed: str, *, asks: bool) -> Iterator[str]:
    """Yield the keys of an entry point, values of the key that is typed, groups and presets.

    Args:
        command: name of an algorithm or program.
        typed: the word so far.
        asks: whether it follows `--help`: keys and sections without "=".
    """
    from megarl.config.algorithms import entry_point
    from megarl.config.cluster import PlanConfig
    from megarl.config.help import groups
    from megarl.config.leaf import leaves, sections

    trees: list[type] = [entry_point("ppo" if command == "plan" else _TREES.get(command, command)).config]
    if command == "plan":
        trees.append(PlanConfig)
    known = {leaf.key: leaf for tree in trees for leaf in leaves(tree)}
    if asks:
        yield from (*known, *sections(trees[0]), "all")
        return
    key, equals, value = typed.partition("=")
    if not equals:
        yield from _FLAGS
        yield from (f"{name}=" for name in (*known, *groups()))
        yield "+conf="
    elif key == "+conf":
        begun = value[: max(value.rfind(","), value.rfind("[")) + 1]  # of a list, [a,b]
        yield from (f"{key}={begun}{name}" for name in _presets())
    elif key in groups():
        yield from (f"{key}={option}" for option, _ in groups()[key])
    elif key in known:
        kinds = known[key].type.split(" | ")
        values = [*known[key].choices, *(("true", "false") if "bool" in kinds else ())]
        yield from (f"{key}={each}" for each in [*values, *(["null"] if "None" in kinds and not value else [])])
        if key.endswith(".fn"):
            from megarl.listing import rewards

            yield from (f"{key}={name}" for name, _ in rewards())


def _runs(typed: str) -> Iterator[str]:
    """Yield folders of runs: in the folder that is typed, else in runs/."""
    folder = typed.rpartition("/")[0] or "runs"
    yield from (str(Path(folder, path.parent.name)) for path in sorted(Path(folder).glob("*/metrics.csv")))


def _presets() -> list[str]:
    from megarl.config.preset_files import preset_files

    return list(preset_files(Path.cwd() / "conf"))
