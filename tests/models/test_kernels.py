"""Transformer Engine's and Apex's kernels, by stand-ins: chosen, trained, resumed. The whole is in the gates."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megarl.errors import UnavailableError
from megarl.models import kernels
from tests.e2e.runs import assert_same_bits, final_tensors
from tests.fakes import WITH_APEX, WITH_TE
from tests.fakes.runs import chosen, course, newest, resumed, train
from tests.gated import gated
from tests.refusals import refused
from tests.worlds import Worlds

TE = ("TEColumnParallelLinear", "TENorm", "TENorm")
APEX = ("ColumnParallelLinear", "FusedLayerNorm", "RMSNorm")
PLAIN = ("ColumnParallelLinear", "LayerNorm", "RMSNorm")
TE_MODULES = ["transformer_engine", "transformer_engine.pytorch"]
APEX_MODULES = ["apex", "apex.normalization"]


@pytest.fixture(scope="module")
def image() -> Iterator[Worlds]:
    """Processes that have both packages, as in the Docker image."""
    worlds = Worlds(WITH_TE, WITH_APEX)
    yield worlds
    worlds.close()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("transformer_engine", "apex"):
        monkeypatch.setitem(sys.modules, package, None)
    kernels._kernels.cache_clear()
    yield
    kernels._kernels.cache_clear()


def test_the_fastest_kernels_that_are_there_are_chosen(image: Worlds) -> None:
    assert image.run(1, chosen, "auto") == image.run(1, chosen, "te") == [TE]
    assert image.run(1, chosen, "apex") == [APEX]
    assert image.run(1, chosen, "torch") == [PLAIN]


@pytest.mark.usefixtures("nothing_installed")
def test_without_any_torch_is_taken_and_the_others_are_refused_in_one_line() -> None:
    assert chosen("auto") == PLAIN
    for kind, package in (("te", "transformer_engine"), ("apex", "apex")):
        offers: dict[str, list[str]] = {"parallel.kernels": ["torch"]}
        with refused(UnavailableError, key="parallel.kernels", value=kind, offers=offers, names=(package,)):
            chosen(kind)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(("kind", "names"), [("te", TE_MODULES), ("apex", APEX_MODULES)])
def test_a_package_that_megatron_could_not_import_is_not_taken(
    kind: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes are there all the same, and refuse to be made."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert chosen("auto") == PLAIN
    with refused(UnavailableError, key="parallel.kernels", value=kind, names=("Megatron",)):
        chosen(kind)


@pytest.mark.usefixtures("nothing_installed")
def test_a_broken_package_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("an undefined symbol\n  in a library")

    monkeypatch.setattr(kernels, "_transformer_engine", broken)
    with refused(UnavailableError, key="parallel.kernels", value="te", names=("an undefined symbol in a library",)):
        chosen("te")


@pytest.mark.gate
def test_apex_trains_as_torch_does(image: Worlds, tmp_path: Path) -> None:
    case = ("gpt2", "TP2+SP")
    plain, apex = (train(image, kind, tmp_path / kind, *case) for kind in ("torch", "apex"))
    assert course(apex) == pytest.approx(course(plain), rel=1e-5)


def test_kernels_train_alike_and_go_on_bit_for_bit(image: Worlds, tmp_path: Path) -> None:
    """Through Megatron's own wrappers, over two processes with sequence parallelism."""
    case = ("gpt2", "TP2+SP")
    plain, unbroken = (train(image, kind, tmp_path / kind, *case) for kind in ("torch", "auto"))
    assert len(course(plain)) == 12
    assert course(unbroken) == pytest.approx(course(plain), rel=1e-5)
    again = resumed(image, "te", tmp_path / "again", *case, unbroken)
    assert_same_bits(final_tensors(again), final_tensors(unbroken))
    assert course(again) == course(unbroken)[6:]


@pytest.mark.parametrize("optimizer", gated(["adamw", "adamw8bit", "muon", "rmsprop"], ["muon", "rmsprop"]))
def test_a_run_without_the_packages_goes_on_with_them_and_back(
    optimizer: str, worlds: Worlds, image: Worlds, tmp_path: Path
) -> None:
    """Their Adam counts its steps elsewhere than torch's, and has other settings in its groups."""
    case = ("gpt2", "one")
    kind = f"optim.kind={optimizer}"
    unbroken = train(worlds, "torch", tmp_path / "torch", *case, kind)
    there = resumed(image, "te", tmp_path / "there", *case, unbroken, kind)
    assert course(there) == pytest.approx(course(unbroken)[6:], rel=1e-5)
    further = ["trainer.max_steps=9", kind]
    expected = train(worlds, "torch", unbroken, *case, *further)
    back = train(worlds, "torch", tmp_path / "back", *case, f"run.resume={newest(there)}", *further)
    assert course(back) == pytest.approx(course(expected)[-6:], rel=1e-5)
