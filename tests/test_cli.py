"""The command `megarl`: its help, lists and completion, what wrong commands are answered, and what it starts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib

import megarl
from megarl import cli, completion, doctor, listing
from megarl.config.algorithms import ALGORITHMS, entry_points
from megarl.config.compose import compose, run
from megarl.config.defaults import defaults
from megarl.config.help import short_help
from megarl.config.leaf import leaves
from megarl.config.preset_files import preset_files

ROOT = Path(megarl.__file__).parents[1]
HEAVY = ("torch", "megatron", "transformers", "lightning", "hydra", "omegaconf")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `megarl WORDS` in this process and an empty folder: (exit code, stdout, stderr)."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def called(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megarl"])
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return called


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with prompts, two reward functions, an empty folder and a user's preset."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "rewards.py").write_text(
        "def score(outputs, **metadata):\n    return [1.0 for _ in outputs]\n\n\ndef narrow(texts):\n    return [1.0]\n"
    )
    (tmp_path / "my-sft").mkdir()
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("# @package _global_\n# What mine is for.\nseed: 2\n")
    return tmp_path


# --- help -------------------------------------------------------------------------------------------------------------


def fits_a_screen(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 24 and max(map(len, lines)) <= 80


def test_help_fits_a_screen_and_names_every_command(call: Call) -> None:
    for words in ((), ("--help",), ("help",)):
        code, out, err = call(*words)
        assert (code, err) == (0, "")
        assert fits_a_screen(out)
        assert all(name in out.split() for name in cli.command_names() if name != "help")


@pytest.mark.parametrize("name", entry_points())
def test_help_of_an_entry_point_is_a_screen_with_the_ten_keys_that_people_change_first(name: str) -> None:
    entry = entry_points()[name]
    text = short_help(name, defaults(entry))
    assert fits_a_screen(text)
    assert len(set(entry.first_keys)) == 10
    plain = compose(name, [])[1]
    for key in entry.first_keys:
        section, _, last = key.rpartition(".")
        value = plain[section][last] if section else plain[last]
        shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        assert f"  {key}={shown} " in text


@pytest.mark.parametrize("name", entry_points())
def test_the_defaults_that_help_shows_are_those_that_hydra_composes(name: str) -> None:
    assert defaults(entry_points()[name]) == compose(name, [])[1]


def test_help_is_the_same_however_the_program_is_started(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--help", "optim.lr"]):
        ours = call("ppo", *argv)
        with pytest.raises(SystemExit):
            run("ppo", argv, lambda config: pytest.fail("must not run"))
        assert ours == (0, capsys.readouterr().out, "")


def test_help_of_a_key_or_a_section_has_its_full_text_and_the_values_of_the_command_line(call: Call) -> None:
    keys = {leaf.key: leaf for leaf in leaves(ALGORITHMS["ppo"].config)}
    _, out, _ = call("ppo", "--help", "ppo.kl_coef", "optim")
    assert keys["ppo.kl_coef"].doc in " ".join(out.split())
    assert all(f"\n{key}=" in f"\n{out}" for key in keys if key.startswith("optim."))
    assert "ppo.lam=" not in out
    assert "optim.lr=0.5  [" in call("ppo", "optim.lr=0.5", "--help", "optim.lr")[1]
    assert "model=tiny" in call("ppo", "--help", "model")[1]
    assert call("help", "ppo", "optim.lr") == call("ppo", "--help", "optim.lr")


@pytest.mark.parametrize("name", ["ls", "show", "report", "watch", "new", "doctor", "completion"])
def test_help_of_megarls_own_commands_says_how_they_are_used(call: Call, name: str) -> None:
    assert call("help", name) == call(name, "--help")
    code, out, _ = call(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: megarl {name}")


# --- lists ------------------------------------------------------------------------------------------------------------


def test_the_commands_are_the_algorithms_and_programs_that_there_are(call: Call) -> None:
    assert list(cli.ALGORITHMS) == list(ALGORITHMS)
    for program, _ in cli.PROGRAMS.values():
        assert (ROOT / "megarl" / f"{program}.py").is_file()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["megarl"] == "megarl.cli:main"


def test_ls_lists_presets_algorithms_rewards_and_families_with_a_line_each(call: Call, files: Path) -> None:
    from megarl.models.exchange.families import FAMILIES

    code, out, _ = call("ls")
    assert code == 0
    words = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    assert {*ALGORITHMS, *preset_files(files / "conf"), *FAMILIES} <= words
    assert {"megarl.rewards.builtin:length", "megarl.rewards.verifiable:boxed"} <= words
    assert "What mine is for." in call("ls", "presets")[1]
    assert [name for name, _ in listing.families()] == sorted(FAMILIES)
    for name, about in (*listing.families(), *listing.rewards()):
        assert about, name


@pytest.mark.parametrize("name", ["randomwalks", "dapo", "gpt20b", "randomwalks_ilql"])
def test_show_prints_a_preset_that_can_be_copied_and_who_can_use_it(call: Call, files: Path, name: str) -> None:
    code, out, _ = call("show", name)
    assert (code, call("show", f"conf/{name}.yaml")) == (0, (0, out, ""))
    text = preset_files(files / "conf")[name].read_text()
    assert out.startswith(text)
    uses = {line.split()[2] for line in out.removeprefix(text).splitlines() if line.startswith("# megarl ")}
    expected = {
        "randomwalks": {"ppo", "grpo"},
        "dapo": {"ppo", "grpo"},
        "randomwalks_ilql": {"ilql"},
        "gpt20b": {"ALGORITHM"},
    }
    assert uses == expected[name]
    (files / "conf" / f"{name}.yaml").write_text(out)
    assert compose("ppo" if name != "randomwalks_ilql" else "ilql", [f"+conf={name}"])


# --- wrong commands ---------------------------------------------------------------------------------------------------

SCORED = ("data.train=[prompts.jsonl]", "reward.fn=rewards.py:score")
WRONG: list[tuple[str, str]] = [
    ("pppo", "megarl ppo"),
    ("train pppo model.path=my-sft", "did you mean ppo?"),
    ("train model.path=my-sft", "megarl train NAME"),
    ("train rewards.py:focal", "score"),
    ("train_ppo +conf=randomwalks", "megarl ppo"),
    ("megarl.train_sft", "megarl sft"),
    ("model.path=my-sft data.train=[prompts.jsonl]", "megarl ppo model.path=my-sft data.train=[prompts.jsonl]"),
    ("--tp=2", "megarl --help"),
    ("list", "megarl ls"),
    ("eval model.path=my-sft", "megarl evaluate"),
    ("serve_reward model.path=my-sft", "megarl serve-reward"),
    ("ls preset", "megarl ls presets"),
    ("show randomwalk", "randomwalks"),
    ("show", "megarl show randomwalks"),
    ("help pppo", "megarl ppo"),
    ("init mine", "megarl new"),
    ("new", "megarl new my-project"),
    ("new my project", "megarl new 'my project'"),
    ("new --force mine", "one FOLDER and nothing else"),
    ("new conf", "choose a name that is not used yet"),
    ("new prompts.jsonl", "prompts.jsonl is a file"),
    ("completion tcsh", "megarl completion bash"),
    ("doctor --fix", "remove '--fix'"),
    ("ppo optim.lrr=1e-5", "optim.lr"),
    ("ppo lr=1e-5", "optim.lr"),
    ("ppo --optim.lr=1e-5", "optim.lr=..."),
    ("ppo --learning-rate 1e-5", "without dashes"),
    ("ppo --hlep", "--help"),
    ("ppo --help optim.lrr", "optim.lr"),
    ("ppo conf=randomwalks", "+conf="),
    ("ppo +conf=randomwalk", "randomwalks"),
    ("ppo randomwalks", "+conf=randomwalks"),
    ("ppo my-sft", "model.path=my-sft"),
    ("grpo prompts.jsonl", "data.train=[prompts.jsonl]"),
    ("grpo rewards.py:score", "reward.fn=rewards.py:score"),
    ("grpo optim.lr", "optim.lr=..."),
    ("grpo data.train=prompts.jsonl reward.fn=rewards.py:score", "data.train=[prompts.jsonl]"),
    ("ppo data.train=[prompt.jsonl] reward.fn=rewards.py:score", "data.train"),
    ("ppo data.train=[prompts.jsonl]", "reward.fn=rewards.py:score"),
    ("ppo data.train=[prompts.jsonl] reward.fn=reward.py:score", "give the path of a Python file"),
    ("ppo data.train=[prompts.jsonl] reward.fn=rewards.py:scor", "did you mean score"),
    ("ppo data.train=[prompts.jsonl] reward.fn=rewards.py:narrow", "def narrow(outputs, **metadata)"),
    ("ppo data.train=[prompts.jsonl] 'reward.fn=\"0.5*rewards.py:score + 1*rewards.py:scor\"'", "did you mean score"),
    ("ppo model.path=my-sft data.train=[prompts.jsonl] reward.fn=rewards.py:score", "config.json"),
    ("sft export.hf=my-sft", "name another folder"),
    ("sft run.resume=my-sft", "auto or never"),
    ("sft optim.lr=fast", "a number"),
    ("sft model=tyni", "tiny"),
    ("dpo dpo.kind=sigmod data.train=[prompts.jsonl]", "sigmoid"),
    ("rm rm.king=pairs data.train=[prompts.jsonl]", "rm.kind"),
    ("generate model.path=my-sft promts=prompts.jsonl", "prompts"),
    ("generate prompts=prompt.jsonl", "name a file, or a text"),
    ("generate prompts=prompts.jsonl out=rewards.py", "name another file"),
    ("chat my-sft", "model.path=my-sft"),
    ("chat", "model.path"),
    ("chat rollout.temperature=0.5", "model.path"),
    ("evaluate modelpath=my-sft", "model.path"),
    ("evaluate model.path=my-sft data.eval=[prompts.jsonl] reward.fn=rewards.py:scor", "config.json"),
    ("convert form=my-sft to=exported", "from"),
    ("convert from=my-sft to=exported", "config.json"),
    ("plan +conf=gpt20b cluster.gpuss=64", "cluster.gpus"),
    ("sweep sft sweep.optim.lr=uniform(0,1)", "sweep.metric=eval/loss"),
    ("sweep stf sweep.metric=eval/loss", "megarl sweep sft"),
    ("sweep sft sweep.metric=eval/loss sweep.optim.rl=uniform(0,1)", "optim.lr"),
    ("compare sft optim.lr=1 optim.lr=2", "compare.metric=eval/loss"),
    ("compare sft randomwalk randomwalks compare.metric=a", "did you mean randomwalks"),
    ("selftest tpp=2", "tp"),
    ("why-stuck runs/none", "name the folder of a run"),
]


@pytest.mark.parametrize(("command", "remedy"), WRONG, ids=[command for command, _ in WRONG])
def test_a_wrong_command_is_answered_in_one_line_with_what_to_type_instead(
    call: Call, files: Path, command: str, remedy: str
) -> None:
    code, out, err = call(*shlex.split(command))
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ")
    assert remedy in err


# --- what is imported -------------------------------------------------------------------------------------------------


def imported(argv: list[str], folder: Path) -> tuple[int, set[str]]:
    """Return the exit code of a command, and which heavy modules its process imported."""
    program = (
        "import sys, atexit; sys.argv = ['megarl', *sys.argv[1:]]\n"
        f"atexit.register(lambda: print('modules', *({set(HEAVY)} & sys.modules.keys())))\n"
        "from megarl.cli import main; main()"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=folder, env=environ
    )
    return done.returncode, set(done.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["ppo", "--help"], 0),
        (["ppo", "--help", "optim.lr"], 0),
        (["ls"], 0),
        (["show", "randomwalks"], 0),
        (["complete", "bash", "megarl ppo optim."], 0),
        (["new", "project"], 0),
        (["pppo"], 2),
        (["ppo", "optim.lrr=1"], 2),
        (["ppo", "--multirun", "optim.lrr=1,2"], 2),
        (["ppo", "+conf=randomwalk"], 2),
        (["plan", "cluster.gpuss=1"], 2),
        (["plan", "--help"], 0),
        (["sweep", "--help"], 0),
        (["compare", "--help"], 0),
        (["sweep", "sft", "sweep.metirc=a"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_neither_hydra_nor_torch_is_imported_to_answer(argv: list[str], code: int, tmp_path: Path) -> None:
    assert imported(argv, tmp_path) == (code, set())


@pytest.mark.parametrize(
    "argv",
    [
        ["ppo", *SCORED[:1], "reward.fn=rewards.py:scor"],
        ["ppo", *SCORED, "model.path=my-sft"],
        ["generate", "prompts=prompt.jsonl"],
        ["convert", "from=my-sft", "to=exported"],
    ],
    ids=" ".join,
)
def test_torch_is_not_imported_to_refuse_a_file_or_a_folder(argv: list[str], files: Path) -> None:
    code, modules = imported(argv, files)
    assert (code, modules & {"torch", "transformers", "lightning"}) == (2, set())


# --- starting a program -----------------------------------------------------------------------------------------------


def test_a_program_is_started_as_python_m_would(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "probe.py").write_text(
        "import __main__, json, os, sys\n"
        "print(json.dumps([__name__, __main__.__spec__.name, sys.argv, os.environ.get('RANK')]))\n"
        "sys.exit(int(sys.argv[1].partition('=')[2]))\n"
    )
    monkeypatch.setattr(megarl, "__path__", [*megarl.__path__, str(tmp_path)])
    monkeypatch.setitem(cli.PROGRAMS, "probe", ("probe", "a program that tells how it was started"))
    monkeypatch.setenv("RANK", "3")
    for code in (0, 3, 130):
        ended, out, err = call("probe", f"code={code}", "+conf=[a,b]")
        name, spec, argv, rank = json.loads(out)
        assert (ended, err, name, spec, rank) == (code, "", "__main__", "megarl.probe", "3")
        assert argv[1:] == [f"code={code}", "+conf=[a,b]"]


def test_chat_is_generate_with_chat(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda name, **_: started.append((name, sys.argv[1:])))
    call("chat", "model.path=a")
    assert started == [("megarl.generate", ["chat=true", "model.path=a"])]


def test_the_version_and_the_module_are_those_of_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "megarl", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"megarl {megarl.__version__}\n")


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megarl pp", ["ppo"]),
        ("megarl se", ["selftest", "serve-reward"]),
        ("megarl sweep pp", ["ppo"]),
        ("megarl compare ppo min", ["mine"]),
        ("megarl compare ppo mine . compare.in", ["compare.interval="]),
        ("megarl sweep ppo sweep.ki", ["sweep.kind="]),
        ("megarl sweep ppo sweep.optim.l", ["sweep.optim.lr="]),
        ("megarl sweep ppo sweep.kind=g", ["sweep.kind=grid"]),
        ("megarl ppo optim.l", ["optim.lr="]),
        ("megarl ppo model.norm=", ["model.norm=layernorm", "model.norm=rmsnorm"]),
        ("megarl ppo data.pack=t", []),
        ("megarl sft data.pack=t", ["data.pack=true"]),
        ("megarl ppo model=s", ["model=small"]),
        ("megarl ppo +conf=min", ["+conf=mine"]),
        ("megarl ppo +conf=[mine,dapo_", ["+conf=[mine,dapo_paper"]),
        ("megarl ppo reward.fn=megarl.rewards.builtin:le", ["reward.fn=megarl.rewards.builtin:length"]),
        ("megarl ppo --help optim.l", ["optim.lr"]),
        ("megarl plan cluster.gpus_", ["cluster.gpus_per_node="]),
        ("megarl show min", ["mine"]),
        ("megarl ls fa", ["families"]),
        ("megarl completion ", ["bash", "fish", "zsh"]),
        ("megarl nothing ", []),
    ],
)
def test_a_line_is_completed(line: str, expected: list[str], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert completion.completed(line) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megarl gr", ["grpo"]),
        ("megarl ppo optim.l", ["optim.lr="]),
        ("megarl ppo model.norm=l", ["layernorm"]),
        ("megarl ppo +conf=randomwalks_i", ["randomwalks_ilql"]),
        ("megarl show dap", ["dapo", "dapo_paper"]),
    ],
)
def test_bash_completes_after_sourcing_the_script(line: str, expected: list[str], tmp_path: Path) -> None:
    command = tmp_path / "megarl"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megarl "$@"\n')
    command.chmod(0o755)
    program = (
        'source <(megarl completion bash); complete -p megarl >&2; COMP_LINE="$1"; COMP_POINT=${#1}; _megarl; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "--norc", "-c", program, "bash", line], capture_output=True, text=True, cwd=tmp_path, env=environ
    )
    assert done.stdout.split() == expected, done.stderr
    assert "_megarl megarl" in done.stderr


@pytest.mark.parametrize("shell", completion.SCRIPTS)
def test_the_script_of_every_shell_asks_for_the_line(shell: str, call: Call) -> None:
    code, out, _ = call("completion", shell)
    assert code == 0
    assert f"megarl complete {shell} " in out


# --- doctor -----------------------------------------------------------------------------------------------------------


def finding(name: str, check: Any) -> doctor.Finding:
    return next(iter(doctor.findings_of([(name, check)])))


def test_doctor_finds_this_machine_fit(call: Call) -> None:
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    for name, _ in doctor.CHECKS:
        assert f"  {name} " in out
    assert "WRONG" not in out
    assert importlib.metadata.version("megatron-core") in out


def test_doctor_works_without_torch_and_says_how_to_mend_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, err = call("doctor")
    assert (code, err) == (1, "")
    assert "WRONG torch" in out
    assert "-> pip install" in out


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> doctor.Finding:
        raise OSError("libcudart.so.12: cannot open")

    found = finding("GPUs", broken)
    assert (found.name, found.state) == ("GPUs", doctor.NOTE)
    assert "libcudart.so.12" in found.result


def test_doctor_refuses_versions_that_megarl_does_not_work_with(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.20.0" if name == "megatron-core" else real(name))
    found = doctor.packages()
    assert found.state == doctor.WRONG
    assert "megatron-core 0.20.0" in found.result
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for _, name, least, below in doctor._REQUIRED:
        assert f"{name}>={least},<{below}" in declared


def test_doctor_says_what_megatron_lacks_to_be_imported() -> None:
    program = (
        "import sys; sys.modules['megatron.core.pipeline_parallel'] = None\n"
        "from megarl import doctor; found = doctor.packages(); print(found.state, found.result)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith(doctor.WRONG)
    assert "megatron.core.pipeline_parallel" in done.stdout


def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\ntmpfs /home/a/scratch tmpfs rw 0 0\n")
    assert doctor.file_system(Path("/home/a"), mounts) == "nfs4"
    assert doctor.file_system(Path("/home/a/scratch/b"), mounts) == "tmpfs"
    assert doctor.file_system(Path("/homes"), mounts) == "ext4"
    assert doctor.file_system(Path("/"), tmp_path / "nothing") is None


def test_versions_are_compared_by_number() -> None:
    assert doctor._below("2.8.0+cpu", "2.10")
    assert not doctor._below("2.8", "2.8.0")
    assert not doctor._below("5.24.0", "5")
    assert doctor._below("0.16.0rc1", "0.16.1")
