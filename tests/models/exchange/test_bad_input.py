"""Folders that cannot be read end in one clear line that names what is wrong, before any weight is used."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megarl.config.sections.model import ModelConfig
from megarl.errors import CheckpointError, ConfigError, MegarlError
from megarl.models.exchange.export import write_folder
from megarl.models.exchange.families import FAMILIES, family_of, require_family
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.source import HuggingFaceSource
from tests.models.exchange.published import PUBLISHED, edit_config, save_published, stored
from tests.models.exchange.refusal import assert_not_opened
from tests.refusals import refused


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    save_published("llama3", folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


INDEX = "model.safetensors.index.json"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in stored(folder).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def in_shards(source: Path, target: Path) -> Path:
    write_folder(open_source(source), target, shard_bytes=20_000)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


def test_several_files_with_an_index_are_one_model(llama: Path, tmp_path: Path) -> None:
    shards = in_shards(llama, tmp_path / "shards")
    before, after = stored(llama), stored(shards)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    whole, cut = open_source(llama), open_source(shards)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(whole.read(name), cut.read(name))


def test_torch_pickles_are_read(llama: Path, folder: Path) -> None:
    torch.save(stored(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name in ("decoder.layers.0.mlp.linear_fc1.weight", "output_layer.weight"):
        assert torch.equal(open_source(folder).read(name), open_source(llama).read(name))


def test_a_missing_shard(llama: Path, tmp_path: Path) -> None:
    shards = in_shards(llama, tmp_path / "shards")
    gone = sorted(shards.glob("model-*.safetensors"))[1]
    gone.unlink()
    assert_not_opened(shards, key=gone.name, where=INDEX)


def test_an_index_that_lies(llama: Path, tmp_path: Path) -> None:
    shards = in_shards(llama, tmp_path / "shards")
    content = json.loads((shards / INDEX).read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"]["model.norm.weight"] = first
    (shards / INDEX).write_text(json.dumps(content))
    assert_not_opened(shards, key="model.norm.weight", value=first, where=INDEX)


def test_an_index_that_points_outside_the_folder(llama: Path, tmp_path: Path) -> None:
    shards = in_shards(llama, tmp_path / "shards")
    content = json.loads((shards / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (shards / INDEX).write_text(json.dumps(content))
    assert_not_opened(shards, key="../other.safetensors", where=INDEX)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "in the length", "in the header", "in the last tensor"])
def test_a_truncated_safetensors_file(keep: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_not_opened(folder, where="model.safetensors")


def test_a_header_that_is_no_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"not json" + b"\0" * 64)
    assert_not_opened(folder, key="header", where="model.safetensors")


class Touch:
    """What a hostile pickle does when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_with_code_in_it_is_not_run(save: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    save({"model.norm.weight": Touch(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert_not_opened(folder, where="pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "odd",
    [
        {"model.norm.weight": torch.empty(32, device="meta")},
        {"model.norm.weight": torch.eye(3).to_sparse()},
        {("a", 1): torch.zeros(2)},
        {3: torch.zeros(2)},
        {None: torch.zeros(2)},
    ],
    ids=["meta", "sparse", "a tuple as name", "a number as name", "no name"],
)
def test_a_pickle_of_tensors_without_numbers_or_names(odd: dict[Any, Any], folder: Path) -> None:
    torch.save({**stored(folder), **odd}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_not_opened(folder, key=str(next(iter(odd))), where="pytorch_model.bin")


def test_a_shape_that_does_not_fit_the_configuration(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    assert_not_opened(folder, key="model.layers.0.mlp.down_proj.weight", value=[32, 48], names=("[32, 64]",))


def test_an_integer_weight(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert_not_opened(folder, key=name, value="I8")


def test_an_unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.mlp.extra.weight": torch.zeros(2)}))
    assert_not_opened(folder, key="model.layers.0.mlp.extra.weight")


def test_a_bias_that_the_configuration_denies(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    assert_not_opened(folder, key="model.layers.0.self_attn.q_proj.bias")


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    assert_not_opened(folder, key="model.layers.1.self_attn.k_proj.weight")


def test_a_layer_more_than_the_configuration_has(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    assert_not_opened(folder, names=("model.layers.1.",))


def test_a_quantised_model(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    assert_not_opened(folder, key="quantization_config", value={"quant_method": "gptq"}, where="config.json")


def test_an_unknown_architecture_is_refused_with_the_known_ones(folder: Path) -> None:
    edit_config(folder, architectures=["BloomForCausalLM"])
    known = [family.architectures[0] for family in FAMILIES.values()]
    named = ["BloomForCausalLM"]
    assert_not_opened(folder, key="architectures", value=named, where="config.json", offers={"architectures": known})


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert_not_opened(tmp_path, where=str(tmp_path))
    assert_not_opened(tmp_path / "gone", where=str(tmp_path / "gone"))


def test_a_configuration_without_a_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    assert_not_opened(folder, key="num_hidden_layers", where="config.json of this llama")


def test_a_hub_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with refused(CheckpointError, where="megarl-tests/no-such-model"):
        open_source("megarl-tests/no-such-model")


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    import transformers

    config, arguments = PUBLISHED[name]
    made = getattr(transformers, config)(**arguments).to_dict()
    return {**made, "architectures": [FAMILIES[made["model_type"]].architectures[0]], **changes}


@pytest.mark.parametrize(
    ("name", "changes", "key", "value"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before", False),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim", 16),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", {"activation_function": "tanh"}, "activation_function", "tanh"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type", "longrope"),
        ("llama_yarn", {"rope_scaling": {"beta_fast": 16}}, "beta_fast", 16),
        (
            "qwen2_window",
            {"max_window_layers": 1, "layer_types": None},
            "layer_types",
            ["full_attention", "sliding_attention"],
        ),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise", 0.1),
        ("qwen2_moe_window", {"layer_types": None}, "layer_types", None),
    ],
)
def test_variants_that_we_cannot_compute_are_refused_by_name(
    name: str, changes: dict[str, Any], key: str, value: Any
) -> None:
    config = config_of(name, **changes)
    with refused(CheckpointError, key=key, value=value, where="config.json"):
        family_of(config).model_config(config)


def test_rope_of_older_configurations_is_read() -> None:
    config = config_of("llama3")
    rope = config.pop("rope_parameters")
    old = {**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert family_of(old).model_config(old) == family_of(config).model_config(config_of("llama3"))
    neox = config_of("gpt_neox")
    del neox["rope_parameters"]
    model = family_of(neox).model_config({**neox, "rotary_pct": 0.25, "rotary_emb_base": 5000})
    assert (model.rope_percent, model.rope_base) == (0.25, 5000.0)


def test_names_of_a_model_without_its_output_layer_are_known(tmp_path: Path) -> None:
    """GPT-2 on the hub lacks the prefix and keeps causal masks among its weights."""
    save_published("gpt2", tmp_path / "model")
    plain = {name.removeprefix("transformer."): tensor.clone() for name, tensor in stored(tmp_path / "model").items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    before = open_source(tmp_path / "model").read("decoder.layers.0.self_attention.linear_qkv.weight")
    save_file(plain, tmp_path / "model" / "model.safetensors")
    source = open_source(tmp_path / "model")
    assert isinstance(source, HuggingFaceSource)
    assert torch.equal(source.read("decoder.layers.0.self_attention.linear_qkv.weight"), before)
    assert source.left_out == {"h.0.attn.bias": "a causal mask, not a weight"}


NAMES = {"gpt2": ("n_embd", "n_layer", "n_head"), "gptj": ("n_embd", "n_layer", "n_head")}
FAMILY_NAMES = sorted(set(PUBLISHED) & set(FAMILIES))


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    "value", ["two", 32.5, 1e30, -1, 0, True, [4], {}, float("nan"), float("inf"), 10**12, 10**30], ids=repr
)
def test_sizes_that_cannot_be_are_refused_in_every_family(name: str, value: Any) -> None:
    for key in NAMES.get(name, ("hidden_size", "num_hidden_layers", "num_attention_heads")):
        config = config_of(name, **{key: value})
        with refused(CheckpointError) as found:
            family_of(config).model_config(config)
        assert len(found.line) < 400


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"num_key_value_heads": 3}),
        ("llama", {"num_key_value_heads": "2"}),
        ("llama", {"head_dim": 7}),
        ("llama", {"rms_norm_eps": "small"}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("llama", {"attention_bias": "no"}),
        ("llama", {"tie_word_embeddings": 1}),
        ("llama", {"hidden_act": ["silu"]}),
        ("llama", {"rope_parameters": [1]}),
        ("llama", {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": "x", "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 10**400}}),
        ("llama", {"vocab_size": "many"}),
        ("llama", {"vocab_size": 3.5}),
        ("mistral", {"sliding_window": -3}),
        ("qwen2_window", {"sliding_window": "x"}),
        ("qwen3", {"head_dim": 2.0}),
        ("gpt2", {"activation_function": {}}),
        ("gptj", {"rotary_dim": 10**6}),
        ("gptj", {"rotary_dim": "x"}),
        ("gpt_neox", {"rotary_pct": "x", "rope_parameters": None}),
        ("opt", {"ffn_dim": 0.5}),
        ("mixtral", {"num_local_experts": 0}),
        ("mixtral", {"num_experts_per_tok": 5}),
        ("qwen2_moe", {"mlp_only_layers": "1"}),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}),
        ("qwen3_moe", {"decoder_sparse_step": 3}),
        ("qwen3_moe", {"moe_intermediate_size": None}),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}),
    ],
)
def test_other_values_that_cannot_be_are_refused(name: str, changes: dict[str, Any]) -> None:
    config = config_of(name, **changes)
    with refused(CheckpointError):
        family_of(config).model_config(config)


@pytest.mark.parametrize("named", ["LlamaForCausalLM", {"a": 1}, 3, [None], [["LlamaForCausalLM"]]])
def test_architectures_that_are_no_names(named: Any, folder: Path) -> None:
    edit_config(folder, architectures=named)
    assert_not_opened(folder, key="architectures", where="config.json")


@pytest.mark.parametrize("text", ["[" * 200_000, "[1]", "", '{"a": ' + "1" * 5000 + "}"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("config.json", CheckpointError), (INDEX, CheckpointError), ("megarl_tokenizer.json", ConfigError)],
)
def test_json_files_that_cannot_be_used(name: str, kind: type[MegarlError], text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    assert_not_opened(folder, kind, where=name)


@pytest.mark.parametrize(
    ("content", "kind", "key"),
    [
        (b"\xff\xfe", ConfigError, None),
        (b"{", ConfigError, None),
        (b'{"kind": "none"}', CheckpointError, "tokenizer"),
        (b'{"kind": null}', CheckpointError, "tokenizer"),
        (b"{}", CheckpointError, "tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_described(
    content: bytes, kind: type[MegarlError], key: str | None, folder: Path
) -> None:
    (folder / "megarl_tokenizer.json").write_bytes(content)
    assert_not_opened(folder, kind, key=key, where="megarl_tokenizer.json")


@pytest.mark.parametrize("value", [None, 3, ["model.safetensors"], "", "..", "a" * 300, "a\0b"])
def test_an_index_that_names_no_file(value: Any, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": value}}))
    assert_not_opened(folder, where=INDEX)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":' + b"[" * 200_000,
        b"[1]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
    ids=range(10),
)
def test_a_safetensors_header_that_cannot_be(header: bytes, folder: Path) -> None:
    content = len(header).to_bytes(8, "little") + header + b"\0" * 64
    (folder / "model.safetensors").write_bytes(content)
    assert_not_opened(folder, where="model.safetensors")


@pytest.mark.parametrize("path", ["a" * 300, "./" + "a" * 300, "a\0b", "~nobody-of-this-name/x", "a/b/c"])
def test_a_path_that_cannot_be(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(CheckpointError) as found:
        open_source(path)
    assert "\0" not in found.line


def test_a_model_of_no_family_is_refused_with_the_keys_in_the_way() -> None:
    model = ModelConfig(qk_norm=True, parallel_residual="one_norm")
    names = ("model.qk_norm=true", "model.parallel_residual")
    with refused(ConfigError, where="export.hf", names=(*names, "qwen3")):
        require_family(model, None, "export.hf")
    with refused(ConfigError, key="model.qk_norm", value=True, where="export.hf", names=(*names, "llama")):
        require_family(model, "llama", "export.hf")
    require_family(ModelConfig(), None, "export.hf")
