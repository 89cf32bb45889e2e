"""`megarl doctor`: what this machine has, what megarl will use of it, what is wrong, and the command that mends it.

Every check is a small function that returns a `Finding`. Nothing of torch is imported before the check that is about
it, and a check that fails is a finding: the doctor also works where torch is missing or broken.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import megarl
from megarl.errors import ConfigError

GOOD, NOTE, WRONG = "ok", "note", "WRONG"
_GIB = 2**30
_LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "f2fs", "ramfs")
_SMALL_SHM, _SMALL_DISK = 1 * _GIB, 20 * _GIB
_INSTALL = "pip install -e . -c constraints.txt"
_REQUIRED = (
    ("megatron.core", "megatron-core", "0.16.1", "0.20"),
    ("lightning", "lightning", "2.4", "2.7"),
    ("hydra", "hydra-core", "1.3.2", "1.4"),
    ("omegaconf", "omegaconf", "2.3", "2.4"),
    ("transformers", "transformers", "5", "6"),
)
"""The module, the package, the least version and the one that it must be below, as in pyproject.toml."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was looked at.
        result: what it is, in a few words.
        state: GOOD, NOTE (works, but could be better) or WRONG (megarl cannot run until it is mended).
        remedy: the command, or the setting, that mends it.
    """

    name: str
    result: str
    state: str = GOOD
    remedy: str = ""


def run(argv: Sequence[str]) -> int:
    """Print the findings. Return the exit code: 1 if something that megarl needs is wrong."""
    if argv:
        raise ConfigError(f"megarl doctor takes no settings: remove '{' '.join(argv)}'", key=argv[0])
    findings = list(findings_of(CHECKS))
    sys.stdout.write("\n".join(lines_of(findings)) + "\n")
    return 1 if any(finding.state == WRONG for finding in findings) else 0


Check = Callable[[], Finding]


def findings_of(checks: Sequence[tuple[str, Check]]) -> Iterator[Finding]:
    """Yield the findings of checks; a check that raises is a finding, too."""
    for name, check in checks:
        try:
            yield check()
        except (Exception, SystemExit) as problem:  # a broken library raises anything
            said = " ".join(f"{type(problem).__name__}: {problem}".split())[:160]
            yield Finding(name, f"cannot be told ({said})", NOTE)


def lines_of(findings: Sequence[Finding]) -> Iterator[str]:
    """Yield the report: a line for each finding, its remedy below it, and a last line that sums up."""
    column = max(len(finding.name) for finding in findings)
    for finding in findings:
        yield f"{finding.state:<6}{finding.name:<{column}}  {finding.result}"
        if finding.remedy:
            yield f"{'':<{column + 8}}-> {finding.remedy}"
    wrong = [finding.name for finding in findings if finding.state == WRONG]
    notes = sum(finding.state == NOTE for finding in findings)
    yield ""
    if wrong:
        yield f"megarl cannot run here yet: mend {', '.join(wrong)} with the commands above."
    else:
        yield f"megarl can run here ({notes} notes). Check that it computes correctly: megarl selftest"


# --- what this machine has --------------------------------------------------------------------------------------------


def python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_version()} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        return Finding("Python", found)
    return Finding("Python", found, WRONG, "make a virtual environment with Python 3.11: python3.11 -m venv .venv")


def cores() -> Finding:
    """The processor's cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    result = f"{usable} usable of {os.cpu_count()}; OMP_NUM_THREADS={threads or 'not set'}"
    if threads and threads.isdigit() and int(threads) > usable:
        return Finding("cores", result, NOTE, f"export OMP_NUM_THREADS={usable}")
    return Finding("cores", result)


def memory() -> Finding:
    """The memory that is free, within the limit of this process's control group."""
    import psutil

    seen = psutil.virtual_memory()
    limit = _group_limit()
    free = seen.available if limit is None else min(seen.available, limit)
    result = f"{free / _GIB:.1f} GiB free of {seen.total / _GIB:.1f} GiB"
    if limit is not None and limit < seen.total:
        result += f", limited to {limit / _GIB:.1f} GiB"
    if free < 2 * _GIB:
        return Finding("memory", result, NOTE, "a training run takes about 1 GiB per process before its model")
    return Finding("memory", result)


def _group_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None


