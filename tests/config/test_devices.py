"""A run on the CPU sees no GPU, or says that it cannot look away."""

import os
import sys
from types import SimpleNamespace

import pytest

from megarl.config.devices import VISIBLE, hide_gpus
from megarl.errors import ConfigError


def torch_with(gpus: int) -> SimpleNamespace:
    return SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpus > 0))


def test_a_run_on_the_cpu_hides_gpus_before_torch_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    hide_gpus("cpu")
    assert os.environ[VISIBLE] == ""


@pytest.mark.parametrize("accelerator", ["auto", "gpu"])
def test_other_runs_see_what_they_saw(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    hide_gpus(accelerator)
    assert os.environ[VISIBLE] == "0,1"


def test_a_gpu_that_is_in_use_already_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.setitem(sys.modules, "torch", torch_with(gpus=1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^trainer\.accelerator=cpu, but .* CUDA_VISIBLE_DEVICES='' .*$"):
        hide_gpus("cpu")
    monkeypatch.setitem(sys.modules, "torch", torch_with(gpus=0))  # type: ignore[arg-type]
    hide_gpus("cpu")
