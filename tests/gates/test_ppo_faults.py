"""What may befall a phase: a kill in any part of it, and a reward function that never answers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarl import heartbeat
from megarl.checkpoint import find, verify
from tests.e2e.runs import PAIRS, WALKS, assert_same_bits, final_tensors

PARTS = ("clone", "generate", "score", "evaluate", "shape", "train", "save")
CRITICS = {
    "shared": ["ppo.adaptive_kl.target=1", "ppo.adaptive_kl.horizon=100", "ppo.scale_scores=running"],
    "separate": ["critic.kind=separate", "critic.separate.lr=1e-3", "ppo.kl_in=loss"],
}
REWARD_MODEL = "reward model"  # beside the function, with the shared critic
ADAPTERS = {
    "lora": [*CRITICS["shared"], "adapter.rank=4", "ppo.kl_coef=0.05"],
    "qlora": [*CRITICS["separate"], "adapter.kind=dora", "adapter.base_bits=4", "adapter.rank=4"],
    "8-bit Adam": [*CRITICS["shared"], "optim.kind=adamw8bit"],
}
LAYOUTS = {"one": [], "DP2": ["trainer.devices=2"], "PP2": ["trainer.devices=2", "parallel.pp=2"]}
CASES = [(critic, layout) for critic in (*CRITICS, REWARD_MODEL) for layout in LAYOUTS]
CASES += [("lora", "PP2"), ("qlora", "DP2"), ("8-bit Adam", "DP2")]
PHASES = 6
PATIENCE_S = 300.0
TIMEOUT_S, GRACE_S = 5.0, 10.0

# A function that takes its time, so that there is something to be killed in, and writes down what it has scored.
SCORES = """
import time
from pathlib import Path

def score(samples, outputs, **_):
    time.sleep(0.05)
    scores = [float(len(set(output))) for output in outputs]
    with Path(__file__).with_name("scored.txt").open("a") as file:
        file.writelines(sample + "\\n" for sample in samples)
    return scores
"""

SLEEPS = """
import time
from pathlib import Path

def score(outputs, **_):
    began = Path(__file__).with_name("began.txt")
    if not began.exists():
        began.write_text(str(time.time()))
        time.sleep(3600)
    return [float(len(output)) for output in outputs]