def shared_memory() -> Finding:
    """The shared memory, which processes of one machine exchange tensors through."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "does not exist", NOTE, "in a container: docker run --ipc=host")
    total = shutil.disk_usage(path).total
    result = f"{total / _GIB:.1f} GiB"
    if total < _SMALL_SHM:
        return Finding("/dev/shm", result, NOTE, "in a container: docker run --ipc=host (or --shm-size=8g)")
    return Finding("/dev/shm", result)


def runs_folder() -> Finding:
    """The file system of runs/: whether other machines see it, and its free space."""
    place = (Path.cwd() / "runs").resolve()
    while not place.exists():
        place = place.parent
    kind = file_system(place)
    free = shutil.disk_usage(place).free
    seen = "seen by this machine only" if kind in _LOCAL_FILE_SYSTEMS else "probably shared by machines"
    result = f"{free / _GIB:.0f} GiB free at {Path.cwd() / 'runs'}; {kind or 'unknown file system'}, {seen}"
    if not os.access(place, os.W_OK):
        return Finding("runs/", f"{place} cannot be written", WRONG, "cd to a folder of yours, or set run.dir=FOLDER")
    if free < _SMALL_DISK:
        return Finding("runs/", result, NOTE, "set run.dir=FOLDER on another disk, or checkpoint.keep_last=1")
    return Finding("runs/", result)


def file_system(place: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the type of the file system that holds a folder; None if it cannot be told."""
    try:
        rows = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    found = [row for row in rows if len(row) > 2 and place.is_relative_to(row[1])]
    return max(found, key=lambda row: len(row[1]))[2] if found else None


def slurm() -> Finding:
    """The client of SLURM."""
    if shutil.which("sbatch") is None:
        return Finding("SLURM", "no sbatch here; torchrun, or trainer.devices, starts the processes")
    version = _output("sbatch", "--version") or "sbatch"
    job = os.environ.get("SLURM_JOB_ID")
    return Finding("SLURM", f"{version}{f', in job {job}' if job else ''}; start with sbatch launchers/ppo.sh")


def torch() -> Finding:
    """Torch: that it is there and works, and how it was built."""
    module = _imported("torch")
    if isinstance(module, str):
        if importlib.util.find_spec("torch") is None:
            return Finding("torch", "not installed", WRONG, _INSTALL)
        return Finding("torch", f"cannot be imported ({module})", WRONG, "pip install --force-reinstall torch")
    build = f"CUDA {module.version.cuda}" if module.version.cuda else "CPU"
    result = f"{module.__version__}, {build} build"
    if _below(module.__version__, "2.8"):
        return Finding("torch", f"{result}: too old", WRONG, "pip install -U 'torch>=2.8'")
    if float((module.ones(2, 2) @ module.ones(2, 2)).sum()) != 8.0:
        return Finding("torch", f"{result}: a product of ones is wrong", WRONG, "pip install --force-reinstall torch")
    return Finding("torch", result)


def gpus() -> Finding:
    """The GPUs, and whether torch can use them."""
    driver = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    present = driver.splitlines() if driver else []
    module = _imported("torch")
    if isinstance(module, str):
        return Finding("GPUs", f"{len(present)} by nvidia-smi; torch is needed to use them")
    usable = module.cuda.device_count() if module.cuda.is_available() else 0
    if usable:
        return Finding("GPUs", f"{usable} x {module.cuda.get_device_name(0)}")
    if present and not module.version.cuda:
        remedy = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return Finding("GPUs", f"{len(present)} x {present[0]}, but this torch is a CPU build", NOTE, remedy)
    if present:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        newer = f"install an NVIDIA driver that supports CUDA {module.version.cuda}, or a torch for an older CUDA"
        remedy = newer if hidden is None else "unset CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", f"{len(present)} x {present[0]}, but torch sees none", NOTE, remedy)
    return Finding("GPUs", "none; runs use the CPU")


def nccl() -> Finding:
    """NCCL, through which GPUs communicate."""
    module = _working_torch()
    if not module.cuda.is_available():
        return Finding("NCCL", "not needed: processes on CPUs communicate through gloo")
    if not module.distributed.is_nccl_available():
        return Finding("NCCL", "not in this torch", WRONG, "install a torch of pytorch.org's CUDA builds")
    return Finding("NCCL", ".".join(map(str, module.cuda.nccl.version())))


