"""NeMo's archives: the same bits there and back in every split, and bad ones refused in one line with nothing left."""

import errno
import gzip
import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from megarl import convert
from megarl.config.sections.model import EncoderConfig, ModelConfig, RopeScalingConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange import nemo_archive
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.logits import fixed_batch, logits
from megarl.models.exchange.nemo_config import read_config, write_config
from megarl.models.exchange.nemo_write import write_nemo
from megarl.models.exchange.source import HEADS
from megarl.models.exchange.views import gate_and_up
from tests.models.exchange.published import save_published, stored
from tests.models.exchange.refusal import assert_not_opened
from tests.refusals import refused

NAMES = ("llama3_of_nemo", "gpt2", "qwen2_tied")
NORM = "model.decoder.final_layernorm.weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    save_published(
        "llama3",
        root / "llama3_of_nemo",
        num_hidden_layers=4,
        rope_parameters={**scaling, "original_max_position_embeddings": 8192},
    )
    save_published("gpt2", root / "gpt2")
    save_published("qwen2_tied", root / "qwen2_tied", tie_word_embeddings=True)
    return root


@pytest.fixture(scope="module")
def archive(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "llama.nemo"
    write_nemo(open_source(published / "llama3_of_nemo"), path)
    return path


def unpacked(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {item.name: tar.extractfile(item).read() for item in tar.getmembers()}  # type: ignore[union-attr]


def packed(members: dict[str, bytes], path: Path) -> Path:
    with tarfile.open(path, "w:") as tar:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))
    return path


def spoilt(archive: Path, path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    members = unpacked(archive)
    change(members)
    return packed(members, path)


def with_config(**changes: Any) -> Callable[[dict[str, bytes]], Any]:
    def change(members: dict[str, bytes]) -> None:
        config = {**yaml.safe_load(members["./model_config.yaml"]), **changes}
        members["./model_config.yaml"] = yaml.safe_dump(config).encode()

    return change


def with_weights(edit: Callable[[dict[str, Any]], Any], member: str = "./model_weights.ckpt") -> Callable[..., Any]:
    def change(members: dict[str, bytes]) -> None:
        weights = torch.load(io.BytesIO(members[member]), weights_only=True)
        edit(weights)
        buffer = io.BytesIO()
        torch.save(weights, buffer)
        members[member] = buffer.getvalue()

    return change


@pytest.mark.parametrize(
    "odd",
    [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), io.BytesIO(b"x")],
    ids=["meta", "sparse", "no tensor"],
)
def test_a_tensor_without_numbers_in_the_archive(odd: Any, archive: Path, tmp_path: Path) -> None:
    path = spoilt(archive, tmp_path / "odd.nemo", with_weights(lambda weights: weights.update({f"model.{FC1}": odd})))
    assert_not_opened(path, key=f"model.{FC1}", where="model_weights.ckpt")


