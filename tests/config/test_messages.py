"""Whatever is mistyped, the answer is one line: the key, the value and the nearest thing that works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megarl.config.compose import compose, run
from megarl.config.leaf import sections
from megarl.config.messages import check_argument
from megarl.config.preset_files import HEADER, preset_files
from megarl.config.presets import register
from megarl.config.sft import SFTConfig
from megarl.errors import ConfigError
from tests.refusals import refused

Start = Callable[..., tuple[int, str, str]]
Preset = Callable[..., None]
Offers = Mapping[str, list[Any]]


@pytest.fixture
def refuses(start: Start, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks how an entry point refuses its arguments: in one line, by an error with the given data."""

    def check(*argv: str, **data: Any) -> None:
        with monkeypatch.context() as here, refused(ConfigError, **data) as found:
            here.setattr("megarl.config.compose.run_command", lambda work, debug: work())
            run("sft", list(argv), lambda config: 0)
        code, out, err = start(*argv)
        assert (code, out) == (2, "")
        assert err == f"error: {found.line}\n"

    return check


Refuses = Callable[..., None]


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_unknown_key_is_refused_however_it_is_given(refuses: Refuses, prefix: str) -> None:
    offers = {"parallel.tpp": ["parallel.tp", "parallel.pp"]}
    refuses(f"{prefix}parallel.tpp=2", key="parallel.tpp", offers=offers, names=(f"'{prefix}parallel.tpp=2'",))


@pytest.mark.parametrize(
    ("argument", "key", "meant"),
    [
        ("tp=3", "tp", "parallel.tp"),
        ("model.layers=3", "model.layers", "model.num_layers"),
        ("trainer.lr=3", "trainer.lr", "optim.lr"),
        ("optimizer.lr=3", "optimizer.lr", "optim.lr"),
        ("paralel.tp=3", "paralel.tp", "parallel.tp"),
        ("paralel=single", "paralel", "parallel"),
        ("trainer.global_batchsize=3", "trainer.global_batchsize", "trainer.global_batch_size"),
        ("model={num_layer: 3}", "model.num_layer", "model.num_layers"),
        ("+confg=gpt20b", "confg", "+conf"),
    ],
)
def test_the_key_that_was_meant_is_named(argument: str, key: str, meant: str, folder: Path) -> None:
    with refused(ConfigError, key=key, names=(argument, meant)) as found:
        compose("sft", [argument])
    assert found.error.offers[key][0] == meant


def test_a_key_like_no_other_gets_its_sections_keys(refuses: Refuses) -> None:
    offers = {"tokenizer.xyzzy": ["tokenizer.kind", "tokenizer.path"]}
    refuses("tokenizer.xyzzy=1", key="tokenizer.xyzzy", offers=offers, names=("kind", "path"))
    refuses("xyzzy=1", key="xyzzy", offers={"xyzzy": sections(SFTConfig)}, names=("run", "model", "tokenizer"))


