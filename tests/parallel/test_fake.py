"""Ranks of worlds that are not there."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megarl.config.sections.model import ModelConfig
from megarl.errors import UnavailableError
from megarl.models.config import GPTConfig
from megarl.models.gpt import GPT
from megarl.parallel.fake import fake_world, rank_of
from megarl.parallel.initialise import is_sharded
from megarl.parallel.layout import Layout
from tests.refusals import refused


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No process group, whatever an earlier test of this process has left."""
    if dist.is_initialized():
        dist.destroy_process_group()
    yield
    assert not dist.is_initialized()


def test_a_rank_has_the_coordinates_that_it_was_asked_for() -> None:
    layout = Layout(tp=2, pp=4, dp=8)
    for coordinates in ({}, {"tp": 1}, {"dp": 7}, {"pp": 3}, {"tp": 1, "dp": 5, "pp": 2}):
        with fake_world(layout, rank_of(layout, **coordinates)) as grid:
            assert (grid.tp_rank, grid.dp_rank, grid.pp_rank) == tuple(
                coordinates.get(axis, 0) for axis in ("tp", "dp", "pp")
            )


def test_a_live_world_is_not_disturbed() -> None:
    with (
        fake_world(Layout()),
        refused(UnavailableError, key="process group"),
        fake_world(Layout(tp=2)),
    ):
        pass


def test_megatrons_random_states_of_a_gpu_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU is visible, Megatron's tracker asks CUDA for a generator of a device called "meta"."""
    from megatron.core.tensor_parallel import random

    def cuda(*_: object, **__: object) -> None:
        raise TypeError("tuple indices must be integers or slices, not torch.device")

    for owner, name in ((random, "_get_cuda_rng_state"), (random, "_set_cuda_rng_state")):
        monkeypatch.setattr(owner, name, cuda)
    monkeypatch.setattr(random.CudaRNGStatesTracker, "add", lambda self, name, seed: cuda())
    with fake_world(Layout(tp=2)) as grid:
        assert grid.random_state()["tracked"]
    assert random._get_cuda_rng_state is cuda


def test_everything_is_put_back() -> None:
    from megarl.parallel import cpu

    cpu.install()
    before = (torch.cuda.current_device, torch.Tensor.type, torch.get_rng_state())
    with fake_world(Layout(tp=4)):
        assert torch.cuda.current_device() == torch.device("meta")
    with pytest.raises(ZeroDivisionError), fake_world(Layout(tp=4)):
        raise ZeroDivisionError
    assert (torch.cuda.current_device, torch.Tensor.type) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.empty(1).device.type == "cpu"


def global_counts(layout: Layout, model: ModelConfig, ranks: list[int]) -> dict[str, int]:
    """Elements of every parameter of the whole model, gathered from what each rank holds of it."""
    found: dict[str, int] = {}
    config = GPTConfig.build(model, layout, vocab_size=101, kernels="torch")
    for rank in ranks:
        with fake_world(layout, rank) as grid:
            parts = range(layout.vpp) if layout.vpp > 1 else [None]
            chunks = [
                GPT(
                    config,
                    grid,
                    pre_process=grid.is_first_stage and not part,
                    post_process=grid.is_last_stage and part in (None, layout.vpp - 1),
                    vp_stage=part,
                    heads=("lm", "value", "q", "q"),
                )
                for part in parts
            ]
            for chunk in chunks:
                for name, parameter in chunk.global_names():
                    assert parameter.device.type == "meta", name
                    tied_copy = name.startswith("embedding") and not grid.is_first_stage
                    if not tied_copy and (is_sharded(parameter) or grid.tp_rank == 0):
                        found[name] = found.get(name, 0) + parameter.numel()
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2, dp=2), Layout(tp=4, sequence_parallel=True), Layout(pp=2, vpp=2)], ids=str
)
def test_the_parts_of_one_replica_are_the_model(layout: Layout, tied: bool) -> None:
    model = ModelConfig(num_layers=4, hidden_size=32, max_positions=16, tie_embeddings=tied)
    replica = [rank_of(layout, tp=tp, pp=pp) for tp in range(layout.tp) for pp in range(layout.pp)]
    assert global_counts(layout, model, replica) == global_counts(Layout(), model, [0])


FAMILIES = {
    "gpt2": {"position": "learned", "norm": "layernorm", "tie_embeddings": True, "mlp_bias": True, "qkv_bias": True},
    "opt": {"position": "learned", "position_offset": 2, "norm": "layernorm", "activation": "relu"},
    "gptj": {"parallel_residual": "one_norm", "norm": "layernorm", "lm_head_bias": True, "rope_interleaved": True},
    "qwen3": {"qk_norm": True, "num_kv_heads": 2, "sliding_window": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", [("lm",), ("lm", "value"), ("lm", "q", "q")], ids=["plain", "value", "q"])
def test_a_model_lies_on_its_grids_device_whatever_the_default_is(family: str, heads: tuple[str, ...]) -> None:
    """On a GPU nothing is there by default: what megarl or Megatron makes without a device would stay on the CPU."""
    shape = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, **FAMILIES[family])
    with fake_world(Layout(tp=2), default_device=False) as grid:
        model = GPT(GPTConfig.build(shape, grid.layout, vocab_size=50), grid, heads=heads)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        elsewhere = [name for name, tensor in tensors if tensor.device.type != "meta"]
    assert elsewhere == []
