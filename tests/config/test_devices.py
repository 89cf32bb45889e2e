"""A run on the CPU sees no GPU, or says that it cannot look away."""

import os
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from megarl.config.devices import VISIBLE, hide_gpus
from megarl.errors import ConfigError
from megarl.parallel import cpu
from tests.refusals import refused


def torch_with(gpus: int) -> SimpleNamespace:
    return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpus > 0))


def test_a_run_on_the_cpu_hides_gpus_before_torch_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with hide_gpus("cpu"):
        assert os.environ[VISIBLE] == ""


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_other_runs_see_what_they_saw(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    with hide_gpus(accelerator):
        assert os.environ[VISIBLE] == "0,1"


@pytest.mark.parametrize("before", [None, "0,1"])
@pytest.mark.parametrize("fails", [True, False])
def test_the_environment_is_afterwards_as_it_was(
    before: str | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.setattr(cpu, "installed", lambda: False)
    if before is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = before
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with suppress(ValueError), hide_gpus("cpu"):
        if fails:
            raise ValueError
    assert os.environ.get(VISIBLE) == before


def test_a_process_whose_megatron_was_changed_for_a_cpu_sees_no_gpu_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(cpu, "installed", lambda: True)
    with hide_gpus("cpu"):
        pass
    assert os.environ[VISIBLE] == ""


def test_a_gpu_that_is_in_use_already_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.setitem(sys.modules, "torch", torch_with(gpus=1))  # type: ignore[arg-type]
    with (
        refused(
            ConfigError,
            key="trainer.accelerator",
            value="cpu",
            offers={"trainer.accelerator": ["gpu"]},
            names=(VISIBLE,),
        ),
        hide_gpus("cpu"),
    ):
        pass
    monkeypatch.setitem(sys.modules, "torch", torch_with(gpus=0))  # type: ignore[arg-type]
    with hide_gpus("cpu"):
        pass
