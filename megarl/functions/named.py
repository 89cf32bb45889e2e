"""Functions by name: checked without being run, and loaded where they will run."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from megarl.disk import exists, local
from megarl.errors import ConfigError
from megarl.functions.identity import identity

Function = Callable[..., Any]
Spec = str | Function
ARGUMENTS = ("samples", "prompts", "outputs", "tokenizer")
"""The keyword arguments of every call of a scoring function, besides the fields of the records."""
BUILT_IN = "megarl.rewards.builtin"
_WEIGHTED = re.compile(
    r"^(?:(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*\*\s*)?(?P<function>\S+)$", re.IGNORECASE
)

_VERSION = "__megarl_version__"
"""Attribute of a module that was made from a file: its path, time and size."""

# Code that calls one of these may define names that reading it does not show.
_DYNAMIC = {"globals", "exec", "eval", "setattr", "vars", "locals"}


@dataclass(frozen=True)
class NamedFunction:
    """A function that another process can load.

    Attributes:
        name: how messages call it.
        source: "package.module:function", "/folder/file.py:function", or the callable by cloudpickle.
        file: where it is written, if that is known.
        identity: what it is, beside its file's text; the same in every process.
    """

    name: str
    source: str | bytes
    file: str | None = None
    identity: str = ""

    def load(self) -> Function:
        """The callable itself. Runs the user's code."""
        loaded = self.value()
        if not callable(loaded):
            raise TypeError(f"{self.name} is a {type(loaded).__name__}, not a function")
        return loaded  # type: ignore[no-any-return]

    def value(self) -> Any:
        """What has this name, of any type. Runs the user's code."""
        if isinstance(self.source, bytes):
            import cloudpickle

            return cloudpickle.loads(self.source)
        place, _, path = self.source.rpartition(":")
        if str(Path.cwd()) not in sys.path and "" not in sys.path:  # a console script's import path lacks it
            sys.path.append(str(Path.cwd()))
        found = _import_file(Path(place)) if _is_file(place) else importlib.import_module(place)
        for attribute in path.split("."):
            found = getattr(found, attribute)
        return found


@dataclass(frozen=True)
class _Given:
    """The name of a function as the configuration gives it; `kind` is what it should name: a function, or a class."""

    key: str
    name: str
    kind: str = "function"

    def refused(self, problem: str, where: str | Path | None = None, functions: Sequence[str] = ()) -> ConfigError:
        """The error; `functions` of the same module or file can be used instead."""
        place = self.name.rpartition(":")[0]
        return ConfigError(
            f"{self.key}={self.name}{problem}",
            key=self.key,
            value=self.name,
            where=where,
            offers={self.key: [f"{place}:{function}" for function in functions]} if functions else None,
        )


def resolve(spec: Spec | NamedFunction, key: str = "reward.fn", kind: str = "function") -> NamedFunction:
    """Check a function's name, or pack a callable, before anything is started.

    A module or file is found and read, not run. A name that only running it could show is left for `load` to find. The
    functions of `reward.fn` and `metric.fn` are loaded in a separate process. Functions that return records, and the
    one that reads answers for `eval.vote`, are loaded in processes of the run.

    Args:
        spec: "package.module:function", "path/to/file.py:function", or a callable.
        key: the configuration key it came from, for the messages.
        kind: what the name stands for, for the messages: function, class, or another object.

    Raises:
        ConfigError: no such module, file or function, or a callable that cannot travel to another process.
    """
    if isinstance(spec, NamedFunction):
        return spec
    if not isinstance(spec, str):
        return _pack(spec, key)
    given = _Given(key, spec, kind)
    place, colon, path = spec.rpartition(":")
    if not colon or not place or not all(part.isidentifier() for part in path.split(".")):
        raise given.refused(f" names no {kind}: write package.module:{kind} or path/to/file.py:{kind}")
    if _is_file(place):
        file = _python_file(place)
        if file is None:
            missing = Path(place).absolute()
            raise given.refused(f": there is no file {missing}; give the path of a Python file", missing)
        _check_name(file, path, given)
        return NamedFunction(spec, f"{file}:{path}", str(file), spec)
    file_of_module = _find_module(place, given)
    if file_of_module is not None:
        _check_name(file_of_module, path, given)
    return NamedFunction(spec, spec, None if file_of_module is None else str(file_of_module), spec)


