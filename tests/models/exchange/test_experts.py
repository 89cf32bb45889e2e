"""Mixtures of experts in and out: transformers' log-probs in every layout, greedy tokens, and the same bits back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megarl import convert
from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.experience.rows import forward_rows
from megarl.experience.start_weights import FOLDER, keep
from megarl.models.build import build_engine
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.export import INDEX, export, write_folder
from megarl.models.exchange.families import FAMILIES, family_for
from megarl.models.exchange.family import shape_of
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.parameters import SCORE
from megarl.models.exchange.source import HEADS
from megarl.models.roles import Role
from megarl.parallel.digest import weights_digest
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Microbatch, Rows
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling
from megarl.tokenizers import ByteTokenizer
from tests.gated import gated
from tests.models.exchange.experts import DENSE, KINDS, VOCAB, make, save
from tests.models.exchange.published import stored
from tests.refusals import refused
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"ep": 2}),
    "TP2xEP2": (4, {"tp": 2, "ep": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2xEP2": (4, {"pp": 2, "ep": 2}),
}
PROMPTS = 3
Published = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Folder and model of every family."""
    root = tmp_path_factory.mktemp("experts")
    return {kind: (root / kind, save(kind, root / kind)) for kind in KINDS}


def tokens() -> Tensor:
    return torch.randint(2, VOCAB, (4, 48), generator=torch.Generator().manual_seed(5))


def prompts() -> list[list[int]]:
    return [row[: 6 + 5 * number].tolist() for number, row in enumerate(tokens()[:PROMPTS])]


def opened(folder: Path, layout: dict[str, Any], heads: tuple[str, ...] = ("lm",)) -> Engine:
    """An engine with the weights of a folder."""
    device = start_world()
    grid = Grid(Layout.for_world(dist.get_world_size(), **layout), device)
    source = open_source(folder)
    role = Role("policy", source.model, source.vocab_size, heads, source=source)
    return build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1)


