"""Transformer Engine's and Apex's kernels, by stand-ins, in every layout: trained, saved, resumed, converted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.checkpoint import plain_content
from megarl.config.sections.model import ModelConfig
from megarl.models.config import GPTConfig
from megarl.models.gpt import GPT
from megarl.parallel.device import GPU, assumed
from megarl.parallel.fake import fake_world
from megarl.parallel.layout import Layout
from tests.e2e.runs import assert_same_bits, final_tensors, metrics
from tests.fakes.runs import (
    FOLDERS,
    LAYOUTS,
    SHAPES,
    after_three_steps,
    chosen,
    course,
    ppo_as_on_a_gpu,
    resumed,
    sft_as_on_a_gpu,
    train,
)
from tests.models.exchange.published import stored
from tests.models.test_kernels import APEX, PLAIN, TE
from tests.worlds import Worlds

pytestmark = pytest.mark.gate
OTHERS = ["te", "apex"]
PAIRS = [(first, then) for first in FOLDERS for then in FOLDERS if first != then]
EVERYWHERE = [(shape, layout) for shape in SHAPES for layout in LAYOUTS]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def installed() -> Iterator[dict[str, Worlds]]:
    """Processes that have one package, or none."""
    worlds = {kind: Worlds(*folders) for kind, folders in FOLDERS.items()}
    yield worlds
    for each in worlds.values():
        each.close()


@pytest.fixture(scope="module")
def unbroken(installed: dict[str, Worlds], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """unbroken(kind, shape, layout, *overrides): a run of six steps, made once."""

    @cache
    def trained(kind: str, shape: str, layout: str, *overrides: str) -> Path:
        return train(installed[kind], kind, tmp_path_factory.mktemp("run") / kind, shape, layout, *overrides)

    return trained


@pytest.mark.parametrize(("kind", "best"), [("torch", PLAIN), ("te", TE), ("apex", APEX)])
def test_the_fastest_kernels_are_those_of_the_package_that_is_there(
    kind: str, best: tuple[str, ...], installed: dict[str, Worlds]
) -> None:
    assert installed[kind].run(1, chosen, "auto") == installed[kind].run(1, chosen, kind) == [best]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("shape", "layout"), EVERYWHERE)
def test_losses_and_gradient_norms_are_those_of_torch(kind: str, shape: str, layout: str, unbroken: Train) -> None:
    expected = course(unbroken("torch", shape, layout))
    assert len(expected) == 12
    assert course(unbroken(kind, shape, layout)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(("shape", "layout"), EVERYWHERE)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    kind: str, shape: str, layout: str, installed: dict[str, Worlds], unbroken: Train, tmp_path: Path
) -> None:
    before = unbroken(kind, shape, layout)
    again = resumed(installed[kind], kind, tmp_path, shape, layout, before)
    assert_same_bits(final_tensors(again), final_tensors(before))
    assert course(again) == course(before)[6:]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("source", "target"), [("TP2+SP", "one"), ("one", "TP2+SP"), ("PP2+vpp2", "DP2")])
def test_a_checkpoint_goes_on_in_another_layout(
    source: str,
    target: str,
    shape: str,
    kind: str,
    installed: dict[str, Worlds],
    unbroken: Train,
    tmp_path: Path,
) -> None:
    before = unbroken(kind, shape, source)
    on = resumed(installed[kind], kind, tmp_path, shape, target, before)
    assert course(on) == pytest.approx(course(before)[6:], rel=1e-5)


@pytest.mark.parametrize(("first", "then"), PAIRS)
@pytest.mark.parametrize(("shape", "layout"), [("llama", "one"), ("gpt2", "TP2+SP"), ("odd", "DP2")])
def test_a_checkpoint_goes_on_with_other_kernels(
    first: str, then: str, shape: str, layout: str, installed: dict[str, Worlds], unbroken: Train, tmp_path: Path
) -> None:
    before = unbroken(first, shape, layout)
    on = resumed(installed[then], then, tmp_path, shape, layout, before)
    assert course(on) == pytest.approx(course(before)[6:], rel=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_frozen_layers_go_on_too(kind: str, installed: dict[str, Worlds], unbroken: Train, tmp_path: Path) -> None:
    """The first stage trains nothing, and has no optimizer."""
    frozen = "model.num_layers_unfrozen=1"
    before = unbroken(kind, "gpt2", "PP2", frozen)
    assert course(before) == pytest.approx(course(unbroken("torch", "gpt2", "PP2", frozen)), rel=1e-5)
    again = resumed(installed[kind], kind, tmp_path, "gpt2", "PP2", before, frozen)
    assert_same_bits(final_tensors(again), final_tensors(before))


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(kind: str, recompute: str, unbroken: Train) -> None:
    """With dropout, under sequence parallelism: the draws of the forward pass are repeated."""
    noisy = ["model.dropout=0.1"]
    plain = unbroken(kind, "gpt2", "TP2+SP", *noisy)
    again = unbroken(kind, "gpt2", "TP2+SP", *noisy, f"parallel.recompute={recompute}")
    assert course(again) == pytest.approx(course(plain), rel=1e-6)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_goes_on_bit_for_bit(
    kind: str, shape: str, installed: dict[str, Worlds], unbroken: Train, tmp_path: Path
) -> None:
    bf16 = "trainer.precision=bf16"
    before = unbroken(kind, shape, "TP2+SP", bf16)
    assert course(before) == pytest.approx(course(unbroken("torch", shape, "TP2+SP", bf16)), rel=0.05)
    again = resumed(installed[kind], kind, tmp_path, shape, "TP2+SP", before, bf16)
    assert_same_bits(final_tensors(again), final_tensors(before))


@contextmanager
def with_extra_state() -> Iterator[None]:
    os.environ["MEGARL_TEST_EXTRA_STATE"] = "1"
    try:
        yield
    finally:
        del os.environ["MEGARL_TEST_EXTRA_STATE"]


def sft_with_extra_state(run_dir: Path, *overrides: str) -> None:
    with with_extra_state():
        sft_as_on_a_gpu(run_dir, *overrides)


@pytest.mark.parametrize("shape", SHAPES)
def test_extra_state_that_is_not_empty_is_not_in_checkpoints(
    shape: str, installed: dict[str, Worlds], unbroken: Train, tmp_path: Path
) -> None:
    settings = [*SHAPES[shape], "parallel.kernels=te"]
    installed["te"].run(1, sft_with_extra_state, tmp_path / "first", *settings)
    resume = f"run.resume={after_three_steps(tmp_path / 'first')}"
    installed["te"].run(1, sft_with_extra_state, tmp_path / "again", *settings, resume)
    assert_same_bits(final_tensors(tmp_path / "again"), final_tensors(unbroken("te", shape, "one")))
    assert not [part.key for part in plain_content(after_three_steps(tmp_path / "first"))[1] if "extra" in part.key]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_model_goes_to_hugging_face_and_back(
    kind: str, shape: str, installed: dict[str, Worlds], tmp_path: Path
) -> None:
    """What a trained model is exported as is what torch's kernels give; read and written again, it does not change."""
    out = {each: tmp_path / f"{each}-hf" for each in ("torch", kind)}
    for each, folder in out.items():
        train(installed[each], each, tmp_path / each, shape, "TP2+SP", f"export.hf={folder}")
    weights, expected = stored(out[kind]), stored(out["torch"])
    assert weights.keys() == expected.keys()
    assert [key for key in weights if not torch.allclose(weights[key], expected[key], rtol=0, atol=1e-4)] == []
    still = ["trainer.max_steps=1", "checkpoint.every=null", "optim.lr=0", f"parallel.kernels={kind}"]
    back = [f"model.path={out[kind]}", f"export.hf={tmp_path / 'back'}"]
    installed[kind].run(1, sft_as_on_a_gpu, tmp_path / "still", *still, *back)
    assert_same_bits(stored(tmp_path / "back"), weights)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("layout", ["one", "TP2+SP", "PP2"])
