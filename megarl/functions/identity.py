"""What a callable is, in words that are the same in every process: its pickle holds random names and unordered sets."""

import functools
import types
from typing import Any

NOTEBOOK = "__main__"
"""Where no file may tell what a function does: what it calls there counts as its own code."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))


def identity(thing: Any, seen: tuple[int, ...] = ()) -> str:
    """Code, default values, what a closure holds, an instance's fields. Of what is none of these, only the type."""
    if isinstance(thing, PLAIN):
        return repr(thing)
    if id(thing) in seen:
        return "..."
    seen = (*seen, id(thing))

    def each(*things: Any) -> str:
        return ", ".join(identity(one, seen) for one in things)

    if isinstance(thing, list | tuple):
        return f"{type(thing).__name__}({each(*thing)})"
    if isinstance(thing, set | frozenset):
        return f"set({', '.join(sorted(identity(one, seen) for one in thing))})"
    if isinstance(thing, dict):
        return f"dict({', '.join(sorted(f'{each(key)}: {each(value)}' for key, value in thing.items()))})"
    if isinstance(thing, functools.partial):
        return f"partial({each(thing.func, thing.args, thing.keywords)})"
    if isinstance(thing, types.MethodType):
        return f"method({each(thing.__func__, thing.__self__)})"
    if isinstance(thing, types.FunctionType):
        held = [_content(cell) for cell in thing.__closure__ or ()]
        return f"{_name(thing)}({each(thing.__code__, thing.__defaults__, thing.__kwdefaults__, held, _used(thing))})"
    if isinstance(thing, types.CodeType):
        return f"code({each(thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames, thing.co_freevars)})"
    if isinstance(thing, type):
        written = [one for one in vars(thing).values() if isinstance(one, types.FunctionType)]
        return f"{_name(thing)}({each(*written) if thing.__module__ == NOTEBOOK else ''})"
    if isinstance(thing, types.BuiltinFunctionType | types.ModuleType):
        return _name(thing)
    return f"{each(type(thing))}({each(getattr(thing, '__dict__', None))})"


def _used(function: types.FunctionType) -> list[Any]:
    """Functions, classes and plain values of a notebook that one of its functions names."""
    if function.__module__ != NOTEBOOK:
        return []
    found = [function.__globals__.get(name) for name in _names(function.__code__)]
    return [one for one in found if isinstance(one, (*PLAIN, types.FunctionType, type))]


def _names(code: types.CodeType) -> list[str]:
    """Also of the functions and comprehensions inside it."""
    inner = [name for one in code.co_consts if isinstance(one, types.CodeType) for name in _names(one)]
    return [*code.co_names, *inner]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', thing.__name__)}"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