def computed(folders: dict[str, Path], layout: dict[str, Any], out: Path) -> dict[str, Any]:
    """Log-probs of the tokens of every kind, and checksums; exports everything, through a checkpoint too."""
    found: dict[str, Any] = {}
    for kind, folder in folders.items():
        engine, source = opened(folder, layout), open_source(folder)

        def logprobs(model: Any, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

        rows = Rows(tokens(), torch.full((len(tokens()),), tokens().shape[1]), torch.ones(tokens().shape))
        result = forward_rows(engine, rows, logprobs, per_microbatch=2, share_bins=False)["logprobs"]
        found[kind] = {"logprobs": result, "digest": weights_digest(engine), "digests": engine.digests()}
        export(engine, out / kind, model=source.model, vocab_size=VOCAB, family=kind, shard_bytes=20_000)
        card = ModelCard.of(source.model, VOCAB, ByteTokenizer(), TokenizerConfig(), source=source)
        found[kind]["kept"] = out / FOLDER / keep(engine, card, out)
        engine.grid.close()
    return found


@pytest.fixture(scope="module")
def alone(worlds: Worlds, published: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes."""
    folders = {kind: folder for kind, (folder, _) in published.items()}
    (found,) = worlds.run(1, computed, folders, {}, tmp_path_factory.mktemp("alone"))
    return found  # type: ignore[no-any-return]


def test_one_process_computes_what_transformers_does(alone: dict[str, Any], published: Published) -> None:
    given = tokens()
    for kind, (_, model) in published.items():
        with torch.no_grad():
            logits = model(input_ids=given, attention_mask=torch.ones_like(given)).logits
        wanted = torch.log_softmax(logits[:, :-1], -1).gather(2, given[:, 1:, None])[..., 0]
        assert float(wanted.std()) > 0.3, f"{kind} is too flat to prove anything"
        assert float((alone[kind]["logprobs"][:, 1:] - wanted).abs().max()) < 1e-4, kind


def assert_same_tensors(folder: Path, other: Path) -> None:
    before, after = stored(folder), stored(other)
    assert before.keys() == after.keys(), other
    assert [key for key in before if not torch.equal(before[key], after[key])] == [], other


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["PP2", "PP2xEP2"]))
def test_every_layout_computes_the_same_and_goes_back_bit_for_bit(
    layout: str, worlds: Worlds, published: Published, alone: dict[str, Any], tmp_path: Path
) -> None:
    size, grid = LAYOUTS[layout]
    ranks = worlds.run(size, computed, {kind: folder for kind, (folder, _) in published.items()}, grid, tmp_path)
    for kind, (folder, _) in published.items():
        for rank in ranks:
            assert float((rank[kind]["logprobs"] - alone[kind]["logprobs"]).abs().max()) < 1e-5, kind
            assert rank[kind]["digest"] == alone[kind]["digest"], kind
            assert rank[kind]["digests"] == alone[kind]["digests"], kind
        assert_same_tensors(folder, tmp_path / kind)
        write_folder(open_source(ranks[0][kind]["kept"]), tmp_path / f"{kind} again")
        assert_same_tensors(folder, tmp_path / f"{kind} again")


def test_ranks_that_share_experts_write_files_of_their_own(
    worlds: Worlds, published: Published, tmp_path: Path
) -> None:
    kind = "qwen2_moe"
    worlds.run(2, computed, {kind: published[kind][0]}, {"ep": 2}, tmp_path)
    where = json.loads((tmp_path / kind / INDEX).read_text())["weight_map"]
    files: dict[bool, set[str]] = {False: set(), True: set()}
    for name, file in where.items():
        _, _, rest = name.partition(".experts.")
        files[rest != "" and int(rest.partition(".")[0]) >= 3].add(file)
    assert len(files[True]) > 1
    assert not files[True] & files[False]


def generated(folders: dict[str, Path], layout: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The greedy responses of every kind, by the numbers of the prompts."""
    found = {}
    for kind, folder in folders.items():
        engine = opened(folder, layout)
        generator = Generator(engine, VOCAB + 1, seed=1, limits=Limits(slots=2))  # a token that never comes
        sampling = Sampling(temperature=0.0, max_new_tokens=64)
        requests = [Request(number, 0, tuple(prompt), sampling) for number, prompt in enumerate(prompts())]
        responses = {one.prompt_id: one.response for one in generator.generate(requests)}
        found[kind] = [responses[number] for number in range(PROMPTS)]
        generator.close()
        engine.grid.close()
    return found


def test_greedy_tokens_are_those_of_transformers(worlds: Worlds, published: Published) -> None:
    (found,) = worlds.run(1, generated, {kind: folder for kind, (folder, _) in published.items()}, {})
    for kind, (_, model) in published.items():
        for prompt, response in zip(prompts(), found[kind], strict=True):
            settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            wanted = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
            assert prompt + response == wanted, kind
            assert len(set(response)) > 2, f"{kind} repeats itself too much to prove anything"


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_goes_out_and_comes_back(kind: str) -> None:
    family = FAMILIES[kind]
    model = family.model_config(make(kind).config.to_dict())
    assert model.experts is not None
    assert model.experts.dense_layers == DENSE[kind]
    assert (model.experts.balance, model.experts.z_loss) == (0.0, 0.0)
    model.experts.balance = 0.02
    config = family.hf_config(model, VOCAB)
    assert config["router_aux_loss_coef"] == 0.02
    assert shape_of(family.model_config(config)) == shape_of(model)


@pytest.mark.parametrize(
    ("step", "plain", "dense"), [(1, [], []), (2, [], [0, 2]), (2, [1], [0, 1, 2]), (3, [2, 9], None), (1, None, [])]
)
def test_layers_with_a_plain_mlp_are_counted_as_transformers_does(
    step: int, plain: list[int] | None, dense: list[int] | None
) -> None:
    family = FAMILIES["qwen3_moe"]
    config = make("qwen3_moe").config.to_dict() | {"decoder_sparse_step": step, "mlp_only_layers": plain}
    if dense is None:
        with refused(CheckpointError, key="model.experts.dense_layers"):
            family.model_config(config)
        return
    model = family.model_config(config)
    assert model.experts is not None
    assert model.experts.dense_layers == dense
    written = family.hf_config(model, VOCAB)
    assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, dense)


MIXTURE = {"activation": "swiglu", "norm": "rmsnorm", "position": "rope", "num_layers": 3}


@pytest.mark.parametrize(
    ("experts", "changes", "family"),
    [
        ({}, {}, "mixtral"),
        ({}, {"sliding_window": 8}, "mixtral"),
        ({"dense_layers": [1]}, {"qk_norm": True}, "qwen3_moe"),
        ({"normalise": False}, {"qk_norm": True}, "qwen3_moe"),
        ({"shared_ffn_size": 8, "dense_layers": [0]}, {"qkv_bias": True}, "qwen2_moe"),
        ({"shared_ffn_size": 8}, {}, "qwen2_moe"),
    ],
    ids=str,
)
def test_a_model_from_scratch_finds_the_family_that_holds_it(
    experts: dict[str, Any], changes: dict[str, Any], family: str
) -> None:
    model = ModelConfig(**{**MIXTURE, **changes}, experts=ExpertsConfig(count=4, **experts))
    assert family_for(model).name == family


@pytest.mark.parametrize(
    ("experts", "family", "key"),
    [
        ({"normalise": False}, "mixtral", "model.experts.normalise"),
        ({"dense_layers": [1]}, "mixtral", "model.experts.dense_layers"),
        ({"shared_ffn_size": 8}, "mixtral", "model.experts.shared_ffn_size"),
        ({"shared_ffn_size": 8}, "qwen3_moe", "model.experts.shared_ffn_size"),
        ({}, "llama", "model.experts.count"),
        (None, "mixtral", "model.experts.count"),
        (None, "qwen3_moe", "model.experts.count"),
    ],
    ids=str,
)
def test_a_family_that_cannot_hold_a_mixture_is_refused_with_the_key(
    experts: dict[str, Any] | None, family: str, key: str
) -> None:
    section = None if experts is None else ExpertsConfig(count=4, **experts)
    model = ModelConfig(**MIXTURE, qk_norm=family == "qwen3_moe", experts=section)
    with refused(ConfigError, key=key, names=(family,)):
        FAMILIES[family].hf_config(model, VOCAB)


# --- between formats -------------------------------------------------------------------------------------------------


def converted(*commands: list[str]) -> list[int]:
    """Exit codes, in a world of one."""
    return [convert.run(words) for words in commands]


def test_there_and_back_is_the_same_bits_and_a_narrower_dtype_is_written(
    worlds: Worlds, published: Published, tmp_path: Path
) -> None:
    commands = [[f"from={folder}", f"to={tmp_path / kind}"] for kind, (folder, _) in published.items()]
    commands += [[f"from={tmp_path / kind}", f"to={tmp_path / kind}-again"] for kind in KINDS]
    narrow = ["format=huggingface", "dtype=bf16"]
    commands += [[f"from={tmp_path / kind}", f"to={tmp_path / kind}-narrow", *narrow] for kind in KINDS]
    assert worlds.run(1, converted, *commands) == [[0] * len(commands)]
    for kind, (folder, _) in published.items():
        assert open_source(tmp_path / kind).kind == "megarl"
        assert_same_tensors(folder, tmp_path / f"{kind}-again")
        before, after = stored(folder), stored(tmp_path / f"{kind}-narrow")
        assert all(torch.equal(before[key].bfloat16(), after[key]) for key in before), kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_nemo_archive_is_refused_and_leaves_nothing(kind: str, published: Published, tmp_path: Path) -> None:
    with refused(ConfigError, key="model.experts.count", value=6):
        convert.run([f"from={published[kind][0]}", f"to={tmp_path / 'new.nemo'}"])
    assert list(tmp_path.iterdir()) == []


def exported_heads(folder: Path, layout: dict[str, Any], out: Path) -> None:
    """Export a policy with a value head, and a reward model, whose weights are those of a folder."""
    model = open_source(folder).model
    for name, heads in {"value": ("lm", "value"), "score": ("score",)}.items():
        engine = opened(folder, layout, heads)
        export(engine, out / name, model=model, vocab_size=VOCAB, family="qwen2_moe", score_moments=(0.5, 2.0))
        engine.grid.close()


def test_heads_are_written_beside_shared_experts(worlds: Worlds, published: Published, tmp_path: Path) -> None:
    folder = published["qwen2_moe"][0]
    worlds.run(4, exported_heads, folder, {"pp": 2, "ep": 2}, tmp_path)
    assert_same_tensors(folder, tmp_path / "value")
    assert (tmp_path / "value" / HEADS).is_file()
    before, after = stored(folder), stored(tmp_path / "score")
    assert after.keys() - before.keys() == {"score.weight"}
    assert before.keys() - after.keys() == {"lm_head.weight"}
    assert all(torch.equal(before[key], after[key]) for key in after if key != "score.weight")
    source = open_source(tmp_path / "score")
    assert (source.has_output, source.score_moments, SCORE in source.heads) == (False, (0.5, 2.0), True)
