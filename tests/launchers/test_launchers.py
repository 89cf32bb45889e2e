"""What the launchers would run, line by line, and what they refuse; no Slurm is needed for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.refusals import assert_command_refused

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
GOLDEN = Path(__file__).parent / "golden"
SCRIPTS = sorted(LAUNCHERS.glob("*.sh"))
ALGORITHMS = [path for path in SCRIPTS if path.name not in ("shared.sh", "chain.sh")]
INHERITED = ("SLURM", "MEGARL", "OMP", "NCCL", "TORCH", "MASTER", "WORLD", "LOCAL", "CUDA", "PYTORCH", "PYTHON")


def launch(folder: Path, script: str, *overrides: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """A dry run with an interpreter that finds every configuration good, unless MEGARL_PYTHON says another."""
    yes = folder / "python"
    yes.write_text("#!/bin/sh\n")
    yes.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(INHERITED) and key != "TOKENIZERS"}
    command = ["bash", str(LAUNCHERS / script), *overrides]
    settings = {"MEGARL_DRY_RUN": "1", "MEGARL_PYTHON": str(yes), **environ}
    return subprocess.run(command, cwd=folder, env={**clean, **settings}, capture_output=True, text=True, timeout=120)


def job(nodes: int, gpus: int = 8) -> dict[str, str]:
    """What SLURM tells a batch script of a job."""
    last = f"node[001-{nodes:03d}]" if nodes > 1 else "node001"
    on_node = {"SLURM_GPUS_ON_NODE": str(gpus)} if gpus else {}
    return {
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": last,
        "SLURM_CPUS_ON_NODE": "96",
        **on_node,
    }


PLANS = {
    "ppo-1-node": ("ppo.sh", ["+conf=gpt20b"], job(1)),
    "ppo-2-nodes": ("ppo.sh", ["+conf=gpt20b", "run.name=mine", "data.text_key=a b"], job(2)),
    "ppo-16-nodes": ("ppo.sh", ["+conf=gpt20b"], job(16)),
    "ilql-2-nodes-torchrun": ("ilql.sh", ["run.dir=/big/mine"], {**job(2), "MEGARL_LAUNCH": "torchrun"}),
    "ppo-16-nodes-torchrun": ("ppo.sh", ["+conf=gpt20b"], {**job(16), "MEGARL_LAUNCH": "torchrun"}),
    "sft-2-nodes-cpu": ("sft.sh", [], {**job(2, gpus=0), "SLURM_NTASKS_PER_NODE": "4", "MEGARL_DEVICE": "cpu"}),
    "ppo-2-nodes-pyxis": (
        "ppo.sh",
        [],
        {**job(2), "MEGARL_IMAGE": "/images/megarl.sqsh", "MEGARL_CONTAINER": "pyxis", "MEGARL_MOUNTS": "/data:/data"},
    ),
    "rft-1-node-apptainer": (
        "rft.sh",
        [],
        {**job(1), "MEGARL_IMAGE": "/images/megarl.sif", "MEGARL_CONTAINER": "apptainer", "MEGARL_LAUNCH": "torchrun"},
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_dry_run_prints_the_exact_lines(name: str, tmp_path: Path) -> None:
    """MEGARL_WRITE_GOLDEN=1 writes the files anew: read the difference before it is committed."""
    script, overrides, environ = PLANS[name]
    if "MEGARL_IMAGE" in environ:
        environ = {**environ, "MEGARL_PYTHON": "python"}
    done = launch(tmp_path, script, *overrides, **environ)
    assert done.returncode == 0, done.stderr
    told = done.stdout.replace(str(tmp_path), "/here").replace(str(ROOT), "/megarl")
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("MEGARL_WRITE_GOLDEN"):
        golden.write_text(told)
    assert told == golden.read_text()


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("a[003-010,12],b1", "a003"),
        ("a[7]", "a7"),
        ("x1,x2", "x1"),
        ("r[1-2]n", "r1n"),
        ("x1,y[2-3]", "x1"),
    ],
)
def test_the_processes_meet_at_the_first_node(nodelist: str, first: str, tmp_path: Path) -> None:
    done = launch(tmp_path, "sft.sh", **{**job(2), "SLURM_JOB_NODELIST": nodelist})
    assert f"export MASTER_ADDR={first}\n" in done.stdout


def test_what_is_set_outside_wins(tmp_path: Path) -> None:
    done = launch(tmp_path, "sft.sh", **job(1), OMP_NUM_THREADS="3", NCCL_DEBUG="INFO")
    assert "export OMP_NUM_THREADS=3\n" in done.stdout
    assert "export NCCL_DEBUG=INFO\n" in done.stdout


def test_the_lines_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    done = launch(tmp_path, "sft.sh", 'data.text_key=it\'s a "key"', **job(1))
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nfor last; do :; done; printf %s "$last"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    again = subprocess.run(["bash", "-c", done.stdout], env={"PATH": path}, capture_output=True, text=True, timeout=60)
    assert again.stdout == 'data.text_key=it\'s a "key"'


def test_nodes_that_no_layout_divides_over_stay_idle(tmp_path: Path) -> None:
    """What the check of the configuration prints last is the number of nodes."""
    fewer = tmp_path / "fewer"
    fewer.write_text("#!/bin/sh\necho the container says something\necho 2\n")
    fewer.chmod(0o755)
    lines = launch(tmp_path, "sft.sh", **job(3), MEGARL_PYTHON=str(fewer)).stdout.splitlines()
    assert "export WORLD_SIZE=16" in lines
    assert lines[-1].startswith("srun --nodes=2 --relative=0 --ntasks=16 --ntasks-per-node=8 ")


# Three replicas do not divide a batch of eight, nor three stages four layers.
OF_EIGHT = ("trainer.global_batch_size=8", "trainer.micro_batch_size=8", "model.num_layers=4", "model.num_heads=4")


def on_three(folder: Path, *settings: str) -> "subprocess.CompletedProcess[str]":
    environ = {**job(3, gpus=0), "MEGARL_PER_NODE": "1", "MEGARL_PYTHON": sys.executable}
    return launch(folder, "sft.sh", *OF_EIGHT, *settings, **environ)


def test_a_job_that_is_not_elastic_is_told_how_many_processes_would_do(tmp_path: Path) -> None:
    assert_command_refused(on_three(tmp_path), "trainer.global_batch_size=8", "one does over 2")


def test_an_elastic_job_takes_the_nearest_layout(tmp_path: Path) -> None:
    done = on_three(tmp_path, "launch.elastic=true")
    assert done.returncode == 0, done.stderr
    assert "srun --nodes=2 --relative=0 --ntasks=2 " in done.stdout
    assert "trainer.micro_batch_size=4" in done.stderr
    assert "2 of the 3 nodes" in done.stderr


def test_processes_that_the_layout_does_not_divide_stop_it(tmp_path: Path) -> None:
    done = launch(tmp_path, "sft.sh", "parallel.tp=4", **job(2), MEGARL_PER_NODE="3", MEGARL_PYTHON=sys.executable)
    assert_command_refused(done, "parallel.tp=4", "6 processes")
    assert "srun" not in done.stdout


@pytest.mark.parametrize(("left", "code", "starts"), [("2", 2, 1), ("", 1, 3)])
def test_what_would_end_the_same_way_is_not_started_again(left: str, code: int, starts: int, tmp_path: Path) -> None:
    """torchrun ends with 1 whatever its processes end with; what they leave in a file is believed."""
    srun = tmp_path / "srun"
    leave = f'echo {left} >"$MEGARL_STATUS_FILE.exit"' if left else ":"
    srun.write_text(
        f"#!/bin/bash\n[[ $* == *distributed.run* ]] || exit 0\necho >>{tmp_path}/starts\n{leave}\nexit 1\n"
    )
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    again = {"MEGARL_LAUNCH": "torchrun", "MEGARL_RESTARTS": "2", "MEGARL_DRY_RUN": "", "MEGARL_DEVICE": "cpu"}
    done = launch(tmp_path, "sft.sh", **{**job(1, gpus=0), "SLURM_NTASKS_PER_NODE": "2", **again, "PATH": path})
    assert done.returncode == code, done.stderr
    assert len((tmp_path / "starts").read_text().splitlines()) == starts


@pytest.mark.parametrize("installed", [True, False])
def test_an_installed_package_is_not_made_a_folder_of_modules(installed: bool, tmp_path: Path) -> None:
    """Python would find megarl/logging.py in the place of its own logging."""
    home = tmp_path / "site-packages" / "megarl" if installed else tmp_path / "checkout"
    shutil.copytree(LAUNCHERS, home / "launchers")
    (home if installed else home / "megarl").mkdir(exist_ok=True)
    (tmp_path / "python").write_text('#!/bin/sh\necho "found: $PYTHONPATH" >&2\n')
    (tmp_path / "python").chmod(0o755)
    environ = {**job(1), "MEGARL_DRY_RUN": "1", "MEGARL_PYTHON": str(tmp_path / "python"), "PATH": os.environ["PATH"]}
    command = ["bash", str(home / "launchers" / "sft.sh")]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
    assert done.stderr == f"found: {'' if installed else home}\n"


def test_a_preset_for_gpus_does_not_start_on_cpus_by_itself(tmp_path: Path) -> None:
    done = launch(tmp_path, "sft.sh", "trainer.accelerator=gpu", **job(1, gpus=0), MEGARL_PYTHON=sys.executable)
    assert_command_refused(done, "MEGARL_DEVICE=cpu")


@pytest.mark.parametrize(
    ("key", "value"), [("MEGARL_LAUNCH", "mpirun"), ("MEGARL_DEVICE", "tpu"), ("MEGARL_CONTAINER", "podman")]
)
def test_a_setting_that_is_none_is_refused(key: str, value: str, tmp_path: Path) -> None:
    done = launch(
        tmp_path, "sft.sh", **{**job(1), "MEGARL_IMAGE": "x" if key == "MEGARL_CONTAINER" else "", key: value}
    )
    assert_command_refused(done, f"{key}={value}")


def test_a_chain_waits_link_by_link_for_one_run(tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$MEGARL_RUN_NAME $MEGARL_REQUEUE $@" >>calls\nexpr 100 + "$(wc -l <calls)"\n')
    sbatch.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCHERS / "chain.sh"), "3", "--nodes=8", "launchers/ppo.sh", "+conf=gpt20b"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "MEGARL_RUN_NAME": "long"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["101", "102", "103"]
    same = "--nodes=8 launchers/ppo.sh +conf=gpt20b"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"long never --parsable --no-requeue --export=ALL {same}",
        f"long never --parsable --no-requeue --export=ALL --dependency=afterany:101 {same}",
        f"long never --parsable --no-requeue --export=ALL --dependency=afterany:102 {same}",
    ]


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.name)
def test_a_launcher_is_five_lines(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    assert lines[-1] == f'source "$here/shared.sh" && launch {path.stem} "$@"'


@pytest.mark.parametrize("path", [*SCRIPTS, *(ROOT / "docker").glob("*.sh")], ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.stdout == ""


def test_every_setting_is_explained_in_the_docs() -> None:
    text = (LAUNCHERS / "shared.sh").read_text()
    told = (ROOT / "docs" / "clusters.md").read_text()
    settings = {line.split()[1].split("=")[0] for line in text.splitlines() if line.startswith("# MEGARL_")}
    exported = {line.split()[1] for line in text.splitlines() if line.strip().startswith("setting ")}
    assert len(settings) > 8
    assert len(exported) > 12
    assert not {name for name in settings | exported if f"`{name}`" not in told}


def test_the_kubernetes_manifest_starts_a_program_that_exists() -> None:
    (manifest,) = yaml.safe_load_all((LAUNCHERS / "k8s" / "pytorchjob.yaml").read_text())
    assert manifest["kind"] == "PyTorchJob"
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for that name"
        command = container["args"]
        module = command[command.index("-m") + 1]
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file()
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert str(gpus) == manifest["spec"]["nprocPerNode"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert {"runs", "shm"} <= mounts
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]


@pytest.mark.parametrize("folder", ["with space", "plain", "two  spaces/and more"])
@pytest.mark.parametrize("arguments", ["", " +conf=gpt20b run.dir=/a b/c", " reward.fn=/x/y/ppo.sh:f"])
def test_slurms_copy_of_a_script_finds_the_rest_of_it(folder: str, arguments: str, tmp_path: Path) -> None:
    """SLURM runs a copy in its spool folder; `scontrol` knows where the script was, in a line with its arguments."""
    home, spool = tmp_path / folder / "launchers", tmp_path / "spool"
    shutil.copytree(LAUNCHERS, home)
    spool.mkdir()
    shutil.copy(LAUNCHERS / "ppo.sh", spool / "slurm_script")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\nprintf 'JobId=1\\n   Command=%s\\n   WorkDir=/x\\n' '{home}/ppo.sh{arguments}'\n")
    scontrol.chmod(0o755)
    done = launch(tmp_path, str(spool / "slurm_script"), **job(1), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "megarl.train_ppo" in done.stdout
