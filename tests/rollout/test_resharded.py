"""Generation in another layout than training's: the weights that arrive, the same tokens, and what a move costs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megarl.config.sections.model import EncoderConfig
from megarl.errors import ConfigError, InvariantError
from megarl.models.gpt import GPT
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.reshard import Reshard
from megarl.rollout.guided import guided
from megarl.rollout.requests import Rollout
from megarl.rollout.resharded import for_generation, parse_layout
from megarl.rollout.stored import load
from tests.e2e.runs import metrics, run_ppo
from tests.parallel.engines import batches, small_engine
from tests.refusals import assert_refusal, refused
from tests.rollout.test_generate import MODERATE, check_same, generator_of, some_requests
from tests.worlds import Worlds

SEED = 1  # of `small_engine`
T5 = {"position": "relative", "activation": "geglu", "encoder": EncoderConfig(num_layers=4, start_id=0)}
HEADS = {"value_head": True, "q_heads": 2}
CASES: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "PP2 to TP2": (2, {"pp": 2}, "tp2", {}),
    "TP2 to PP2": (2, {"tp": 2, "sequence_parallel": True}, "pp2", {"qkv_bias": True, "mlp_bias": True}),
    "PP2 to TP2, with heads": (2, {"pp": 2}, "tp2", {"heads": True}),
    "TP2xPP2 to DP4, tied": (4, {"tp": 2, "pp": 2}, "tp1", {"tie_embeddings": True}),
    "PP2 to TP2, encoder and decoder": (2, {"pp": 2}, "tp2", T5),
    "TP2 to PP2, encoder and decoder": (2, {"tp": 2, "sequence_parallel": True}, "pp2", T5),
    "CP2 to TP2": (2, {"cp": 2}, "tp2", {}),
    "CP2xTP2 to DP4": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}, "tp1", {}),
    "CP2xPP2 to TP2": (4, {"cp": 2, "pp": 2}, "tp2", {}),
    "PP2xDP2 to TP4, few key-value heads": (4, {"pp": 2}, "tp4", {"num_kv_heads": 2}),
}


def in_both(layout: dict[str, Any], wanted: str, model: dict[str, Any]) -> dict[str, Any]:
    """Rollouts in the training layout and in the other, before and after a step of training."""
    heads = HEADS if model.pop("heads", False) else {}
    engine = small_engine(layout, {**MODERATE, **model}, **heads)
    reshard = for_generation(engine, wanted)
    assert reshard is not None
    here, there = generator_of(engine), generator_of(reshard.engine)
    here.token_scorer = there.token_scorer = guided(1.0) if heads else GPT.logits
    found: dict[str, Any] = {"links": reshard.links, "weights": reshard.weight_bytes}
    torch.manual_seed(7)
    for name in ("first", "trained"):
        reshard.refresh()
        found[name] = here.generate(some_requests(14)), there.generate(some_requests(14))
        if name == "first":
            moved = {key: value.detach().clone() for key, value in reshard.engine.parameters()}
            reshard.engine.models[0].initialise(reshard.grid, SEED)
            found["as drawn"] = all(torch.equal(moved[key], value) for key, value in reshard.engine.parameters())
            found["received"] = {key: value.numel() * value.element_size() for key, value in moved.items()}
            engine.train_step(batches(engine, 0), cross_entropy, count_targets)
            engine.apply_gradients()
            for model in engine.models:
                model.move_targets(0.5)
    found["arrived"] = engine.digests() == reshard.engine.digests()
    there.close()
    reshard.close()
    return found


@pytest.mark.parametrize("name", CASES)
def test_another_layout_has_the_same_weights_and_draws_the_same_tokens(name: str, worlds: Worlds) -> None:
    size, layout, wanted, model = CASES[name]
    ranks = worlds.run(size, in_both, layout, wanted, model)
    for found in ranks:
        assert found["as drawn"]
        assert found["arrived"]
        for here, there in (found["first"], found["trained"]):
            check_same(there, here, name)
    responses: list[list[Rollout]] = [ranks[0][when][0] for when in ("first", "trained")]
    assert responses[0] != responses[1], "nothing was learnt, so the second move proves nothing"
    for rank, found in enumerate(ranks):
        arriving = sum(count for (_, target), count in found["links"].items() if target == rank)
        assert arriving == found["weights"][rank] == sum(found["received"].values())
    if name == "PP2 to TP2":  # what the upper stage has comes from there, whole or a half of it
        for rank, found in enumerate(ranks):
            above = ("decoder.layers.2.", "decoder.layers.3.", "decoder.final", "output_layer")
            upper = sum(count for key, count in found["received"].items() if key.startswith(above))
            assert found["links"][1, rank] == upper
            assert found["links"][0, rank] == sum(found["received"].values()) - upper


def error_of(layout: dict[str, Any], wanted: str, model: dict[str, Any]) -> ConfigError | None:
    engine = small_engine(layout, model, train=False)
    try:
        for_generation(engine, wanted)
    except ConfigError as problem:
        return problem
    return None


@pytest.mark.parametrize(
    ("layout", "wanted", "model", "names"),
    [
        ({"pp": 2, "vpp": 2}, "tp2", {}, ("parallel.vpp=null",)),
        ({}, "pp2", {"tie_embeddings": True}, ("embedding",)),
        ({}, "tp2", {"num_heads": 1}, ("rollout.engine.layout=tp2", "attention heads")),
        ({}, "pp2", {**T5, "num_layers": 6}, ("rollout.engine.layout=pp2", "4 + 6 layers")),
        ({}, "tp3", {}, ("rollout.engine.layout=tp3", "3 processes")),
        ({}, "tp2,pp1", {}, ("rollout.engine.layout=tp2,pp1", "tp2xpp2", "null")),
    ],
)
def test_what_cannot_be_moved_is_refused_by_every_rank(
    layout: dict[str, Any], wanted: str, model: dict[str, Any], names: tuple[str, ...], worlds: Worlds
) -> None:
    for error in worlds.run(2, error_of, layout, wanted, model):
        assert isinstance(error, ConfigError)
        assert_refusal(error, names=names)


def test_the_layout_of_training_is_no_other(worlds: Worlds) -> None:
    assert worlds.run(2, error_of, {"pp": 2}, "pp2", {}) == [None, None]


def shown() -> str:
    engine = small_engine({"pp": 2}, train=False)
    reshard = for_generation(engine, "TP2")
    assert reshard is not None
    return reshard.table()


def test_the_cost_is_a_table_before_anything_moves(worlds: Worlds) -> None:
    table = worlds.run(2, shown)[0]
    assert table.startswith("weights from PP2 to TP2: ")
    assert [line.split()[:2] for line in table.splitlines()[2:6]] == [["0", "0"], ["1", "0"], ["0", "1"], ["1", "1"]]


def test_a_layout_is_written_as_it_is_shown() -> None:
    assert str(parse_layout("TP2xPP2", 8)) == "TP2xPP2xDP2"
    for text in ("", "tp0", "dp2", "tp2xtp2", "2"):
        with refused(ConfigError, key="rollout.engine.layout", value=text, offers={"rollout.engine.layout": [None]}):
            parse_layout(text, 4)
    with refused(ConfigError, key="rollout.engine.layout", value="tp3", offers={}):
        parse_layout("tp3", 4)


def run_without_second_copy(run_dir: Path, *overrides: str) -> tuple[InvariantError, int]:
    """The error of a run whose second layout gets weights once, and the number of copies that it asked for."""
    plain, asked = Reshard.refresh, 0

    def refresh(self: Reshard) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            plain(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Reshard, "refresh", refresh)
        with pytest.raises(InvariantError) as found:
            run_ppo(run_dir, *overrides)
    return found.value, asked


def test_a_run_of_ppo_is_the_same_when_it_generates_in_another_layout(worlds: Worlds, tmp_path: Path) -> None:
    """Phase for phase: what the second phase draws, the first has trained. Had its weights not been copied, the run
    would have ended there."""
    runs = {"plain": [], "moved": ["rollout.engine.layout=tp2", "rollout.engine.cuda_graphs=true"]}
    for name, settings in runs.items():
        dump = f"rollout.dump={tmp_path / name / 'dump'}"
        worlds.run(2, run_ppo, tmp_path / name, "parallel.pp=2", dump, *settings)
    for phase in ("train-000000.jsonl", "train-000001.jsonl"):
        plain, moved = (load(tmp_path / name / "dump" / phase) for name in runs)
        check_same(moved, plain, phase)
    losses = [metrics(tmp_path / name, "policy/loss", "value/loss", "train/grad_norm") for name in runs]
    assert len(losses[0]) == 2
    assert losses[1] == [pytest.approx(phase, rel=1e-4, abs=2e-6) for phase in losses[0]]
    dump = tmp_path / "stale" / "dump"
    stale = ["parallel.pp=2", "rollout.engine.layout=tp2", f"rollout.dump={dump}"]
    for error, asked in worlds.run(2, run_without_second_copy, tmp_path / "stale", *stale):
        offers = {"rollout.engine.layout": [None], "health.invariants": ["warn"]}
        assert_refusal(
            error, key="weights_arrived", offers=offers, names=("in phase 2", "PP2", "TP2", "decoder.layers")
        )
        assert (error.exit_code, asked) == (3, 2)
    assert [path.name for path in dump.glob("train-*")] == ["train-000000.jsonl"], "the second phase sampled nothing"
