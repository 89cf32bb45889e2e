"""Reward functions that behave and misbehave; the worker imports them by name."""

# ruff: noqa: T201 - what a reward function prints is part of what is tested

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "numpy", "transformers", "megatron", "lightning", "hydra")


def lengths(outputs: list[str], **_: Any) -> list[float]:
    return [float(len(output)) for output in outputs]


def everything_it_was_given(
    samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any, **metadata: Any
) -> list[float]:
    """Prints its arguments as one line of JSON."""
    given = {"samples": samples, "prompts": prompts, "outputs": outputs, "eos": tokenizer.eos_id, **metadata}
    print(json.dumps(given, sort_keys=True))
    return [0.5] * len(samples)


def no_metadata(samples: list[str], prompts: list[str], outputs: list[str], tokenizer: Any) -> list[float]:
    return [0.0] * len(samples)


def answer_of_the_record(answer: list[Any], **_: Any) -> list[Any]:
    """Returns the field `answer` as the scores, so that a test can have anything returned."""
    return answer


def too_few(samples: list[str], **_: Any) -> list[float]:
    return [1.0] * (len(samples) - 1)


def a_number(**_: Any) -> float:
    return 3.0


def raises(outputs: list[str], **_: Any) -> list[float]:
    raise ValueError("cannot judge\nthis")


def exits(**_: Any) -> list[float]:
    sys.exit("enough")


def raises_deep_in_a_library(outputs: list[str], **_: Any) -> list[float]:
    return [json.loads("{") for _ in outputs]


def sleeps(**_: Any) -> list[float]:
    time.sleep(3600)
    return []


def sleeps_in_a_child(pid_file: list[str], **_: Any) -> list[float]:
    """Starts a process of its own, writes both pids, and waits for it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    written = Path(pid_file[0] + ".part")
    written.write_text(f"{os.getpid()} {child.pid}")
    written.rename(pid_file[0])
    child.wait()
    return []


def keeps_the_lock(pid_file: list[str], **_: Any) -> list[float]:
    """A regular expression that takes ages, during which no other thread of the process runs."""
    Path(pid_file[0] + ".part").write_text(str(os.getpid()))
    Path(pid_file[0] + ".part").rename(pid_file[0])
    re.match("(a+)+$", "a" * 60 + "b")
    return []


def dies(outputs: list[str], **_: Any) -> list[float]:
    print("about to die")
    os._exit(7)


def killed_while_a_child_holds_the_pipe(**_: Any) -> list[float]:
    if os.fork() == 0:
        time.sleep(3600)
    os.kill(os.getpid(), 9)
    return []


def acts_once(outputs: list[str], mark: list[str], **_: Any) -> list[float]:
    """The first call that sees a mark file missing leaves it and does what its first output says."""
    if not Path(mark[0]).exists():
        Path(mark[0]).touch()
        action = outputs[0]
        if action == "sleep":
            time.sleep(3600)
        if action == "die":
            os._exit(1)
        if action == "raise":
            raise RuntimeError("the first time")
        if action == "nan":
            return [float("nan")] * len(outputs)
    return [float(len(output)) for output in outputs]


def bad_word_raises(outputs: list[str], **_: Any) -> list[float]:
    if "bad" in outputs:
        raise ValueError("a bad word")
    return [1.0] * len(outputs)


def process(samples: list[str], **_: Any) -> list[float]:
    return [float(os.getpid())] * len(samples)


def has_variable(outputs: list[str], **_: Any) -> list[float]:
    return [float(name in os.environ) for name in outputs]


def visible_devices(samples: list[str], **_: Any) -> list[float]:
    print("devices:", repr(os.environ.get("CUDA_VISIBLE_DEVICES")))
    return [0.0] * len(samples)


def imported_libraries(samples: list[str], **_: Any) -> list[float]:
    return [float(sum(name in sys.modules for name in LIBRARIES))] * len(samples)


def calls_seen(samples: list[str], **_: Any) -> list[float]:
    return [float(len(samples))] * len(samples)


def noisy(samples: list[str], **_: Any) -> list[float]:
    """Writes where the protocol must not be: on descriptors 1 and 2, with bytes that are no text, and many."""
    print("printed")
    os.write(1, b"\xff\xfe raw\n")
    os.write(2, b"to stderr\n")
    print("surrogate \ud800 and \u00fc")
    os.write(1, b"x" * 200_000 + b"\n")
    return [1.0] * len(samples)


def tensor_scores(samples: list[str], **_: Any) -> Any:
    import numpy

    return numpy.arange(len(samples), dtype="float32") / 2


def dense(outputs: list[str], **_: Any) -> list[list[float]]:
    return [[float(token) for token in range(len(output))] for output in outputs]


def floods(outputs: list[str], **_: Any) -> list[float]:
    """Prints what the outputs ask for: many lines, on either stream, or one that does not end."""
    if "line" in outputs:
        os.write(1, b"y" * 20_000_000)
    stream = sys.stderr if "stderr" in outputs else sys.stdout
    for number in range(0 if "line" in outputs else 10**9 if "late" in outputs else 50_000):
        print(f"line {number}", file=stream)
    return [1.0] * len(outputs)


def raises_what_it_is_given(outputs: list[str], **_: Any) -> list[float]:
    """Another error at every call, by a file that counts them."""
    counter = Path(outputs[0])
    calls = len(counter.read_text()) if counter.exists() else 0
    counter.write_text("x" * (calls + 1))
    raise ValueError(f"call {calls}")


def nan_first(samples: list[str], **_: Any) -> list[float]:
    """No score for every third sample of a call."""
    return [float("nan") if index % 3 == 0 else 1.0 for index, _ in enumerate(samples)]
