"""Data files and folders, read and tokenised as prompts, as documents for SFT, and as samples with rewards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch

from megarl.config.files import load_chat_template
from megarl.config.sections.data import OfflineDataConfig, PromptDataConfig
from megarl.data.dataset import SFTDataset
from megarl.data.formats import RecordFormat
from megarl.data.offline import open_store
from megarl.data.prompts import PromptLimits, read_prompts
from megarl.data.responses import ResponseFormat
from megarl.data.sources import read_records
from megarl.tokenizers import ByteTokenizer
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case

Laid = tuple[str, str, Callable[[Path], None]]
"""What was done, the name of the file or folder, and how it is written."""
Maker = Callable[[int, int, Path], list[Case]]

CHAT = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"text": "a text"}, {"prompt": "a ", "completion": "b"}, {"messages": CHAT}],
    "prompts": [{"prompt": "a question", "answer": 3}, {"messages": CHAT[:1], "answer": 4}],
    "offline": [
        {"samples": ["a", "b"], "rewards": 0.5},
        {"messages": CHAT, "rewards": [1]},
        {"samples": "abc", "rewards": -1},
    ],
    "pairs": [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"messages": CHAT[:1], "chosen": "b", "rejected": "c"},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "Badly."}]},
    ],
}
TEMPLATES = (
    "{{",
    "{% for m in messages %}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ gone }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ raise_exception('no\nline') }}",
    "{% include 'x' %}",
    "{{ messages }}",
    "{}",
    "{{ messages | tojson }}",
    "{{ bos_token }}",
    "{% set x = messages.pop() %}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].content.encode }}",
    "gone.jinja",
    ".",
    "x" * 300,
    "{{ 10 ** 10 ** 6 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 10 ** 10 }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)


def cases(seed: int, count: int, store: Path) -> list[Case]:
    makers = (*[_jsonl] * 8, *[_json] * 3, _text, *[_parquet] * 3, *[_folder] * 3)
    return [_case(Random(f"records {seed} {number}"), f"{seed}.{number}", makers) for number in range(count)]


def plain(seed: int, count: int, store: Path) -> list[Case]:
    """Files that are read without another library, and no templates."""
    made = (
        _case(Random(f"records {seed} {number}"), f"{seed}.{number}", (_jsonl, _json, _text), 0)
        for number in range(count)
    )
    return list(made)


def _case(draw: Random, number: str, makers: Sequence[Callable[..., Laid]], templates: float = 0.12) -> Case:
    reader = draw.choice(list(RECORDS))
    what, file, lay = draw.choice(makers)(draw, RECORDS[reader])
    template = draw.choice(TEMPLATES) if draw.random() < templates else None
    told = f", template {template[:30]!r}" if template else ""
    read = {"sft": _documents, "prompts": _prompts, "offline": _samples, "pairs": _pairs}[reader]
    options = _options(draw)

    def act(folder: Path) -> None:
        os.chdir(folder)
        read(str(folder / file), template, options)

    return Case(f"records {reader} {number}: {file}: {what}{told}", lay, act, ("data.", "chat_template"))


def _options(draw: Random) -> dict[str, Any]:
    return {
        "format": draw.choice(("auto", "auto", "text", "completion", "chat")),
        "too_long": draw.choice(("truncate", "drop", "error")),
        "loss_on": draw.choice(("completion", "all")),
        "split": draw.choice(("train", "train", "test", "validation", "", "a/b", "train[:10%]")),
    }


def _documents(path: str, template: str | None, options: dict[str, Any]) -> None:
    record_format = RecordFormat(
        format=options["format"], loss_on=options["loss_on"], chat_template=load_chat_template(template)
    )
    SFTDataset(read_records([path], options["split"]), ByteTokenizer(), 32, record_format, options["too_long"])


LIMITS = PromptLimits(context=64, max_new_tokens=16, vocab_size=ByteTokenizer().size, too_long="drop")


def _prompts(path: str, template: str | None, options: dict[str, Any]) -> None:
    read_prompts([path], options["split"], PromptDataConfig(chat_template=template), ByteTokenizer(), LIMITS)


def _samples(path: str, template: str | None, options: dict[str, Any]) -> None:
    data = OfflineDataConfig(
        train=[path], chat_template=template, seq_length=32, too_long=options["too_long"], cache=None
    )
    store = open_store(data, ByteTokenizer())
    store.take(torch.tensor([0]))


def _pairs(path: str, template: str | None, options: dict[str, Any]) -> None:
    record_format = ResponseFormat(chat_template=load_chat_template(template))
    for record in read_records([path], options["split"]):
        record_format.pair(record, ByteTokenizer())


def _written(what: str, name: str, content: bytes | str) -> Laid:
    return what, name, lambda folder: mutate.put(folder / name, content)


def _jsonl(draw: Random, records: list[dict[str, Any]]) -> Laid:
    lines = [json.dumps(record) for record in records]
    kind = draw.randrange(4)
    if kind < 2:
        at = draw.randrange(len(records))
        what, tree = mutate.tree(draw, records[at])
        lines[at] = mutate.dumps(tree, ensure_ascii=draw.random() < 0.5)
        return _written(what, "data.jsonl", "\n".join(lines) + "\n")
    content = "\n".join(lines) + "\n"
    return _spoilt_file(draw, content, kind == 2, "data.jsonl")


def _spoilt_file(draw: Random, content: str, as_text: bool, name: str) -> Laid:
    what, spoilt = mutate.text(draw, content) if as_text else mutate.data(draw, content.encode())
    return _written(what, name, spoilt)


def _json(draw: Random, records: list[dict[str, Any]]) -> Laid:
    kind = draw.randrange(4)
    if kind < 2:
        what, tree = mutate.tree(draw, records)
        return _written(what, "data.json", mutate.dumps(tree))
    return _spoilt_file(draw, json.dumps(records, indent=1), kind == 2, "data.json")


def _text(draw: Random, records: list[dict[str, Any]]) -> Laid:
    return _spoilt_file(draw, "one line\nanother line\n", draw.random() < 0.5, "data.txt")


def _parquet(draw: Random, records: list[dict[str, Any]]) -> Laid:
    import io
    from datetime import datetime
    from decimal import Decimal

    import pyarrow
    from pyarrow import parquet

    columns: dict[str, Any] = {
        "texts": pyarrow.array(["a b", "c d"]),
        "nulls": pyarrow.array([None, None], pyarrow.string()),
        "integers": pyarrow.array([1, 2]),
        "lists": pyarrow.array([["a", "b"], ["c", "d"]]),
        "lists with nulls": pyarrow.array([["a", None], None]),
        "structs": pyarrow.array([[{"role": "user", "content": "a"}], [{"role": "assistant", "content": None}]]),
        "bytes": pyarrow.array([b"\xff\xfe", b"a"]),
        "decimals": pyarrow.array([Decimal("1.5"), Decimal("2.5")]),
        "times": pyarrow.array([datetime(2020, 1, 1), None]),
        "maps": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "dictionary": pyarrow.array(["a", "b"]).dictionary_encode(),
        "numbers that are none": pyarrow.array([float("nan"), float("inf")]),
        "halves": pyarrow.array([1.0, 2.0], pyarrow.float16())
        if hasattr(pyarrow, "float16")
        else pyarrow.array([1, 2]),
    }
    names = list(records[0])
    table = pyarrow.table({name: columns[draw.choice(list(columns))] for name in (*names, draw.choice(names) + "_2")})
    if draw.random() < 0.1:
        table = table.slice(0, 0)
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    what, content = f"types {[str(field.type) for field in table.schema]}", buffer.getvalue()
    if draw.random() < 0.6:
        what, content = mutate.data(draw, content)
    return _written(what, "data.parquet", content)


def _folder(draw: Random, records: list[dict[str, Any]]) -> Laid:
    good = "".join(json.dumps(record) + "\n" for record in records)
    kinds: dict[str, Callable[[Path], Any]] = {
        "empty": lambda folder: None,
        "a folder called like a file": lambda folder: (folder / "a.jsonl").mkdir(),
        "an empty file beside a good one": lambda folder: (
            mutate.put(folder / "a.jsonl", ""),
            mutate.put(folder / "b.jsonl", good),
        ),
        "a broken link": lambda folder: (folder / "a.jsonl").symlink_to("gone.jsonl"),
        "a link to itself": lambda folder: (folder / "a.jsonl").symlink_to("a.jsonl"),
        "a link to the folder": lambda folder: (folder / "a.jsonl").symlink_to("."),
        "a pipe": lambda folder: os.mkfifo(folder / "a.jsonl"),
        "other files only": lambda folder: mutate.put(folder / "notes.md", "text"),
        "files of other splits": lambda folder: mutate.put(folder / "test.jsonl", good),
        "a saved data set that is none": lambda folder: mutate.put(
            folder / "dataset_info.json", draw.choice(("", "{}", "[]", "1", "null", '{"features": 3}'))
        ),
        "saved splits that are none": lambda folder: mutate.put(
            folder / "dataset_dict.json", draw.choice(("", "{}", "[]", '{"splits": 3}', '{"splits": ["train"]}'))
        ),
        "a saved data set without its state": lambda folder: (
            mutate.put(folder / "dataset_info.json", "{}"),
            mutate.put(
                folder / "state.json", draw.choice(("{}", "[]", '{"_data_files": [{"filename": "/etc/passwd"}]}'))
            ),
        ),
        "names that are strange": lambda folder: mutate.put(folder / "a\n\x1b[31m.jsonl", "{}"),
        "a name in no encoding": lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jsonl")).write_text(
            "[]\n"
        ),
        "a broken file": lambda folder: mutate.put(folder / "a.json", good),
    }
    what = draw.choice(list(kinds))
    name = draw.choice(("data", "a folder", "data.jsonl", "data.parquet", "é"))

    def lay(folder: Path) -> None:
        (folder / name).mkdir()
        kinds[what](folder / name)

    return what, name, lay
