"""One Slurm of two nodes for all tests here, and one of three for those that lose a node.

A machine without Slurm skips them, and says so at the end.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing

_skipped = False


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    yield from _cluster(tmp_path_factory, 2)


@pytest.fixture
def three_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of one test's own, which may lose some."""
    yield from _cluster(tmp_path_factory, 3)


def _cluster(tmp_path_factory: pytest.TempPathFactory, nodes: int) -> Iterator[Cluster]:
    global _skipped
    lacking = missing()
    if lacking:
        _skipped = True
        pytest.skip(f"no Slurm: {', '.join(lacking)}")
    folder = tmp_path_factory.mktemp("slurm")
    for path in (folder, *folder.parents):  # munged, as a user of its own, must get to its socket
        if path.stat().st_mode & 0o5 != 0o5 and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    cluster = Cluster(folder, nodes)
    try:
        yield cluster
    finally:
        cluster.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.write_sep(
            "!", f"SLURM TESTS WERE SKIPPED: this machine lacks {', '.join(missing())}", red=True
        )
        terminalreporter.write_line("apt-get install slurm-wlm munge    as root, then run them again")
