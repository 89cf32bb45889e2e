"""What a callable is, in words that are the same in every process: its pickle holds random names and unordered sets."""

import functools
import types
from typing import Any

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
        return f"{_name(thing)}({each(thing.__code__, thing.__defaults__, thing.__kwdefaults__, held)})"
    if isinstance(thing, types.CodeType):
        return f"code({each(thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames, thing.co_freevars)})"
    if isinstance(thing, type | types.BuiltinFunctionType | types.ModuleType):
        return _name(thing)
    return f"{_name(type(thing))}({each(getattr(thing, '__dict__', None))})"


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', thing.__name__)}"


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