def same_bits(one: Path, other: Path) -> None:
    before, after = stored(one), stored(other)
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.mark.parametrize(
    ("name", "split"),
    [("llama3_of_nemo", []), ("gpt2", []), ("qwen2_tied", ["tp=2", "pp=2"])],
)
def test_there_and_back_is_the_same_bits(name: str, split: list[str], published: Path, tmp_path: Path) -> None:
    there, back = tmp_path / "model.nemo", tmp_path / "back"
    assert convert.run([f"from={published / name}", f"to={there}", *split]) == 0
    assert convert.run([f"from={there}", f"to={back}"]) == 0
    same_bits(published / name, back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model.nemo"]
    assert open_source(there).family is open_source(published / name).family


def test_to_and_from_a_checkpoint(published: Path, archive: Path, tmp_path: Path) -> None:
    assert convert.run([f"from={archive}", f"to={tmp_path / 'checkpoint'}", "format=megarl"]) == 0
    assert convert.run([f"from={tmp_path / 'checkpoint'}", f"to={tmp_path / 'again.nemo'}"]) == 0
    assert convert.run([f"from={tmp_path / 'again.nemo'}", f"to={tmp_path / 'back'}"]) == 0
    same_bits(published / "llama3_of_nemo", tmp_path / "back")


@pytest.mark.parametrize(
    ("tp", "pp", "members"),
    [
        (1, 1, ["model_weights.ckpt"]),
        (2, 1, ["mp_rank_00/model_weights.ckpt", "mp_rank_01/model_weights.ckpt"]),
        (1, 2, ["tp_rank_00_pp_rank_000/model_weights.ckpt", "tp_rank_00_pp_rank_001/model_weights.ckpt"]),
        (2, 2, [f"tp_rank_0{t}_pp_rank_00{p}/model_weights.ckpt" for p in (0, 1) for t in (0, 1)]),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_split_is_read_as_the_whole(
    name: str, tp: int, pp: int, members: list[str], published: Path, tmp_path: Path
) -> None:
    whole = open_source(published / name)
    write_nemo(whole, tmp_path / "split.nemo", tp=tp, pp=pp)
    assert [key[2:] for key in unpacked(tmp_path / "split.nemo") if key.endswith(".ckpt")] == members
    merged = open_source(tmp_path / "split.nemo")
    assert merged.names == whole.names
    assert merged.vocab_size == whole.vocab_size
    for key in whole.names:
        assert torch.equal(merged.read(key), whole.read(key)), key
    words = whole.read("embedding.word_embeddings.weight")
    for first, last in ((0, 20), (40, 80), (60, 70), (10, 53)):
        assert torch.equal(merged.rows("embedding.word_embeddings.weight", first, last), words[first:last])


def test_the_files_are_what_torch_and_megatron_know(published: Path, tmp_path: Path) -> None:
    """Names, shapes and splits as Megatron's modules with Transformer Engine have them, loaded by torch alone."""
    source = open_source(published / "llama3_of_nemo")
    write_nemo(source, tmp_path / "split.nemo", tp=2, pp=2)
    members = unpacked(tmp_path / "split.nemo")
    one = torch.load(io.BytesIO(members["./tp_rank_01_pp_rank_000/model_weights.ckpt"]), weights_only=True)
    last = torch.load(io.BytesIO(members["./tp_rank_00_pp_rank_001/model_weights.ckpt"]), weights_only=True)
    layer = (
        *("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"),
        *("self_attention.linear_proj.weight", "mlp.linear_fc1.layer_norm_weight"),
        *("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    )
    layers = {f"model.decoder.layers.{number}.{name}" for number in (0, 1) for name in layer}
    assert set(one) == {"model.embedding.word_embeddings.weight", *layers}
    assert set(last) == {"model.output_layer.weight", "model.decoder.final_layernorm.weight", *layers}
    gate, up = (piece.view for piece in gate_and_up(source.read(FC1), source.model))
    assert torch.equal(one["model.decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate[24:], up[24:]]))
    norm = last["model.decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"]
    assert torch.equal(norm, source.read("decoder.layers.3.input_layernorm.weight"))
    assert one["model.embedding.word_embeddings.weight"].shape == (128, 32)


def test_a_tied_last_stage_has_its_copy_of_the_embedding(published: Path, tmp_path: Path) -> None:
    write_nemo(open_source(published / "gpt2"), tmp_path / "split.nemo", pp=2)
    last = unpacked(tmp_path / "split.nemo")["./tp_rank_00_pp_rank_001/model_weights.ckpt"]
    copy = torch.load(io.BytesIO(last), weights_only=True)["model.output_layer.weight"]
    source = open_source(tmp_path / "split.nemo")
    assert torch.equal(copy[:53], source.read("embedding.word_embeddings.weight"))
    assert source.left_out == {"model.output_layer.weight": "tied to the embedding, which is read instead"}


def test_names_of_other_writers_are_known(archive: Path, tmp_path: Path) -> None:
    """Without Transformer Engine, with a wrapped module, and with what it keeps beside the weights."""

    def rename(weights: dict[str, Any]) -> None:
        for key in list(weights):
            plain = key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
            plain = plain.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.").replace("model.", "model.module.")
            weights[plain] = weights.pop(key)
        weights["model.module.decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"scales")
        weights["model.module.rotary_pos_emb.inv_freq"] = torch.ones(4)

    other = spoilt(archive, tmp_path / "other.nemo", with_weights(rename))
    source, known = open_source(other), open_source(archive)
    assert source.names == known.names
    assert all(torch.equal(source.read(key), known.read(key)) for key in known.names)
    assert set(source.left_out.values()) == {
        "state of Transformer Engine, not a weight",
        "computed from the configuration",
    }


def test_a_compressed_archive_is_read(archive: Path, tmp_path: Path) -> None:
    packed_ = tmp_path / "small.nemo"
    packed_.write_bytes(gzip.compress(archive.read_bytes()))
    assert torch.equal(open_source(packed_).read(FC1), open_source(archive).read(FC1))
    packed_.write_bytes(packed_.read_bytes()[:-2000])
    assert_not_opened(packed_, where="small.nemo")


def test_a_narrower_dtype(published: Path, tmp_path: Path) -> None:
    source = open_source(published / "gpt2")
    write_nemo(source, tmp_path / "narrow.nemo", dtype=torch.bfloat16, tp=2)
    narrow = open_source(tmp_path / "narrow.nemo")
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.read(FC1), source.read(FC1).bfloat16())


def test_heads_ride_along(published: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(published / "gpt2", tmp_path / "model"))
    head = {"value_head.weight": torch.randn(1, 32), "value_head.bias": torch.randn(1)}
    save_file(head, model / HEADS)
    write_nemo(open_source(model), tmp_path / "model.nemo")
    source = open_source(tmp_path / "model.nemo")
    assert all(torch.equal(source.read(key), head[key]) for key in head)
    assert source.heads.keys() == head.keys()


def test_the_tokenizer_and_its_ids_come_along(published: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(published / "gpt2", tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"words": 1}')
    write_nemo(open_source(model), tmp_path / "model.nemo")
    source = open_source(tmp_path / "model.nemo")
    assert source.tokenizer is not None
    kind, path = source.tokenizer
    assert kind == "huggingface"
    assert (Path(str(path)) / "tokenizer.json").read_text() == '{"words": 1}'
    assert open_source(tmp_path / "model.nemo").tokenizer == source.tokenizer
    assert source.token_ids["eos_token_id"] == 0


def test_the_logits_are_those_of_the_published_model(published: Path, archive: Path) -> None:
    theirs, ours = open_source(published / "llama3_of_nemo"), open_source(archive)
    tokens = fixed_batch(theirs)
    assert torch.allclose(logits(theirs, tokens), logits(ours, tokens), atol=1e-4)


MINIMAL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}


def test_defaults_are_those_of_nemo() -> None:
    model = read_config(MINIMAL)
    assert (model.position, model.norm, model.tie_embeddings, model.ffn_size) == ("learned", "layernorm", True, 128)
    assert model.activation == "gelu_tanh"  # what NeMo's fused gelu computes
    assert model.qkv_bias
    assert model.out_bias
    assert model.mlp_bias
    assert read_config({**MINIMAL, "bias_activation_fusion": False}).activation == "gelu"
    assert read_config({**MINIMAL, "bias": False, "qkv_bias": True}).qkv_bias
    assert read_config({**MINIMAL, "window_size": [6, 0]}).sliding_window == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "alibi"),
        ("normalization", "layernorm1p"),
        ("activation", "squared-relu"),
        ("num_moe_experts", 8),
        ("transformer_block_type", "post_ln"),
        ("target", "nemo.collections.asr.models.EncDecCTCModel"),
        ("target", "nemo.collections.nlp.models.language_modeling.megatron_t5_model.MegatronT5Model"),
        ("window_size", [3, 3]),
    ],
)
def test_variants_that_we_cannot_compute_are_refused_by_name(key: str, value: Any) -> None:
    with refused(CheckpointError, key=key, value=value, where="model_config.yaml"):
        read_config({**MINIMAL, key: value})


def test_a_size_that_is_null_is_refused() -> None:
    with refused(CheckpointError, where="model_config.yaml"):
        read_config({**MINIMAL, "num_layers": None})


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"parallel_residual": "one_norm"}, "model.parallel_residual", "one_norm"),
        ({"lm_head_bias": True}, "model.lm_head_bias", True),
        ({"activation": "relu"}, "model.activation", "relu"),
        ({"position": "learned", "position_offset": 2}, "model.position_offset", 2),
        (
            {"rope_scaling": RopeScalingConfig("yarn", 4.0, original_positions=16)},
            "model.rope_scaling.kind",
            "yarn",
        ),
        (
            {"rope_scaling": RopeScalingConfig("llama3", 32.0, original_positions=8192)},
            "model.rope_scaling.factor",
            32.0,
        ),
        ({"out_bias": True}, "model.out_bias", True),
        ({"encoder": EncoderConfig(num_layers=3), "position": "relative"}, "model.encoder.num_layers", 3),
    ],
    ids=str,
)
def test_models_that_nemo_cannot_hold_are_not_written(changes: dict[str, Any], key: str, value: Any) -> None:
    with refused(ConfigError, key=key, value=value, offers={"format": ["huggingface", "megarl"]}):
        write_config(ModelConfig(**changes), 53, torch.float32, 1, 1)


