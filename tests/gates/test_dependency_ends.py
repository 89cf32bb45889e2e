"""The oldest and the newest Lightning and Hydra that pyproject.toml allows both carry whole runs."""

from pathlib import Path

import pytest

from tests.gates.environments import ROOT, install, make_environment, run

ENDS = {
    "oldest": ["lightning==2.4.*", "hydra-core==1.3.2"],
    "newest": ["lightning==2.6.*", "hydra-core==1.3.8"],
}
WHOLE_RUNS = "cut_in_two or command_line or TP2xPP2"


@pytest.mark.gate
@pytest.mark.parametrize("end", ENDS)
def test_whole_runs_work_with_the_ends_of_the_supported_versions(end: str, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "venv")
    install(python, "-e", str(ROOT), "pytest", "pytest-timeout", constraints=ENDS[end])
    versions = "import lightning, hydra; print(lightning.__version__, hydra.__version__)"
    found = run(python, "-c", versions, cwd=ROOT, timeout=300).stdout.split()[-2:]
    wanted = [pin.split("==")[1].removesuffix("*") for pin in ENDS[end]]
    assert all(have.startswith(want) for have, want in zip(found, wanted, strict=True)), found
    passed = run(
        *(python, "-m", "pytest", "tests/e2e", "-k", WHOLE_RUNS),
        *("-p", "no:cacheprovider", "--basetemp", tmp_path / "runs"),
        cwd=ROOT,
        timeout=1800,
    )
    assert " passed" in passed.stdout
