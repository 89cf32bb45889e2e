"""The gate: thousands of malformed inputs, none of which may end in anything but one clear line.

MEGARL_FUZZ_SEED=7 draws other cases, MEGARL_FUZZ_SCALE=3 three times as many, MEGARL_FUZZ_ONLY="models gpt2 0.12" runs
one of them with its traceback.
"""

from pathlib import Path

import pytest

from tests.gates.fuzz import (
    archives,
    checkpoints,
    commands,
    models,
    records,
    scorers,
    settings,
    surroundings,
    traces,
    words,
)
from tests.gates.fuzz.check import SCALE, SEED, check

# The timeout of the test itself must not use the signal that stops a case that hangs.
pytestmark = [pytest.mark.gate, pytest.mark.timeout(1200, method="thread")]
KINDS = {
    "settings": (settings.cases, 300),
    "records": (records.cases, 500),
    "words": (words.cases, 200),
    "models": (models.cases, 500),
    "archives": (archives.cases, 200),
    "checkpoints": (checkpoints.cases, 250),
    "traces": (traces.cases, 300),
    "scorers": (scorers.cases, 300),
    "surroundings": (surroundings.cases, 200),
    "workers": (scorers.workers, 20),
}


@pytest.fixture(autouse=True)
def short_panics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizers library prints a panic itself, with its whole stack where the environment asks for one."""
    monkeypatch.setenv("RUST_BACKTRACE", "0")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Well-formed files to spoil, a folder for each kind."""
    return tmp_path_factory.mktemp("stores")


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_input_ends_in_one_line(kind: str, stores: Path, tmp_path: Path) -> None:
    make, count = KINDS[kind]
    (stores / kind).mkdir()
    outcome = check(make(SEED, round(count * SCALE), stores / kind), tmp_path)
    print(f"{kind}: {outcome.report()}")  # noqa: T201 - pytest shows it when the test fails
    assert not outcome.faults, outcome.report()


def test_commands_end_in_documented_exit_codes(stores: Path, tmp_path: Path) -> None:
    (stores / "commands").mkdir()
    outcome = commands.check(commands.cases(SEED, round(48 * SCALE), stores / "commands"), tmp_path)
    print(f"commands: {outcome.report()}")  # noqa: T201
    assert not outcome.faults, outcome.report()
