"""`.nemo` archives: members, configuration, weights and the tar itself, also compressed and hostile."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from megarl.config.sections.parallel import ParallelConfig
from megarl.config.shape import check_shape
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.nemo_write import write_nemo
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case
from tests.gates.fuzz.words import make_store as make_tokenizers
from tests.models.exchange.published import save_published

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
SPLITS = {"whole": (1, 1), "tp2": (2, 1), "tp2pp2": (2, 2)}


def make_store(store: Path) -> None:
    import shutil

    save_published("qwen2_tied", store / "model", tie_word_embeddings=True)
    make_tokenizers(store)
    for file in (store / "huggingface").iterdir():
        shutil.copy(file, store / "model")
    for name, (tp, pp) in SPLITS.items():
        write_nemo(open_source(store / "model"), store / f"{name}.nemo", tp=tp, pp=pp)


def cases(seed: int, count: int, store: Path) -> list[Case]:
    if not (store / "whole.nemo").is_file():
        make_store(store)
    archives = {name: (store / f"{name}.nemo").read_bytes() for name in SPLITS}
    made = []
    for number in range(count):
        draw = Random(f"archives {seed} {number}")
        base = draw.choice(list(SPLITS))
        what, content = draw.choices((_members, _config, _weights, _bytes, _bomb), (5, 6, 4, 3, 0.4))[0](
            draw, archives[base]
        )
        made.append(
            Case(
                f"archives {base} {seed}.{number}: {what}",
                _laid(content),
                read,
                (CONFIG, "tokenizer.", "megarl_tokenizer.json"),
            )
        )
    return made


def _laid(content: bytes) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        mutate.put(folder / "model.nemo", content)

    return lay


def read(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder.parent.parent / "cache")  # tokenizers are unpacked there
    source = open_source(folder / "model.nemo")
    check_shape(source.model, ParallelConfig())
    for name in sorted(source.names):
        source.read(name)
        source.rows(name, 1, 3)
    if source.tokenizer is not None:
        from megarl.tokenizers import build_tokenizer

        build_tokenizer(*source.tokenizer)


def _changed(content: bytes, ending: str, change: Callable[[bytes], bytes]) -> bytes:
    found = mutate.unpacked(content)
    at = next(index for index, (member, _) in enumerate(found) if member.name.endswith(ending))
    found[at] = (found[at][0], change(found[at][1]))
    return mutate.packed(found)


def _members(draw: Random, content: bytes) -> tuple[str, bytes]:
    what, members = mutate.members(draw, mutate.unpacked(content))
    try:
        return what, mutate.packed(members)
    except (ValueError, OverflowError, UnicodeError):  # the writer refuses it too
        return what + " (whole)", content


def _config(draw: Random, content: bytes) -> tuple[str, bytes]:
    said = []

    def change(text: bytes) -> bytes:
        if draw.random() < 0.2:
            what, spoilt = mutate.text(draw, text.decode())
        else:
            values = [pair for pair in mutate.VALUES if not isinstance(pair[1], mutate.Raw)]
            what, tree = mutate.tree(draw, yaml.safe_load(text), values)
            spoilt = yaml.safe_dump(tree).encode("utf-8", "surrogatepass")
        said.append(what)
        return spoilt

    changed = _changed(content, CONFIG, change)
    return f"{CONFIG} {said[0]}", changed


def _weights(draw: Random, content: bytes) -> tuple[str, bytes]:
    said = []

    def change(file: bytes) -> bytes:
        if draw.random() < 0.4:
            what, spoilt = mutate.data(draw, file)
            said.append(what)
            return spoilt
        weights: dict[Any, Any] = torch.load(io.BytesIO(file), weights_only=True)
        name = draw.choice(sorted(weights))
        odd: dict[str, Any] = {
            "of another shape": torch.zeros(3),
            "a scalar": torch.tensor(1.0),
            "of integers": weights[name].to(torch.int32),
            "text": "x",
            "None": None,
            "sparse": torch.eye(3).to_sparse(),
            "complex": torch.zeros(3, dtype=torch.complex64),
            "empty": torch.empty(0),
            "bytes": io.BytesIO(b"x"),
            "a list": [1],
            "of doubles": weights[name].double(),
            "on the meta device": torch.empty(3, device="meta"),
            "a view": weights[name].t() if weights[name].dim() == 2 else weights[name],
        }
        what = draw.choice([*odd, "missing", "renamed", "joined by a layer"])
        if what == "missing":
            del weights[name]
        elif what == "renamed":
            weights[
                draw.choice((1, "", "x" * 300, "a\nb", f"{name}.2", "decoder.layers.-1.x", "decoder.layers.99999999.x"))
            ] = weights.pop(name)
        elif what == "joined by a layer":
            weights[f"model.decoder.layers.{draw.choice((2, 9, 10**9, 10**30))}.input_layernorm.weight"] = torch.zeros(
                32
            )
        else:
            weights[name] = odd[what]
        said.append(f"{name} is {what}")
        buffer = io.BytesIO()
        torch.save(weights, buffer, _use_new_zipfile_serialization=draw.random() < 0.9)
        return buffer.getvalue()

    changed = _changed(content, WEIGHTS, change)
    return said[0], changed


def _bytes(draw: Random, content: bytes) -> tuple[str, bytes]:
    if draw.random() < 0.4:
        packed = gzip.compress(content, 1)
        if draw.random() < 0.3:
            return "compressed", packed
        what, spoilt = mutate.data(draw, packed)
        return f"compressed, {what}", spoilt
    if draw.random() < 0.2:
        what, spoilt = mutate.data(draw, content[:2_000])
        return f"its start, {what}", spoilt + content[2_000:]
    return mutate.data(draw, content)


def _bomb(draw: Random, content: bytes) -> tuple[str, bytes]:
    """Small files that grow."""
    if draw.random() < 0.5:
        member = mutate.plain_member(CONFIG, b"")[0]
        member.size = 2**40
        return "a member of a terabyte", member.tobuf() + bytes(1024)
    zeros = gzip.compress(bytes(2**24), 9)
    return "2 GB of zeros, compressed", zeros * 128
