"""Builds the system call filter of sandboxed programs: a classic BPF program, as bytes, for this machine's processor.

The filter is the second protection after the isolation. It refuses what reaches deep into the kernel or out of the
sandbox and what a tested program does not need. Calls that the kernel has gained since this list was written are
refused as unknown.
"""

from __future__ import annotations

import errno
import platform
import socket
import struct
from collections.abc import Sequence

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS = ("x86_64", "aarch64")

# name: (x86_64, aarch64); None where a processor does not have the call
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    # file systems and namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "quotactl": (179, 60),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    # the kernel's own machinery
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "io_setup": (206, 0),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "syslog": (103, 116),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "personality": (135, 92),
    "vhangup": (153, 58),
    # the machine's name and clock
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    # memory that belongs to no process, which no limit of a process counts
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
_CHANGES_FILES: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rmdir": (84, None),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "link": (86, None),
    "linkat": (265, 37),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}
_OPEN, _OPENAT = (2, None), (257, 56)
_SOCKET, _SOCKETPAIR = (41, 198), (53, 199)
_CLONE, _PRLIMIT = (56, 220), (302, 261)

_FIRST_NEW = 424
"""From this number on, calls have one number on all processors."""
_ALLOWED_NEW = (436, 439, 441, 449, 462)
"""close_range, faccessat2, epoll_pwait2, futex_waitv, mseal. Without clone3, C libraries use clone, whose flags the
filter can read; without openat2, openat."""
_X32 = 0x40000000

_CLONE_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET, and CLONE_NEWTIME."""
_OPEN_TO_CHANGE = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE; the same numbers on both processors."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH = 0, 4

_Instruction = tuple[int, int, int, int]


def system_call_filter(read_only: bool) -> bytes:
    """Return the filter, an array of `struct sock_filter`.

    Args:
        read_only: also refuse every call that changes a file, and all sockets but pairs. For a program that shares the
            file systems and the network with everything else.

    Raises:
        NotImplementedError: this machine's processor is not one of those whose system calls are listed here.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise NotImplementedError(f"no system call filter for the processor {machine}: use x86_64 or aarch64")
    which = _NUMBERS.index(machine)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        (_AT_LEAST, 0, len(_ALLOWED_NEW) + 2, _FIRST_NEW),
        *[(_EQUAL, len(_ALLOWED_NEW) - index, 0, number) for index, number in enumerate(_ALLOWED_NEW)],
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_RETURN, 0, 0, _ALLOW),
    ]
    refused = {**_REFUSED, **(_CHANGES_FILES if read_only else {})}
    if read_only:
        refused["socket"] = _SOCKET
    for numbers in refused.values():
        program += _refuse(numbers[which], [])
    program += _refuse(_CLONE[which], _bits_of_argument(0, _CLONE_NAMESPACES))
    program += _refuse(_PRLIMIT[which], _argument_is_not(0, 0))
    program += _refuse(_SOCKETPAIR[which], _argument_is_not(0, socket.AF_UNIX))
    if read_only:
        program += _refuse(_OPEN[which], _bits_of_argument(1, _OPEN_TO_CHANGE))
        program += _refuse(_OPENAT[which], _bits_of_argument(2, _OPEN_TO_CHANGE))
    else:
        program += _refuse(_SOCKET[which], _argument_is_not(0, socket.AF_UNIX))
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _refuse(number: int | None, condition: Sequence[_Instruction]) -> list[_Instruction]:
    """Return what refuses a call. `condition` jumps over the instruction that follows it where it does not hold."""
    if number is None:
        return []
    end = [(_RETURN, 0, 0, _ERROR | errno.EPERM)]
    body = [*condition, *end, *([(_LOAD, 0, 0, _NUMBER)] if condition else [])]
    return [(_EQUAL, 0, len(body), number), *body]


def _bits_of_argument(index: int, bits: int) -> list[_Instruction]:
    return [(_LOAD, 0, 0, 16 + 8 * index), (_ANY_BIT, 0, 1, bits)]


def _argument_is_not(index: int, value: int) -> list[_Instruction]:
    return [(_LOAD, 0, 0, 16 + 8 * index), (_EQUAL, 1, 0, value)]