def packages() -> Finding:
    """The libraries that megarl stands on, in versions that it works with."""
    versions, wrong = [], []
    for name, distribution, least, below in _REQUIRED:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{distribution} is not installed")
            continue
        versions.append(f"{distribution} {version}")
        if _below(version, least) or not _below(version, below):
            wrong.append(f"{distribution} {version} is not >={least},<{below}")
        elif name == "megatron.core" and isinstance(problem := _imported("megarl.parallel.engine"), str):
            wrong.append(f"{distribution} cannot be imported ({problem})")
    if wrong:
        return Finding("libraries", "; ".join(wrong), WRONG, _INSTALL)
    return Finding("libraries", ", ".join(versions))


def kernels() -> Finding:
    """Transformer Engine and Apex, whose layers are faster on GPUs."""
    found = []
    for label, name in (("Transformer Engine", "transformer_engine.pytorch"), ("Apex", "apex.normalization")):
        module = _imported(name)
        found.append(f"{label} {'is there' if not isinstance(module, str) else 'is not there'}")
    result = ", ".join(found)
    module = _imported("torch")
    on_gpu = not isinstance(module, str) and module.cuda.is_available()
    if on_gpu and "not" in found[0]:
        remedy = "use the image of docker/, or build it: pip install --no-build-isolation transformer-engine[pytorch]"
        return Finding("fast layers", result, NOTE, remedy)
    return Finding("fast layers", f"{result}{'' if on_gpu else ' (used on GPUs only)'}")


# --- what megarl will use ---------------------------------------------------------------------------------------------


def layers_used() -> Finding:
    """The classes of layers that `parallel.kernels=auto` chooses here."""
    _working_torch()
    from megarl.models.kernels import kernels as choose
    from megarl.parallel.device import device_settings

    chosen = choose()
    room = chosen.column.__mro__[1].__module__.split(".")[0]
    device = "a GPU's" if not device_settings().cpu_layers else "a CPU's"
    return Finding("megarl uses: layers", f"{room}'s linear layers, with {device} settings (parallel.kernels=auto)")


def products_used() -> Finding:
    """The library that multiplies matrices."""
    module = _working_torch()
    if module.cuda.is_available():
        return Finding("megarl uses: products", "cuBLAS")
    from megarl.parallel.products import library

    return Finding("megarl uses: products", f"{library()}; {module.backends.cpu.get_cpu_capability()}")


def attention_used() -> Finding:
    """How attention is computed."""
    _working_torch()
    from megarl.parallel.device import device_settings

    plain = "two matrix products for short sequences, torch's scaled_dot_product_attention for long ones"
    used = plain if device_settings().plain_attention else "torch's scaled_dot_product_attention"
    return Finding("megarl uses: attention", used)


def precision_advice() -> Finding:
    """Which precision to choose."""
    module = _working_torch()
    if not module.cuda.is_available():
        return Finding("advice: precision", "trainer.precision=fp32, the default")
    if module.cuda.is_bf16_supported():
        return Finding("advice: precision", "trainer.precision=bf16, for half the activation memory")
    return Finding("advice: precision", "trainer.precision=fp32: this GPU has no bf16")


def version() -> Finding:
    """The version of megarl, and where it is."""
    return Finding("megarl", f"{megarl.__version__} at {Path(megarl.__file__).parent}")


CHECKS: tuple[tuple[str, Check], ...] = (
    ("megarl", version),
    ("Python", python),
    ("torch", torch),
    ("GPUs", gpus),
    ("NCCL", nccl),
    ("libraries", packages),
    ("fast layers", kernels),
    ("SLURM", slurm),
    ("cores", cores),
    ("memory", memory),
    ("/dev/shm", shared_memory),
    ("runs/", runs_folder),
    ("megarl uses: layers", layers_used),
    ("megarl uses: products", products_used),
    ("megarl uses: attention", attention_used),
    ("advice: precision", precision_advice),
)


def _imported(name: str) -> ModuleType | str:
    """Return a module, or in one line why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as problem:  # a library that was built for another machine raises anything
        return " ".join(f"{type(problem).__name__}: {problem}".split())[:160]


def _working_torch() -> ModuleType:
    module = _imported("torch")
    if isinstance(module, str):
        raise ImportError("torch is needed for it")
    return module


def _below(version: str, bound: str) -> bool:
    """Return whether a version is below another, by its leading numbers."""
    return _numbers(version) < _numbers(bound)


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:  # 2.8 and 2.8.0 are equal
        numbers.pop()
    return tuple(numbers)


def _output(*command: str) -> str | None:
    """Return what a program prints; None if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