def test_a_missing_rank(published: Path, tmp_path: Path) -> None:
    write_nemo(open_source(published / "gpt2"), tmp_path / "whole.nemo", tp=2)
    gone = "./mp_rank_01/model_weights.ckpt"
    bad = spoilt(tmp_path / "whole.nemo", tmp_path / "bad.nemo", lambda members: members.pop(gone))
    assert_not_opened(bad, key=gone[2:], where="bad.nemo")


def test_a_rank_without_a_tensor(published: Path, tmp_path: Path) -> None:
    write_nemo(open_source(published / "gpt2"), tmp_path / "whole.nemo", tp=2)
    name = "model.decoder.layers.0.mlp.linear_fc1.weight"
    change = with_weights(lambda weights: weights.pop(name), "./mp_rank_01/model_weights.ckpt")
    bad = spoilt(tmp_path / "whole.nemo", tmp_path / "bad.nemo", change)
    assert_not_opened(bad, key=name, where="mp_rank_01/model_weights.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_a_truncated_archive(share: float, archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.nemo"
    path.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    assert_not_opened(path, names=(str(path),))


def test_something_else_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "text.nemo").write_text("no tar at all " * 100)
    assert_not_opened(tmp_path / "text.nemo", where="text.nemo")
    empty = packed({"readme": b"x"}, tmp_path / "empty.nemo")
    assert_not_opened(empty, key="model_config.yaml", where="empty.nemo")


