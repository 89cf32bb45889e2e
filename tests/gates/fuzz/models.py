"""Model folders of the eight families: config.json, indices, safetensors and pickles, opened and read whole."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from megarl.config.sections.parallel import ParallelConfig
from megarl.config.shape import check_shape
from megarl.models.exchange.export import write_folder
from megarl.models.exchange.formats import open_source
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case
from tests.models.exchange.published import save_published, stored

FAMILIES = ("gpt2", "gpt_neox", "gptj", "opt", "llama_yarn", "mistral", "qwen2_window", "qwen3", "llama3")
INDEX = "model.safetensors.index.json"


def make_store(store: Path) -> None:
    for family in FAMILIES:
        save_published(family, store / family)
    write_folder(open_source(store / "llama3"), store / "shards", shard_bytes=20_000)
    write_folder(open_source(store / "gpt2"), store / "pickled")
    torch.save(stored(store / "gpt2"), store / "pickled" / "pytorch_model.bin")
    (store / "pickled" / "model.safetensors").unlink()


def cases(seed: int, count: int, store: Path) -> list[Case]:
    if not (store / "pickled").is_dir():
        make_store(store)
    made = []
    for number in range(count):
        draw = Random(f"models {seed} {number}")
        way = draw.choices((_config, _header, _body, _index, _pickle, _files), (10, 4, 2, 2, 3, 1))[0]
        base, what, lay = way(draw, store)
        made.append(Case(f"models {base} {seed}.{number}: {what}", lay, read, ("config.json", "model.")))
    return made


def read(folder: Path) -> None:
    """Everything that building a model from the folder would read."""
    source = open_source(folder / "model")
    check_shape(source.model, ParallelConfig())
    for name in sorted(source.names):
        source.read(name)
        source.rows(name, 1, 3)


Laid = tuple[str, str, Callable[[Path], None]]


def _copied(store: Path, base: str, change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        shutil.copytree(store / base, folder / "model")
        change(folder / "model")

    return lay


@cache
def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _config(draw: Random, store: Path) -> Laid:
    base = draw.choice(FAMILIES)
    config = _json(store / base / "config.json")
    if draw.random() < 0.75:
        what, tree = mutate.tree(draw, config)
        content = mutate.dumps(tree).encode("utf-8", "surrogatepass")
    elif draw.random() < 0.5:
        what, content = mutate.text(draw, json.dumps(config, indent=1))
    else:
        what, content = mutate.data(draw, json.dumps(config).encode())
    return base, f"config.json {what}", _copied(store, base, lambda model: mutate.put(model / "config.json", content))


def _header(draw: Random, store: Path) -> Laid:
    base = draw.choice(FAMILIES)
    content = (store / base / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if draw.random() < 0.8:
        what, tree = mutate.tree(draw, header)
        written = mutate.dumps(tree).encode("utf-8", "surrogatepass")
    else:
        what, written = mutate.data(draw, content[8 : 8 + length])
    said = len(written) if draw.random() < 0.9 else draw.choice((0, 1, len(written) + 1, 2**32, 2**63, 2**64 - 1))
    spoilt = struct.pack("<Q", said) + written + content[8 + length :]
    return (
        base,
        f"header {what}, length {said}",
        _copied(store, base, lambda model: mutate.put(model / "model.safetensors", spoilt)),
    )


def _body(draw: Random, store: Path) -> Laid:
    base = draw.choice((*FAMILIES, "shards"))
    file = draw.choice(sorted(path.name for path in (store / base).glob("*.safetensors")))
    what, spoilt = mutate.data(draw, (store / base / file).read_bytes())
    return base, f"{file} {what}", _copied(store, base, lambda model: mutate.put(model / file, spoilt))


def _index(draw: Random, store: Path) -> Laid:
    what, tree = mutate.tree(draw, _json(store / "shards" / INDEX))
    content = mutate.dumps(tree).encode("utf-8", "surrogatepass")
    if draw.random() < 0.2:
        what, content = mutate.text(draw, json.dumps(_json(store / "shards" / INDEX)))
    return "shards", f"index {what}", _copied(store, "shards", lambda model: mutate.put(model / INDEX, content))


class _Call:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("megarl-fuzz-outside", "w")


def _pickle(draw: Random, store: Path) -> Laid:
    tensors: dict[Any, Any] = dict(stored(store / "gpt2"))
    name = draw.choice(sorted(tensors))
    odd: dict[str, Any] = {
        "a list": [1, 2],
        "text": "x",
        "None": None,
        "a number": 3.5,
        "a sparse tensor": torch.eye(3).to_sparse(),
        "code": _Call(),
        "a complex tensor": torch.zeros(3, dtype=torch.complex64),
        "an integer tensor": tensors[name].to(torch.int8),
        "a scalar": torch.tensor(1.0),
        "a tensor of the meta device": torch.empty(tensors[name].shape, device="meta"),
        "an empty tensor": torch.empty(0),
        "a dictionary": {"a": torch.zeros(2)},
        "a boolean tensor": tensors[name] > 0,
        "a parameter": torch.nn.Parameter(tensors[name]),
        "a transposed tensor": tensors[name].t().contiguous().t() if tensors[name].dim() == 2 else tensors[name],
    }
    what = draw.choice(list(odd))
    kind = draw.randrange(5)
    whole: Any = {**tensors, name: odd[what]}
    if kind == 0:
        whole, what = odd[what], f"{what} alone"
    if kind == 1:
        whole, what = (
            {**tensors, draw.choice((1, None, "", "extra\nname", ("a",))): odd[what]},
            f"{what} under another key",
        )
    buffer = io.BytesIO()
    if draw.random() < 0.1:
        pickle.dump(whole if kind == 0 else {"a": _Call()}, buffer)
    else:
        torch.save(whole, buffer, _use_new_zipfile_serialization=draw.random() < 0.8)
    content = buffer.getvalue()
    if kind >= 3:
        what, content = mutate.data(draw, content)
    return (
        "pickled",
        f"{name} {what}",
        _copied(store, "pickled", lambda model: mutate.put(model / "pytorch_model.bin", content)),
    )


def _files(draw: Random, store: Path) -> Laid:
    base = draw.choice((*FAMILIES, "shards", "pickled"))
    name = draw.choice(sorted(path.name for path in (store / base).iterdir()))
    ways: dict[str, Callable[[Path], Any]] = {
        "missing": lambda path: path.unlink(),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a broken link": lambda path: (path.unlink(), path.symlink_to("gone")),
        "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
        "empty": lambda path: path.write_bytes(b""),
        "another file": lambda path: path.write_bytes((store / "opt" / "config.json").read_bytes()),
    }
    what = draw.choice(list(ways))
    return base, f"{name} is {what}", _copied(store, base, lambda model: ways[what](model / name))
