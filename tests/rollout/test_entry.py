"""`python -m megarl.generate`: prompts from files and the command line, the same lines in every layout, clear
refusals."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import MegarlError
from tests.e2e.runs import composed
from tests.programs import Program
from tests.refusals import assert_command_refused, assert_entry_refuses, assert_refusal
from tests.worlds import Worlds

SMALL = ["model.num_layers=2", "model.hidden_size=32", "rollout.max_new_tokens=6", "trainer.progress=none"]


def entry(argv: list[str], stdin: str = "") -> str:
    """The entry point in a world that exists already. What it wrote to standard output."""
    import torch

    from megarl.generate import work

    torch.manual_seed(0)
    before = sys.stdout, sys.stdin
    sys.stdout, sys.stdin = io.StringIO(), io.StringIO(stdin)
    try:
        work(composed("generate", [*SMALL, *argv]))
        return sys.stdout.getvalue()
    finally:
        sys.stdout, sys.stdin = before


def error_of(argv: list[str]) -> MegarlError | None:
    """What the entry point raises of input that it does not take."""
    try:
        entry(argv)
    except MegarlError as problem:
        return problem
    return None


def lines(path: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda line: (line["prompt_id"], line["sample_id"]))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    records = [{"prompt": f"What is {n} and more?"[: 5 + 3 * n]} for n in range(5)]
    records.append({"messages": [{"role": "user", "content": "Hello"}]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_every_response_is_one_line_and_the_same_in_every_layout(worlds: Worlds, prompts: Path, tmp_path: Path) -> None:
    wanted: list[dict[str, Any]] = []
    for name, size, layout in (
        ("one", 1, []),
        ("dp", 2, []),
        ("tp", 2, ["parallel.tp=2"]),
        ("pp", 2, ["parallel.pp=2"]),
    ):
        out = tmp_path / f"{name}.jsonl"
        written = worlds.run(size, entry, [f"prompts={prompts}", f"out={out}", "rollout.n=2", *layout])
        assert written == [""] * size
        found = lines(out)
        wanted = wanted or found
        assert [line | {"logprob": 0} for line in found] == [line | {"logprob": 0} for line in wanted]
        assert [line["logprob"] for line in found] == pytest.approx([line["logprob"] for line in wanted], abs=1e-4)
    assert len(wanted) == 12
    assert wanted[0]["prompt"] == "What "
    assert wanted[0]["response"] != wanted[1]["response"]
    assert {line["tokens"] for line in wanted} == {6}


def test_one_prompt_on_the_command_line_answers_on_standard_output(worlds: Worlds) -> None:
    (written,) = worlds.run(1, entry, ["prompts='Once upon, a time'"])
    line = json.loads(written)
    assert line["prompt"] == "Once upon, a time"
    assert line["finish_reason"] == "length"


def test_long_prompts_are_left_out_cut_or_refused(worlds: Worlds, prompts: Path, tmp_path: Path) -> None:
    narrow = [f"prompts={prompts}", "model.max_positions=20"]  # room for 14 tokens: four of the six prompts fit
    for argv, where, length in (
        (narrow, "prompts.jsonl:5", "17"),
        (["prompts='Once upon a time'", "model.max_positions=20"], "prompts='Once upon a time'", "16"),
    ):
        (error,) = worlds.run(1, error_of, argv)
        offers = {"rollout.too_long": ["truncate", "drop"]}
        assert_refusal(error, key="rollout.max_new_tokens", value=6, where=where, offers=offers, names=(length,))
    for how, numbers in (("drop", [0, 1, 2, 3, 5]), ("truncate", [0, 1, 2, 3, 4, 5])):
        out = tmp_path / f"{how}.jsonl"
        worlds.run(1, entry, [*narrow, f"out={out}", f"rollout.too_long={how}"])
        assert [line["prompt_id"] for line in lines(out)] == numbers


def test_a_chat_template_may_be_a_file(worlds: Worlds, prompts: Path, tmp_path: Path) -> None:
    template = _file(tmp_path, "chat.jinja", "{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    out = tmp_path / "out.jsonl"
    worlds.run(1, entry, [f"prompts={prompts}", f"out={out}", f"chat_template={template}"])
    assert lines(out)[-1]["prompt"] == "<Hello>"


@pytest.mark.gate
def test_tasks_of_srun_are_one_world(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "megarl.generate", *SMALL, f"prompts={prompts}", f"out={out}"]
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "4242",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    tasks = [
        subprocess.Popen(command, env={**os.environ, **slurm, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}, text=True)
        for rank in ("0", "1")
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    assert len(lines(out)) == 6


def test_a_chat_answers_until_it_is_ended(worlds: Worlds) -> None:
    lines = "hello\n\n/set top_k 0\nand then?\n/quit\nnever read\n"
    (written,) = worlds.run(1, entry, ["chat=true", "system=Be brief."], lines)
    (first,) = worlds.run(1, entry, ["chat=true", "system=Be brief."], "hello\n")
    assert written.startswith(first)
    assert len(written) > len(first) > 1
    for shared in ("tp", "cp"):
        ranks = worlds.run(2, entry, ["chat=true", f"parallel.{shared}=2", "system=Be brief."], "hello\n")
        assert ranks == [first, ""]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ("prompts", "--chat")),
        (["prompts=a", "chat=true"], ("prompts", "chat=true")),
        (["prompts=a", "rollout.top_p=0"], ("rollout.top_p=0",)),
        (["prompts=a", "rollout.n=0"], ("rollout.n=0",)),
        (["prompts=a", "rollout.max_new_tokens=256"], ("rollout.max_new_tokens=256", "model.max_positions=256")),
        (["prompts=a", "parallel.tp=3", "trainer.devices=3"], ("parallel.tp=3",)),
        (["prompts=a", "rollout.topk=3"], ("rollout.topk", "rollout.top_k")),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_is_built(
    argv: list[str],
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert_entry_refuses("generate", argv, names, capsys)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: ["prompts=missing.jsonl"], {"names": ("prompts=missing.jsonl",)}),
        (
            lambda folder: [f"prompts={_file(folder, 'a.jsonl', '{}')}"],
            {"key": "prompt", "value": None, "where": "a.jsonl:1"},
        ),
        (lambda folder: [f"prompts={_file(folder, 'b.jsonl', '{')}"], {"where": "b.jsonl:1", "names": ("JSON",)}),
        (
            lambda folder: [f"prompts={_file(folder, 'c.jsonl', json.dumps({'prompt': ''}))}"],
            {"key": "prompt", "value": "", "where": "c.jsonl:1"},
        ),
        (lambda folder: ["prompts=a", f"out={_file(folder, 'out.jsonl', 'kept')}"], {"names": ("out.jsonl",)}),
        (lambda folder: ["prompts=a", "rollout.stop=['']"], {"key": "rollout.stop", "value": [""]}),
        (
            lambda folder: ["prompts=a", "rollout.engine.cache_bytes=10"],
            {"key": "rollout.engine.cache_bytes", "value": 10},
        ),
        (
            lambda folder: ["prompts=a", "rollout.engine.layout=tp2"],
            {"names": ("rollout.engine.layout=tp2", "parallel.tp")},
        ),
        (lambda folder: ["prompts=a", "chat_template=missing.jinja"], {"names": ("chat_template='missing.jinja'",)}),
        (lambda folder: ["prompts=a", f"out={_file(folder, 'file', '')}/out.jsonl"], {"names": ("file/out.jsonl",)}),
    ],
)
def test_bad_input_is_one_clear_line(
    prepare: Callable[[Path], list[str]], expected: dict[str, Any], worlds: Worlds, tmp_path: Path
) -> None:
    (error,) = worlds.run(1, error_of, prepare(tmp_path))
    assert_refusal(error, **expected)
    kept = tmp_path / "out.jsonl"
    assert not kept.exists() or kept.read_text() == "kept"


def _file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_it_starts_its_own_processes(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    words = [*SMALL, f"prompts={prompts}", f"out={out}", "trainer.devices=2"]
    first = Program("megarl.generate", *words)
    _, errors = first.communicate(timeout=280)
    assert first.returncode == 0, errors
    assert len(lines(out)) == 6
    assert "6 responses, 36 tokens in" in errors
    command = [sys.executable, "-m", "megarl.generate", *words]
    again = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert_command_refused(again, f"out={out}")
    assert again.stderr.count("\n") == 1
