"""The processes around a sandboxed program. `sandbox.py` starts this file as a script; nothing else imports it.

    outer (this file's main)   watches time, memory and the control pipe; kills the inner process
      inner                    the first process of the new namespaces; its end kills all that is left in them
        program                without privileges, with limits, behind the system call filter

It depends on nothing but a few modules of the standard library, the cheapest to import, as each program waits for them.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import select
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LOOK_S = 0.02
"""Seconds between two looks at the memory of the program's processes."""

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 4096, 16384, 1 << 18, 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_SECCOMP_MODE_FILTER, _AMBIENT_CLEAR = 2, 4
_CAPABILITY_VERSION = 0x20080522
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_LANDLOCK_RIGHTS = ((1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
"""All rights to files that the versions 1 to 5 know."""
_READ_FILE, _READ_FOLDER = 0b101, 0b1101
_INSIDE_ID = 1000
"""User and group number that a program in its own user namespace sees as its own."""
_DEVICES = ("null", "zero", "full", "random", "urandom")
_PAGE = os.sysconf("SC_PAGE_SIZE")

_libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """A step that the kernel refused. The text names the step and the kernel's error."""


def main() -> None:
    """Run one program as the control pipe says first, and write to the status pipe how it ended."""
    with open(0, "rb", closefd=False) as control:
        config = marshal.load(control)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != config["parent"]:
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the run receives them, and closes the control pipe
    try:
        end = _outer(config)
    except Exception as error:
        end = _refusal(error)
    os.write(config["status"], marshal.dumps(end))


def _refusal(error: BaseException) -> dict[str, str]:
    return {
        "how": "refused",
        "why": str(error) if isinstance(error, SetupError) else f"{type(error).__name__}: {error}",
    }


# The outer process


def _outer(config: dict[str, Any]) -> dict[str, Any]:
    """Start the inner process and wait for the end of the program, a limit, or the control pipe."""
    isolation = config["isolation"]
    sweeper = None
    if isolation == "separate user":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the program leaves behind becomes this process's, to be waited for
        sweeper = _start_sweeper(config["uid"])
    _enter_namespaces(config)
    life, life_end = os.pipe()
    report, report_end = os.pipe()
    inner = os.fork()
    if inner == 0:
        os.close(life_end)
        os.close(report)
        if sweeper is not None:
            os.close(sweeper)
        try:
            _inner(config, life, report_end)
        except BaseException as error:
            os.write(report_end, marshal.dumps(_refusal(error)))
        finally:
            os._exit(0)
    os.close(report_end)
    os.close(life)
    for number in {1, *config["fds"]}:
        os.close(number)  # so that the other end of a pipe sees the program's end
    try:
        return _watch(config, inner, report)
    finally:
        os.kill(inner, signal.SIGKILL)
        os.waitpid(inner, 0)
        if sweeper is not None:
            os.close(sweeper)
            _reap_all()


def _watch(config: dict[str, Any], inner: int, report: int) -> dict[str, Any]:
    deadline = time.monotonic() + config["limits"]["wall_s"]
    limit = config["limits"]["memory"]
    poll = select.poll()
    poll.register(report, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = dict(poll.poll(LOOK_S * 1000))
        if report in ready:
            text = os.read(report, 1 << 16)
            return marshal.loads(text) if text else {"how": "killed", "why": "the sandbox ended"}
        if 0 in ready:
            return {"how": "killed", "why": "no longer wanted"}
        if time.monotonic() > deadline:
            return {"how": "timed_out", "why": f"{config['limits']['wall_s']:g} s"}
        pids = _descendants(inner)
        if _memory(pids, exact=False) > limit and _memory(pids, exact=True) > limit:
            return {"how": "out_of_memory", "why": f"{limit} bytes in {len(pids)} processes"}


def _descendants(root: int) -> list[int]:
    """Return the processes under a process, itself not included."""
    found: list[int] = []
    todo = [root]
    while todo:
        pid = todo.pop()
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue  # it has ended
        for thread in threads:
            children = [int(child) for child in _read(f"/proc/{pid}/task/{thread}/children").split()]
            found += children
            todo += children
    return found


def _memory(pids: list[int], exact: bool) -> int:
    """Return the resident bytes of processes. Pages that several share count for each of them, or once if `exact`,
    which is slow and not possible everywhere."""
    total = 0
    for pid in pids:
        shared = (
            [line for line in _read(f"/proc/{pid}/smaps_rollup").splitlines() if line.startswith("Pss:")]
            if exact
            else []
        )
        if shared:
            total += int(shared[0].split()[1]) << 10
        elif fields := _read(f"/proc/{pid}/statm").split():
            total += int(fields[1]) * _PAGE
    return total


def _start_sweeper(uid: int) -> int:
    """Start the process that kills every process of a user as soon as this one ends, however it ends.

    Return the pipe whose end it waits for.
    """
    waits, end = os.pipe()
    if os.fork():
        os.close(waits)
        return end
    os.setsid()
    os.closerange(0, waits)
    os.closerange(waits + 1, 1 << 16)
    os.read(waits, 1)
    _become(uid)
    for _ in range(3):  # one is enough: no process can be forked past it
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            break
    os._exit(0)


def _reap_all() -> None:
    """Wait until every child has ended."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def _enter_namespaces(config: dict[str, Any]) -> None:
    isolation, uid = config["isolation"], config["uid"]
    if isolation == "separate user":
        return
    flags = _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWCGROUP
    if isolation == "namespaces":
        _check("unshare(pid, net, ipc, uts, cgroup)", _libc.unshare(flags))
        return
    if uid is not None:  # the superuser has no limit of processes, and the user namespace would inherit that
        _become(uid)
        _prctl(_PR_SET_DUMPABLE, 1)  # else the maps below belong to the superuser
    user, group = os.geteuid(), os.getegid()
    _check("unshare(user, pid, net, ipc, uts, cgroup)", _libc.unshare(flags | _NEWUSER))
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_INSIDE_ID} {user} 1"),
        ("gid_map", f"{_INSIDE_ID} {group} 1"),
    ):
        _write(f"/proc/self/{name}", text)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # changed credentials have cleared it


# The inner process


def _inner(config: dict[str, Any], life: int, report: int) -> None:
    """Prepare the sandbox, start the program, and report its end. What is left of it dies with this process."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_blocking(life, False)
    try:
        if not os.read(life, 1):
            return  # the outer process has ended before its death could be noticed
    except BlockingIOError:
        pass
    _try(_write, "/proc/self/oom_score_adj", "1000")  # where the machine runs out of memory, this goes first
    if config["isolation"] == "separate user":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        os.chdir("/")
    else:
        _build_root(config)
    program = os.fork()
    if program == 0:
        try:
            _program(config)
        except BaseException as error:
            os.write(report, marshal.dumps(_refusal(error)))
        finally:
            os._exit(127)
    _prctl(_PR_SET_DUMPABLE, 0)  # its memory and descriptors are closed to the program
    os.closerange(0, report)
    os.closerange(report + 1, 1 << 16)
    while True:
        pid, status = os.wait()
        if pid == program:
            break
    if os.WIFSIGNALED(status):
        end: dict[str, Any] = {"how": "killed", "why": f"signal {os.WTERMSIG(status)}"}
    else:
        end = {"how": "ended", "code": os.WEXITSTATUS(status)}
    os.write(report, marshal.dumps(end))


def _build_root(config: dict[str, Any]) -> None:
    """Replace the whole view of files by a small one in memory, with a few folders of the machine to be read."""
    _check("unshare(mount)", _libc.unshare(_NEWNS))
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    base, plain = "/tmp", _MS_NOSUID | _MS_NODEV
    _mount("sandbox", base, "tmpfs", plain, "size=1m,nr_inodes=1000,mode=0755")
    os.mkdir(f"{base}/old", 0o700)
    machine = os.uname().machine
    _check("pivot_root", _libc.syscall(_PIVOT_ROOT[machine], base.encode(), f"{base}/old".encode()))
    os.chdir("/")
    for path in config["binds"]:
        _show(path)
    os.mkdir("/dev", 0o755)
    for name in _DEVICES:
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(f"/old/dev/{name}", f"/dev/{name}", None, _MS_BIND)
    os.mkdir("/scratch", 0o755)
    _mount("scratch", "/scratch", "tmpfs", plain, f"size={config['limits']['disk']},nr_inodes=10000,mode=0755")
    for path in ("/work", "/tmp", "/dev/shm"):  # all in the one file system of limited size
        shared = f"/scratch/{os.path.basename(path)}"
        os.mkdir(shared)
        os.chmod(shared, 0o1777)
        os.makedirs(path, exist_ok=True)
        _mount(shared, path, None, _MS_BIND)
    os.mkdir("/proc", 0o555)
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_RDONLY
    if not _try(_mount, "proc", "/proc", "proc", flags, "subset=pid"):  # since Linux 5.8
        _try(_mount, "proc", "/proc", "proc", flags)  # containers that hide parts of theirs allow no other
    _check("umount", _libc.umount2(b"/old", _MNT_DETACH))
    os.rmdir("/old")
    _mount("none", "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | plain)
    os.chdir("/work")
    _libc.sethostname(b"sandbox", 7)


def _show(path: str) -> None:
    """Show a file or folder of the machine under its own name, to be read only."""
    old = f"/old{path}"
    if not os.path.lexists(old) or os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path, 0o755)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    attributes = (ctypes.c_uint64 * 4)(_MS_RDONLY | _MS_NOSUID | _MS_NODEV, 0, 0, 0)
    _mount(old, path, None, _MS_BIND | _MS_REC)
    done = _libc.syscall(
        _MOUNT_SETATTR, _AT_FDCWD, path.encode(), _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)
    )
    if done != 0:  # a kernel before 5.12: without the file systems that are mounted below
        _check(f"umount({path})", _libc.umount2(path.encode(), _MNT_DETACH))
        _mount(old, path, None, _MS_BIND)
        flags = os.statvfs(path).f_flag & (_MS_NOEXEC | 1024 | 2048 | 4096 << 9)
        _mount("none", path, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | flags)


# The program


def _program(config: dict[str, Any]) -> None:
    """Give up everything, and become the program."""
    os.setsid()
    os.nice(5)  # the processes that watch it come first
    fds = config["fds"]
    moved = [os.dup2(number, 500 + index, inheritable=False) for index, number in enumerate(fds)]
    status = [os.dup2(number, index) for index, number in enumerate(moved)]
    _close_on_exec(len(status))
    os.umask(0o077)
    limits = config["limits"]
    for name, value in (
        ("AS", limits["memory"]),
        ("CPU", int(limits["wall_s"]) + 2),
        ("FSIZE", limits["disk"]),
        ("NPROC", limits["processes"]),
        ("NOFILE", limits["files"]),
        ("STACK", 64 << 20),
        ("CORE", 0),
        ("MEMLOCK", 0),
        ("MSGQUEUE", 0),
        ("NICE", 0),
        ("RTPRIO", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    ruleset = _landlock(config["binds"]) if config["isolation"] == "separate user" else None
    _drop_privileges(config)
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33):  # the C library keeps two for itself
            signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        _check("landlock_restrict_self", _libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0))
    _filter_system_calls(bytes.fromhex(config["filter"]))
    command = config["command"]
    os.execve(command[0], command, config["env"])


def _close_on_exec(first: int) -> None:
    """Mark every descriptor from `first` on to be closed when the program starts."""
    if _libc.syscall(436, first, 0xFFFFFFFF, 4) == 0:  # close_range(CLOSE_RANGE_CLOEXEC), since Linux 5.11
        return
    for number in range(first, 1 << 16):
        try:
            os.set_inheritable(number, False)
        except OSError:
            continue  # it is not open


def _landlock(paths: list[str]) -> int | None:
    """Return a Landlock ruleset that lets some files and folders be read and nothing else; None where the kernel has no
    Landlock."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return None
    rights = (ctypes.c_uint64 * 3)(_LANDLOCK_RIGHTS[min(version, 5) - 1], 0, 3)  # 3: no signals or sockets to others
    ruleset: int = _libc.syscall(_LANDLOCK_CREATE, ctypes.byref(rights), 24 if version >= 6 else 8, 0)
    if ruleset < 0:
        raise SetupError(f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    for path in [*paths, *(f"/dev/{name}" for name in _DEVICES)]:
        number = os.open(path, os.O_PATH)
        rule = (ctypes.c_uint32 * 3)(_READ_FOLDER if os.path.isdir(path) else _READ_FILE, 0, number)
        done = _libc.syscall(_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
        _check(f"landlock_add_rule({path})", done)
        os.close(number)
    return ruleset


def _drop_privileges(config: dict[str, Any]) -> None:
    _bound_no_capabilities()
    if config["isolation"] != "user namespaces":
        _become(config["uid"])
    if config["isolation"] == "namespaces":
        _libc.unshare(_NEWUSER)  # where the kernel allows it; the numbers of users are not mapped into it
        _bound_no_capabilities()
    _libc.prctl(_PR_CAP_AMBIENT, _AMBIENT_CLEAR, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check("capset", _libc.capset(ctypes.byref(header), ctypes.byref(nothing)))


def _bound_no_capabilities() -> None:
    for capability in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails beyond the last that the kernel has


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def _filter_system_calls(instructions: bytes) -> None:
    program = _FilterProgram(len(instructions) // 8, instructions)
    address = ctypes.cast(ctypes.pointer(program), ctypes.c_void_p).value or 0
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address)


# System calls


def _become(uid: int) -> None:
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise SetupError(f"setresuid({uid}): {error.strerror}") from error


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind, data)]
    done = _libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    _check(f"mount({source}, {target})", done)


def _prctl(option: int, value: int, more: int = 0) -> None:
    done = _libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(more), ctypes.c_ulong(0), ctypes.c_ulong(0))
    _check(f"prctl({option})", done)


def _check(what: str, done: int) -> None:
    if done != 0:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _try(step: Callable[..., None], *arguments: Any) -> bool:
    """Take a step that may fail. Return whether it succeeded."""
    try:
        step(*arguments)
    except SetupError:
        return False
    return True


def _read(path: str) -> str:
    """Return the text of a file in /proc; nothing where its process has ended or it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    try:
        number = os.open(path, os.O_WRONLY)
        try:
            os.write(number, text.encode())
        finally:
            os.close(number)
    except OSError as error:
        raise SetupError(f"write to {path}: {error.strerror}") from error


if __name__ == "__main__":
    main()
