"""Small runs of supervised fine-tuning with each kind of kernels, in worlds that have the package it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.checkpoint import find
from megarl.models.kernels import kernels
from megarl.parallel.device import GPU, assumed
from tests.e2e.runs import metrics, run_ppo, run_sft
from tests.fakes import WITH_APEX, WITH_TE
from tests.worlds import Worlds

FOLDERS: dict[str, tuple[str, ...]] = {"torch": (), "te": (WITH_TE,), "apex": (WITH_APEX,)}
SHAPES = {
    "llama": [],
    "gpt2": [
        "model.position=learned",
        "model.norm=layernorm",
        "model.activation=gelu_tanh",
        "model.tie_embeddings=true",
        "model.qkv_bias=true",
        "model.out_bias=true",
        "model.mlp_bias=true",
    ],
    # Norms inside attention, one key-value head for two ranks, one norm that feeds two branches.
    "odd": [
        "model.norm=layernorm",
        "model.qk_norm=true",
        "model.num_kv_heads=1",
        "model.parallel_residual=one_norm",
    ],
}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "TP2+SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pp=2"]),
    "DP2": (2, ["trainer.micro_batch_size=2"]),
    "PP2+vpp2": (2, ["parallel.pp=2", "parallel.vpp=2", "trainer.micro_batch_size=2"]),
}
SIX = [
    "trainer.max_steps=6",
    "checkpoint.every=3",
    "checkpoint.keep_last=9",
    "model.hidden_size=32",
    "data.seq_length=32",
    "data.eval=[]",
    "optim.schedule=constant",
]


def chosen(kind: str) -> tuple[str, ...]:
    """Names of the classes that stand for a layer's column-parallel product, LayerNorm and RMSNorm on a GPU."""
    with assumed(GPU):
        found = kernels(kind)
    return tuple(each.__name__ for each in (found.column, found.layernorm, found.rmsnorm))


def sft_as_on_a_gpu(run_dir: Path, *overrides: str) -> None:
    with assumed(GPU):
        run_sft(run_dir, *SIX, *overrides)


def ppo_as_on_a_gpu(run_dir: Path, *overrides: str) -> None:
    with assumed(GPU):
        run_ppo(run_dir, *overrides)


def train(worlds: Worlds, kind: str, run_dir: Path, shape: str, layout: str, *overrides: str) -> Path:
    """Six steps with the given kernels, and checkpoints after three and six. Returns the run's folder."""
    size, parallel = LAYOUTS[layout]
    settings = [*SHAPES[shape], *parallel, f"parallel.kernels={kind}", *overrides]
    worlds.run(size, sft_as_on_a_gpu, run_dir, *settings)
    return run_dir


def course(run_dir: Path) -> list[Any]:
    """Loss and gradient norm of every step."""
    return [value for row in metrics(run_dir, "train/loss", "train/grad_norm") for value in row]


def resumed(worlds: Worlds, kind: str, run_dir: Path, shape: str, layout: str, source: Path, *overrides: str) -> Path:
    """The last three steps again, from another run's checkpoint after three."""
    return train(worlds, kind, run_dir, shape, layout, f"run.resume={after_three_steps(source)}", *overrides)


def after_three_steps(run_dir: Path) -> Path:
    return find(run_dir / "checkpoints")[0]


def newest(run_dir: Path) -> Path:
    return find(run_dir / "checkpoints")[-1]