def test_ppo_generates_and_trains_as_with_torch(
    kind: str, layout: str, installed: dict[str, Worlds], tmp_path: Path
) -> None:
    """Generation switches sequence parallelism off in the layers, and on again."""
    size, parallel = LAYOUTS[layout]
    found: dict[str, list[Any]] = {}
    for each in ("torch", kind):
        settings = [*parallel, "optim.lr=1e-4", f"parallel.kernels={each}"]
        installed[each].run(size, ppo_as_on_a_gpu, tmp_path / each, *settings)
        found[each] = metrics(tmp_path / each, "train/loss", "train/grad_norm")
    assert found["torch"]
    for mine, theirs in zip(found[kind], found["torch"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def elsewhere(kind: str, shape: dict[str, Any]) -> list[str]:
    """Names of tensors that are not on the grid's device where nothing is there by default."""
    dist.destroy_process_group()
    with assumed(GPU), fake_world(Layout(tp=2), default_device=False) as grid:
        model = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, **shape)
        config = GPTConfig.build(model, grid.layout, vocab_size=50, kernels=kind)
        gpt = GPT(config, grid, heads=("lm", "value"))
        tensors = [*gpt.named_parameters(), *gpt.named_buffers()]
        return [name for name, tensor in tensors if tensor.device.type != "meta"]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_model_lies_on_its_grids_device(kind: str, norm: str, installed: dict[str, Worlds]) -> None:
    """Megatron makes Apex's norms without a device."""
    assert installed[kind].run(1, elsewhere, kind, {"norm": norm, "position": "learned", "qk_norm": True}) == [[]]
