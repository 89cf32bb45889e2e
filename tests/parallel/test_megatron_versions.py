"""Which releases of megatron-core are used, warned about and refused, and the names of Megatron that megarl touches."""

import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

import megarl.parallel.megatron_versions as versions
from megarl.errors import UnavailableError
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
Pretend = Callable[..., None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """pretend(release, triton=True): the installed release, and whether triton is there."""
    real, found = importlib.util.find_spec, object()
    monkeypatch.setattr("megarl.logging._seen", set())

    def now(release: str | None, triton: bool = True) -> None:
        monkeypatch.setattr(versions, "installed", lambda: release)
        answer: Callable[[str], Any] = lambda name: (found if triton else None) if name == "triton" else real(name)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", answer)

    return now


def test_the_installed_release_is_usable_and_has_every_name_that_megarl_touches() -> None:
    versions.refuse_unusable()
    versions.check_newer()
    assert versions.missing_names() == []


@pytest.mark.parametrize("release", ["0.15.3", "0.16.0", "0.9.1"])
def test_an_older_release_is_refused(release: str, pretend: Pretend) -> None:
    pretend(release)
    offers = {"megatron-core": [versions.OLDEST, versions.NEWEST]}
    with refused(UnavailableError, key="megatron-core", value=release, offers=offers):
        versions.refuse_unusable()


@pytest.mark.parametrize("release", ["0.18.0", "0.19.2", "0.20.0"])
def test_a_release_that_imports_triton_is_refused_without_it(release: str, pretend: Pretend) -> None:
    pretend(release, triton=False)
    with refused(UnavailableError, key="triton", names=("pip install triton",)):
        versions.refuse_unusable()
    pretend(release)
    versions.refuse_unusable()


def test_an_older_release_does_not_need_triton(pretend: Pretend) -> None:
    for release in ("0.16.1", "0.17.1", None):
        pretend(release, triton=False)
        versions.refuse_unusable()


def test_a_newer_release_is_warned_of_once(pretend: Pretend, caplog: pytest.LogCaptureFixture) -> None:
    pretend("0.20.0rc1")
    with caplog.at_level(logging.WARNING):
        versions.check_newer()
        versions.check_newer()
    (said,) = caplog.messages
    assert "0.20.0rc1" in said
    assert versions.NEWEST in said


def test_a_patch_of_a_tested_release_is_not_warned_of(pretend: Pretend, caplog: pytest.LogCaptureFixture) -> None:
    for release in ("0.16.9", "0.18.2", "0.19.7", None):
        pretend(release)
        versions.check_newer()
    assert caplog.messages == []


def test_a_newer_release_without_a_name_that_megarl_touches_is_refused(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(versions.NAMES, "megatron.core.nowhere", ("some_name",))
    pretend("0.19.2")
    versions.check_newer()
    pretend("0.20.0")
    where = "megatron.core.nowhere.some_name"
    with refused(UnavailableError, key="megatron-core", value="0.20.0", where=where):
        versions.check_newer()


def test_slices_are_received_in_place_from_0_17_on(pretend: Pretend) -> None:
    for release, in_place in (("0.16.1", False), ("0.17.0", True), ("0.19.2", True)):
        pretend(release)
        assert versions.receives_in_place() is in_place


def test_megatrons_notice_of_layouts_is_hidden_and_its_warnings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.distributed import distributed_data_parallel as ddp

    versions.hide_notices()
    versions.hide_notices()
    ddp.logger.warning("full_param_layout not provided with use_distributed_optimizer=True")
    ddp.logger.warning("something else")
    assert caplog.messages == ["something else"]


def test_a_program_ends_in_one_line_where_megatron_is_too_old(tmp_path: Path) -> None:
    """The import of the folder that imports Megatron refuses it, before Megatron's own imports can fail."""
    info = tmp_path / "megatron_core-0.15.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.3\n")
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    words = [sys.executable, "-m", "megarl.selftest", "steps=1"]
    done = subprocess.run(words, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "megatron-core 0.15.3" in done.stderr


def test_the_dependency_admits_the_tested_range_and_its_patches() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = (Requirement(text) for text in project["dependencies"] if text.startswith(versions.PACKAGE))
    major, minor = versions.NEWEST.split(".")[:2]
    assert str(wanted.specifier) in {f">={versions.OLDEST},<{major}.{int(minor) + 1}"} | {
        f"<{major}.{int(minor) + 1},>={versions.OLDEST}"
    }