def weighted_names(text: str) -> list[tuple[float, str]] | None:
    """Return the weights and names of a sum of functions, `0.7*a:f + 0.3*b:g`; None if the text is not a sum."""
    if not re.search(r"\s\+\s|\*", text):
        return None
    matches = [_WEIGHTED.match(part.strip()) for part in re.split(r"\s\+\s", text)]
    terms = [term for term in matches if term is not None]
    if len(terms) < len(matches):
        return None  # `resolve` raises an error that describes valid names
    return [(float(term["weight"] or 1.0), term["function"]) for term in terms]


def check_scoring_function(text: str, key: str) -> None:
    """Refuse the name of a scoring function, or of one in a sum of several, that does not exist or cannot be called.

    It is called with the keyword arguments that docs/rewards.md lists, and with the fields of the records.
    """
    for _, name in weighted_names(text) or [(1.0, text)]:
        function = resolve(name, key)
        takes = parameters(function)
        lacking = [argument for argument in ARGUMENTS if takes is not None and argument not in takes]
        if lacking:
            raise ConfigError(
                f"{key}={name} does not take {', '.join(lacking)}: scoring functions are called with keyword arguments,"
                f" so define it as def {name.rpartition(':')[2]}(outputs, **metadata)",
                key=key,
                value=text,
                where=function.file,
            )


def data_source(text: str, key: str) -> NamedFunction | None:
    """Return the function that an entry of a list of data sources names, or None for a file, folder or hub name.

    `name:subset` may also be a data set on the hub. It is a function where a module `name` defines `subset`, and a
    mistake where a file name.py in this folder does not.
    """
    place, colon, path = text.rpartition(":")
    if not (colon and place and all(part.isidentifier() for part in path.split("."))) or exists(local(text)):
        return None
    if place.endswith(".py"):
        return resolve(text, key)
    if not all(part.isidentifier() for part in place.split(".")):
        return None
    if "." in place:
        return resolve(text, key)
    try:
        function = resolve(text, key)
    except ConfigError:
        if exists(Path(f"{place}.py")):
            raise
        return None
    return function if function.file else None


def check_options(function: NamedFunction, options: Mapping[str, Any], key: str) -> None:
    """Refuse an option that a function certainly does not take.

    Args:
        options: keyword arguments of the function.
        key: the configuration key of the options.
    """
    takes = parameters(function)
    for name in options:
        if takes is not None and name not in takes:
            near = difflib.get_close_matches(name, takes, n=1) or takes
            meant = f"it takes {', '.join(takes)}" if takes else "it takes no options"
            raise ConfigError(
                f"{key}.{name}: {function.name} has no such option; {meant}",
                key=f"{key}.{name}",
                value=options[name],
                where=function.file,
                offers={key: near} if takes else None,
            )


def check_spelling(function: NamedFunction, options: Mapping[str, Any], key: str) -> None:
    """Refuse an option that a function does not name but that looks like one that it does.

    It is for functions that take any option, because options override fields of the records.

    Args:
        function: a function that takes its options by keyword.
        options: the options.
        key: the configuration key of the options.
    """
    found = _definition(function)
    takes = [] if found is None else [argument.arg for argument in found.args.kwonlyargs]
    for name in set(options) - set(takes):
        near = difflib.get_close_matches(name, takes, n=1, cutoff=0.75)
        if near:
            raise ConfigError(
                f"{key}.{name}: {function.name} has no such option; did you mean {near[0]}?",
                key=f"{key}.{name}",
                value=options[name],
                where=function.file,
                offers={key: near},
            )


def parameters(function: NamedFunction) -> list[str] | None:
    """Return the names of a function's parameters, or None where reading its file does not tell them all."""
    found = _definition(function)
    if found is None or found.args.kwarg is not None:
        return None
    return [argument.arg for argument in (*found.args.args, *found.args.kwonlyargs)]


def _definition(function: NamedFunction) -> ast.FunctionDef | None:
    """Return the definition of a function, or of what makes objects of a class, in its file; None where that does not
    tell what it takes."""
    name = str(function.source).rpartition(":")[2]
    if function.file is None or isinstance(function.source, bytes):
        return None
    tree = ast.parse(Path(function.file).read_bytes(), filename=function.file)
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name]
    if len(found) != 1 or found[0].decorator_list:
        return None
    return found[0] if isinstance(found[0], ast.FunctionDef) else _constructor(found[0])