class Touch:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_a_pickle_with_code_in_it_is_not_run(save: Any, archive: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    save({"model.decoder.final_layernorm.weight": Touch(tmp_path / "ran")}, buffer)
    path = spoilt(
        archive, tmp_path / "bad.nemo", lambda members: members.update({"./model_weights.ckpt": buffer.getvalue()})
    )
    assert_not_opened(path, where="model_weights.ckpt")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_configuration_is_not_run(archive: Path, tmp_path: Path) -> None:
    hostile = f"!!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']".encode()
    path = spoilt(archive, tmp_path / "bad.nemo", lambda members: members.update({"./model_config.yaml": hostile}))
    assert_not_opened(path, where="bad.nemo: model_config.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("edit", "data"),
    [
        (
            lambda weights: weights.update({"model.language_model.encoder.layers.0.mlp.weight": torch.ones(2)}),
            {"key": "model.language_model.encoder.layers.0.mlp.weight", "offers": {"mcore_gpt": [True]}},
        ),
        (
            lambda weights: weights.update({"model.decoder.layers.0.extra": torch.ones(2)}),
            {"key": "model.decoder.layers.0.extra"},
        ),
        (lambda weights: weights.pop("model.output_layer.weight"), {"key": "output_layer.weight"}),
        (lambda weights: weights.update({NORM: torch.ones(31)}), {"key": NORM, "value": [31], "names": ("[32]",)}),
        (
            lambda weights: weights.update({NORM: torch.ones(32, dtype=torch.int8)}),
            {"key": NORM, "value": "torch.int8"},
        ),
        (lambda weights: weights.clear(), {"key": "num_layers", "value": 4}),
    ],
    ids=["legacy", "unknown", "missing", "shape", "integers", "nothing"],
)
def test_weights_that_do_not_fit(edit: Any, data: dict[str, Any], archive: Path, tmp_path: Path) -> None:
    assert_not_opened(spoilt(archive, tmp_path / "bad.nemo", with_weights(edit)), **data)


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"num_layers": 3}, "num_layers", 3),
        ({"ffn_hidden_size": 64}, "model.decoder.layers.0.mlp.linear_fc1.weight", [96, 32]),
        ({"tensor_model_parallel_size": 2}, "mp_rank_00/model_weights.ckpt", None),
        ({"override_vocab_size": 500}, "override_vocab_size", 500),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size", 2),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(
    changes: dict[str, Any], key: str, value: Any, archive: Path, tmp_path: Path
) -> None:
    bad = spoilt(archive, tmp_path / "bad.nemo", with_config(**changes))
    assert_not_opened(bad, key=key, value=value, where="bad.nemo")


