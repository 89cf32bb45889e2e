"""examples/notebook.ipynb, as a kernel runs it: training with its panel, and a session over two processes."""

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.doc_links import ROOT


def texts(outputs: list[Any], kind: str) -> list[str]:
    """The plain text of a cell's outputs of a kind."""
    found = [output for output in outputs if output["output_type"] == kind]
    return [output["text"] if kind == "stream" else output["data"]["text/plain"] for output in found]


@pytest.mark.gate
def test_the_notebook_trains_with_a_panel_and_runs_a_loop_over_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra dev)")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (it comes with nbclient)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra dev)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    client.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    _, trained, looped = [cell["outputs"] for cell in book.cells if cell["cell_type"] == "code"]

    (panel,) = texts(trained, "display_data")  # one, which was updated
    assert "phase 4/4" in panel
    assert "score" in panel
    assert "response  " in panel
    (history,) = texts(trained, "execute_result")
    assert len(ast.literal_eval(history)) == 4

    printed = "".join(texts(looped, "stream"))
    assert printed.count("score ") == 2
    assert texts(looped, "display_data") == []
