"""`python -m megarl.plan`: the command, its answers and its refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import megarl
from megarl import plan
from megarl.config.algorithms import ALGORITHMS
from megarl.config.cluster import GPUS, PlanConfig
from megarl.config.leaf import leaves
from megarl.config.ppo import PPOConfig
from megarl.errors import ConfigError
from megarl.parallel.vocab import padded_vocab
from megarl.report.page import page
from megarl.report.write import is_report
from tests.models.exchange.published import save_published
from tests.models.exchange.published import stored as tensors_of
from tests.planning.runs import presets_of_large_models
from tests.programs import Program
from tests.refusals import refused
from tests.report.made_up import made_up
from tests.report.parsed import parse

ROOT = Path(megarl.__file__).parents[1]
TOY = ["model.vocab_size=100", "model.max_positions=256", "rollout.max_new_tokens=64"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No process group, whatever an earlier test of this process has left, and nobody's own presets."""
    if dist.is_initialized():
        dist.destroy_process_group()
    monkeypatch.chdir(tmp_path)


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    plan.show([*argv, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_of_the_readme_answers(tmp_path: Path) -> None:
    done = Program("megarl.plan", "+conf=gpt20b", "cluster.gpus=64", "cluster.gpu=h100", folder=tmp_path)
    written, errors = done.communicate()
    assert done.returncode == 0, errors
    assert "ppo on 64 x H100-80G (8 to a node), TP4xDP16+SP" in written
    for phase in ("generate", "score", "train", "save"):
        assert f"│ {phase}" in written
    assert "fits: the peak is" in written


def test_json_says_every_role_in_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *TOY, "cluster.gpus=4", "parallel.tp=2", "critic.kind=separate", "suggest=true")
    assert found["layout"] == "TP2xDP2"
    (rank,) = found["ranks"]
    assert set(rank["phases"]) == {"generate", "score", "train", "save"}
    for phase in rank["phases"].values():
        assert set(phase["roles"]) == {"policy", "critic", "reference"}
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
        total = sum(role[part] for role in phase["roles"].values() for part in parts)
        assert phase["bytes"] == pytest.approx(total, abs=20)
    assert found["peak"]["bytes"] == max(phase["bytes"] for phase in rank["phases"].values())
    assert set(found["roles"]) == {"policy", "critic", "reference"}
    assert set(found["notes"]) == {"reward"}
    assert found["layouts"]
    assert all("parallel.tp=" in layout["overrides"] for layout in found["layouts"])


T5 = [
    *("model.vocab_size=300", "model.max_positions=256", "rollout.max_new_tokens=64", "rollout.n=4"),
    *("model.position=relative", "model.encoder.num_layers=4", "model.num_layers=4", "prompt_tokens=96"),
]


def test_an_encoder_decoder_is_planned_with_both_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *T5, "cluster.gpus=4", "suggest=true")
    assert found["encoder"] == {"layers": 4, "decoder_layers": 4, "positions": 96, "decoder_positions": 64}
    assert {layout["overrides"].split()[1] for layout in found["layouts"]} == {"parallel.pp=1", "parallel.pp=2"}
    staged = answer(capsys, *T5, "cluster.gpus=4", "parallel.pp=2")["ranks"]
    caches = [rank["phases"]["generate"]["roles"]["policy"]["cache"] for rank in staged]
    assert caches[0] == 0 < caches[1]
    assert answer(capsys, *TOY)["encoder"] is None