def test_a_distributed_checkpoint_is_refused_by_name(archive: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        del members["./model_weights.ckpt"]
        members["./model_weights/metadata.json"] = b"{}"

    assert_not_opened(spoilt(archive, tmp_path / "bad.nemo", change), key="dist_ckpt_format", where="bad.nemo")


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["to={new}.nemo", "tp=3"], {"key": "tp", "value": 3, "names": ("num_heads=",)}),
        (["to={new}.nemo", "pp=3"], {"key": "pp", "value": 3, "names": ("num_layers=",)}),
        (["to={new}.nemo", "tp=0"], {"key": "tp", "value": "0"}),
        (["to={new}", "tp=2"], {"key": "tp", "value": 2, "names": ("format=",)}),
        (["to={new}", "format=nemo"], {"key": "format", "value": "nemo"}),
        (["to={new}.nemo", "format=megarl"], {"key": "format", "value": "megarl"}),
        (["to={there}"], {"kind": CheckpointError, "where": "there.nemo"}),
    ],
    ids=str,
)
def test_bad_words_are_refused_and_leave_nothing(
    words: list[str], data: dict[str, Any], published: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there.nemo"
    there.write_text("mine")
    words = [word.format(new=tmp_path / "new", there=there) for word in words]
    with refused(**data):
        convert.run([f"from={published / 'gpt2'}", *words])
    assert [path.name for path in tmp_path.iterdir()] == ["there.nemo"]
    assert there.read_text() == "mine"


def test_a_failure_half_way_leaves_nothing(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(published / "gpt2")
    read = source.read

    def full(name: str) -> Tensor:
        if name.startswith("decoder.layers.1.mlp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return read(name)

    monkeypatch.setattr(source, "read", full)
    with refused(CheckpointError, where="new.nemo", names=(os.strerror(errno.ENOSPC),)):
        write_nemo(source, tmp_path / "new.nemo", tp=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32.5},
        {"hidden_size": float("inf")},
        {"num_layers": "4"},
        {"num_layers": 10**12},
        {"num_query_groups": 3},
        {"bias": "false"},
        {"layernorm_epsilon": float("nan")},
        {"normalization": ["rmsnorm"]},
        {"window_size": 3},
        {"window_size": ["a", 0]},
        {"tensor_model_parallel_size": 10**9},
        {"max_position_embeddings": None},
        {"rotary_percentage": [1]},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused(changes: dict[str, Any], archive: Path, tmp_path: Path) -> None:
    assert_not_opened(spoilt(archive, tmp_path / "bad.nemo", with_config(**changes)))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "[" * 5000,
        "a0: &a0 [x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 25)),
        "- 1",
        "a: 2024-99-99",
    ],
    ids=["itself", "deep", "laughs", "list", "no date"],
)
def test_a_configuration_that_is_no_yaml_of_a_sensible_size(text: str, archive: Path, tmp_path: Path) -> None:
    change = {"./model_config.yaml": text.encode()}
    bad = spoilt(archive, tmp_path / "bad.nemo", lambda members: members.update(change))
    assert_not_opened(bad, names=("model_config.yaml",))


@pytest.mark.parametrize("ours", [3, [1], {"family": ["llama"]}, {"family": "none", "token_ids": [1]}])
def test_what_we_keep_in_a_configuration_may_be_anything(ours: Any, archive: Path, tmp_path: Path) -> None:
    source = open_source(spoilt(archive, tmp_path / "odd.nemo", with_config(megarl=ours, tokenizer=[1])))
    assert source.family is None
    assert source.token_ids == {}


def test_links_and_paths_in_an_archive_write_nothing(archive: Path, tmp_path: Path) -> None:
    path = packed({**unpacked(archive), "../outside": b"x", "/tmp/absolute-of-megarl": b"x"}, tmp_path / "odd.nemo")
    with tarfile.open(path, "a:") as tar:
        for name, kind in (("./tokenizer/link", tarfile.SYMTYPE), ("./tokenizer/hard", tarfile.LNKTYPE)):
            item = tarfile.TarInfo(name)
            item.type, item.linkname = kind, "/etc/passwd"
            tar.addfile(item)
    assert open_source(path).model.num_layers == 4
    assert not (tmp_path.parent / "outside").exists()
    assert not Path("/tmp/absolute-of-megarl").exists()


def test_a_compressed_archive_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nemo_archive, "MOST_UNPACKED", (2, 1000))
    (tmp_path / "bomb.nemo").write_bytes(gzip.compress(b"\0" * 2**22))
    assert_not_opened(tmp_path / "bomb.nemo", where="bomb.nemo")


def test_a_member_of_a_size_below_zero_is_refused(tmp_path: Path) -> None:
    item = tarfile.TarInfo("a")
    item.size = 512
    header = bytearray(item.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 11 + b"\x00"  # -256 in base 256
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "bad.nemo").write_bytes(bytes(header) + b"\0" * 1024)
    assert_not_opened(tmp_path / "bad.nemo", where="bad.nemo")
