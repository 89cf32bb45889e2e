"""Runs inside sandboxes: a response's code in one process, and the tests of it in another.

`code_tests.py` sends this file's text into both; nothing imports it there, and it needs the standard library alone. The
two processes share a pair of pipes. The tests see the code's functions as `Remote` objects, whose calls are requests
over the pipes:

    tests:  assert add(1, [2]) == 3      ->  {"do": "call", "on": 7, "args": [1, {"l": [2]}]}
    code:   runs add(1, [2])             <-  {"reply": 3}

Values are sent as plain data and become new builtin objects on the other side, so that the comparison with what is
expected runs where no code of the response runs, on objects that it did not make. Anything else is sent as a number
that stands for it, and becomes a `Remote`. What is expected, and what the tests find, never reach the code's process.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import struct
import sys
import types
from _thread import RLock
from collections.abc import Callable
from typing import Any

OUT_OF_MEMORY = 86
"""Exit code of a program that let a MemoryError through."""
_MAX_BYTES = 64 << 20
_TYPES = (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
_ERRORS = {
    name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}
_BUILTIN: dict[str, type] = {**{kind.__name__: kind for kind in _TYPES}, **_ERRORS}
_SEQUENCES: tuple[tuple[str, Any], ...] = (("l", list), ("t", tuple), ("s", set), ("f", frozenset))

_ALONE: dict[str, Callable[..., Any]] = {
    **{name: getattr(builtins, name) for name in ("len", "iter", "next", "bool", "str", "repr", "int", "float", "abs")},
    **{name: getattr(builtins, name) for name in ("complex", "round", "reversed")},
    **{name: getattr(operator, name) for name in ("index", "neg", "pos", "invert")},
}
_WITH_ANYTHING: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("getitem", "setitem", "delitem")
}
_BINARY = ("eq", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_AMONG_REMOTES: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in (*_BINARY, "and_", "or_", "xor", "contains")},
    "isinstance": lambda kind, one: isinstance(one, kind),
    "issubclass": lambda kind, one: issubclass(one, kind),
}
_OPERATIONS = {**_ALONE, **_WITH_ANYTHING, **_AMONG_REMOTES}


class PeerGoneError(BaseException):
    """The other process has ended, or sent an invalid message. A test that expects an Exception does not catch it."""


class Peer:
    """One side of the connection."""

    def __init__(self, source: int, sink: int, may: Callable[[Any, str, str], bool]) -> None:
        """`may` says whether the other side may do something (call, get, len ...) with an object of this one."""
        self._source, self._sink, self._may = os.fdopen(source, "rb"), sink, may
        self._own: dict[int, Any] = {}
        self._number_of: dict[int, int] = {}
        self._classes: dict[int, type] = {}
        self._lock = RLock()
        self.assertion_failed = False  # raised by a function of this side that the other side called
        self.gone = False  # the other side: for tests that catch everything
        self.names: Callable[[], dict[str, Any]] = dict
        self.ends_without_memory = False

    def request(self, do: str, on: int = 0, name: str = "", args: tuple[Any, ...] = (), **keywords: Any) -> Any:
        """Send a request to the other side, and return or raise its reply. Serve its requests meanwhile."""
        with self._lock:
            sent = self._encode(args), self._encode(keywords)
            self._send({"do": do, "on": on, "name": name, "args": sent[0], "kw": sent[1]})
            while True:
                message = self._receive()
                if "do" in message:
                    self._send(self._serve(message))
                elif "raise" in message:
                    raise self._decode_error(message["raise"])
                else:
                    break
            for before, mine, key in ((sent[0], args, "args"), (sent[1], keywords, "kw")):
                if key in message and message[key] != before:
                    _update(mine, self._decode(message[key]))
            return self._decode(message.get("reply"))

    def serve(self) -> None:
        """Serve requests until the other side is gone."""
        while True:
            self._send(self._serve(self._receive()))

    def _serve(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            do, name = message["do"], message.get("name", "")
            if do == "names":
                found = [[name, self._encode(value)] for name, value in self.names().items()]
                return {"reply": {"l": [{"l": pair} for pair in found]}}
            target = self._own[message["on"]]
            args, keywords = self._decode(message["args"]), self._decode(message["kw"])
            if not self._may(target, do, name):
                raise AttributeError(f"{do} {name} is not allowed on a {type(target).__name__} of the tests")
            if do == "call":
                reply = {"reply": self._encode(target(*args, **keywords))}
                return {**reply, "args": self._encode(args), "kw": self._encode(keywords)}
            if do == "get":
                return {"reply": self._encode(getattr(target, name))}
            if do == "set":
                setattr(target, name, *args)
                return {"reply": None}
            return {"reply": self._encode(_OPERATIONS[do](target, *args))}
        except PeerGoneError:
            raise
        except BaseException as error:
            if isinstance(error, MemoryError) and self.ends_without_memory:
                os._exit(OUT_OF_MEMORY)
            self.assertion_failed |= isinstance(error, AssertionError)
            return {"raise": self._encode_error(error)}

    # Values

    def _encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str, float):
            return value
        if isinstance(value, int):
            whole = int(value)
            return whole if abs(whole) < 1 << 60 else {"i": hex(whole)}
        if isinstance(value, Remote):
            return {"o": value._number}
        if isinstance(value, type):
            if _BUILTIN.get(value.__name__) is value:
                return {"B": value.__name__}
            if "_remote_number" in vars(value):
                return {"o": value._remote_number}  # type: ignore[attr-defined]
        for tag, base in _SEQUENCES:
            if isinstance(value, base):
                return {tag: [self._encode(one) for one in base.__iter__(value)]}
        if isinstance(value, dict):
            return {"d": [[self._encode(key), self._encode(one)] for key, one in dict.items(value)]}
        if isinstance(value, bytes | bytearray):
            return {"b" if isinstance(value, bytes) else "y": value.hex()}
        if isinstance(value, str | float):
            return str(value) if isinstance(value, str) else float(value)
        if isinstance(value, complex):
            return {"c": [value.real, value.imag]}
        if kind is range:
            return {"r": [value.start, value.stop, value.step]}
        if kind.__module__ == "decimal" and kind.__name__ == "Decimal":
            return {"D": str(value)}
        if kind.__module__ == "fractions" and kind.__name__ == "Fraction":
            return {"F": [hex(value.numerator), hex(value.denominator)]}
        if kind.__module__ == "collections" and kind.__name__ == "deque":
            return {"q": [self._encode(one) for one in value]}
        return self._number(value)

    def _number(self, value: Any) -> dict[str, Any]:
        """Return what stands for an object of this side. It is kept, so that its number stays its own."""
        number = self._number_of.setdefault(id(value), len(self._number_of) + 1)
        self._own[number] = value
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"h": [number, value.__name__, _builtin_base(value)]}
        return {"h": [number]}

    def _decode(self, coded: Any) -> Any:
        if not isinstance(coded, dict):
            if isinstance(coded, list):
                raise PeerGoneError("an invalid message")
            return coded
        ((tag, body),) = coded.items()
        for name, base in _SEQUENCES:
            if tag == name:
                return base(self._decode(one) for one in body)
        if tag == "d":
            return {self._decode(key): self._decode(value) for key, value in body}
        if tag == "i":
            return int(body, 16)
        if tag in ("b", "y"):
            return (bytes if tag == "b" else bytearray).fromhex(body)
        if tag == "c":
            return complex(*body)
        if tag == "r":
            return range(*body)
        if tag == "B":
            return _BUILTIN[body]
        if tag == "o":
            return self._own[body]
        if tag == "h":
            return self._remote(*body)
        if tag == "q":
            from collections import deque

            return deque(self._decode(one) for one in body)
        if tag == "D":
            from decimal import Decimal

            return Decimal(body)
        from fractions import Fraction

        return Fraction(*(int(digits, 16) for digits in body))

    def _remote(self, number: int, name: str = "", base: str = "") -> Any:
        if not name:
            return Remote(self, number)
        if number not in self._classes:
            self._classes[number] = type(str(name), (_ERRORS[base],), {"_remote_number": int(number)})
        return self._classes[number]

    def _encode_error(self, error: BaseException) -> dict[str, Any]:
        try:
            args = [arg if isinstance(arg, str | int | float | None) else str(arg) for arg in error.args]
        except BaseException:
            args = []
        return {"kind": self._encode(type(error)), "args": self._encode(args)}

    def _decode_error(self, coded: dict[str, Any]) -> BaseException:
        kind, args = self._decode(coded["kind"]), self._decode(coded["args"])
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise PeerGoneError("an invalid error")
        try:
            return kind(*args)
        except Exception:
            return RuntimeError(kind.__name__)

    # Bytes

    def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        rest = memoryview(struct.pack("<Q", len(text)) + text)
        try:
            while rest:
                rest = rest[os.write(self._sink, rest) :]
        except OSError as error:
            self.gone = True
            raise PeerGoneError from error

    def _receive(self) -> dict[str, Any]:
        header = self._source.read(8)
        length = struct.unpack("<Q", header)[0] if len(header) == 8 else _MAX_BYTES + 1
        text = self._source.read(length) if length <= _MAX_BYTES else b""
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.gone = True
            raise PeerGoneError("no message")
        return message


def _update(mine: Any, theirs: Any) -> None:
    """Give mutable arguments the content that the function has left in them."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list | tuple) and len(mine) == len(theirs):
        for index, (old, new) in enumerate(zip(mine, theirs, strict=True)):
            if isinstance(old, list | dict | set | bytearray | tuple) and type(old) is type(new):
                _update(old, new)
            elif isinstance(mine, list):
                mine[index] = new
    elif isinstance(mine, list | bytearray):
        mine[:] = theirs
    elif isinstance(mine, dict):
        kept = {key: mine[key] for key in theirs if key in mine and type(mine[key]) is type(theirs[key])}
        for key, old in kept.items():
            _update(old, theirs[key])
        mine.clear()
        mine.update({key: kept[key] if _is_mutable(kept.get(key)) else new for key, new in theirs.items()})
    elif isinstance(mine, set):
        mine.clear()
        mine.update(theirs)


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set | bytearray)


