"""What the suite prints and draws of its results."""

from pathlib import Path

import pytest

from megarl.conformance import command
from megarl.conformance.compare import Difference
from megarl.conformance.features import Case
from megarl.conformance.running import FAILED, OK, REFUSED, Result
from megarl.conformance.settings import Suite
from tests.report.parsed import parse as tree_of

FAR = Difference("ppo", "parameters", 0.25, 1e-6, "decoder.<weight>")
NEAR = Difference("sft", "gradient norm", 1e-8, 1e-6, "the norm, step 2")
RESULTS = [
    Result(Case(("tp",)), OK, (NEAR,)),
    Result(Case(("cp",)), REFUSED, reason="parallel.cp=2 is not possible"),
    Result(Case(("tied",)), FAILED, reason="rank 1 ended without an answer"),
    Result(Case(("tp", "cp")), REFUSED, reason="parallel.cp=2 is not possible"),
    Result(Case(("tp", "tied")), FAILED, (NEAR, FAR), seconds=2.0),
    Result(Case(("cp", "tied")), OK, (NEAR,)),
]


def test_the_table_has_a_cell_for_each_pair() -> None:
    there, rows = command.grid(RESULTS)
    assert there == ["tp", "cp", "tied"]
    assert rows == [[OK], [REFUSED, REFUSED], [FAILED, OK, FAILED]]


def test_failures_and_refusals_are_printed_with_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    command.show(RESULTS, 3.0)
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if FAR.where in line)
    assert all(word in line for word in ("ppo", "parameters", "2.5e-01", "1.0e-06"))
    assert NEAR.where not in said
    assert "only=tp,tied" in said
    assert "rank 1 ended without an answer" in said
    assert said.count("parallel.cp=2 is not possible") == 1
    assert "2 of 6" in said.splitlines()[-1]


def suite_page(results: list[Result]) -> str:
    return command.page(Suite(), results, 3.0)


def test_the_page_is_written_where_the_settings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command.draw(Suite(), RESULTS, 3.0)
    assert not list(tmp_path.iterdir())
    command.draw(Suite(html="suite.html"), RESULTS, 3.0)
    assert command.verdict(RESULTS) in (tmp_path / "suite.html").read_text()


def test_the_page_links_each_cell_to_its_case() -> None:
    tree = tree_of(suite_page(RESULTS))
    identifiers = {each.attributes["id"] for each in tree.all() if "id" in each.attributes}
    cells = tree.all(id="pairs")[0].all("a")
    assert [cell.text() for cell in cells] == [OK, REFUSED, REFUSED, FAILED, OK, FAILED]
    assert {str(cell.attributes["href"])[1:] for cell in cells} <= identifiers
    failures = tree.all(id="failures")[0]
    assert FAR.where in failures.text()
    assert "rank 1 ended without an answer" in failures.text()
    assert [row.children[-1].text() for row in failures.all("tbody")[0].all("tr")] == ["same", "DIFFERENT"]
    assert len(tree.all(id="refused")[0].all("tbody")[0].all("tr")) == 1
    assert command.verdict(RESULTS) in tree.all("header")[0].text()


@pytest.mark.parametrize(("results", "code"), [(RESULTS, 1), (RESULTS[:2], 0)])
def test_the_exit_code_says_whether_a_case_fails(
    results: list[Result], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("megarl.conformance.running.run_here", lambda suite, finished: list(results))
    assert command.run(Suite()) == code