def test_a_key_below_a_value_is_refused(refuses: Refuses) -> None:
    for prefix in ("", "+"):
        refuses(f"{prefix}parallel.tp.x=3", key="parallel.tp.x", offers={"parallel.tp.x": ["parallel.tp"]})


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("parallel.tp", "abc", "abc"),
        ("parallel.tp", "2.5", 2.5),
        ("parallel.tp", "null", None),
        ("parallel.vpp", "x", "x"),
        ("optim.lr", "fast", "fast"),
        ("data.pack", "perhaps", "perhaps"),
        ("trainer.devices", "[1]", [1]),
        ("data.train", "a.jsonl", "a.jsonl"),
        ("data.train", "[{a: 1}]", [{"a": 1}]),
        ("data.train", "{a:1}", "{a:1}"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(refuses: Refuses, key: str, text: str, value: Any) -> None:
    refuses(f"{key}={text}", key=key, value=value, offers={})


@pytest.mark.parametrize(
    ("argument", "key", "value", "offers"),
    [
        ("model.norm=batchnorm", "model.norm", "batchnorm", {"model.norm": ["layernorm", "rmsnorm"]}),
        ("checkpoint.every=0", "checkpoint.every", 0, {}),
        ("parallel.tp=-1", "parallel.tp", -1, {}),
        ("model.dropout=1", "model.dropout", 1.0, {}),
        ("optim.lr=inf", "optim.lr", float("inf"), {}),
        ("trainer.devices=abc", "trainer.devices", "abc", {"trainer.devices": ["auto"]}),
        ("trainer.devices=0", "trainer.devices", 0, {"trainer.devices": ["auto"]}),
        ("trainer.max_time=2h", "trainer.max_time", "2h", {}),
        ("checkpoint.best.metric=''", "checkpoint.best.metric", "", {}),
    ],
)
def test_a_value_outside_its_choices_or_bounds_is_refused_by_its_key(
    refuses: Refuses, argument: str, key: str, value: Any, offers: Offers
) -> None:
    refuses(argument, key=key, value=value, offers=offers)


@pytest.mark.parametrize(
    ("argument", "key", "value", "offers"),
    [
        ("parallel.tp", "parallel.tp", None, {"parallel.tp": ["parallel.tp"]}),
        ("paralel.tp", "paralel.tp", None, {"paralel.tp": ["parallel.tp"]}),
        ("run.name=a=b", "run.name", "a=b", {}),
        ("data.train=[a", "data.train", "[a", {}),
        ("optim.lr=1,2", "optim.lr", None, {}),
        ("run.name=${nothing}", "run.name", None, {}),
        ("~parallel.tp", "parallel.tp", None, {}),
        ("--tp=2", "--tp", None, {"--tp": ["parallel.tp"]}),
        ("--model-path=x", "--model-path", None, {"--model-path": ["model.path"]}),
        ("--hepl", "--hepl", None, {"--hepl": ["--help"]}),
        ("--xyzzy", "--xyzzy", None, {}),
        ("--resolve", "--resolve", None, {}),
        ("--experimental-rerun=x", "--experimental-rerun", None, {}),
    ],
)
def test_an_argument_that_cannot_be_read_is_refused_by_its_key(
    refuses: Refuses, argument: str, key: str, value: Any, offers: Offers
) -> None:
    refuses(argument, key=key, value=value, offers=offers)


def test_an_unknown_option_of_a_group_gets_the_options(refuses: Refuses) -> None:
    offers = {"model": ["gpt2", "small", "tiny"]}
    refuses("model=tyni", key="model", value="tyni", offers=offers)
    refuses("-m", "model=small,tyni", key="model", value="tyni", offers=offers)


def test_an_unknown_preset_gets_the_nearest_and_the_users_folder(
    refuses: Refuses, preset: Preset, folder: Path
) -> None:
    preset("mine", "seed: 2\n")
    names = (*preset_files(folder / "conf"), str(folder / "conf"))
    refuses("+conf=[gpt20b,mien]", key="preset", value="mien", offers={"preset": ["mine"]}, names=names)


def test_presets_are_added_once_as_a_list(refuses: Refuses) -> None:
    refuses("conf=gpt20b", key="conf", offers={"conf": ["+conf"]})
    refuses("+conf=gpt20b", "+conf=gpt20b", key="+conf", names=("+conf=[a,b]",))


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("parallel: {tpp: 2}\n", {"key": "parallel.tpp", "where": "conf/mine", "names": ("parallel.tp",)}),
        ("tp: 2\n", {"key": "tp", "where": "conf/mine", "offers": {"tp": ["parallel.tp"]}}),
        ("optim: {lr: fast}\n", {"key": "optim.lr", "value": "fast", "where": "conf/mine"}),
        ("model: {norm: batchnorm}\n", {"key": "model.norm", "value": "batchnorm"}),
        ("optim: [1\n", {"key": "preset", "value": "mine", "where": "conf/mine.yaml"}),
        ("- optim\n", {"key": "preset", "value": "mine", "where": "conf/mine.yaml"}),
        ("1: 2\n", {"key": "1"}),
    ],
)
def test_mistakes_in_a_preset_are_told_like_those_in_arguments(
    refuses: Refuses, preset: Preset, text: str, data: dict[str, Any]
) -> None:
    preset("mine", text)
    refuses("+conf=mine", **data)


