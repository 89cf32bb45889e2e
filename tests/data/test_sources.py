"""Reading records: every kind of source, and one clear line for every way a source can be wrong."""

import json
from pathlib import Path

import pytest

from megarl.data.sources import named_lists, read_records
from megarl.errors import ConfigError, DataError
from tests.refusals import refused

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fields(paths, split="train", **more):
    return [dict(record.fields) for record in read_records(paths, split, **more)]


def test_jsonl_records_carry_their_line_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\ufeff{json.dumps(ROWS[0])}\n\n   \n{json.dumps(ROWS[1])}", encoding="utf-8")
    found = list(read_records([str(path)]))
    assert [dict(record.fields) for record in found] == ROWS
    assert [record.where for record in found] == [f"{path}:1", f"{path}:4"]


def test_jsonl_is_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\nbroken")
    assert next(read_records([str(path)])).fields == ROWS[0]


def test_json_list_parquet_and_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("one\n\ntwo\n")
    assert fields([str(tmp_path / "a.json")]) == ROWS
    assert fields([str(tmp_path / "b.parquet")]) == ROWS
    assert fields([str(tmp_path / "c.txt")], text_key="body") == [{"body": "one"}, {"body": "two"}]


def test_sources_follow_each_other_and_a_folder_is_read_by_name(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    write_jsonl(folder / "2.jsonl", [{"n": 2}])
    write_jsonl(folder / "1.jsonl", [{"n": 1}])
    (folder / "notes.md").write_text("not data")
    last = write_jsonl(tmp_path / "last.jsonl", [{"n": 3}])
    assert fields([str(folder), last]) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_folder_with_files_named_after_splits_gives_only_the_wanted_one(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"n": 1}])
    write_jsonl(tmp_path / "eval.jsonl", [{"n": 2}])
    assert fields([str(tmp_path)], "train") == [{"n": 1}]
    assert fields([str(tmp_path)], "validation") == [{"n": 2}]
    offers = {"data.train_split": ["eval", "train"], "data.eval_split": ["eval", "train"]}
    with refused(DataError, key="split", value="test", where=str(tmp_path), offers=offers):
        fields([str(tmp_path)], "test")


def test_saved_data_set_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert fields([str(tmp_path / "one")]) == ROWS
    assert fields([str(tmp_path / "two")], "test") == ROWS[1:]
    offers = {"data.train_split": ["test", "train"], "data.eval_split": ["test", "train"]}
    with refused(DataError, key="split", value="validation", where="two", offers=offers):
        fields([str(tmp_path / "two")], "validation")


def test_hub_name_that_cannot_be_loaded_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def offline(name, subset, split):
        asked.update(name=name, subset=subset, split=split)
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with refused(DataError, key="split", value="test", where="owner/name:small", names=("no route",)):
        fields(["owner/name:small"], "test")
    assert asked == {"name": "owner/name", "subset": "small", "split": "test"}


@pytest.mark.parametrize(
    ("name", "content", "where", "names"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2", ("JSON",)),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl:2", ("list",)),
        ("a.jsonl", b'{"a": 1}\n\xff\xfe\n', "a.jsonl:2", ("UTF-8",)),
        ("a.json", b'{"a": 1}\n{"a": 2}', "a.json", ("JSON", ".jsonl")),
        ("a.json", b'{"a": 1}', "a.json", ("dict", "list")),
        ("a.json", b"\xff", "a.json", ("UTF-8",)),
        ("a.json", b'[{"a": 1}, 2]', "a.json: record 2", ("int",)),
        ("a.parquet", b"junk", "a.parquet", ("ArrowInvalid",)),
        ("a.csv", b"a,b", "a.csv", ("'.csv'", ".jsonl", ".json", ".parquet", ".txt")),
    ],
)
def test_broken_file_is_named_with_its_record(tmp_path, name, content, where, names):
    (tmp_path / name).write_bytes(content)
    with refused(DataError, where=where, names=names):
        fields([str(tmp_path / name)])


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/no/such/place", "a/b/c/d"])
def test_missing_file_is_not_looked_up_on_the_hub(path):
    with refused(DataError, names=(path, "data.train")):
        fields([path])