def test_an_encoder_decoders_plan_says_so_in_words_and_on_its_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan.show([*T5, "cluster.gpus=2", "parallel.pp=2", f"html={tmp_path / 'plan.html'}"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "(an encoder of 4 layers and a decoder of 4)" in printed
    assert "to prompts of 96, each of which the encoder reads once for the 4 responses to it on a replica" in printed
    text = parse((tmp_path / "plan.html").read_text()).all("main")[0].text()
    assert "(an encoder of 4 layers and a decoder of 4)" in text
    assert "One stage is the encoder and the other the decoder" in text


MIXTURE = [*TOY, "model.hidden_size=64", "model.ffn_size=256", "model.experts.count=8", "model.experts.ffn_size=64"]


def test_a_mixture_is_planned_with_its_total_and_its_active_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *MIXTURE, "cluster.gpus=4", "parallel.ep=2", "suggest=true")
    assert found["layout"] == "EP2xDP4"
    assert found["experts"] == {"count": 8, "chosen": 2, "layers": 4, "on_a_rank": 4}
    matrices = 3 if PPOConfig().model.is_gated else 2
    idle = 4 * 6 * matrices * 64 * 64
    parameters = found["parameters"]
    assert parameters["total"] - parameters["active"] == idle
    alone = answer(capsys, *MIXTURE)["ranks"][0]["parameters"]["policy"]
    head = 64 * 128 + 128 + 128 + 1
    tables = 1 if PPOConfig().model.tie_embeddings else 2
    assert parameters["total"] == alone - head - tables * (padded_vocab(100, 1) - 100) * 64
    assert found["ranks"][0]["parameters"]["policy"] == alone - 4 * 4 * matrices * 64 * 64
    assert all("parallel.ep=" in layout["overrides"] for layout in found["layouts"])
    dense = answer(capsys, *TOY, "cluster.gpus=4", "suggest=true")
    assert dense["experts"] is None
    assert dense["parameters"]["total"] == dense["parameters"]["active"]
    assert not any("parallel.ep=" in layout["overrides"] for layout in dense["layouts"])


def test_a_mixtures_plan_says_so_in_words_and_on_its_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    total, active = answer(capsys, *MIXTURE)["parameters"].values()
    more = ["cluster.gpus=4", "parallel.ep=4", "model.experts.shared_ffn_size=32", "model.experts.dense_layers=[0]"]
    plan.show([*MIXTURE, *more[:2]])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"{total:,} parameters, of which {active:,} are active in a token: 2 of 8 experts in each of 4 layers"
        in printed
    )
    assert "tokens are assumed to choose all experts equally often" in printed
    plan.show([*MIXTURE, *more, f"html={tmp_path / 'plan.html'}"])
    text = parse((tmp_path / "plan.html").read_text()).all("main")[0].text()
    assert "2 of 8 experts and a shared one in each of 3 layers, 2 of a layer on a GPU" in text


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["parallel.ep=3", "cluster.gpus=3"], "parallel.ep"),
        (["parallel.ep=2"], "parallel.ep"),
        (["parallel.tp=2", "cluster.gpus=2", "model.experts.ffn_size=63"], "parallel.tp"),
        (["rollout.engine.cuda_graphs=true"], "rollout.engine.cuda_graphs"),
        (["parallel.ep=2", "cluster.gpus=4", "rollout.engine.layout=tp2"], "rollout.engine.layout"),
        (["adapter.rank=4", "adapter.base_bits=4"], "adapter.base_bits"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused_as_the_run_would(more: list[str], key: str) -> None:
    with refused(ConfigError, key=key):
        plan.show([*MIXTURE, *more])


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "rm", "ilql"])
def test_an_encoder_reads_half_of_a_given_sequence_or_prompt_tokens(
    capsys: pytest.CaptureFixture[str], algorithm: str
) -> None:
    run = [f"algorithm={algorithm}", "data.seq_length=200", "model.vocab_size=300", "model.max_positions=256"]
    shape = ["model.position=relative", "model.encoder.num_layers=2"]
    for more, encoded in (([], 100), (["prompt_tokens=150"], 150)):
        found = answer(capsys, *run, *shape, *more)["encoder"]
        assert (found["positions"], found["decoder_positions"]) == (encoded, 200 - encoded)
    with refused(ConfigError, key="prompt_tokens", value=200, offers={"prompt_tokens": [199]}):
        plan.show([*run, *shape, "prompt_tokens=200"])


