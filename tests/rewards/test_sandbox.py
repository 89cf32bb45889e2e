"""Hostile programs in the sandbox: each ends within its limit with score 0 and is counted, and nothing outside is
touched. And honest programs, which pass, and machines without a sandbox, on which nothing runs."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from megarl.errors import RewardError
from megarl.rewards import sandbox
from megarl.rewards.code_tests import OUTCOMES, Verdict, check_responses, find_code, read_tests
from megarl.rewards.sandbox import ISOLATIONS, NAMESPACES, SEPARATE_USER, USER_NAMESPACES, Limits, SandboxError, run
from megarl.rewards.verifiable import python_tests

SHORT_S = 0.5
"""For programs that do not end."""
LONG_S = 60.0
"""For programs that must pass, on machines with much else to do."""
START_S = 4.0
"""For the start and the end of a program, on such machines."""
MARK = 2_098_000_000 + os.getpid() % 50_000 * 10
"""The first user number of programs whose processes are looked for; those of tests that run at the same time differ."""

FORGED = "for n in range(3, 64):\n try: os.write(n, b'1\\n1' + b'right')\n except OSError: pass"
EVIL = """
class Evil(int):
    def __eq__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return 0
    def __hash__(self): return 0
def answer(): return Evil()
"""
HOSTILE = {
    "fork bomb": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "fork bomb that allocates": "import os\nwhile True:\n"
    " try: os.fork(); x = bytearray(64 << 20)\n except OSError: pass",
    "10 GB": "x = bytearray(10 << 30)",
    "memory piece by piece": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "endless loop": "while True: pass",
    "huge integer": "10 ** 10 ** 9",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
    "sleep": "import time\ntime.sleep(1000)",
    "stops itself": "import os\nos.kill(0, 19)",
    "ignores signals": "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "many threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "exit 0": "import sys\nsys.exit(0)",
    "hard exit 0": "import os\nos._exit(0)",
    "exit late": "import atexit, os\natexit.register(os._exit, 0)",
    "kills its parent": "import os\nfor n in (9, 15, 2): os.kill(os.getppid(), n)",
    "kills everything": "import os\nos.kill(-1, 9)\nos.killpg(0, 9)",
    "forges a verdict": f"import os\n{FORGED}\nos._exit(0)",
    "output": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "replaces the machinery": "import builtins, sys, unittest\nbuiltins.all = lambda *a: True\n"
    "builtins.AssertionError = SystemExit\nunittest.TestCase.assertEqual = print\nsys.modules['tests'] = None\n"
    "all = any = lambda *a: True\n__builtins__ = {}\nprint = repr",
    "equal to everything": EVIL,
    "writes into frames": "import sys, gc\nframe = sys._getframe()\nwhile frame:\n frame.f_globals.update(names=None)\n"
    " frame = frame.f_back\n[o.update(passed=True) for o in gc.get_objects() if type(o) is dict and 'passed' in o]",
    "crash": "import ctypes\nctypes.string_at(0)",
    "replaces itself": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'print(\"wrong\")'])",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(1000)\n os._exit(0)",
}
ENDLESS = (
    *("fork bomb", "endless loop", "huge integer", "regular expression", "sleep", "stops itself", "ignores signals"),
    *("deep recursion", "many threads", "output"),
)
"""Hostile programs that run until a limit is reached. The others end by themselves or use up the memory. They have time
for it, on a busy machine too."""
OUT_OF_MEMORY = ("10 GB", "memory piece by piece", "fork bomb that allocates")
ATTEMPTS = {
    "environment": "assert 'CANARY' not in os.environ and b'CANARY' not in open('/proc/self/environ', 'rb').read()",
    "environment of others": "for p in os.listdir('/proc'):\n if p.isdigit() and int(p) != os.getpid(): "
    "assert b'CANARY' not in open(f'/proc/{p}/environ', 'rb').read()",
    "memory of the parent": "open(f'/proc/{os.getppid()}/mem', 'rb+').read(1)",
    "descriptors of the parent": "os.listdir(f'/proc/{os.getppid()}/fd')",
    "the canary": "open(CANARY).read()",
    "beside the canary": "open(CANARY + '.new', 'w').write('x')",
    "shadow": "open('/etc/shadow').read()",
    "passwd for writing": "open('/etc/passwd', 'a')",
    "standard library": "open(os.__file__, 'a')",
    "next to the library": "open(os.path.dirname(os.__file__) + '/canary.py', 'w')",
    "home of root": "open('/root/canary', 'w')",
    "internet": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0canary-of-megarl')",
    "packets": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "ptrace": "call('ptrace', 16, os.getppid(), 0, 0)",
    "mount": "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "user namespace": "call('unshare', 0x10000000)",
    "chroot": "call('chroot', b'/tmp')",
    "setuid": "os.setuid(0)",
    "setuid bit": "open('/tmp/x', 'w'); os.chown('/tmp/x', 0, 0)",
    "device": "os.mknod('/tmp/sda', 0o60666, os.makedev(254, 0))",
    "bpf": "call('syscall', 321, 0, 0, 0)",
    "io_uring": "call('syscall', 425, 8, 0)",
    "keyctl": "call('syscall', 250, 0, 0, 0)",
    "memfd": "os.memfd_create('x')",
    "host name": "socket.sethostname('canary')",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))",
    "limits of the parent": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "real time": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(9))",
    "niceness": "os.nice(-5)",
    "control groups": "os.mkdir('/sys/fs/cgroup/canary')",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')",
    "signal to the first process": "os.kill(1, 0) if os.getppid() != 1 else os.kill(2 ** 22 - 1, 0)",
    "fill the disk": "for i in range(100): open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20))",
    "fill shared memory": "open('/dev/shm/x', 'wb').write(b'x' * (64 << 20))",
    "many files": "for i in range(20_000): open(f'/tmp/{i}', 'w').close()",
    "many descriptors": "kept = [os.dup(0) for i in range(1000)]",
    "many processes": "for i in range(100):\n if os.fork() == 0: time.sleep(100)",
}
"""Each statement must raise (or, where it asserts, hold)."""


def attempts(canary: Path, port: int) -> str:
    return f"""
