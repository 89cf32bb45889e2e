"""A Slurm of two or more nodes on this machine: its daemons in a folder, its commands, and what it knows of a job."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATIENCE_S = 60.0

# NodeHostname: all nodes are this machine. config_overrides: they may say that they have more cores than it has.
# cred_expire: a requeued job may start again after this many seconds instead of two minutes.
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=1
MinJobAge=600
KillWait=5
MessageTimeout=60
OverTimeLimit=0
JobRequeue=1
ReturnToService=2
SlurmdTimeout=60
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN\n"


def missing() -> list[str]:
    """What this machine lacks of a Slurm."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in NEEDED if shutil.which(name, path=path) is None]
    return lacking or ([] if os.geteuid() == 0 else ["root, as whom its daemons run"])


class Cluster:
    """Daemons that live as long as this object; `close` ends them."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        names = [f"n{number + 1}" for number in range(nodes)]
        for name in ("munge", "state", *(f"spool-{node}" for node in names)):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().split(".")[0]
        user = pwd.getpwuid(os.geteuid()).pw_name
        conf = folder / "slurm.conf"
        ports = _free_ports(1 + nodes)
        lines = [NODE.format(name=name, host=host, port=port) for name, port in zip(names, ports[1:], strict=True)]
        conf.write_text(CONF.format(folder=folder, host=host, user=user, ports=ports) + "".join(lines))
        self.environ = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(conf),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in names:
                self.start_node(node)
            ready = ["idle", str(nodes)]
            self.wait(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ready, "nodes are not idle")
        except BaseException:
            self.close()
            raise

    def run(self, *command: str | Path, cwd: Path | None = None, seconds: float = PATIENCE_S, **environ: str) -> str:
        """A command's output; it must succeed."""
        done = subprocess.run(
            [str(part) for part in command],
            env={**self.environ, **environ},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}"
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, **environ: str) -> str:
        """`sbatch`; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environ).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def wait(self, met: Callable[[], bool], otherwise: str, seconds: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + seconds
        while not met():
            assert time.monotonic() < deadline, f"{otherwise} after {seconds:.0f} s; {self._logs()}"
            time.sleep(0.1)

    def wait_for(
        self, number: str, states: Sequence[str], seconds: float = PATIENCE_S, logs: Path | None = None
    ) -> str:
        """The state of a job once it is one of `states`."""
        try:
            self.wait(lambda: self.state(number) in states, f"job {number} is not {' or '.join(states)}", seconds)
        except AssertionError as problem:
            said = (
                [f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(logs.rglob("*.log"))[:4]]
                if logs
                else []
            )
            raise AssertionError("\n".join([str(problem), str(self.job(number)), *said])) from None
        return self.state(number)

    def start_node(self, name: str) -> None:
        """Start the daemon of a node, also of one that was killed."""
        self.nodes[name] = self._start("slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """End everything that runs on a node at once, as a loss of power would, and tell the controller, which would
        wait for SlurmdTimeout."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        tasks = self.tasks(name)
        daemons = [task.parent() for task in tasks]
        for process in [daemon for daemon in daemons if daemon is not None and daemon.name() == "slurmstepd"] + tasks:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def return_node(self, name: str) -> None:
        """Bring a killed node back, ready for jobs."""
        self.start_node(name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait(lambda: "idle" in self.run("sinfo", "-h", "-n", name, "-o", "%T"), f"{name} is not idle")

    def tasks(self, name: str) -> list[psutil.Process]:
        """The processes of jobs on a node."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environ = process.environ()
                if (environ.get("SLURMD_NODENAME"), environ.get("SLURM_CONF")) == (name, self.environ["SLURM_CONF"]):
                    found.append(process)
        return found

    def close(self) -> None:
        if len(self.daemons) > 1:
            subprocess.run(["scancel", "--state=RUNNING,PENDING", "-u", "root"], env=self.environ, capture_output=True)
            subprocess.run(["scontrol", "shutdown"], env=self.environ, capture_output=True)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons = []

    def _start_munge(self) -> None:
        """A key and a socket of our own, as the user that munge is made for."""
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        as_user: list[str] = []
        if "munge" in {entry.pw_name for entry in pwd.getpwall()}:
            for path in (folder, folder / "key"):
                shutil.chown(path, "munge", "munge")
            as_user = ["runuser", "-u", "munge", "--"]
        (folder / "key").chmod(0o600)
        # --force: the folders above it need not be as guarded as those of a system daemon.
        files = [f"--{name}={folder}/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        command = [*as_user, "munged", "--foreground", "--force", f"--key-file={folder}/key", *files]
        self._start(*command)
        self.wait(lambda: (folder / "socket").exists(), "munged has no socket")

    def _start(self, *command: str) -> "subprocess.Popen[bytes]":
        log = (self.folder / f"{len(self.daemons)}-{command[0]}.out").open("wb")
        bound = ["setpriv", "--pdeathsig", "TERM", *command]  # they end with this process, however it ends
        self.daemons.append(subprocess.Popen(bound, env=self.environ, stdout=log, stderr=log, start_new_session=True))
        return self.daemons[-1]

    def _logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.out")
        )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
