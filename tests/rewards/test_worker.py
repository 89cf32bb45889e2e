"""Scoring in a process of its own: what the function is given, and what becomes of it when it misbehaves."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.errors import ConfigError, DataError, MegarlError
from megarl.rewards import RewardWorker, Scores
from megarl.rewards.client import REMEDIES, ScoringError
from megarl.rewards.process import MOST_LINES
from megarl.tokenizers import build_tokenizer
from tests.refusals import refused
from tests.rewards import functions

Start = Callable[..., RewardWorker]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes workers, named functions of `functions` or callables, and ends them."""
    made: list[RewardWorker] = []

    def start(function: Any, **settings: Any) -> RewardWorker:
        name = f"tests.rewards.functions:{function}" if isinstance(function, str) else function
        made.append(RewardWorker(name, ("bytes", None), **{"retries": 0, "timeout_s": 20.0, **settings}))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def ask(worker: RewardWorker, *outputs: str, **metadata: list[Any]) -> Scores:
    """Score outputs after the prompt "p"."""
    return worker.score(["p" + output for output in outputs], ["p"] * len(outputs), list(outputs), metadata)


def gone(pid: int, within_s: float) -> bool:
    """Whether a process ends in time; a zombie that nobody reaps has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} was never written"
        time.sleep(0.02)
    return file.read_text()


# What the function is given, and what comes back


def test_the_function_gets_texts_tokenizer_and_the_fields_of_the_records(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start("everything_it_was_given")
    with caplog.at_level(logging.INFO, logger="megarl.rewards"):
        scores = worker.score(["ab", "cd"], ["a", "c"], ["b", "d"], {"answer": [1, {"x": [None]}], "goal": ["g", "h"]})
        worker.close()
    assert scores.values == [0.5, 0.5]
    line = next(record.getMessage() for record in caplog.records if "samples" in record.getMessage())
    assert json.loads(line[line.index("{") :]) == {
        "samples": ["ab", "cd"],
        "prompts": ["a", "c"],
        "outputs": ["b", "d"],
        "eos": build_tokenizer("bytes").eos_id,
        "answer": [1, {"x": [None]}],
        "goal": ["g", "h"],
    }


def test_a_tokenizer_object_travels_too() -> None:
    def eos(samples: list[str], tokenizer: Any, **_: Any) -> list[float]:
        return [tokenizer.eos_id, *tokenizer.encode("A")]

    tokenizer = build_tokenizer("bytes")
    with RewardWorker(eos, tokenizer) as worker:
        assert ask(worker, "a", "b").values == [float(tokenizer.eos_id), 65.0]


def test_a_call_asks_about_all_samples_in_their_order(start: Start) -> None:
    outputs = ["x" * n for n in (5, 3, 9, 1, 4, 8, 2)]
    assert ask(start("lengths"), *outputs).values == [5.0, 3.0, 9.0, 1.0, 4.0, 8.0, 2.0]
    assert ask(start("calls_seen"), *"abcde").values == [5] * 5


def test_no_samples_need_no_worker(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert ask(start("lengths")) == Scores([])


def test_a_lambda_and_a_closure_travel(start: Start) -> None:
    factor = 3.0

    def scaled(outputs: list[str], **_: Any) -> list[float]:
        return [factor * len(output) for output in outputs]

    assert ask(start(scaled), "ab").values == [6.0]
    assert ask(start(lambda outputs, **_: [-1.0 for _ in outputs]), "ab", "c").values == [-1.0, -1.0]


def test_a_function_in_a_file_can_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("FACTOR = 4\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour import FACTOR\ndef score(outputs, **_):\n    return [FACTOR * len(o) for o in outputs]\n"
    )
    with RewardWorker(f"{tmp_path}/mine.py:score", None) as worker:
        assert ask(worker, "ab").values == [8.0]


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("class Judge:\n    @staticmethod\n    def one(**_):\n        return [1]\n")
    monkeypatch.chdir(tmp_path)
    with RewardWorker("my_rewards:Judge.one", None) as worker:
        assert ask(worker, "a").values == [1.0]


def test_options_go_before_fields_of_the_records(start: Start) -> None:
    worker = start("answer_of_the_record", options={"answer": [7.0]})
    assert ask(worker, "a", answer=[1.0]).values == [7.0]


def test_per_token_rewards_come_back_as_lists_and_must_fit_the_response(start: Start) -> None:
    worker = start("dense")
    assert ask(worker, "abc", "d").values == [[0.0, 1.0, 2.0], [0.0]]
    assert worker.score(["ab"], [""], ["ab"], lengths=[2]).values == [[0.0, 1.0]]
    with refused(ScoringError, where="sample 1", names=("3", "4")) as found:
        worker.score(["ab", "abc"], ["", ""], ["ab", "abc"], lengths=[2, 4])
    assert kind_of(found.error) == "score"


def test_measures_by_name_may_be_per_token(start: Start) -> None:
    measures = start(lambda outputs, **_: {"tokens": [[0.5, 1.0] for _ in outputs], "style": [2.0 for _ in outputs]})
    found = ask(measures, "ab", "cd")
    assert found.values == [[0.5, 1.0]] * 2
    assert found.parts == {"tokens": [1.5, 1.5], "style": [2.0, 2.0]}


def test_arrays_are_scores(start: Start) -> None:
    assert ask(start("tensor_scores"), "a", "b", "c").values == [0.0, 0.5, 1.0]


# Where it runs


def test_the_worker_knows_nothing_of_the_process_group(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_JOB_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"),
    ]
    for name in [*names, "MY_API_KEY"]:
        monkeypatch.setenv(name, "0")
    assert ask(start("has_variable"), *names, "MY_API_KEY").values == [0.0] * len(names) + [1.0]


@pytest.mark.parametrize(("devices", "shown"), [("", "''"), ("3", "'3'"), (None, "'0,1'")])
def test_the_worker_sees_no_gpu_unless_told(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    devices: str | None,
    shown: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    worker = start("visible_devices", devices=devices)
    with caplog.at_level(logging.INFO, logger="megarl.rewards"):
        ask(worker, "a")
        worker.close()
    assert f"devices: {shown}" in caplog.text


def test_the_worker_imports_nothing_heavy(start: Start) -> None:
    assert ask(start("imported_libraries"), "a").values == [0.0]


def test_the_worker_is_another_process_that_stays(start: Start) -> None:
    worker = start("process")
    first, second = ask(worker, "a"), ask(worker, "b")
    assert first.values == second.values != [float(os.getpid())]


def test_prints_go_to_the_log_and_do_not_disturb_the_scores(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    worker = start("noisy")
    with caplog.at_level(logging.INFO, logger="megarl.rewards"):
        assert ask(worker, "a", "b").values == [1.0, 1.0]
        assert ask(worker, "a").values == [1.0]
        worker.close()
    lines = [record.getMessage() for record in caplog.records]
    for text in ("printed", "to stderr", "surrogate \\ud800 and \u00fc"):
        assert lines.count(f"tests.rewards.functions:noisy: {text}") == 2


# What goes wrong


def kind_of(error: MegarlError) -> str:
    assert isinstance(error, ScoringError)
    return error.kind


def failure_of(worker: RewardWorker, *outputs: str, kind: str, where: str | None = None, **metadata: list[Any]) -> str:
    """The line of the error that a call ends with."""
    offers = {"reward.calls.on_error": ["drop"]}
    with refused(ScoringError, key="reward.fn", value=worker.name, where=where, offers=offers) as found:
        ask(worker, *(outputs or ("a", "b")), **metadata)
    assert kind_of(found.error) == kind
    assert found.line.startswith(f"reward.fn={worker.name} ")
    return found.line


def test_a_function_that_raises_is_quoted_with_its_line(start: Start) -> None:
    line = functions.raises.__code__.co_firstlineno + 1
    message = failure_of(start("raises"), kind="raised", where=f"{functions.__file__}:{line}")
    assert "ValueError: cannot judge this" in message


def test_the_line_is_the_users_also_when_a_library_raises(start: Start) -> None:
    line = functions.raises_deep_in_a_library.__code__.co_firstlineno + 1
    failure_of(start("raises_deep_in_a_library"), kind="raised", where=f"{functions.__file__}:{line}")


def test_sys_exit_is_a_failure_like_any_other(start: Start) -> None:
    assert "SystemExit: enough" in failure_of(start("exits"), kind="raised")


def test_a_function_without_room_for_the_fields_is_told_to_make_some(start: Start) -> None:
    message = failure_of(start("no_metadata"), "a", kind="raised", goal=[3])
    assert "**metadata" in message
    assert "; goal " in message


def test_a_wrong_count_is_named(start: Start) -> None:
    assert re.findall(r" (\d) ", failure_of(start("too_few"), kind="count"))[:2] == ["1", "2"]


def test_an_answer_that_is_no_list_is_shown(start: Start) -> None:
    message = failure_of(start("a_number"), kind="count")
    assert "3.0" in message
    assert "list" in message


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (None, "None"),
        ("1.0", "'1.0' (str)"),
        ([], "empty list"),
        ([1.0, float("nan")], "nan for token 1"),
    ],
)
def test_a_score_that_is_none_names_the_sample(start: Start, bad: object, shown: str) -> None:
    worker = start("answer_of_the_record")
    message = failure_of(worker, *"abcd", kind="score", where="sample 3", answer=[1.0, 2.0, 3.0, bad])
    assert shown in message


def test_a_function_that_never_returns_is_killed_in_time(start: Start) -> None:
    worker = start("sleeps", timeout_s=1.0)
    worker.start()
    began = time.monotonic()
    message = failure_of(worker, kind="late")
    assert 1.0 <= time.monotonic() - began < 5.0
    assert "1 s" in message
    assert "reward.calls.timeout" in message


def test_what_the_function_started_is_killed_with_it(start: Start, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    failure_of(start("sleeps_in_a_child", timeout_s=3.0), "a", kind="late", pid_file=[str(pids)])
    assert all(gone(int(pid), within_s=5) for pid in pids.read_text().split())


def test_a_dead_worker_is_reported_with_its_last_line(start: Start) -> None:
    message = failure_of(start("dies"), kind="died")
    assert "exit code 7" in message
    assert "about to die" in message


def test_a_dead_worker_is_noticed_though_its_child_holds_the_pipe(start: Start) -> None:
    worker = start("killed_while_a_child_holds_the_pipe", timeout_s=60)
    worker.start()
    began = time.monotonic()
    message = failure_of(worker, kind="died")
    assert "SIGKILL" in message
    assert "memory" in message
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize("action", ["sleep", "die", "raise", "nan"])
def test_what_fails_once_is_retried_and_counted(start: Start, tmp_path: Path, action: str) -> None:
    worker = start("acts_once", retries=1, timeout_s=2.0)
    scores = ask(worker, action, "abc", mark=[str(tmp_path / "mark")] * 2)
    assert scores.values == [float(len(action)), 3.0]
    assert (scores.failed_calls, scores.repeated_calls, scores.dropped) == (1, 1, 0)


def test_retries_end(start: Start) -> None:
    assert "3 tries" in failure_of(start("raises", retries=2), kind="raised")


@pytest.mark.parametrize("function", ["raises", "dies", "too_few", "sleeps"])
def test_with_drop_a_failed_call_costs_its_samples_and_is_counted(start: Start, function: str) -> None:
    scores = ask(start(function, on_error="drop", timeout_s=0.5, retries=1), "a", "b")
    assert scores.values == [None, None]
    assert (scores.failed_calls, scores.repeated_calls, scores.dropped) == (2, 1, 2)


def test_with_drop_other_calls_and_other_samples_keep_their_scores(start: Start) -> None:
    worker = start("bad_word_raises", on_error="drop")
    calls = [ask(worker, *outputs) for outputs in (("a", "b"), ("bad", "c"), ("d",))]
    assert [scores.values for scores in calls] == [[1.0, 1.0], [None, None], [1.0]]
    assert [(scores.failed_calls, scores.dropped) for scores in calls] == [(0, 0), (1, 2), (0, 0)]
    flawed = ask(start("answer_of_the_record", on_error="drop"), "a", "b", "c", answer=[1.0, None, 3.0])
    assert flawed.values == [1.0, None, 3.0]
    assert flawed.dropped == 1


def test_after_a_failure_the_next_call_works(start: Start, tmp_path: Path) -> None:
    worker = start("acts_once", timeout_s=2.0)
    for action, kind in (("sleep", "late"), ("die", "died")):
        mark = str(tmp_path / action)
        failure_of(worker, action, kind=kind, mark=[mark])
        assert ask(worker, "abcd", mark=[mark]).values == [4.0]


def test_a_worker_that_died_between_calls_is_started_again(start: Start) -> None:
    worker = start("process")
    (first,) = ask(worker, "a").values
    assert isinstance(first, float)
    os.kill(int(first), signal.SIGKILL)
    assert worker._process is not None
    assert "SIGKILL" in worker._process.death()
    scores = ask(worker, "a")
    assert scores.values != [first]
    assert scores.failed_calls == 0


def test_signals_of_the_job_leave_the_worker_alone(start: Start) -> None:
    worker = start("process")
    (pid,) = ask(worker, "a").values
    assert isinstance(pid, float)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(int(pid), number)
    assert ask(worker, "a").values == [pid]


def test_after_an_interrupted_call_its_late_answer_is_not_taken_for_the_next(start: Start, tmp_path: Path) -> None:
    def slow_once(outputs: list[str], mark: list[str], **_: Any) -> list[float]:
        if not Path(mark[0]).exists():
            Path(mark[0]).touch()
            time.sleep(0.6)
            return [-1.0] * len(outputs)
        return [2.0] * len(outputs)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    worker, mark = start(slow_once), str(tmp_path / "mark")
    worker.start()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(worker, "a", mark=[mark])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ask(worker, "a", mark=[mark]).values == [2.0]


def test_a_module_that_cannot_be_imported_is_an_error_even_with_drop(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\ndef score(**_):\n    return []\n")
    worker = RewardWorker(f"{tmp_path}/broken.py:score", None, on_error="drop")
    file = f"{tmp_path}/broken.py"
    names = ("ModuleNotFoundError", "'no_such_library'")
    with refused(ScoringError, value=f"{file}:score", where=f"{file}:1", offers={}, names=names) as found:
        worker.start()
    assert kind_of(found.error) == "raised"


def test_a_start_that_hangs_is_killed(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(3600)\ndef score(**_):\n    return []\n")
    worker = RewardWorker(f"{tmp_path}/slow.py:score", None, start_timeout_s=0.5)
    with refused(ScoringError, value=f"{tmp_path}/slow.py:score", offers={}, names=("0.5 s",)) as found:
        worker.start()
    assert kind_of(found.error) == "late"


# How it ends


def test_close_ends_the_worker_and_may_be_called_twice(start: Start) -> None:
    worker = start("process")
    (pid,) = ask(worker, "a").values
    assert isinstance(pid, float)
    worker.close()
    worker.close()
    assert gone(int(pid), within_s=2)


def kill_a_run_in_a_call(function: str, pids: Path, timeout_s: float) -> str:
    """Start a run that scores with a function, kill it when the function has begun, and return what that wrote."""
    run = textwrap.dedent(
        f"""
        from megarl.rewards import RewardWorker
        worker = RewardWorker("tests.rewards.functions:{function}", None, timeout_s={timeout_s})
        worker.score(["a"], ["a"], ["a"], {{"pid_file": [{str(pids)!r}]}})
        """
    )
    process = subprocess.Popen([sys.executable, "-c", run], cwd=Path(__file__).parents[2])
    try:
        return wait_for(pids)
    finally:
        process.kill()
        process.wait()


def test_the_worker_and_its_children_end_when_the_run_is_killed_in_a_call(tmp_path: Path) -> None:
    worker, child = kill_a_run_in_a_call("sleeps_in_a_child", tmp_path / "pids", timeout_s=60).split()
    assert gone(int(worker), within_s=15)
    assert gone(int(child), within_s=5)


def test_a_function_that_lets_no_other_thread_run_ends_soon_after_its_time_out(tmp_path: Path) -> None:
    worker = kill_a_run_in_a_call("keeps_the_lock", tmp_path / "pids", timeout_s=1)
    assert gone(int(worker), within_s=20)


# What is refused before anything is started


@pytest.mark.parametrize(
    ("setting", "key", "offers"),
    [
        ({"timeout_s": 0}, "reward.calls.timeout", {}),
        ({"retries": -1}, "reward.calls.retries", {}),
        ({"on_error": "ignore"}, "reward.calls.on_error", {"reward.calls.on_error": ["error", "drop"]}),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], key: str, offers: dict[str, Any]) -> None:
    (value,) = setting.values()
    with refused(ConfigError, key=key, value=value, offers=offers, names=(f"{key}={value}",)):
        RewardWorker("tests.rewards.functions:lengths", None, **setting)


def test_a_tokenizer_that_cannot_travel_is_refused() -> None:
    with refused(ConfigError, key="reward.fn", names=("TypeError", "generator")):
        RewardWorker("tests.rewards.functions:lengths", (line for line in "ab"))


def test_columns_of_unequal_length_and_taken_names_are_refused(start: Start) -> None:
    worker = start("lengths")
    with refused(DataError, key="goal", names=("1", "2")):
        ask(worker, "a", "b", goal=[1])
    with refused(DataError, key="prompts", names=("reward.fn",)):
        worker.score(["a"], [""], ["a"], {"prompts": ["x"]})


# What is said of it


@pytest.mark.parametrize("outputs", [["stdout"], ["stderr"], ["line"]])
def test_a_flood_of_output_is_counted_and_holds_nothing_up(
    outputs: list[str], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start("floods", timeout_s=60)
    with caplog.at_level(logging.INFO, logger="megarl.rewards"):
        assert ask(worker, *outputs).values == [1.0]
        worker.close()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) <= MOST_LINES + 1
    assert any("more lines in this call, which are not logged" in line for line in lines)
    assert all(len(line) < 5000 for line in lines)


def test_a_call_that_is_late_for_its_output_says_so(start: Start) -> None:
    worker = start("floods", timeout_s=1.0)
    worker.start()
    assert re.search(r"[0-9,]+ lines", failure_of(worker, "late", kind="late"))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        ("raises", "raised"),
        ("too_few", "count"),
        ("a_number", "count"),
        ("answer_of_the_record", "score"),
        ("dies", "died"),
        ("sleeps", "late"),
    ],
)
def test_the_remedy_fits_what_failed(function: str, kind: str, start: Start) -> None:
    message = failure_of(start(function, timeout_s=1.0), kind=kind, answer=[None, None])
    assert [named for named, remedy in REMEDIES.items() if remedy in message] == [kind]
    assert ("reward.calls.timeout" in message) == (kind == "late")
    assert ("reward.calls.batch_size" in message) == (kind in ("late", "died"))


NUMBERS = "megarl.rewards.builtin:numeric_match"


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("reward.fn", "correct reward.options or the records"),
        ("reward.terms.1.fn", "correct reward.terms.1.options or the records"),
        ("metric.fn", "correct the records"),
    ],
)
def test_the_remedy_of_a_ready_made_function_is_in_the_options_or_the_records(
    key: str, remedy: str, tmp_path: Path
) -> None:
    with (
        RewardWorker(NUMBERS, None, key=key, retries=0) as worker,
        refused(ScoringError, key=key, names=(f"; {remedy}, or leave",)),
    ):
        ask(worker, "1", answer=["none"])


def test_a_record_that_a_ready_made_function_refuses_is_named_with_its_place() -> None:
    texts = ["1", "2", "3"]
    with (
        RewardWorker(NUMBERS, None, retries=0) as worker,
        refused(ScoringError, names=("3 samples, 0 to 2; sample 1 of the call is b.jsonl:7",)),
    ):
        worker.score(texts, [""] * 3, texts, {"answer": ["1", "no", "3"]}, places=["a.jsonl:1", "b.jsonl:7", ""])


def test_a_sample_without_a_usable_score_is_named_with_its_place(start: Start) -> None:
    worker = start("answer_of_the_record")
    with refused(ScoringError, names=("sample 1 ", "(b.jsonl:7, and 1 more)")):
        worker.score([""] * 3, [""] * 3, [""] * 3, {"answer": [1.0, None, None]}, places=["a.jsonl:1", "b.jsonl:7", ""])


def test_a_failure_is_told_once_where_it_repeats(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    failure_of(start("raises", retries=2), kind="raised")
    assert "cannot judge" not in caplog.text


def test_each_failure_of_its_own_is_told(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = failure_of(start("raises_what_it_is_given", retries=2), str(tmp_path / "calls"), kind="raised")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [re.findall(r"call \d", line)[0] for line in told] == ["call 0", "call 1"]
    assert "call 2" in message


def test_dropped_samples_are_told_once_of_a_kind(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    worker = start("raises", on_error="drop")
    for _ in range(3):
        ask(worker, "a", "b")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "2 samples are dropped" in told[0]


def test_samples_that_are_dropped_after_another_try_are_told_of(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """The second try scores one of the two, and the other fails for the same reason as before."""
    worker = start("nan_first", retries=1, on_error="drop")
    assert ask(worker, "a", "b", "c", "d").dropped == 1
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["is called again" in line for line in told] == [True, False]
    assert "and 1 samples are dropped" in told[1]


def test_a_metric_is_told_of_the_keys_that_there_are(start: Start) -> None:
    with (
        start("sleeps", timeout_s=0.5, key="metric.fn") as worker,
        refused(ScoringError, key="metric.fn", names=("reward.calls.timeout",)) as found,
    ):
        ask(worker, "a")
    assert "metric.timeout" not in found.line
