"""Every algorithm on a mixture of experts: the same steps in every layout, and exact resume after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.every_algorithm import ALGORITHMS, SAVED, Kind, train, write_data
from tests.e2e.runs import final_tensors
from tests.gated import gated
from tests.worlds import Worlds

MODEL = [
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.ffn_size=48",
    "model.init_std=0.1",
    "model.experts.count=4",
    "model.experts.chosen=2",
    "model.experts.ffn_size=24",
    "model.experts.shared_ffn_size=16",
    "model.experts.balance=0.01",
    "model.experts.z_loss=0.001",
]
LAYOUTS = {
    "EP2": (2, ["parallel.ep=2"]),
    "TP2+SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xEP2": (4, ["parallel.tp=2", "parallel.ep=2"]),
    "PP2xEP2": (4, ["parallel.pp=2", "parallel.ep=2"]),
}
CASES = [(algorithm, layout) for algorithm in ALGORITHMS for layout in LAYOUTS]
FAST = [("ppo", "PP2xEP2")]
ROUTING = ("experts/balance_loss", "experts/z_loss", "experts/most_loaded", "experts/unused")


def run(run_dir: Path, algorithm: str, folder: Path, *overrides: str) -> None:
    replayed = ["rollout.engine.router_replay=true"] * (algorithm in ("ppo", "grpo"))
    train(run_dir, algorithm, folder, *MODEL, *replayed, *overrides)


@pytest.fixture(scope="module")
def kind(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    root = tmp_path_factory.mktemp("experts")
    write_data(root)
    return Kind(run, root, worlds)


@pytest.mark.parametrize(("algorithm", "layout"), gated(CASES, [case for case in CASES if case not in FAST]))
def test_every_algorithm_takes_the_same_steps_in_every_layout(
    algorithm: str, layout: str, kind: Kind, tmp_path: Path
) -> None:
    kind.check_steps(algorithm, LAYOUTS[layout], tmp_path, *ROUTING)


@pytest.mark.parametrize("algorithm", gated(["ppo", "dpo"], ["dpo"]))
def test_a_killed_run_of_shared_experts_ends_in_the_weights_of_the_unbroken_one(
    algorithm: str, kind: Kind, tmp_path: Path
) -> None:
    kind.train(tmp_path / "unbroken", algorithm, LAYOUTS["EP2"], *SAVED)
    kind.check_resume(algorithm, LAYOUTS["EP2"], tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("first", "then"),
    gated(
        [("EP2", "PP2xEP2"), ("EP2", "TP2+SP"), ("TP2xEP2", "EP2"), ("PP2", "EP2")],
        [("EP2", "PP2xEP2"), ("TP2xEP2", "EP2"), ("PP2", "EP2")],
    ),
)
def test_a_checkpoint_loads_in_another_layout(first: str, then: str, kind: Kind, tmp_path: Path) -> None:
    kind.train(tmp_path, "sft", LAYOUTS[first], *SAVED, "trainer.max_steps=1")
    kind.train(tmp_path, "sft", LAYOUTS[then], *SAVED)
    found, wanted = final_tensors(tmp_path), final_tensors(kind.alone("sft"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5, msg=name)  # a step is 1e-3 long