def _constructor(written: ast.ClassDef) -> ast.FunctionDef | None:
    """Return the `__init__` of a class without `self`; None where the class does not define it itself."""
    found = [node for node in written.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if len(found) != 1 or found[0].decorator_list or not found[0].args.args:
        return None
    del found[0].args.args[0]
    return found[0]


def name_of(function: Function) -> str:
    """What to call a callable in a message."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}:{name}" if module else str(name)


def _pack(function: object, key: str) -> NamedFunction:
    if not callable(function):
        raise ConfigError(
            f"{key} is a {type(function).__name__}: give a function, or its name as package.module:function",
            key=key,
        )
    import cloudpickle

    name = name_of(function)
    try:
        return NamedFunction(name, cloudpickle.dumps(function), _file_of(function), identity(function))
    except Exception as error:  # what a closure holds may raise anything when it is pickled
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{key}={name} cannot be sent to the process that runs it ({type(error).__name__}: {reason}); "
            "create what it holds inside the function, or name it as package.module:function",
            key=key,
            value=name,
        ) from error


def _file_of(function: Function) -> str | None:
    """Where a callable is written; pickles of importable ones hold no more than its name."""
    while isinstance(function, functools.partial):
        function = function.func
    written = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        file = inspect.getsourcefile(inspect.unwrap(written))
    except (TypeError, ValueError, OSError):
        return None
    return file if file and Path(file).is_file() else None


def _python_file(place: str) -> Path | None:
    """The absolute path of a file; None where there is none, or there can be none of such a name."""
    try:
        file = Path(place).expanduser().absolute()
        return file if file.is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, half a character, a user who is not there
        return None


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place


def _find_module(name: str, given: _Given) -> Path | None:
    """The source file of a module, found without importing its packages; None if it has none that can be read."""
    importlib.invalidate_caches()  # the file may be younger than the last look at its folder
    path: Iterable[str] | None = None
    found: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        try:
            found = _find_in(part, path)
        except (ImportError, KeyError, ValueError):  # namespace packages inside others, unusual import hooks
            return None
        if found is None:
            inside = f" in the package {'.'.join(parts[: depth - 1])}" if depth > 1 else ""
            raise given.refused(
                f": there is no module {part}{inside}; {_nearest_built_in(name)}"
                f"run from the folder that holds it, install it, or give a file as path/to/file.py:{given.kind}",
                part,
            )
        if depth < len(parts) and found.submodule_search_locations is None:
            raise given.refused(f": {part} is a module, not a package, so it holds no module {name}", part)
        path = found.submodule_search_locations
    origin = found.origin if found else None
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


def _find_in(name: str, path: Iterable[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None  # type: ignore[arg-type]
        if spec is not None:
            return spec
    # A console script's import path lacks the current folder, where a user's module usually lies.
    return PathFinder.find_spec(name, [str(Path.cwd())]) if path is None else None


def _nearest_built_in(module: str) -> str:
    return f"the ready-made ones are in {BUILT_IN}; " if module in ("builtin", "builtins", "rewards") else ""


def _check_name(file: Path, path: str, given: _Given) -> None:
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except OSError as error:
        raise given.refused(f": {file} cannot be read ({error.strerror})", file) from error
    except (RecursionError, MemoryError) as error:  # Python's parser has both for code that is nested too deep
        raise given.refused(f": {file} is nested too deep for Python; simplify it", file) from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}:{line}" if line else file
        raise given.refused(f": {where} is not valid Python ({getattr(error, 'msg', error)}); fix it", where) from error
    names, complete = _top_level_names(tree)
    name = path.split(".")[0]
    if name in names or not complete:
        return
    defines = ast.ClassDef if given.kind == "class" else ast.FunctionDef
    functions = [node.name for node in tree.body if isinstance(node, defines)]
    near = difflib.get_close_matches(name, sorted(names), n=1)
    hint = f"did you mean {near[0]}?" if near else f"it defines {', '.join(functions) or f'no {given.kind}'}"
    raise given.refused(f": {file} defines no {name}; {hint}", file, near or functions)


def _top_level_names(tree: ast.Module) -> tuple[set[str], bool]:
    """Names a module binds at its top level, and whether these are certainly all."""
    names: set[str] = set()
    complete = not any(isinstance(node, ast.Name) and node.id in _DYNAMIC for node in ast.walk(tree))
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            waiting.extend(ast.iter_child_nodes(node))
    return names, complete and "*" not in names and "__getattr__" not in names


def _import_file(file: Path) -> Any:
    """Run a file as a module of its own, again only if it has changed; its neighbours can be imported, as when it is
    run as a script."""
    name, stat = f"function_file_{file.stem}", file.stat()
    known = sys.modules.get(name)
    if known is not None and getattr(known, _VERSION, None) == (str(file), stat.st_mtime_ns, stat.st_size):
        return known  # so that two keys that name one file get the same classes
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    setattr(module, _VERSION, (str(file), stat.st_mtime_ns, stat.st_size))
    return module