def test_the_plan_is_drawn_into_a_file_that_is_no_other_page(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plans" / "plan.html"
    for pp in (1, 2):  # the second time it replaces the first
        plan.show([*TOY, "cluster.gpus=2", f"parallel.pp={pp}", f"html={file}"])
        out, err = capsys.readouterr()
        assert err == f"page: {file}\n"
        assert "fits: the peak is" in out
    tree = parse(file.read_text())
    assert "PP2" in tree.all("h1")[0].text()
    assert tree.with_class("gantt")
    assert is_report(file, "megarl plan")


@pytest.mark.parametrize(("name", "content"), [("mine.html", "my notes"), ("report.html", None), ("folder", "")])
def test_a_file_that_is_no_plan_is_refused_before_anything_is_planned_and_kept(
    tmp_path: Path, name: str, content: str | None
) -> None:
    if content == "":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(page([made_up(1)]) if content is None else content)
    before = "" if content == "" else (tmp_path / name).read_text()
    with refused(ConfigError, key="html"):
        plan.show([*TOY, f"html={name}", "cluster.gpus=3", "parallel.tp=2"])  # wrong in another way, too
    assert content == "" or (tmp_path / name).read_text() == before


@pytest.mark.parametrize(("algorithm", "roles"), [("sft", ["policy"]), ("ilql", ["policy"])])
def test_other_algorithms_have_fewer_roles(
    capsys: pytest.CaptureFixture[str], algorithm: str, roles: list[str]
) -> None:
    found = answer(capsys, f"algorithm={algorithm}", "model.vocab_size=300", "model.max_positions=256")
    assert list(found["ranks"][0]["phases"]) == ["train", "save"]
    assert list(found["ranks"][0]["phases"]["train"]["roles"]) == roles


def test_ilql_with_one_q_head_holds_less(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["algorithm=ilql", "model.vocab_size=300", "model.max_positions=256"]
    two, one = (
        answer(capsys, *settings, f"ilql.two_qs={given}")["ranks"][0]["parameters"]["policy"]
        for given in ("true", "false")
    )
    width = PPOConfig().model.hidden_size
    # A head and its target: width -> 2 x width -> the padded vocabulary, with biases
    padded = padded_vocab(300, 1)
    assert two - one == 2 * (width * 2 * width + 2 * width + 2 * width * padded + padded)


def test_ilql_that_evaluates_has_a_cache_then_and_with_graphs_throughout(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["algorithm=ilql", *TOY, "data.eval=[prompts.txt]", "data.seq_length=128"]
    for more, held in (([], ["generate"]), (["rollout.engine.cuda_graphs=true"], ["generate", "train", "save"])):
        found = answer(capsys, *run, *more)
        phases = found["ranks"][0]["phases"]
        assert [phase for phase, uses in phases.items() if uses["roles"]["policy"]["cache"]] == held
        assert list(found["phases"]) == ["train", "save"]  # seconds of evaluations are left out


def test_a_critic_that_starts_from_a_checkpoint_has_its_shape(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_published("llama", tmp_path / "critic")
    policy = ["model.vocab_size=53", "model.max_positions=64", "rollout.max_new_tokens=16", "critic.kind=separate"]
    found = answer(capsys, *policy, f"critic.separate.path={tmp_path / 'critic'}")
    stored = {path: tensor for path, tensor in tensors_of(tmp_path / "critic").items() if path != "lm_head.weight"}
    parts = found["ranks"][0]["parameters"]
    padded = padded_vocab(53, 1)
    head = 32 * 64 + 64 + 64 + 1
    grown = (padded - 53) * 32  # the table is padded, and there is no output layer
    assert parts["critic"] == sum(tensor.numel() for tensor in stored.values()) + grown + head
    assert parts["policy"] > 10 * parts["critic"]


def test_a_critic_has_no_output_layer(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *TOY, "critic.kind=separate", "model.tie_embeddings=false")["ranks"][0]["parameters"]
    hidden = PPOConfig().model.hidden_size
    head = hidden * 2 * hidden + 2 * hidden + 2 * hidden + 1
    assert found["policy"] - found["critic"] == padded_vocab(100, 1) * hidden - head


def test_a_layout_to_generate_in_is_planned_and_refused_as_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    run = [*TOY, "cluster.gpus=2", "parallel.pp=2"]
    here, there = (answer(capsys, *run, *more)["ranks"][0]["phases"] for more in ([], ["rollout.engine.layout=tp2"]))
    copy = there["train"]["roles"]["generator"]["weights"]
    assert copy > 0
    assert there["train"]["bytes"] - here["train"]["bytes"] == pytest.approx(copy, abs=2)
    assert there["generate"]["roles"]["policy"]["cache"] == 0
    with refused(ConfigError, names=("rollout.engine.layout=tp3",)):
        plan.show([*run, "rollout.engine.layout=tp3"])


def test_rft_generates_and_trains_and_reads_nothing_again(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model.vocab_size=300", "model.max_positions=256", "rollout.max_new_tokens=64", "rollout.n=8"]
    found = answer(capsys, "algorithm=rft", "rft.prompts=32", *settings)
    phases = found["ranks"][0]["phases"]
    assert list(phases) == ["generate", "train", "save"]
    assert list(phases["generate"]["roles"]) == ["policy"]
    assert list(found["notes"]) == ["reward"]


@pytest.mark.parametrize("name", presets_of_large_models())
def test_every_preset_fits_80_gb_at_its_world_size(capsys: pytest.CaptureFixture[str], name: str) -> None:
    entry = "ilql" if name.endswith("_ilql") else "ppo"
    found = answer(capsys, f"+conf={name}", f"algorithm={entry}", "cluster.gpu=a100")
    assert found["fits"], found["peak"]


@pytest.mark.parametrize(
    ("argv", "key", "data"),
    [
        (["cluster.gpuz=64"], "cluster.gpuz", {"names": ("cluster.gpus",)}),
        (["cluster.gpu=b100"], "cluster.gpu", {"value": "b100", "offers": {"cluster.gpu": list(GPUS)}}),
        (["clusters.gpus=64"], "clusters", {"offers": {"clusters": ["cluster"]}}),
        (["algorithm=pppo"], "algorithm", {"value": "pppo", "offers": {"algorithm": list(ALGORITHMS)}}),
        (["algorithm=rft", "rollout.n=8"], "rft.prompts", {"value": None}),
        (["--jason"], "--jason", {"names": ("--json",)}),
        (["html="], "html", {"names": ("html=plan.html",)}),
        (["cluster.gpus=${"], "cluster.gpus=${", {}),
        (["mfu=${.}"], "mfu=${.}", {}),
        (["json=\x1b[31m"], "json=\\x1b[31m", {}),
        ([*TOY, "cluster.gpus=3", "parallel.tp=2"], "parallel.tp", {"value": 2, "offers": {"parallel.tp": [1]}}),
        ([*TOY, "prompt_tokens=250"], "prompt_tokens", {"value": 250, "offers": {"prompt_tokens": [192]}}),
        ([*TOY, "response_tokens=65"], "response_tokens", {"value": 65, "offers": {"response_tokens": [64]}}),
    ],
)
def test_bad_input_ends_in_one_line_with_the_key_and_a_remedy(argv: list[str], key: str, data: dict[str, Any]) -> None:
    with refused(ConfigError, key=key, **data):
        plan.show(argv)


def test_the_page_lists_every_key() -> None:
    documented = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for leaf in leaves(PlanConfig):
        assert f"| `{leaf.key}` |" in documented
        assert leaf.doc in documented
        assert leaf.doc in plan.help_text()
