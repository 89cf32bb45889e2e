"""What several gates need: environments to compare with, and a browser."""

import importlib.util
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gates.environments import install, make_environment

TRL = "trl==1.16.0"
PEFT = ("peft==0.21.2", "transformers", "torch")
NO_BROWSER = [
    *(name for name in ("chromium", "chromedriver") if shutil.which(name) is None),
    *(name for name in ("selenium",) if importlib.util.find_spec(name) is None),
]


@pytest.fixture(scope="session")
def trl_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with TRL; `MEGARL_GATE_TRL` names the interpreter of one that is there already."""
    there = os.environ.get("MEGARL_GATE_TRL")
    return Path(there) if there is not None else _installed(tmp_path_factory.mktemp("trl"), TRL)


@pytest.fixture(scope="session")
def peft_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with PEFT; `MEGARL_GATE_PEFT` names the interpreter of one that is there already. Without it, the
    one that `MEGARL_GATE_TRL` names is used, if it has PEFT."""
    there = os.environ.get("MEGARL_GATE_PEFT")
    if there is not None:
        return Path(there)
    trls = os.environ.get("MEGARL_GATE_TRL")
    if trls is not None and subprocess.run([trls, "-c", "import peft"], capture_output=True).returncode == 0:
        return Path(trls)
    return _installed(tmp_path_factory.mktemp("peft"), *PEFT)


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which checks how accessible a page is."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    packed = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, text=True, timeout=120)
    if packed.returncode:
        pytest.skip(f"npm cannot fetch axe-core: {packed.stderr.strip()[:200]}")
    with tarfile.open(next(folder.glob("axe-core-*.tgz"))) as archive:
        file = archive.extractfile("package/axe.min.js")
        assert file is not None
        return file.read().decode()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by selenium; skips the test where either is missing."""
    if NO_BROWSER:
        pytest.skip(f"{', '.join(NO_BROWSER)} not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def _installed(folder: Path, *requirements: str) -> Path:
    """The interpreter of a new environment with some packages; skips the test if they cannot be installed."""
    python = make_environment(folder / "venv")
    try:
        install(python, *requirements)
    except (AssertionError, subprocess.TimeoutExpired) as problem:
        pytest.skip(f"{requirements[0]} cannot be installed here: {str(problem)[-500:]}")
    return python