def test_folder_without_data_is_refused(tmp_path):
    with refused(DataError, where=str(tmp_path), names=(".jsonl", ".json", ".parquet", ".txt")):
        fields([str(tmp_path)])


def test_records_of_a_python_list_are_named_by_their_place_in_it(tmp_path):
    path = write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    with named_lists({path: "prompts"}):
        assert [record.where for record in read_records([path])] == ["prompts[0]", "prompts[1]"]
    assert [record.where for record in read_records([path])] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000, "[" * 300 + "]" * 300, "-" + "9" * 4301])
def test_json_that_python_itself_stumbles_over_is_named_like_any_other(tmp_path, name, value):
    record = '{"text": "hi", "n": ' + value + "}"
    path = tmp_path / name
    path.write_text(record if name.endswith("l") else f"[{record}]")
    with refused(DataError, where=f"{path}:1" if name.endswith("l") else str(path), names=("JSON",)):
        fields([str(path)])


@pytest.mark.parametrize(
    "path", ["a" * 300, "a" * 300 + ".jsonl", "./" + "a" * 300, "a\0b", "~nobody-of-this-name/x.jsonl"]
)
def test_a_path_that_cannot_be_is_refused_with_the_key(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with refused(DataError, names=("data.eval",)) as found:
        list(read_records([path], key="data.eval"))
    assert "\0" not in found.line


def test_an_empty_source_is_refused_with_the_key(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with refused(DataError, key="clone.data", where="empty.jsonl"):
        list(read_records([str(tmp_path / "empty.jsonl")], key="clone.data"))


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "own_records.py"
    path.write_text(
        "def rows(count=2):\n    for number in range(count):\n        yield {'text': f'row {number}'}\n"
        "def broken():\n    yield {'text': 'a'}\n    raise KeyError('lost')\n"
        "def leaves():\n    raise SystemExit(3)\n"
        "def texts():\n    return ['a', 'b']\n"
        "def number():\n    return 7\n"
        "def nothing():\n    return []\n"
        "def needs(path):\n    return []\n"
        "again = rows\n"
        "def imports():\n    import no_such_module_here\n    return []\n"
    )
    return path


def test_a_function_returns_records_and_takes_options(module: Path) -> None:
    assert fields([f"{module}:rows"]) == [{"text": "row 0"}, {"text": "row 1"}]
    (record,) = read_records([f"{module}:rows"], options={"count": 1})
    assert (dict(record.fields), record.where) == ({"text": "row 0"}, f"{module}:rows: record 1")


@pytest.mark.parametrize(("name", "line"), [("broken", 6), ("leaves", 8), ("imports", 19)])
def test_a_function_that_fails_is_named_with_its_line(module: Path, name: str, line: int) -> None:
    with refused(DataError, key="data.eval", value=f"{module}:{name}", where=f"{module}:{line}"):
        list(read_records([f"{module}:{name}"], key="data.eval"))


def test_a_function_that_returns_no_records_is_named(module: Path) -> None:
    with refused(DataError, where=f"{module}:texts: record 1", names=("str",)):
        list(read_records([f"{module}:texts"]))
    with refused(DataError, key="data.train", value=f"{module}:number", names=("int",)):
        list(read_records([f"{module}:number"]))
    with refused(DataError, key="data.train", where=f"{module}:nothing"):
        list(read_records([f"{module}:nothing"]))


def test_options_are_checked_before_the_function_runs(module: Path) -> None:
    with refused(ConfigError, key="data.options.cuont", value=1, offers={"data.options": ["count"]}):
        list(read_records([f"{module}:rows"], options={"cuont": 1}))


def test_what_a_function_cannot_be_called_with_is_refused(module: Path) -> None:
    with refused(ConfigError, key="data.options", value={}, where=str(module), names=("path",)):
        list(read_records([f"{module}:needs"]))
    with refused(ConfigError, key="data.options", value={"cuont": 1}, where=str(module), names=("cuont",)):
        list(read_records([f"{module}:again"], options={"cuont": 1}))