def test_a_file_without_the_first_line_is_told_about_it(refuses: Refuses, preset: Preset) -> None:
    preset("plain", "seed: 2\n", header="")
    refuses("+conf=plain", key="preset", value="plain", where="plain.yaml", names=(HEADER,))


@pytest.mark.parametrize(
    "argument",
    [
        *("=5", "+=5", "~=5", "=", "==", "+", "++", "~", " =1", "a..b=1", ".a=1", "a.=1", "model..hidden_size=3"),
        *("conf@x=1", "+conf@x=1", "model@y=tiny", "conf@=1", "a b=1", " seed=1", "run.name=\udcff", "a\nb=1"),
        *("seed=" + "1" * 5000, "a" * 20_000 + ".=1"),
    ],
)
def test_a_key_that_cannot_be_one_is_refused_before_anything_is_read(argument: str) -> None:
    with refused(ConfigError) as found:
        check_argument(argument, SFTConfig)
    assert found.error.key
    assert len(found.line) < 500


@pytest.mark.parametrize(
    "argument",
    ["=5", "seed=[1", "seed={", "a=b=c", "run.name=${", "run.name=${run.name}", "s\u00e9e=1", "optim.lr=" + "1" * 400],
)
def test_whatever_is_typed_the_answer_is_one_short_line(argument: str, start: Start) -> None:
    code, out, err = start(argument)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert len(err) < 500


@pytest.mark.parametrize(("argument", "key"), [("=5", "=5"), ("a..b=1", "a..b"), ("conf@x=1", "@x")])
def test_a_multirun_refuses_in_the_same_line(argument: str, key: str, refuses: Refuses) -> None:
    refuses("--multirun", "seed=1,2", argument, key=key)


def test_an_entry_of_a_mapping_may_be_new_with_or_without_a_plus(folder: Path) -> None:
    for argument in ("reward.options.x=1", "+reward.options.x=1", "++reward.options.x=1"):
        assert compose("ppo", [argument])[0].reward.options == {"x": 1}
    assert compose("ppo", ["reward.options={x: 1, y: {z: [2]}}"])[0].reward.options == {"x": 1, "y": {"z": [2]}}
    assert compose("ppo", ["reward.options={}", "reward.options.x=1"])[0].reward.options == {"x": 1}
    assert compose("ppo", ["+conf=randomwalks", "data.options.seed=5"])[0].data.options == {"seed": 5}


@pytest.mark.parametrize(("first", "second"), [("--multirun", "--cfg"), ("-m", "-c"), ("--info", "--cfg")])
def test_two_ways_to_run_at_once_are_refused(first: str, second: str, refuses: Refuses) -> None:
    refuses(first, second, "job", key=second)


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
    with refused(ConfigError, key="preset", value="broken", where="conf/broken.yaml"):
        register(["+conf=broken"], "sft")
    register([], "sft")


def test_a_preset_that_is_not_utf_8_is_named(preset: Preset, folder: Path) -> None:
    preset("bytes", "")
    (folder / "conf" / "bytes.yaml").write_bytes(b"# @package _global_\nrun: {name: \xff}\n")
    with refused(ConfigError, key="preset", value="bytes", where="conf/bytes.yaml"):
        register(["+conf=bytes"], "sft")


def test_a_mapping_in_a_lists_place_is_named_in_a_preset(preset: Preset, folder: Path) -> None:
    preset("mapping", "data: {train: {a: 1}}\n")
    with refused(ConfigError, key="data.train", value={"a": 1}, where="conf/mapping.yaml"):
        register(["+conf=mapping"], "sft")
    register([], "sft")


def test_a_folder_with_a_presets_name_is_passed_over(folder: Path, refuses: Refuses) -> None:
    (folder / "conf" / "odd.yaml").mkdir(parents=True)
    register([], "sft")
    refuses("+conf=odd", key="preset", value="odd")


def test_a_section_that_is_given_a_value_is_named(refuses: Refuses, preset: Preset) -> None:
    preset("mine", "model: ${gone}\n")
    refuses("+conf=mine", key="model")
    refuses("+logger=${gone}", where="+logger=${gone}")
