"""The steps of docker/Dockerfile that need no container engine, in fresh environments."""

import os
import sys
from pathlib import Path

import pytest

from tests.docker.test_dockerfile import PYTHON_OF_NGC, arguments, installing
from tests.gates.environments import ROOT, make_environment_of, resolved, run
from tools.versions import COMPILED_AGAINST, normal, read_lock

UNSEEN = ["PIP_CONSTRAINT", "MEGARL_SELFTEST", "MEGARL_STATUS_FILE"]
# Torch and numpy of the image, and the others of one of November 2025: several are too old for megarl's requirements.
OF_THE_IMAGE = {
    "torch": "2.13.0a0+8145d630e8.nv26.06",
    "numpy": "2.1.0",
    "protobuf": "6.33.0",
    "packaging": "25.0",
    "typing_extensions": "4.15.0",
    "fsspec": "2025.9.0",
    "pillow": "12.0.0",
    "click": "8.3.0",
}


def listed(python: Path, folder: Path) -> dict[str, str]:
    lines = run(python, "-m", "pip", "list", "--format=freeze", cwd=folder, timeout=300).stdout.splitlines()
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}


@pytest.mark.gate
def test_the_cpu_images_steps_give_an_environment_that_trains(tmp_path: Path) -> None:
    """TORCH_INDEX says, as for make, where the CPU build of torch is; without it, pip's own index has to have it."""
    done = run(
        *("bash", ROOT / "docker" / "try_cpu.sh", tmp_path / "image"),
        cwd=tmp_path,
        timeout=1800,
        without=UNSEEN,
        PYTHON=sys.executable,
        TORCH_INDEX=os.environ.get("TORCH_INDEX", ""),
    )
    told = done.stdout
    assert f"megarl is {tmp_path}/image/cpu/lib" in told
    tested, listing, preset = "the layout gives the same numbers", "usage: python -m megarl.train_sft", "num_layers: 44"
    assert -1 < told.find(tested) < told.find(listing) < told.find(preset)
    _, pins = read_lock((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    pinned = {name: line.partition("==")[2] for name, line in pins.items()}
    installed = listed(tmp_path / "image" / "cpu" / "bin" / "python", tmp_path)
    found = {name: version.partition("+")[0] for name, version in installed.items()}
    assert {"tensorboard", "wandb", "megatron-core"} <= set(found)
    others = {name: version for name, version in found.items() if pinned.get(name) != version}
    assert set(others) <= {"megarl", "pip", "setuptools"}


@pytest.mark.gate
def test_the_gpu_images_pins_can_be_installed_and_leave_torch_numpy_and_protobuf(tmp_path: Path) -> None:
    python = make_environment_of(PYTHON_OF_NGC, tmp_path / "venv", OF_THE_IMAGE)
    named = installing("gpu").partition("pins.txt")[2].split("&&")[0].split()
    pins = tmp_path / "pins.txt"
    run(python, ROOT / "tools" / "versions.py", "constrain", pins, *named, cwd=tmp_path, timeout=60)
    megatron = f"megatron-core=={arguments()['MEGATRON_CORE_VERSION']}"
    new = resolved(python, "--constraint", pins, megatron, ROOT, "tensorboard", "wandb", without=UNSEEN)
    _, locked = read_lock((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert {name: f"{name}=={new[name]}" for name in named} == {name: locked[name] for name in named}
    assert f"megatron-core=={new['megatron-core']}" == megatron
    assert not set(new) & set(COMPILED_AGAINST)
