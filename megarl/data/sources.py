"""Files, folders, hub data sets and functions in, records out, each with the place it came from.

What a record means is decided in `formats`; here it is an object with keys.
"""

from __future__ import annotations

import codecs
import gzip
import inspect
import re
import traceback
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from megarl.config.files import SUFFIXES, data_suffix, require_data
from megarl.disk import UnreadableError, is_dir, is_file, local, parse_json
from megarl.errors import ConfigError, DataError, MegarlError, UnavailableError, first_line
from megarl.functions.named import NamedFunction, check_options, data_source

_VALIDATION = ("validation", "valid", "val", "dev", "eval")
_SPLIT_KEYS = ("data.train_split", "data.eval_split")
_DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_NAMED = 3  # records that a message names
_lists: ContextVar[Mapping[str, str]] = ContextVar("lists", default={})  # noqa: B039 - never changed in place
_SPLIT_WORD = re.compile(rf"^(train|test|{'|'.join(_VALIDATION)})(?=[-_.])")


@dataclass(frozen=True)
class Record:
    """One record as it was read, where (`file:line`, or `file: record N`), and from which of several sources."""

    fields: Mapping[str, Any]
    where: str
    source: int = 0


@dataclass
class Places:
    """How many records something happened to, and where the first few of them are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """Count a record, and remember where it is if it is one of the first."""
        self.count += 1
        if len(self.first) < _NAMED:
            self.first.append(where)

    def __str__(self) -> str:
        more = self.count - len(self.first)
        return ", ".join(self.first) + (f" and {more} more" if more else "")


@contextmanager
def named_lists(names: Mapping[str, str]) -> Iterator[None]:
    """Inside, records of files that were written from Python lists are named by their list: `prompts[3]`.

    Args:
        names: the name of the list by the path of its file.
    """
    token = _lists.set(names)
    try:
        yield
    finally:
        _lists.reset(token)


def read_records(
    paths: Sequence[str],
    split: str = "train",
    text_key: str = "text",
    key: str = "data.train",
    options: Mapping[str, Any] | None = None,
) -> Iterator[Record]:
    """Records of several sources, one source after the other, in their order.

    Args:
        paths: .jsonl, .json (a list of objects), .parquet or .txt files (a record per line); folders of them;
            folders written by `datasets.save_to_disk`; hub names, "owner/name" or "owner/name:subset"; functions that
            return records, "package.module:function" or "path/to/file.py:function".
        split: split of a hub data set, and the files that are read in a folder that names files after splits.
        text_key: key under which a line of a .txt file is put.
        key: of the configuration, where the sources come from; for the messages.
        options: keyword arguments of the functions.

    Raises:
        DataError: a source is missing, empty or broken; the message names the file and the record.
    """
    for source, path in enumerate(paths):
        name, count = _lists.get().get(path), 0
        for record in _read_source(path, split, text_key, key, options or {}):
            yield Record(record.fields, record.where if name is None else f"{name}[{count}]", source)
            count += 1
        if not count:
            empty = name or path
            raise DataError(
                f"{empty}: has no records; give a source with at least one, or take it off {key}",
                key=key,
                where=empty,
            )


def _read_source(path: str, split: str, text_key: str, key: str, options: Mapping[str, Any]) -> Iterator[Record]:
    place = local(path)
    if is_dir(place):
        return _read_folder(place, split, text_key)
    if is_file(place):
        return _read_file(place, text_key)
    function = data_source(path, key)
    if function is not None:
        return _read_function(function, key, options)
    require_data(path, key)
    return _read_hub(path, split)


def _read_function(function: NamedFunction, key: str, options: Mapping[str, Any]) -> Iterator[Record]:
    """Run a function of the user in this process."""
    check_options(function, options, "data.options")
    try:
        loaded = function.load()
        if problem := _unbound(loaded, options):
            raise ConfigError(
                f"{key}: {function.name} cannot be called with data.options={dict(options)}: {problem}",
                key="data.options",
                value=dict(options),
                where=function.file,
            )
        for number, fields in enumerate(loaded(**options), 1):
            yield _record(fields, f"{function.name}: record {number}")
    except MegarlError:
        raise
    except (Exception, SystemExit) as error:  # the user's code raises anything
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename == function.file), frames[-1])
        raise DataError(
            f"{key}: {function.name} failed with {first_line(error, kind=True)} at {frame.filename}:{frame.lineno}; "
            "it must return records, which are mappings",
            key=key,
            value=function.name,
            where=f"{frame.filename}:{frame.lineno}",
        ) from error


def _unbound(function: Callable[..., Any], options: Mapping[str, Any]) -> str | None:
    """Return why a function cannot be called with these keyword arguments, or None where it can, or may."""
    try:
        inspect.signature(function).bind(**options)
    except TypeError as problem:
        return str(problem)
    except ValueError:  # a built-in function whose parameters are not known
        return None
    return None


def _read_folder(folder: Path, split: str, text_key: str) -> Iterator[Record]:
    if is_file(folder / "dataset_dict.json") or is_file(folder / "dataset_info.json"):
        yield from _read_saved(folder, split)
        return
    try:
        files = sorted(item for item in folder.iterdir() if data_suffix(item) in SUFFIXES and is_file(item))
    except OSError as error:
        raise _unreadable(folder, f"cannot be read ({error.strerror}); name another folder") from error
    if not files:
        raise _unreadable(folder, f"holds no {', '.join(SUFFIXES)} file; give a folder that does")
    # Reading train.jsonl and test.jsonl of one folder together would train on the test set.
    named = {item: word.group(1) for item in files if (word := _SPLIT_WORD.match(item.name))}
    if named:
        names = _VALIDATION if split in _VALIDATION else (split,)
        files = [item for item in files if named.get(item) in names]
        if not files:
            there = sorted(set(named.values()))
            raise DataError(
                f"{folder}: has files for {', '.join(there)}, but none for {split!r}; "
                "set data.train_split or data.eval_split to one of them, or list the files",
                key="split",
                value=split,
                where=folder,
                offers=dict.fromkeys(_SPLIT_KEYS, there),
            )
    for item in files:
        if item.with_name(f"{item.name}.gz") in files:
            raise _unreadable(folder, f"holds {item.name} and {item.name}.gz, the same records twice; remove one")
    for item in files:
        yield from _read_file(item, text_key)


def _read_file(path: Path, text_key: str) -> Iterator[Record]:
    suffix = data_suffix(path)
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix == ".txt":
        return _read_text(path, text_key)
    raise _unreadable(path, f"files of kind {path.suffix!r} are not read; use one of {', '.join(SUFFIXES)}")


def _opened(path: Path) -> IO[bytes]:
    """Open a file for reading, or what is compressed in it."""
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _raw_lines(path: Path) -> Generator[bytes, None, None]:
    """Iterate over the lines of a file."""
    try:
        with _opened(path) as file:
            yield from file
    except _DAMAGED_GZIP as error:
        raise _unreadable(path, "is not a readable gzip file; compress it again") from error
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror}); name another file") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    with closing(_raw_lines(path)) as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                raise _unreadable(f"{path}:{number}", f"is not UTF-8 ({error.reason}); convert the file") from error
            if line.strip():
                yield number, line


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            fields = parse_json(line)
        except UnreadableError as error:
            raise _unreadable(where, f"{error}; fix or delete the line") from error
        yield _record(fields, where)


def _read_json(path: Path) -> Iterator[Record]:
    try:
        content = b"".join(_raw_lines(path))
        items = parse_json(content.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 ({error.reason}); convert the file") from error
    except UnreadableError as error:
        raise _unreadable(path, f"{error}; if it has one object per line, name it .jsonl") from error
    if not isinstance(items, list):
        raise _unreadable(path, f"holds a {type(items).__name__}; expected a list of objects")
    for number, fields in enumerate(items, 1):
        yield _record(fields, f"{path}: record {number}")


def _read_text(path: Path, text_key: str) -> Iterator[Record]:
    for number, line in _lines(path):
        yield Record({text_key: line}, f"{path}:{number}")


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UnavailableError(
            f'{path}: reading parquet needs pyarrow; pip install "megarl[data]"', key="pyarrow", where=path
        ) from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield _record(fields, f"{path}: record {number}")
    except (ArrowException, OSError, ValueError, ArithmeticError) as error:  # a value that Python has no type for
        raise _unreadable(
            path, f"is not a readable parquet file ({first_line(error, kind=True)}); write it anew"
        ) from error


def _read_saved(folder: Path, split: str) -> Iterator[Record]:
    datasets = _datasets(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises its own, Arrow's and Python's kinds
        raise _unreadable(folder, f"is not a readable saved data set ({first_line(error, kind=True)})") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(
                f"{folder}: has no split {split!r}; set data.train_split or data.eval_split to one of "
                f"{', '.join(sorted(found))}",
                key="split",
                value=split,
                where=folder,
                offers=dict.fromkeys(_SPLIT_KEYS, sorted(found)),
            )
        found = found[split]
    for number, fields in enumerate(found, 1):
        yield _record(fields, f"{folder}: record {number}")


def _read_hub(name: str, split: str) -> Iterator[Record]:
    datasets = _datasets(name)
    repository, _, subset = name.partition(":")
    try:
        found = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # the library raises its own, the network's and Python's kinds
        raise DataError(
            f"{name}: is no file or folder here, and split {split!r} of it could not be loaded from the hub "
            f"({first_line(error, kind=True)}); check the name, the split and the network, or download it to a folder",
            key="split",
            value=split,
            where=name,
        ) from error
    for number, fields in enumerate(found, 1):
        yield _record(fields, f"{name}: record {number}")


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError(
            f'{source}: needs the datasets library; pip install "megarl[data]"', key="datasets", where=source
        ) from error
    return datasets


def _record(fields: Any, where: str) -> Record:
    if not isinstance(fields, Mapping):
        raise _unreadable(where, f"is a {type(fields).__name__}; expected an object with keys")
    return Record(fields, where)


def _unreadable(where: str | Path, problem: str) -> DataError:
    return DataError(f"{where}: {problem}", where=where)