"""


def start(folder: Path, function: str, *overrides: str, model: Path | None = None) -> subprocess.Popen[bytes]:
    """A run whose reward function lies in the folder, in a process group of its own. With `model`, its reward is the
    sum of the function's and the model's. It yields to this process, which looks out for the moment to kill it."""
    folder.mkdir(exist_ok=True)
    if not (folder / "rewards.py").exists():
        (folder / "rewards.py").write_text(function)
    scored = [f"reward.fn={folder}/rewards.py:score"]
    if model is not None:
        scored = ["reward.fn=null", f"reward.terms=[{{fn:{folder}/rewards.py:score}},{{model:{model}}}]"]
    settings = [f"run.dir={folder / 'run'}", *scored, f"trainer.max_phases={PHASES}"]
    saves = ["checkpoint.every=1", "checkpoint.save_last=true"]
    with (folder / "console.txt").open("ab") as console:
        return subprocess.Popen(
            ["nice", "-n", "10", sys.executable, "-m", "megarl.train_ppo", *WALKS, *settings, *saves, *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def console(folder: Path) -> str:
    return (folder / "console.txt").read_text(errors="replace")[-4000:]


def finish(folder: Path, *overrides: str, model: Path | None = None) -> None:
    assert start(folder, SCORES, *overrides, model=model).wait(timeout=900) == 0, console(folder)


def kill_in(part: str, folder: Path, draw: random.Random, *overrides: str, model: Path | None = None) -> str:
    """Kill -9 a run soon after it has entered a part of a phase; the part that it was in by then."""
    run = folder / "run"
    running = start(folder, SCORES, *overrides, model=model)
    deadline = time.monotonic() + PATIENCE_S
    wanted_step = None if part == "clone" else draw.randint(0, 2) + (len(find(run / "checkpoints")) > 0)
    while True:
        assert running.poll() is None, console(folder)
        assert time.monotonic() < deadline, console(folder)
        last = [word for word in heartbeat.read(run) if word.pid == running.pid]
        if last and last[0].phase == part and (wanted_step is None or last[0].step >= wanted_step):
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.03))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    for path in find(run / "checkpoints"):
        assert verify(path) is None
    return heartbeat.read(run)[0].phase


def reward_model(folder: Path) -> Path:
    """The run folder of a small reward model."""
    pairs = [{"prompt": "ab", "chosen": "c" * (1 + n % 5), "rejected": "d" * (1 + n % 4)} for n in range(16)]
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = [f"data.train=[{folder}/pairs.jsonl]", "trainer.max_steps=2", "trainer.eval_every=null"]
    subprocess.run([sys.executable, "-m", "megarl.train_rm", *PAIRS, *settings, f"run.dir={folder}/run"], check=True)
    return folder / "run"


@pytest.mark.gate
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("critic", "layout"), CASES)
def test_a_run_killed_in_every_part_of_a_phase_ends_in_the_unbroken_runs_weights(
    critic: str, layout: str, tmp_path: Path
) -> None:
    """Each part of a phase is the last that a process of one and the same run saw. No sample is scored twice: of a
    call whose answer was on its way when the run was killed, nobody knows, so it may be asked again, and no other."""
    of_models = (CRITICS | ADAPTERS).get(critic, CRITICS["shared"])
    settings = [*of_models, "reward.calls.batch_size=4", *LAYOUTS[layout]]
    model = reward_model(tmp_path / "rm") if critic == REWARD_MODEL else None
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    finish(unbroken, *settings, model=model)
    draw = random.Random(critic)
    killed_in = [kill_in(part, broken, draw, *settings, model=model) for part in PARTS]
    for _ in range(3):  # on a busy machine the run may have gone on to the next part by the time it is killed
        if "score" not in killed_in:
            killed_in.append(kill_in("score", broken, draw, *settings, model=model))
    assert "score" in killed_in
    finish(broken, *settings, model=model)
    ours = final_tensors(broken / "run")
    assert_same_bits(ours, final_tensors(unbroken / "run"))
    assert not [name for name in ours if name.startswith("reward")]
    wanted, found = ((folder / "scored.txt").read_text().splitlines() for folder in (unbroken, broken))
    assert set(found) == set(wanted)
    lost = 4 * killed_in.count("score")  # a run that is killed soon after it generated may be asking already
    assert 0 <= len(found) - len(wanted) <= lost, f"more than the calls under way was asked again: {killed_in}"


@pytest.mark.gate
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("on_error", ["error", "drop"])
def test_a_function_that_never_answers_holds_up_a_run_no_longer_than_its_time_out(
    on_error: str, tmp_path: Path
) -> None:
    """From its first call to the end of the run, or to the end of the phase that goes on without the answer."""
    folder = tmp_path / "slow"
    one_try = [
        "reward.calls.retries=0",
        f"reward.calls.timeout={TIMEOUT_S}",
        f"reward.calls.on_error={on_error}",
        "reward.calls.batch_size=8",
    ]
    running = start(folder, SLEEPS, *one_try)
    if on_error == "error":
        code = running.wait(timeout=900)
        ended = time.time()
        assert code == 2, console(folder)
        assert re.search(rf"^error: reward\.fn={folder}/rewards\.py:score .*5 s", console(folder), re.M)
    else:
        checkpoints = folder / "run" / "checkpoints"
        while not find(checkpoints):
            assert running.poll() is None, console(folder)
            time.sleep(0.05)
        ended = time.time()
        assert running.wait(timeout=900) == 0, console(folder)
    assert ended - float((folder / "began.txt").read_text()) < TIMEOUT_S + GRACE_S