import ctypes, os, socket, sys, time
CANARY, PORT = {str(canary)!r}, {port}
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
for name, code in {ATTEMPTS!r}.items():
    try:
        exec(code)
    except (OSError, ValueError, MemoryError):
        continue
    if 'assert' not in code:
        print('done:', name, flush=True)
print('end', flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def isolations() -> list[str]:
    found = [isolation for isolation in ISOLATIONS if not sandbox._try(isolation)]
    if not found:
        pytest.skip("this kernel allows no sandbox")
    return found


@pytest.fixture
def within(isolations: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def choose(isolation: str) -> None:
        if isolation not in isolations:
            pytest.skip(f"this kernel does not allow {isolation}: {sandbox._try(isolation)}")
        monkeypatch.setattr(sandbox, "working_isolation", lambda: isolation)

    return choose


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """A file that all may read, a variable, and sockets that listen; all are as before at the end."""
    monkeypatch.setenv("CANARY", "CANARY")
    tmp_path.chmod(0o777)
    file = tmp_path / "canary"
    file.write_text("CANARY")
    file.chmod(0o666)
    before = shm()
    with socket.socket() as listening, socket.socket(socket.AF_UNIX) as abstract:
        listening.bind(("127.0.0.1", 0))
        abstract.bind("\0canary-of-megarl")
        for one in (listening, abstract):
            one.listen()
            one.setblocking(False)
        yield file, listening.getsockname()[1]
        for one in (listening, abstract):
            with pytest.raises(BlockingIOError):
                one.accept()
    assert file.read_text() == "CANARY"
    assert list(tmp_path.iterdir()) == [file]
    assert shm() == before
    assert not Path("/root/canary").exists()
    assert not Path(os.__file__).with_name("canary.py").exists()
    assert socket.gethostname() != "canary"


def shm() -> list[str]:
    return [name for name in sorted(os.listdir("/dev/shm")) if name == "x"]  # noqa: PTH208


def processes_of(uid: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["uids"]):
        if process.info["uids"] and process.info["uids"].real == uid and process.is_running():
            found.append(process.pid)
    return found


def outcome_of(scores: dict[str, list[float]], row: int) -> str:
    """The one outcome that a response is counted as."""
    (outcome,) = [name for name in OUTCOMES if scores[name][row]]
    return outcome


# Hostile programs


@pytest.mark.parametrize("kind", ["calls", "cases"])
def test_hostile_programs_end_in_time_with_score_0_and_a_count(within: Any, isolations: list[str], kind: str) -> None:
    within(isolations[0])
    cases = [{"input": "", "output": "right"}]
    tests: Any = ["assert answer() == 'right'"] if kind == "calls" else cases
    endless = [name for name in HOSTILE if name in ENDLESS]
    others = [name for name in HOSTILE if name not in ENDLESS]
    found, workers = {}, 4
    for names, timeout in ((endless, SHORT_S), (others, LONG_S)):
        start = time.monotonic()
        codes = [HOSTILE[name] for name in names]
        scores = python_tests(codes, tests=[tests] * len(names), timeout=timeout, workers=workers)
        took = time.monotonic() - start
        assert scores["python_tests"] == [0.0] * len(names)
        rounds = -(-len(names) // workers)
        assert took < rounds * (timeout + sandbox.GRACE_S) + len(names) * START_S
        found |= {name: outcome_of(scores, row) for row, name in enumerate(names)}
    assert {found[name] for name in endless} <= {"timed_out", "failed", "killed"}
    assert {found[name] for name in ("endless loop", "sleep", "regular expression", "stops itself")} == {"timed_out"}
    assert {found[name] for name in OUT_OF_MEMORY} == {"out_of_memory"}
    assert {found[name] for name in others if name not in OUT_OF_MEMORY} <= {"failed", "killed"}
    assert found["crash"] == "killed"


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_nothing_outside_can_be_read_or_touched(within: Any, isolation: str, canary: tuple[Path, int]) -> None:
    within(isolation)
    end, output = run(attempts(*canary).encode(), limits=Limits(wall_s=LONG_S))
    assert (end.how, end.why, output.decode()) == ("ended", "", "end\n")


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_process_is_left(within: Any, isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    within(isolation)
    if os.geteuid() != 0:
        pytest.skip("the user number of programs is this user's own, who has other processes")
    ends = {"daemon": "ended", "fork bomb": "timed_out", "stops itself": "timed_out"}
    own = threading.local()
    monkeypatch.setattr(sandbox, "unused_uid", lambda: own.uid)

    def run_one(uid: int, name: str) -> tuple[str, list[int]]:
        own.uid = uid
        wall_s = LONG_S if ends[name] == "ended" else SHORT_S
        end, _ = run(HOSTILE[name].encode(), limits=Limits(wall_s=wall_s))
        return end.how, processes_of(uid)

    with ThreadPoolExecutor(len(ends)) as pool:
        found = list(pool.map(run_one, range(MARK, MARK + len(ends)), ends))
    assert found == [(how, []) for how in ends.values()]


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_memory_counts_over_all_processes(within: Any, isolation: str) -> None:
    within(isolation)
    code = (
        "import os, time\nfor _ in range(8): os.fork() or (x := b'x' * (48 << 20)) and time.sleep(99)\ntime.sleep(99)"
    )
    end, _ = run(code.encode(), limits=Limits(wall_s=LONG_S, memory=128 << 20))
    assert end.how == "out_of_memory"


def test_a_killed_run_leaves_no_program(within: Any, isolations: list[str]) -> None:
    """A run that is killed cannot clean up: the kernel and the sandbox do."""
    if os.geteuid() != 0:
        pytest.skip("the user number of programs is this user's own, who has other processes")
    code = (
        "import os, sys, time\nfrom megarl.rewards import sandbox\n"
        "null, programs = os.open(os.devnull, os.O_RDWR), []\n"
        f"for uid, isolation in enumerate(sys.argv[1:], {MARK + 5}):\n"
        "  sandbox.unused_uid = lambda: uid\n"
        "  source = b'import os, time\\nos.fork() or os.setsid()\\ntime.sleep(1000)'\n"
        "  programs.append(sandbox.Program(source, (null,) * 3, sandbox.Limits(1000), isolation))\n"
        "time.sleep(1000)"
    )
    marks = {isolation: uid for uid, isolation in enumerate(isolations, MARK + 5)}
    process = subprocess.Popen([sys.executable, "-c", code, *isolations])
    deadline = time.monotonic() + LONG_S
    while any(len(processes_of(uid)) < 2 for uid in marks.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while left := [isolation for isolation, uid in marks.items() if processes_of(uid)]:
        assert time.monotonic() < deadline, f"{left} left processes"
        time.sleep(0.05)


# Verdicts


CALLS: list[tuple[str, Any, float]] = [
    ("def add(a, b): return a + b", ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], 1.0),
    ("def add(a, b): return 3", ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], 0.5),
    ("def add(a, b): return 3", "assert add(1, 2) == 3\nassert add(2, 2) == 4\nassert add(3, 0) == 3", 2 / 3),
    ("def f(x): return x", "def test_a(): assert f(1) == 1\ndef test_b(): assert f(1) == 2", 0.5),
    ("def sort(x): x.sort()", "x = [3, 1]\nsort(x)\nassert x == [1, 3]", 1.0),
    ("def big(n): return 2 ** n", "assert big(99999) == 2 ** 99999", 1.0),
    ("def squares(n):\n for i in range(n): yield i * i", "assert list(squares(4)) == [0, 1, 4, 9]", 1.0),
    ("def apply(f, x): return f(x)", "assert apply(lambda x: x + 1, 3) == 4\nassert apply(str, 3) == '3'", 1.0),
    ("def f():\n raise KeyError('k')", "try:\n f()\n assert False\nexcept KeyError: pass", 1.0),
    (
        "class No(ValueError): pass\ndef f():\n raise No('no')",
        "import unittest\nclass T(unittest.TestCase):\n def test_a(self):\n  with self.assertRaises(No): f()\n"
        " def test_b(self): self.assertEqual(f, 1)",
        0.5,
    ),
    (
        "class Stack:\n def __init__(self): self.x = []\n def push(self, x): self.x.append(x)\n"
        " def pop(self): return self.x.pop()\n def __len__(self): return len(self.x)",
        "s = Stack()\ns.push([1])\nassert len(s) == 1\nassert s.pop() == [1]\nassert isinstance(s, Stack)",
        1.0,
    ),
    (EVIL, "assert answer() == 5\nassert abs(answer() - 5) < 1", 0.0),
    (EVIL.replace("(int)", ""), "assert answer() == 5\nassert abs(answer() - 5) < 1\nassert answer() < 5", 0.0),
    (
        "all = lambda *a: True\n__builtins__ = {'all': all}\ndef f(x): return 0",
        "assert all(f(x) == x + 1 for x in (1, 2))",
        0.0,
    ),
    ("class math: isclose = print\ndef f(): return 1", "assert math.isclose(f(), 2)", 0.0),
    ("import os\ndef f(): os._exit(0)", "try: f()\nexcept BaseException: pass", 0.0),
    ("def use(f):\n try: f(0)\n except AssertionError: pass", "def check(x): assert x == 1\nuse(check)", 0.0),
    ("def use(f): f.__globals__['x'] = 1", "x = 0\nuse(lambda: 0)", 0.0),
    ("encode = lambda x: '1'\ndecode = eval", "assert decode(encode('__import__')) == '__import__'", 0.0),
    ("def broken(:", "assert broken(1) == 1", 0.0),
]
"""Codes, their tests, and the share of the tests that pass."""


@pytest.fixture(scope="module")
def verdicts_of_calls(isolations: list[str]) -> list[Verdict]:
    """The verdicts of all codes, which are run at once, as a start takes most of the time of each."""
    tests = [read_tests(tests) for _, tests, _ in CALLS]
    codes = [code for code, _, _ in CALLS]
    return check_responses(codes, tests, limits=Limits(LONG_S), workers=4, partial=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", range(len(CALLS)), ids=[code for code, _, _ in CALLS])
def test_tests_that_call_the_code(verdicts_of_calls: list[Verdict], row: int) -> None:
    share, verdict = CALLS[row][2], verdicts_of_calls[row]
    assert (verdict.share, verdict.outcome) == (share, "passed" if share == 1 else "failed")


def test_tests_of_a_program(isolations: list[str]) -> None:
    cases = [{"input": "3\n", "output": "6"}, {"input": "4", "output": ["8", ""]}]
    codes = [
        "print(2 * int(input()))",
        "Here:\n```python\nimport sys\nprint(int(sys.stdin.read()) * 2)\nexit()\n```",
        "print(6)",
        "print(2 * int(input())); raise ValueError",
    ]
    tests: list[Any] = [cases, '{"inputs": ["3", "4"], "outputs": ["6", "8"]}', cases, cases]
    assert python_tests(codes, tests=tests, timeout=LONG_S, partial=True)["python_tests"] == [1.0, 1.0, 0.5, 0.0]
    assert python_tests(codes[1:3], tests=tests[1:3], timeout=LONG_S)["python_tests"] == [1.0, 0.0]


def test_an_entry_point_is_given_to_check(isolations: list[str]) -> None:
    tests = "def check(candidate):\n assert candidate(3) == 3"
    codes = ["def f(x): return x", "def f(x): return 1", "def check(x): pass"]
    scores = python_tests(codes, tests=[tests] * 3, entry_point=["f"] * 3, timeout=LONG_S)
    assert scores["passed"] == scores["python_tests"] == [1.0, 0.0, 0.0]


def test_a_response_without_code_is_refused() -> None:
    scores = python_tests(["", "```python\n```", "x" * 2_000_000], tests=["assert True"] * 3)
    assert scores["refused"] == [1.0] * 3


def test_the_last_block_of_python_is_the_code() -> None:
    assert find_code("a\n```python\n1\n```\nb\n```py\n2\n```\n```\nout\n```") == "2\n"
    assert find_code("a\n```\n1\n```\n") == "1\n"
    assert find_code("```python\nunclosed") == "unclosed"
    assert find_code("x = 1") == "x = 1"


@pytest.mark.parametrize("tests", ["", [], None, 5, [{"input": "1"}], ["", "assert 1"], "{}"])
def test_records_without_tests_are_refused(tests: Any) -> None:
    with pytest.raises(ValueError, match=r"the field 'tests' of sample 1 is .*, which has no tests"):
        python_tests(["x", "y"], tests=["assert True", tests])


@pytest.mark.parametrize(
    "tests",
    ["assert add(1,", ["assert True", "assert add(1,"], "x = '\0'", "(" * 100_000],
    ids=["text", "list", "NUL", "nested too deep"],
)
def test_tests_that_are_not_valid_python_are_refused_with_what_is_wrong(tests: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the field 'tests' of sample 1 is .*, which is not valid Python: ."
    ) as caught:
        python_tests(["x", "y"], tests=["assert True", tests])
    assert "assert add" not in str(tests) or "'(' was never closed" in str(caught.value)


# Machines without a sandbox


def test_where_no_sandbox_is_possible_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sandbox.working_isolation.cache_clear()
    monkeypatch.setattr(sandbox, "_try", lambda isolation: "unshare: Operation not permitted")
    try:
        with pytest.raises(RewardError, match="unshare: Operation not permitted") as caught:
            python_tests([f"open({str(tmp_path / 'ran')!r}, 'w')"], tests=[["assert True"]])
    finally:
        sandbox.working_isolation.cache_clear()
    assert isinstance(caught.value, SandboxError)
    assert caught.value.offers == {"isolation": list(ISOLATIONS)}
    assert list(tmp_path.iterdir()) == []


def test_the_first_isolation_that_works_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_try", lambda isolation: "" if isolation == SEPARATE_USER else "no")
    assert sandbox.find_isolation(ISOLATIONS) == SEPARATE_USER
    assert ISOLATIONS[:2] == (NAMESPACES, USER_NAMESPACES)


def test_a_kernel_that_allows_none_is_refused() -> None:
    """In a user namespace that may make no other, without a second user number: every isolation fails for real."""
    program = (
        "from megarl.rewards import sandbox\n"
        "try: sandbox.working_isolation()\nexcept sandbox.SandboxError as error: print(error)\nelse: print('works')"
    )
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", shell, sys.executable, program], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no user namespace can be made here: {done.stderr.strip()}")
    assert "no sandbox is possible" in done.stdout
    assert "user namespaces: unshare" in done.stdout
