"""Tables as they were before each test, and packages that look installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megarl.config.algorithms import ALGORITHMS

Install = Callable[..., None]


@pytest.fixture(autouse=True)
def tables_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    algorithms = dict(ALGORITHMS)
    families = sys.modules.get("megarl.models.exchange.families")
    before = (dict(families.FAMILIES), dict(families._ORIGINS)) if families else ({}, {})
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(algorithms)
    if families is not None:
        for table, content in zip((families.FAMILIES, families._ORIGINS), before, strict=True):
            table.clear()
            table.update(content)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a folder of `sys.path` that contains a package's metadata."""

    def installed(package: str, **groups: str) -> None:
        folder = tmp_path / "site" / package
        info = folder / f"{package}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        lines = [f"[megarl.{group}]\n{text}\n" for group, text in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(folder)

    return installed