def _builtin_base(kind: type) -> str:
    return next(base.__name__ for base in kind.__mro__ if _ERRORS.get(base.__name__) is base)


class Remote:
    """An object of the other side.

    The answers of an object of the response are never trusted with what is expected: compared with plain data it is
    unequal, and other operators work between two such objects only.
    """

    def __init__(self, peer: Peer, number: int) -> None:
        self.__dict__.update(_peer=peer, _number=number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__doc__", "__enter__", "__exit__"):
            raise AttributeError(name)
        return self._peer.request("get", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("set", self._number, name, (value,))

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._peer.request("call", self._number, "", args, **keywords)

    def __enter__(self) -> Any:
        return self.__getattr__("__enter__")()

    def __exit__(self, *_: object) -> Any:
        return self.__getattr__("__exit__")(None, None, None)

    def __instancecheck__(self, one: object) -> bool:
        return isinstance(one, Remote) and bool(self._peer.request("isinstance", self._number, "", (one,)))

    def __subclasscheck__(self, one: object) -> bool:
        return isinstance(one, Remote) and bool(self._peer.request("issubclass", self._number, "", (one,)))

    def __hash__(self) -> int:
        return hash((Remote, self._number))

    def __format__(self, form: str) -> str:
        return format(str(self), form)


def _remote_method(do: str, among_remotes: bool) -> Callable[..., Any]:
    def method(self: Remote, *args: Any) -> Any:
        if among_remotes and not all(isinstance(arg, Remote) for arg in args):
            return NotImplemented
        return self._peer.request(do, self._number, "", args)

    return method


for _do in _OPERATIONS:
    if _do not in ("contains", "isinstance", "issubclass"):
        setattr(Remote, f"__{_do.rstrip('_')}__", _remote_method(_do, _do in _AMONG_REMOTES))


# The code's process


def serve_code(source: str) -> None:
    """Run the code of a response, and let the tests call what it defines."""
    peer = Peer(4, 5, lambda target, do, name: True)
    module = types.ModuleType("solution")
    sys.modules["solution"] = module

    def names() -> dict[str, Any]:
        _add_exit()
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)
        kept = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        return {name: value for name, value in kept.items() if not isinstance(value, types.ModuleType)}

    peer.names, peer.ends_without_memory = names, True
    try:
        peer.serve()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except PeerGoneError:
        os._exit(0)


def run_program(source: str) -> None:
    """Run the code of a response as a program."""
    _add_exit()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = ["solution.py"]
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _add_exit() -> None:
    """Add the builtins that the site module would."""
    from _sitebuiltins import Quitter

    for name in ("exit", "quit"):
        setattr(builtins, name, Quitter(name, "Ctrl-D"))
