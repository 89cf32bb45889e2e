"""Reward functions: their names and files, what they return, and functions that misbehave in a process of their own."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from megarl.experience.scorers import fingerprint, read_function
from megarl.rewards.answers import AnswerError, NoScore, read_scores
from megarl.rewards.client import RewardWorker
from megarl.tokenizers import ByteTokenizer
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case

GOOD = (
    "import math\n\ndef score(outputs, **_):\n    return [float(len(o)) for o in outputs]\n\n"
    "class Other:\n    def score(self): ...\n"
)
SPECS = (
    "rewards.py:score",
    "rewards.py:scor",
    "rewards.py:",
    ":score",
    "rewards.py",
    "rewards:score",
    "gone.py:score",
    "gone:score",
    "rewards.py:score.x",
    "rewards.py:Other.score",
    "rewards.py:Other.gone",
    "math:sqrt",
    "math:gone",
    "os.path:join",
    "os.gone:join",
    "..:x",
    ".:x",
    "a..b:c",
    "",
    " ",
    "::",
    "a:b:c",
    "rewards.py:1",
    "rewards.py:score()",
    "f; touch x",
    "0.5*rewards.py:score",
    "0.5*rewards.py:score + gone.py:x",
    "rewards.py:score + ",
    " + ",
    "nan*rewards.py:score",
    "1e999*rewards.py:score",
    "-*rewards.py:score",
    "0.5**rewards.py:score",
    "rewards.py:score+rewards.py:score",
    "folder:score",
    "folder/:score",
    "folder.py:score",
    "/dev/null:score",
    "/dev/zero.py:score",
    "rewards.py:é",
    "rewards.py:\ud800",
    "rewards\0.py:score",
    "x" * 300 + ".py:score",
    "x" * 300 + ":score",
    "a\nb.py:c",
    "a\nb:c",
    "sys:exit",
    "megarl.gone:x",
    "megarl.rewards.builtin:gone",
    "builtin:length",
    "~/rewards.py:score",
    "~nobody/rewards.py:score",
    "__main__:x",
    "torch.gone:x",
    "2*rewards.py:score + 2*rewards.py:score",
    "rewards.py:math",
    "rewards.py:__class__",
    "rewards.py:lambda",
    "link.py:score",
    "pipe.py:score",
    "${x}:y",
    "megarl:train",
    "encodings.gone.deep:x",
)
FILES = (
    GOOD,
    "",
    "def score(:\n",
    "score = 3\n",
    "from rewards import *\n",
    "\t\tx = 1\n",
    "x = " + "(" * 300 + ")" * 300 + "\n",
    "x = " + "-" * 100_000 + "1\n",
    "x = " + "9" * 5000 + "\n",
    "# coding: gone\ndef score(): ...\n",
    "def score(): ...\n\0",
    "raise SystemExit\ndef score(): ...\n",
    "globals()['score'] = len\n",
    "a" * 100_000,
    "x = " + "+".join(["1"] * 20_000) + "\n",
    "x = " + "[" * 5_000 + "]" * 5_000 + "\n",
)

BODIES = {
    "raises": "raise ValueError('no\\nline')",
    "raises its own": "class Odd(BaseException):\n        def __str__(self): raise RuntimeError\n    raise Odd",
    "exits": "import sys; sys.exit(3)",
    "leaves at once": "import os; os._exit(0)",
    "is killed": "import os; os.kill(os.getpid(), 9)",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "hangs": "import time; time.sleep(1000)",
    "computes for ever": "while True: pass",
    "recurses": "def f(): return f()\n    return f()",
    "recurses in C": "x = []\n    for _ in range(10**6): x = [x]\n    return x",
    "prints a flood": "[print('x' * 100) for _ in range(20_000)]\n    return ZEROS",
    "prints without line ends": "print('x' * 10**7, end='')\n    return ZEROS",
    "prints bytes": "import sys; sys.stdout.buffer.write(b'\\xff\\x1b[2J' * 100)\n    return ZEROS",
    "writes to every descriptor": (
        "import os\n    for fd in range(3, 64):\n        try: os.write(fd, b'garbage' * 100)\n"
        "        except OSError: pass\n    return ZEROS"
    ),
    "closes every descriptor": "import os; os.closerange(0, 64)\n    return ZEROS",
    "forks": "import os, time\n    if os.fork() == 0: time.sleep(1000)\n    return ZEROS",
    "forks and returns twice": "import os; os.fork()\n    return ZEROS",
    "starts a process": "import subprocess; subprocess.Popen(['sleep', '1000'])\n    return ZEROS",
    "starts a thread": "import threading, time; threading.Timer(1000, print).start()\n    return ZEROS",
    "returns nothing": "return None",
    "returns a number": "return 1.0",
    "returns text": "return 'abc'",
    "returns too few": "return [1.0] * (len(outputs) - 1)",
    "returns too many": "return [1.0] * 100_000",
    "returns a generator": "return (1.0 for _ in outputs)",
    "returns NaN": "return [float('nan')] * len(outputs)",
    "returns infinity": "return [float('inf')] * len(outputs)",
    "returns None": "return [None] * len(outputs)",
    "returns huge integers": "return [10**400] * len(outputs)",
    "returns text of numbers": "return ['1'] * len(outputs)",
    "returns a dictionary": "return {'a': 1}",
    "returns itself": "x = []; x.append(x); return x",
    "returns nested lists": "return [[1.0]] * len(outputs)",
    "returns an object": "return [object()] * len(outputs)",
    "returns a huge list": "return [[1.0] * 10**6] * len(outputs)",
    "returns a tensor": "import torch; return torch.zeros(len(outputs), 2, 2)",
    "returns what lies about its length": "class L(list):\n        __len__ = lambda self: 10**9\n    return L([1.0])",
    "returns what raises": "class F(float):\n        __float__ = lambda self: 1 / 0\n    return [F(1)] * len(outputs)",
    "takes other arguments": None,
    "allocates": "x = bytearray(10**12); return x",
    "installs a handler": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)",
    "replaces stdout": "import sys; sys.stdout = None; sys.stderr = None\n    return ZEROS",
    "changes the folder": "import os; os.chdir('/'); return ZEROS",
    "empties the environment": "import os; os.environ.clear(); return ZEROS",
    "imports what is not there": "import gone_module",
    "at import: raises": "!raise ValueError('at import')",
    "at import: exits": "!import sys; sys.exit(0)",
    "at import: hangs": "!import time; time.sleep(1000)",
    "at import: prints": "!print('x' * 10**6)",
    "at import: os._exit": "!import os; os._exit(7)",
    "is no function": "!score = 3",
    "is a class": "!class score:\n    def __init__(self, **_): ...",
}


def cases(seed: int, count: int, store: Path) -> list[Case]:
    made = []
    for number in range(count):
        draw = Random(f"scorers {seed} {number}")
        make = draw.choices((_name, _answer), (2, 1))[0]
        made.append(make(draw, f"{seed}.{number}"))
    return made


def workers(seed: int, count: int, store: Path) -> list[Case]:
    """Functions that misbehave, each in a worker."""
    draw = Random(f"workers {seed}")
    chosen = draw.sample(list(BODIES), min(count, len(BODIES)))
    return [_worker(what, draw.choice(("error", "drop")), f"{seed}.{number}") for number, what in enumerate(chosen)]


def _name(draw: Random, number: str) -> Case:
    spec = draw.choice(SPECS)
    if draw.random() < 0.2:
        at = draw.randrange(len(spec) + 1)
        spec = spec[:at] + draw.choice(("\n", "é", "*", " ", ".", "/", ":", "\0", "+", "x" * 300)) + spec[at:]
    text = draw.choice(FILES) if draw.random() < 0.6 else GOOD
    content = text.encode()
    what = text[:30]
    if draw.random() < 0.3:
        what, content = mutate.text(draw, text) if draw.random() < 0.5 else mutate.data(draw, content)

    def lay(folder: Path) -> None:
        mutate.put(folder / "rewards.py", content)
        (folder / "folder.py").mkdir()
        (folder / "folder").mkdir()
        (folder / "link.py").symlink_to("link.py")
        os.mkfifo(folder / "pipe.py")

    def act(folder: Path) -> None:
        os.chdir(folder)
        fingerprint(read_function(spec, "reward.fn"), {})

    return Case(f"scorers name {number}: {spec[:60]!r}, file {what!r}", lay, act, ("reward.fn",))


def _answer(draw: Random, number: str) -> Case:
    odd: list[Any] = [
        None,
        True,
        1,
        -0.0,
        float("nan"),
        float("inf"),
        10**400,
        "1",
        b"1",
        1j,
        [],
        [1.0],
        [1.0, float("nan")],
        (1, 2),
        {},
        {1},
        object(),
        type,
        len,
        np.float32(1),
        np.int8(3),
        np.array([1.0, 2.0]),
        np.array(["a"]),
        np.array([None]),
        np.array(1.0),
        np.zeros((2, 2)),
        np.float64("nan"),
        torch.tensor(1.0),
        torch.zeros(2),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.tensor(1j),
        range(2),
        iter([1.0]),
        NoScore("gone"),
        np.datetime64("2020-01-01"),
        np.ma.masked,
    ]
    count = draw.choice((0, 1, 2, 3))
    kind = draw.randrange(4)
    answer: Any = [draw.choice(odd) for _ in range(count)]
    if kind == 0:
        answer = draw.choice(odd)
    if kind == 1:
        answer = (answer, *answer)
    lengths = draw.choice((None, [2] * count, [None] * count))
    shown = " ".join(repr(answer).split())[:80]

    def act(folder: Path) -> None:
        try:
            found = read_scores(answer, count, lengths)
        except AnswerError:
            return
        assert len(found) == count
        for score in found:
            values = [0.0] if isinstance(score, NoScore) else score if isinstance(score, list) else [score]
            assert all(isinstance(value, float) and math.isfinite(value) for value in values), found

    return Case(f"scorers answer {number}: {shown}", lambda folder: None, act)


def source_of(what: str) -> str:
    """The file of a function of `BODIES`."""
    body = BODIES[what]
    if body is None:
        return "def score(gone):\n    return [0.0]\n"
    if body.startswith("!"):
        return f"{body[1:]}\n" + ("" if "score" in body else GOOD)
    return f"def score(outputs, **_):\n    {body}\n".replace("ZEROS", "[0.0] * len(outputs)")


def _worker(what: str, on_error: str, number: str) -> Case:
    source = source_of(what)

    def act(folder: Path) -> None:
        os.chdir(folder)
        worker = RewardWorker(
            "rewards.py:score", ByteTokenizer(), timeout_s=2.0, retries=0, on_error=on_error, start_timeout_s=8.0
        )
        try:
            for _ in range(2):
                scores = worker.score(samples=["ab", "ac"], prompts=["a", "a"], outputs=["b", "c"], lengths=[1, 1])
                assert len(scores.values) == 2
        finally:
            worker.close()

    lay: Callable[[Path], None] = lambda folder: mutate.put(folder / "rewards.py", source)  # noqa: E731
    return Case(f"workers {on_error} {number}: {what}", lay, act, ("reward.fn",))
