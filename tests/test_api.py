"""`megarl.train`: each shape of call that trlX's users know, and what comes back."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import megarl
from megarl import convert
from megarl.api import Trained
from megarl.config.algorithms import ALGORITHMS
from megarl.config.sft import SFTConfig
from megarl.errors import ConfigError, DataError, MegarlError, UnavailableError
from megarl.inputs import _algorithm
from megarl.run.owner import RunLock
from tests.models.exchange.published import save_published, stored
from tests.refusals import refused
from tests.worlds import Worlds

TINY = {"num_layers": 2, "hidden_size": 32, "num_heads": 4}
QUIET = [
    "trainer.progress=none",
    "logger.tensorboard=false",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
]


def ppo(run_dir: Path) -> None:
    config = megarl.default_config("ppo", *QUIET, f"run.dir={run_dir}", "trainer.max_phases=1", "ppo.rollouts=4")
    config.rollout.max_new_tokens = 6
    config.trainer.eval_every = 1
    offset = 10.0  # a closure travels too
    trained = megarl.train(
        TINY,
        reward_fn=lambda samples, topic, **kwargs: [offset + len(set(text)) for text in samples],
        prompts=[{"prompt": "cats ", "topic": "animals"}, {"prompt": "tea ", "topic": "drinks"}],
        eval_prompts=[{"prompt": "dogs ", "topic": "animals"}],
        metric_fn=lambda outputs, **kwargs: {"letters": [len(output) for output in outputs]},
        stop_sequences=["\n\n", "é"],
        config=config,
    )
    assert [row["step"] for row in trained.history] == [0, 1]
    assert trained.history[-1]["rollout/score"] > offset
    assert {"eval/score", "eval/letters"} <= trained.summary["metrics"].keys()
    answers = trained.generate(["cats ", "dogs "], n=2, max_new_tokens=3)
    assert [len(both) for both in answers] == [2, 2]
    assert {sample["phase"] for sample in trained.samples} == {0, 1}
    assert trained.evaluate(["ab", {"prompt": "cd", "topic": "x"}][1:])["metrics"]["eval/score"] > offset
    found = trained.evaluate(["ab", "cd"], reward_fn=lambda outputs, **_: [7.0 for _ in outputs], n=2)
    assert found["metrics"]["eval/score"] == 7.0
    assert (run_dir / "evaluations" / "2" / "evaluation.json").exists()
    trained.save_pretrained(run_dir / "hf")
    assert AutoModelForCausalLM.from_pretrained(run_dir / "hf").config.num_hidden_layers == 2


def uploaded(run_dir: Path) -> None:
    """Everything that goes to the hub, but for the hub: a server here answers in its place."""
    import http.server

    import huggingface_hub

    asked: list[tuple[str, bytes]] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            here = f"http://127.0.0.1:{server.server_port}/org/model"
            files = json.loads(asked[-1][1])["files"] if "/preupload/" in self.path else []
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            answer = json.dumps({"url": here, "files": modes, "commitUrl": here, "commitOid": "1" * 40}).encode()
            refuses = self.path.endswith("/commit/main") and b"refuse" in asked[-1][1]
            self.send_response(403 if refuses else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = partial(huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{server.server_port}")
    config = megarl.default_config("sft", *QUIET, f"run.dir={run_dir}", "trainer.max_steps=1")
    trained = megarl.train(TINY, samples=["a text", "another"], config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "HfApi", there)
        trained.push_to_hub("org/model", token="hf_x", private=True)
        assert b"private" in asked[0][1]
        with refused(UnavailableError, key="repo_id", value="org/model"):
            trained.push_to_hub("org/model", token="hf_x", commit_message="refuse")
    server.shutdown()
    assert any(b"model.safetensors" in body for _, body in asked)


def ilql(run_dir: Path) -> None:
    config = megarl.default_config("ilql", *QUIET, f"run.dir={run_dir}", "trainer.max_steps=2", "data.cache=null")
    rewards = np.array([1.0, 100.0], dtype=np.float32)
    trained = megarl.train(TINY, samples=["dolphins", "geese"], rewards=rewards, config=config)
    assert trained.history[-1]["train/loss_q"] > 0
    assert isinstance(trained.generate("g", max_new_tokens=2)[0], str)


def sft(run_dir: Path) -> None:
    config = megarl.default_config("sft", *QUIET, f"run.dir={run_dir}", "trainer.max_steps=2")
    trained = megarl.train(TINY, samples=[["1 + 2 = ", "3"], ["2 + 2 = ", "4"]], config=config)
    assert trained.summary["status"] == "finished"
    assert len(trained.generate(["1 + 2 = "], max_new_tokens=2)) == 1


def adapter(run_dir: Path) -> None:
    model = run_dir.parent / "model"
    save_published("qwen3", model, vocab_size=262)
    config = megarl.default_config("sft", *QUIET, f"run.dir={run_dir}", "trainer.max_steps=2", "data.seq_length=32")
    config.adapter.rank, config.adapter.targets = 2, ["q_proj", "down_proj"]
    config.optim.lr, config.optim.warmup_steps = 0.1, 0
    trained = megarl.train(str(model), samples=[["1 + 2 = ", "3"], ["2 + 2 = ", "4"]], config=config)
    assert len(trained.generate(["1 + 2 = "], max_new_tokens=2)) == 1
    trained.save_pretrained(run_dir / "hf")
    before, whole = stored(model), stored(run_dir / "hf")
    changed = {name.rpartition(".layers.")[2] for name in before if not torch.equal(before[name], whole[name])}
    assert changed == {f"{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")}
    trained.save_pretrained(run_dir / "peft", adapter=True)
    factors = load_file(run_dir / "peft" / "adapter_model.safetensors")
    for name in changed:
        place = f"base_model.model.model.layers.{name.removesuffix('.weight')}"
        up, down = factors[f"{place}.lora_B.weight"], factors[f"{place}.lora_A.weight"]
        full = f"model.layers.{name}"
        torch.testing.assert_close(whole[full], before[full] + 16 * up @ down)  # adapter.alpha is 32
    model.rename(run_dir.parent / "moved")
    assert convert.run([f"from={run_dir}", f"to={run_dir / 'again'}", "format=peft"]) == 0  # needs no other weights
    again = load_file(run_dir / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in factors.items())


def stopped(run_dir: Path) -> None:
    config = megarl.default_config("sft", *QUIET, "trainer.max_steps=1")
    config.run.dir = str(run_dir / "lr=1e-4,a")  # a name that a command line would have to quote
    trained = megarl.train(TINY, samples=["a text", "another"], config=config)
    (free,) = trained.generate("a", max_new_tokens=8, temperature=0)
    (cut,) = trained.generate("a", max_new_tokens=8, temperature=0, stop=["${x}", free[:2]])
    assert len(cut) < len(free)
    with refused(DataError, names=("prompts[1]: ", "300")):
        trained.generate(["a", "b" * 300], max_new_tokens=8, too_long="error")
    with refused(ConfigError, key="too_long", value="drop", offers={"too_long": ["truncate", "error"]}):
        trained.generate("a", too_long="drop")


def refused_by_place(run_dir: Path) -> None:
    config = megarl.default_config("ppo", *QUIET, f"run.dir={run_dir}")
    lists: list[tuple[str, dict[str, Any]]] = [
        ("prompts[1]", {"prompts": ["a", "b" * 300]}),
        ("eval_prompts[2]", {"prompts": ["a"], "eval_prompts": ["a", "b", "\ud800"]}),
        ("prompts[0]", {"prompts": [{"prompt": "a", "outputs": 1}]}),
    ]
    for where, given in lists:
        with refused(DataError, names=(f"{where}: ",)):
            megarl.train(TINY, reward_fn=lambda outputs, **_: [0.0 for _ in outputs], config=config, **given)


def test_prompts_that_no_phase_could_use_are_refused_by_their_place_in_the_list(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, refused_by_place, tmp_path / "run")


@pytest.mark.parametrize("call", [ppo, ilql, sft, adapter, stopped, uploaded], ids=lambda call: call.__name__)
def test_a_call_trains_answers_and_exports(call: Any, worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, call, tmp_path / "run")


def test_an_adapter_alone_is_written_only_by_a_run_that_trains_one(tmp_path: Path) -> None:
    with refused(ConfigError, key="adapter", names=("adapter.rank",)):
        Trained(SFTConfig(), tmp_path).save_pretrained(tmp_path / "peft", adapter=True)


def noticed(run_dir: Path) -> None:
    def notice() -> None:
        while not (run_dir / "metrics.csv").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=notice, daemon=True).start()
    config = megarl.default_config("sft", *QUIET, f"run.dir={run_dir}", "trainer.max_steps=100000")
    with pytest.raises(SystemExit) as end:
        megarl.train(TINY, samples=["a text", "another"], config=config)
    assert end.value.code == 0
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"


def test_a_notice_ends_the_script_since_what_follows_is_for_a_trained_model(worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, noticed, tmp_path / "run")


def test_a_plain_script_needs_nothing_else(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import megarl, json\n"
        f"config = megarl.default_config('sft', *{QUIET!r}, 'trainer.max_steps=1', 'run.dir=run')\n"
        f"trained = megarl.train({TINY!r}, samples=['a text', 'another'], config=config)\n"
        "print(json.dumps(trained.summary['status']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == "finished"


def test_the_arguments_say_which_algorithm() -> None:
    assert _algorithm(len, None, None, None) == "ppo"
    assert _algorithm(None, ["a"], [1.0], None) == "ilql"
    assert _algorithm(None, ["a"], None, None) == "sft"
    assert _algorithm(len, None, None, megarl.default_config("rft")) == "rft"


OBJECT = object()


@pytest.mark.parametrize(
    ("arguments", "kind", "data"),
    [
        ({}, ConfigError, {"key": "train()"}),
        ({"samples": ["a"], "rewards": [1.0, 2.0]}, DataError, {"key": "rewards", "value": 2}),
        ({"model": {"layers": 2}, "samples": ["a"]}, ConfigError, {"key": "model.layers"}),
        ({"samples": ["a"], "eval_prompts": ["b"]}, ConfigError, {"key": "eval_prompts", "names": ("sft",)}),
        (
            {"samples": [["a", "b", "c"]]},
            DataError,
            {"key": "samples", "value": ["a", "b", "c"], "where": "record 1"},
        ),
        ({"model": {"num_layers": 2.0}, "samples": ["a"]}, ConfigError, {"key": "model.num_layers", "value": 2.0}),
        ({"samples": ["a"], "rewards": [OBJECT]}, DataError, {"key": "object", "value": OBJECT}),
    ],
)
def test_a_call_that_cannot_be_meant_is_refused(
    arguments: dict[str, Any],
    kind: type[MegarlError],
    data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(kind, **data):
        megarl.train(**arguments)


def test_a_configuration_refuses_unknown_keys_and_other_algorithms() -> None:
    config = megarl.default_config("ppo")
    with pytest.raises(AttributeError, match="lrr"):
        config.optim.lrr = 1.0
    with refused(ConfigError, key="config", value="ppo", offers={"config": ["sft"]}):
        megarl.train(samples=["a"], config=config)
    with refused(ConfigError, key="algorithm", value="dqn", offers={"algorithm": list(ALGORITHMS)}):
        megarl.default_config("dqn")


def test_a_mistyped_attribute_is_answered_like_a_mistyped_argument() -> None:
    config = megarl.default_config("ppo")
    for mistake in (
        lambda: setattr(config.optim, "lrr", 1.0),
        lambda: config["optim"].__setitem__("lrr", 1.0),
        lambda: config.optim.lrr,
        lambda: megarl.default_config("ppo", "optim.lrr=1"),
    ):
        with refused(ConfigError, key="optim.lrr", offers={"optim.lrr": ["optim.lr"]}):
            mistake()
    with refused(ConfigError, key="optm", offers={"optm": ["optim"]}):
        config.optm.lr = 1.0
    with refused(ConfigError, key="optim.lr", value="fast"):
        config.optim.lr = "fast"


def test_a_configuration_by_attribute_is_still_omegaconfs() -> None:
    config = megarl.default_config("ilql")
    assert not hasattr(config, "nothing")
    assert getattr(config.optim, "nothing", 3) == 3
    config.optim.lr, config.data.train, config.reward.options = 0.5, ["a"], {"b": 1}
    copied = copy.deepcopy(config)
    assert (copied.optim.lr, copied.data.train, copied.reward.options.b) == (0.5, ["a"], 1)
    assert OmegaConf.to_container(config)["optim"]["lr"] == 0.5


@pytest.mark.parametrize("run_dir", ["a" * 300, "a\0b"])
def test_a_run_folder_that_cannot_be_is_refused_before_anything_is_written(
    run_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = megarl.default_config("sft", *QUIET)
    config.run.dir = run_dir
    with refused(ConfigError, names=("run.dir=",)):
        megarl.train(samples=["a"], config=config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"), [("summary.json", "{"), ("summary.json", "[1]"), ("metrics.csv", "a\nb\n")]
)
def test_what_a_run_left_behind_may_be_damaged(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    trained = megarl.api.Trained(None, tmp_path)
    for read in ("summary", "history"):
        file = {"summary": "summary.json", "history": "metrics.csv"}[read]
        with refused(DataError, where=str(tmp_path / file)):
            getattr(trained, read)


def test_a_call_leaves_the_inputs_of_the_run_that_holds_its_folder(tmp_path: Path) -> None:
    holder = RunLock(tmp_path)
    holder.take()
    inputs = tmp_path / "inputs" / "prompts.jsonl"
    inputs.parent.mkdir()
    inputs.write_text("the other run's")
    config = megarl.default_config("ppo", *QUIET, f"run.dir={tmp_path}")
    with refused(ConfigError, key="run.dir", value=str(tmp_path), names=(f"process {os.getpid()}",)):
        megarl.train(TINY, reward_fn=len, prompts=["a"], config=config)
    holder.release()
    assert inputs.read_text() == "the other run's"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".owner-0000001.json", "inputs"]
