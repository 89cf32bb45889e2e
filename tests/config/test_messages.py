"""Whatever is mistyped, the answer is one line: the key, the value and the nearest thing that works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megarl.config.compose import compose
from megarl.config.messages import check_argument
from megarl.config.presets import register
from megarl.config.schema import SFTConfig
from megarl.errors import ConfigError

Start = Callable[..., tuple[int, str, str]]
Preset = Callable[..., None]


def refused(start: Start, *argv: str) -> str:
    """The one line with which an entry point refuses its arguments."""
    code, out, err = start(*argv)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err[len("error: ") :].rstrip("\n")


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_unknown_key_is_refused_however_it_is_given(start: Start, prefix: str) -> None:
    line = refused(start, f"{prefix}parallel.tpp=2")
    assert f"unknown key 'parallel.tpp' (in '{prefix}parallel.tpp=2'); did you mean 'parallel.tp'" in line


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("tp=3", "'parallel.tp'"),
        ("model.layers=3", "'model.num_layers'"),
        ("trainer.lr=3", "'optim.lr'"),
        ("optimizer.lr=3", "'optim.lr'"),
        ("paralel.tp=3", "'parallel.tp'"),
        ("paralel=single", "'parallel'"),
        ("trainer.global_batchsize=3", "'trainer.global_batch_size'"),
        ("model={num_layer: 3}", "'model.num_layers'"),
        ("+confg=gpt20b", "'+conf=NAME'"),
    ],
)
def test_the_key_that_was_meant_is_named(start: Start, argument: str, meant: str) -> None:
    line = refused(start, argument)
    assert "unknown key" in line
    assert f"did you mean {meant}" in line
    assert argument in line


def test_a_key_like_no_other_gets_its_sections_keys(start: Start) -> None:
    assert "'tokenizer' has the keys kind, path" in refused(start, "tokenizer.xyzzy=1")
    assert "sections are run, model, tokenizer" in refused(start, "xyzzy=1")


def test_a_key_below_a_value_is_refused(start: Start) -> None:
    assert "'parallel.tp' holds a value and has no keys below it" in refused(start, "parallel.tp.x=3")
    assert "'parallel.tp' holds a value and has no keys below it" in refused(start, "+parallel.tp.x=3")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("parallel.tp=abc", "parallel.tp=abc is not an integer ("),
        ("parallel.tp=2.5", "parallel.tp=2.5 is not an integer ("),
        ("parallel.tp=null", "parallel.tp=null is not an integer ("),
        ("parallel.vpp=x", "parallel.vpp=x is not an integer or null ("),
        ("optim.lr=fast", "optim.lr=fast is not a number ("),
        ("data.pack=perhaps", "data.pack=perhaps is not true or false ("),
        ("trainer.devices=[1]", "trainer.devices=[1] is not an integer or text ("),
        ("data.train=a.jsonl", "data.train=a.jsonl is not a list, [a,b]: write data.train=[a.jsonl]"),
        ("data.train=[{a: 1}]", "data.train=[{'a': 1}] holds something that is no text"),
        ("data.train={a:1}", "data.train={a:1} is not a list, [a,b]"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_the_right_one(start: Start, argument: str, expected: str) -> None:
    assert expected in refused(start, argument)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.norm=batchnorm", "model.norm=batchnorm is not a valid value: choose from layernorm or rmsnorm"),
        ("checkpoint.every=0", "checkpoint.every=0 is out of range: use an integer or null, at least 1"),
        ("parallel.tp=-1", "parallel.tp=-1 is out of range: use an integer, at least 1"),
        ("model.dropout=1", "model.dropout=1.0 is out of range: use a number, at least 0 and below 1"),
        ("optim.lr=nan", "optim.lr=nan is out of range"),
        ("optim.lr=inf", "optim.lr=inf is out of range"),
        ("trainer.devices=abc", "trainer.devices=abc is neither a count nor auto: use 1, 2, ... or auto"),
        ("trainer.devices=0", "trainer.devices=0 is neither a count nor auto"),
        ("trainer.max_time=2h", "trainer.max_time=2h is not HH:MM:SS: for two hours use '02:00:00'"),
        ("checkpoint.metric=''", "checkpoint.metric is empty"),
    ],
)
def test_a_value_outside_its_choices_or_bounds_is_told_them(start: Start, argument: str, expected: str) -> None:
    assert expected in refused(start, argument)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "parallel.tp",
            "'parallel.tp' has no '=': settings are written key=value, for example parallel.tp=...",
        ),
        ("paralel.tp", "for example parallel.tp=..."),
        (
            "run.name=a=b",
            "cannot read the value of 'run.name=a=b': quote special characters, \"run.name='a=b'\"",
        ),
        ("data.train=[a", "cannot read the value of 'data.train=[a'"),
        ("optim.lr=1,2", "or add --multirun to run once per value"),
        ("run.name=${nothing}", "run.name: Interpolation key 'nothing' not found"),
        ("~parallel.tp", "'parallel.tp' cannot be removed"),
        ("--tp=2", "unknown flag '--tp': settings are written key=value without dashes"),
        ("--resolve", "--resolve goes with --cfg"),
        ("--experimental-rerun=x", "unpickles a file"),
    ],
)
def test_an_argument_that_cannot_be_read_is_told_its_form(start: Start, argument: str, expected: str) -> None:
    assert expected in refused(start, argument)


def test_an_unknown_option_of_a_group_gets_the_options(start: Start) -> None:
    line = refused(start, "model=tyni")
    assert line == "model has no 'tyni'; did you mean 'tiny'? (options: gpt2, small, tiny)"
    assert "model has no 'tyni'" in refused(start, "-m", "model=small,tyni")


def test_an_unknown_preset_gets_the_nearest_and_the_users_folder(start: Start, preset: Preset, folder: Path) -> None:
    preset("mine", "seed: 2\n")
    line = refused(start, "+conf=[gpt20b,mien]")
    assert "unknown preset 'mien'; did you mean 'mine'?" in line
    assert "known presets: " in line
    assert ", mine, " in line
    assert str(folder / "conf") in line


def test_presets_are_added_once_as_a_list(start: Start) -> None:
    assert "must be written '+conf=...'" in refused(start, "conf=gpt20b")
    assert "+conf=[a,b]" in refused(start, "+conf=gpt20b", "+conf=gpt20b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parallel: {tpp: 2}\n", "unknown key 'parallel.tpp' (in conf/mine); did you mean 'parallel.tp'"),
        ("tp: 2\n", "unknown key 'tp' (in conf/mine); did you mean 'parallel.tp'?"),
        ("optim: {lr: fast}\n", "optim.lr=fast is not a number"),
        ("model: {norm: batchnorm}\n", "model.norm=batchnorm is not a valid value"),
        ("optim: [1\n", "preset 'mine' cannot be read"),
        ("- optim\n", "preset 'mine' cannot be read"),
        ("1: 2\n", "unknown key '1'"),
    ],
)
def test_mistakes_in_a_preset_are_told_like_those_in_arguments(
    start: Start, preset: Preset, text: str, expected: str
) -> None:
    preset("mine", text)
    assert expected in refused(start, "+conf=mine")


def test_a_file_without_the_first_line_is_told_about_it(start: Start, preset: Preset) -> None:
    preset("plain", "seed: 2\n", header="")
    assert "plain.yaml is no preset: its first line must be '# @package _global_'" in refused(start, "+conf=plain")


@pytest.mark.parametrize(
    "argument",
    [
        *("=5", "+=5", "~=5", "=", "==", "+", "++", "~", " =1", "a..b=1", ".a=1", "a.=1", "model..hidden_size=3"),
        *("conf@x=1", "+conf@x=1", "model@y=tiny", "conf@=1", "a b=1", " seed=1", "run.name=\udcff", "a\nb=1"),
        *("seed=" + "1" * 5000, "a" * 20_000 + ".=1"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_before_anything_is_read(argument: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_argument(argument, SFTConfig)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    ["=5", "seed=[1", "seed={", "a=b=c", "run.name=${", "run.name=${run.name}", "s\u00e9e=1", "optim.lr=" + "1" * 400],
)
def test_whatever_is_typed_the_answer_is_one_short_line(argument: str, start: Start) -> None:
    assert len(refused(start, argument)) < 500


@pytest.mark.parametrize("argument", ["=5", "a..b=1", "conf@x=1"])
def test_a_multirun_refuses_in_the_same_line(argument: str, start: Start) -> None:
    assert refused(start, "--multirun", "seed=1,2", argument)


def test_an_entry_of_a_mapping_is_added_with_a_plus(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"\+reward\.options\.x=VALUE"):
        compose("ppo", ["reward.options.x=1"])


@pytest.mark.parametrize(
    "text",
    [
        "seed: 1\nseed: 2\n",
        "seed:\n\t- 1\n",
        "- seed\n",
        "3\n",
        "a: &a [*a]\n",
        "x: " + "[" * 3000 + "\n",
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 25)),
        "seed: !!python/object/apply:os.system [true]\n",
    ],
    ids=["twice", "tab", "list", "number", "itself", "deep", "laughs", "code"],
)
def test_a_preset_that_cannot_be_read_is_refused_where_it_is_asked_for(text: str, preset: Preset, folder: Path) -> None:
    preset("broken", text)
    with pytest.raises(ConfigError, match=r"preset 'broken' cannot be read") as caught:
        register(["+conf=broken"], "sft")
    assert "\n" not in str(caught.value)
    register([], "sft")


def test_a_preset_that_is_not_utf_8_is_named(preset: Preset, folder: Path) -> None:
    preset("bytes", "")
    (folder / "conf" / "bytes.yaml").write_bytes(b"# @package _global_\nrun: {name: \xff}\n")
    with pytest.raises(ConfigError, match=r"bytes\.yaml\): is not UTF-8"):
        register(["+conf=bytes"], "sft")


def test_a_mapping_in_a_lists_place_is_named_in_a_preset(preset: Preset, folder: Path) -> None:
    preset("mapping", "data: {train: {a: 1}}\n")
    with pytest.raises(ConfigError, match=r"data\.train=\{'a': 1\} is not a list, \[a,b\] \(in .*mapping\.yaml\)"):
        register(["+conf=mapping"], "sft")
    register([], "sft")


def test_a_folder_with_a_presets_name_is_passed_over(folder: Path) -> None:
    (folder / "conf" / "odd.yaml").mkdir(parents=True)
    register([], "sft")


def test_a_section_that_is_given_a_value_is_named(start: Start, preset: Preset) -> None:
    preset("mine", "model: ${gone}\n")
    assert "model is a section" in refused(start, "+conf=mine")
    assert "logger=${gone}" in refused(start, "+logger=${gone}")
