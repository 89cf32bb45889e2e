"""The lines of the panel: what they show of a run, on any terminal."""

import io
import math
import re

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from megarl.callbacks.panel import Paper, cut, flow, panel, sparkline
from megarl.callbacks.run_progress import RunProgress, Shown, count, duration

PHASE = {
    "rollout/score": 0.8125,
    "rollout/kl": 0.0213,
    "rollout/entropy": 1.5,
    "train/loss": -0.0123,
    "train/grad_norm": 1.25,
    "train/lr": 1e-5,
    "perf/tokens_per_second": 12345.0,
    "perf/peak_memory_gb": 2.5,
}
SECONDS = {"generate": 41.2, "score": 0.25, "evaluate": 3.0, "shape": 0.001, "train": 20.0}


def phase(**changes: object) -> RunProgress:
    """A PPO run in its twelfth phase."""
    shown = Shown("phase 11/50", "What is\nthe way? " * 20, "It is \x1b[2Jleft. " * 20, 0.75)
    progress = RunProgress(
        11, 50, dict(PHASE), eta_s=3725.0, unit="phase", section="generate", seconds=SECONDS, memory_gb=1.75
    )
    progress.trend.extend(index / 40 for index in range(40))
    progress.evaluation = {"eval/score": 0.9, "eval/score_se": 0.1, "eval/response_tokens": 7.0}
    progress.sample = shown
    for name, value in changes.items():
        setattr(progress, name, value)
    return progress


def written(progress: RunProgress, width: int = 80, height: int = 24, encoding: str = "utf-8") -> list[str]:
    """What a terminal of this size shows. Rich breaks lines that are too wide."""
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    console.print(Text("\n").join(panel(progress, Paper(width, height, encoding))))
    return console.export_text().splitlines()


def test_a_phase_on_a_usual_terminal() -> None:
    lines = written(phase())
    assert re.fullmatch(r"phase 11/50  ━{11}─{41}  eta 1:02:05", lines[0])
    assert lines[1] == "now: generate  last phase:  generate 41s  score 0.25s  evaluate 3.00s"
    assert lines[2] == "shape 0.00s  train 20s"
    assert lines[3].startswith("score 0.8125  ▁▁▁▁▁▂▂")
    assert lines[3].endswith("▇▇█████  0 to 0.975")
    assert lines[4:6] == [
        "kl 0.0213  entropy 1.5000  loss -0.0123  grad norm 1.250  lr 1.00e-05",
        "12.3k tokens/s  memory 1.75 GB (peak 2.50)",
    ]
    assert lines[6] == "last evaluation:  score 0.9  response_tokens 7"
    assert lines[7] == "phase 11/50  score 0.75"
    assert lines[8].startswith("prompt    What is the way? What is")
    assert lines[10].startswith(r"response  It is \x1b[2Jleft.")
    assert lines[11].startswith("          ")
    assert lines[9].endswith("…")
    assert len(lines) == 12


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [1, 5, 12, 40, 79, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_all_fit_its_height(width: int, encoding: str) -> None:
    for progress in (phase(), phase(section="", took_s=1e6, sample=Shown("x", "日本語" * 300, "🙂" * 300))):
        for height in (4, 24):
            lines = panel(progress, Paper(width, height, encoding))
            assert len(lines) <= height
            assert max(cell_len(line.plain) for line in lines) <= max(width - 2, 1)
            assert written(progress, width, height, encoding)[: len(lines)] == [line.plain.rstrip() for line in lines]


def test_a_narrow_terminal_shows_the_same() -> None:
    lines = written(phase(), width=40)
    assert re.fullmatch(r"phase 11/50  ━+─+  eta 1:02:05", lines[0])
    shown = "  ".join(lines)
    for item in ("now: generate", "train 20s", "kl 0.0213", "memory 1.75 GB (peak 2.50)", "response_tokens 7"):
        assert item in shown
    assert sum("▇" in line for line in lines) == 1
    assert len(lines) <= 24


def test_a_low_terminal_does_without_the_sample() -> None:
    lines = written(phase(), height=10)
    assert lines[-1].startswith("last evaluation")
    assert len(written(phase(), height=5)) == 4


def test_a_terminal_without_block_characters_gets_ascii() -> None:
    sample = Shown("phase 1/50", "naïve ▇", "日本")
    lines = written(phase(sample=sample), encoding="ascii")
    assert "\n".join(lines).isascii()
    assert "###---" in lines[0]
    assert r"prompt    na\xefve \u2587" in lines


def test_what_an_algorithm_does_not_have_is_left_out() -> None:
    progress = RunProgress(7, 20, {"train/loss": 2.5, "train/lr": 1e-3}, unit="step")
    progress.trend.extend([3.0, 2.5])
    assert written(progress)[1:] == ["loss 2.5000  █▁  2.5 to 3", "lr 1.00e-03"]


def test_before_the_first_phase_it_is_said_what_is_waited_for() -> None:
    assert written(RunProgress(0, 9, unit="phase"))[1:] == ["waiting for the first phase"]


def test_the_last_state_has_the_time_that_the_run_took() -> None:
    lines = written(phase(step=50, section="", took_s=3600.0))
    assert re.fullmatch(r"phase 50/50  ━+  took 1:00:00", lines[0])
    assert lines[1].startswith("last phase:")


def test_without_a_limit_there_is_no_bar() -> None:
    assert written(RunProgress(7, None, {"train/loss": math.nan})) == ["step 7", "loss nan"]


def test_a_sparkline_reaches_from_the_lowest_to_the_highest_value() -> None:
    assert sparkline([0.0, 7.0, 3.5], ascii_only=False) == "▁█▅"
    assert sparkline([0.0, 7.0, 3.5], ascii_only=True) == "_#="
    assert sparkline([2.0, 2.0], ascii_only=False) == "▅▅"
    assert sparkline([1.0, math.nan, 2.0, math.inf], ascii_only=False) == "▁?█?"
    assert sparkline([math.nan], ascii_only=False) == "?"
    assert sparkline([-1.7e308, 1.7e308], ascii_only=False) == "▁█"


def test_items_flow_into_lines_and_too_many_end_in_an_ellipsis() -> None:
    assert flow(["ab", "cd", "ef"], 6, "...") == ["ab  cd", "ef"]
    assert flow(["ab", "cd", "ef"], 6, "...", most=1) == ["ab ..."]
    assert flow([], 6, "...") == []
    assert cut("abcdefg", 6, "...") == "abc..."
    assert cut("日本語日本語", 6, "…") == "日本…"


def test_a_row_without_a_response_is_no_sample() -> None:
    assert Shown.of("x", {"prompt": "a", "score": 1.0}) is None
    assert Shown.of("x", {"prompt": "a", "response": "b", "score": [1.0, 2.0]}) == Shown("x", "a", "b", 3.0)


def test_numbers_in_short() -> None:
    assert [count(value) for value in (0.5, 999.0, 1234.5, 2e6)] == ["0.5", "999", "1.23k", "2M"]
    assert [duration(s) for s in (0, 61.4, 36061, -3)] == ["0:00:00", "0:01:01", "10:01:01", "0:00:00"]
