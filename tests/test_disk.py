"""Whatever a path or a file is, looking at it ends in an answer or in one short reason."""

from pathlib import Path

import pytest
import torch

from megarl import disk
from megarl.disk import UnreadableError
from megarl.errors import ConfigError
from tests.refusals import refused


@pytest.mark.parametrize("name", ["a" * 300, "x/" + "a" * 300, "a\0b", "~nobody-of-this-name/x", "gone", "file/below"])
def test_a_path_that_cannot_be_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    path = disk.local(name)
    assert not disk.exists(path)
    assert not disk.is_file(path)
    assert not disk.is_dir(path)
    assert disk.why_missing(path)


def test_a_link_to_itself_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not disk.exists(tmp_path / "loop")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a" * 256, None),
        ("new/" + "\u00fc" * 128 + "/run", None),
        ("a\0b", None),
        ("file", "/file"),
        ("file/run", "/file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_with_its_key(
    name: str, where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with refused(ConfigError, key="run.dir", value=name, where=where) as found:
        disk.writable(name, "run.dir")
    assert (found.error.where is None) == (where is None)
    assert "\0" not in found.line


def test_a_place_that_can_be_written_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert disk.writable("new/run", "run.dir") == tmp_path / "new" / "run"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("1" * 5000, "not valid JSON"),
        ("[" * 200_000, "too deep"),
        ("[" * 300 + "]" * 300, "too deep"),
        ('{"a":' * 300 + "1" + "}" * 300, "too deep"),
        (b"\xff\xfe{}", "UTF-8"),
    ],
)
def test_json_that_cannot_be_used_has_one_reason(text: str | bytes, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason) as caught:
        disk.parse_json(text)
    assert "\n" not in str(caught.value)
    assert "sys.set" not in str(caught.value)


def test_wide_json_is_not_deep() -> None:
    assert len(disk.parse_json("[" + ",".join(["[]"] * 5000) + "]")) == 5000
    assert disk.parse_json("[" * disk.DEEPEST + "]" * disk.DEEPEST)


@pytest.mark.parametrize("text", ["[1]", "null", "3", '"a"'])
def test_what_is_no_object_is_refused_where_one_is_needed(text: str) -> None:
    with pytest.raises(UnreadableError, match="instead of a JSON object"):
        disk.parse_object(text)


def test_a_file_that_is_not_text_or_not_readable_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"a\xff")
    for path, reason in (
        (tmp_path / "bytes", "not UTF-8"),
        (tmp_path, "directory"),
        (tmp_path / "gone", "no such file"),
    ):
        with pytest.raises(UnreadableError, match=reason):
            disk.read_text(path)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 9) + "]\n" for n in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "expand to more than"),
        ("a: &a [*a]", "refers to itself"),
        ("a: &a {b: *a}", "refers to itself"),
        ("[" * 5000, "too deep"),
        ("a: &b [", "not valid YAML"),
        ("# " + "x" * 1_000_000, "more than"),
    ],
    ids=["laughs", "list", "mapping", "deep", "broken", "long"],
)
def test_yaml_that_cannot_be_used_has_one_reason(text: str, reason: str) -> None:
    with pytest.raises(UnreadableError, match=reason) as caught:
        disk.check_yaml(text)
    assert "\n" not in str(caught.value)


def test_aliases_that_come_to_little_are_yaml() -> None:
    disk.check_yaml("base: &base {a: 1}\nother: {<<: *base, b: [*base, *base]}")


class Hostile:
    """A pickle that would call a function."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def test_a_pickle_with_code_is_refused_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Hostile()}, tmp_path / "code.pt")
    with pytest.raises(UnreadableError, match="more than weights and plain values;") as caught:
        disk.load_plain(tmp_path / "code.pt")
    assert "weights_only" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 40, b"\x80\x02}q\x00."])
def test_a_damaged_pickle_is_called_that(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UnreadableError, match="is damaged") as caught:
        disk.load_plain(tmp_path / "bad.pt")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_values_are_shortened_and_cannot_steer_a_terminal() -> None:
    assert disk.shown("a" * 1000) == "a" * 120 + "... (1000 characters)"
    assert disk.shown("a\n\x1b[2J\0") == "a\\n\\x1b[2J\\x00"


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    disk.write_atomically(path, "first")

    def full(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        disk.write_atomically(path, "second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_written_of_many_pieces(tmp_path: Path) -> None:
    disk.write_atomically(tmp_path / "file", (str(number) for number in range(3)))
    assert (tmp_path / "file").read_text() == "012"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def fill_and_fail(folder: Path) -> None:
    with disk.written_aside(folder) as aside:
        (aside / "file").write_text("")
        raise ZeroDivisionError


def test_a_folder_that_is_not_filled_to_the_end_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(folder)
    assert not list((tmp_path / "above").iterdir())
    with disk.written_aside(folder) as aside:
        (aside / "file").write_text("")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert list((tmp_path / "above").iterdir()) == [folder]
