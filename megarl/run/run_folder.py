"""The folder of a run: its path, and the files that describe the run so that it can be repeated."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import OmegaConf

import megarl
from megarl.config.launcher import started_by_slurm
from megarl.disk import write_atomically
from megarl.errors import ConfigError
from megarl.logging import get_logger
from megarl.parallel.device import device_settings

logger = get_logger(__name__)

PACKAGES = (
    "torch",
    "megatron-core",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "transformer-engine",
    "apex",
)
_GIT_TIMEOUT_S = 30


class RunFolder:
    """The folder of a run, created by the constructor. Only the first process of a run writes into it through this
    class.

    If a resumed run writes different content into a file, the earlier file is kept as `<name>.<n><suffix>`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ConfigError(
                f"the run folder {self.path} cannot be created ({problem.strerror}): set run.dir to another folder",
                key="run.dir",
                where=self.path,
            ) from problem

    def write_config(self, resolved: Mapping[str, Any]) -> Path:
        """Write config.yaml: every key with its value."""
        return self.write("config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(resolved))))

    def write_environment(self) -> None:
        """Write versions.json, git.json and, if tracked files differ from the commit, git.diff."""
        self.write("versions.json", json.dumps(versions(), indent=2) + "\n")
        state, diff = _git_state()
        self.write("git.json", json.dumps(state, indent=2) + "\n")
        if diff:
            self.write("git.diff", diff)
        else:
            self.set_aside("git.diff")

    def write_extensions(self, described: Mapping[str, Mapping[str, str]]) -> None:
        """Write extensions.json, if the run uses any: what each key names, its file, and a hash of that."""
        if described:
            self.write("extensions.json", json.dumps(described, indent=2) + "\n")
        else:
            self.set_aside("extensions.json")

    def append_start(self, record: Mapping[str, Any]) -> None:
        """Append a line to starts.jsonl, which has one for every start of the run."""
        with (self.path / "starts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Write a file into the folder. An earlier one with different content is kept under a number."""
        path = self.path / name
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            self.set_aside(name)
        write_atomically(path, text)
        return path

    def set_aside(self, name: str) -> None:
        """Rename a file of an earlier process of this run with a number."""
        path = self.path / name
        if not path.exists():
            return
        number = 1
        while (earlier := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(earlier)


def resolve_run_dir(entry: str, config: Any, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of a run: `run.dir`, else `runs/NAME` with NAME = `run.name` or "<entry>-<yyyymmdd-hhmmss>".

    Processes that a launcher starts must find the same folder without communication. Under torchrun the time is the
    start of their common parent. Several SLURM tasks use the numbers of the job and the step instead, so that a
    requeued job finds its folder again. A process started alone creates the folder at once, so that no other run
    started in the same second uses it.

    Args:
        entry: name of the entry point, as in sft.
        config: the entry's typed configuration tree.
        environ: the environment; tests pass their own.
    """
    if config.run.dir:
        return Path(config.run.dir).expanduser()
    if config.run.name:
        return Path("runs", config.run.name)
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ
    machines = int(environ.get("GROUP_WORLD_SIZE", "1")) if by_torchrun else 1
    tasks = int(environ["SLURM_NTASKS"]) if started_by_slurm(environ) else 1
    if "SLURM_JOB_ID" in environ and max(tasks, machines) > 1:
        return Path("runs", f"{entry}-job{environ['SLURM_JOB_ID']}-{environ.get('SLURM_STEP_ID', '0')}")
    if machines > 1:
        raise ConfigError("run.name=null, but the machines of this run must agree on one: set run.name", key="run.name")
    if by_torchrun:
        return Path("runs", f"{entry}-{_format(psutil.Process(os.getppid()).create_time())}")
    return _claim(entry, _format(time.time()))


def _claim(entry: str, stamp: str) -> Path:
    """Create the folder of a name, with a number if another run has the name."""
    for number in range(1, 1000):
        folder = Path("runs", f"{entry}-{stamp}" if number == 1 else f"{entry}-{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            return folder  # RunFolder reports what is wrong with the folder
        return folder
    raise ConfigError(
        f"run.name=null, but runs/{entry}-{stamp} and 998 more exist: set run.name",
        key="run.name",
        where=f"runs/{entry}-{stamp}",
    )


def _format(seconds: float) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))


def versions() -> dict[str, Any]:
    """Return the software versions and the hardware of this process."""
    packages = {name: _version(name) for name in PACKAGES}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "megarl": megarl.__version__,
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "cpu": {"name": _cpu_name(), "count": os.cpu_count(), "threads": torch.get_num_threads()},
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": {"names": gpus, "cuda": torch.version.cuda},
        "device_settings": asdict(device_settings()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git_state() -> tuple[dict[str, Any], str]:
    """Return the commit and the changes of megarl's checkout, else of the current folder's."""
    reason = "no git checkout"
    for folder in (Path(megarl.__file__).parent, Path.cwd()):
        try:
            root = _git(folder, "rev-parse", "--show-toplevel").strip()
            status = _git(Path(root), "status", "--porcelain").splitlines()
        except (OSError, subprocess.SubprocessError) as problem:
            reason = _git_reason(problem)
            continue
        changed = [line[3:] for line in status if not line.startswith("??")]
        commit, diff = None, ""
        try:
            commit = _git(Path(root), "rev-parse", "--verify", "--quiet", "HEAD").strip()
            diff = _git(Path(root), "diff", "HEAD") if changed else ""
        except (OSError, subprocess.SubprocessError) as problem:
            logger.debug("git in %s: %s", root, _git_reason(problem))  # a checkout without a commit
        untracked = [line[3:] for line in status if line.startswith("??")]
        dirty = bool(changed)
        return {"root": root, "commit": commit, "dirty": dirty, "changed": changed, "untracked": untracked}, diff
    return {"root": None, "commit": None, "dirty": None, "reason": reason}, ""


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_GIT_TIMEOUT_S,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    ).stdout


def _git_reason(problem: Exception) -> str:
    if isinstance(problem, subprocess.CalledProcessError):
        lines = (problem.stderr or "").strip().splitlines()
        return lines[0] if lines else f"git exited with {problem.returncode}"
    return "git is not installed" if isinstance(problem, FileNotFoundError) else str(problem)
