"""Predictions at sizes where a process's memory shows, and the least GPU counts that presets state."""

import multiprocessing
import re
import resource
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megarl import plan as command
from megarl.config.cluster import ClusterConfig, PlanConfig
from megarl.config.preset_files import preset_files
from megarl.config.resources import conf_folder
from megarl.parallel.layout import Layout
from megarl.planning.hardware import Cluster
from megarl.planning.memory import plan_stage
from megarl.planning.plan import make_plan, suggest
from megarl.planning.times import Rates
from megarl.planning.work import Work, work_of
from megarl.training import module_of
from tests.planning.runs import GPT2, LLAMA, NEOX, describe, trained

pytestmark = pytest.mark.gate

LARGE: dict[str, Work] = {
    "gpt2": describe(Layout(), {**GPT2, "num_layers": 12, "hidden_size": 768, "num_heads": 12}, micro=4),
    "llama-bf16": describe(
        Layout(),
        {**LLAMA, "num_layers": 8, "hidden_size": 1024, "num_heads": 16},
        micro=4,
        precision="bf16",
        recompute="full",
    ),
    "neox": describe(Layout(), {**NEOX, "num_layers": 12, "hidden_size": 768, "num_heads": 12}, micro=8),
}


def _growth(work: Work, pipe: Any) -> None:
    """Bytes by which this process's resident memory grows, at most, in a step; a small one comes first.

    The C library keeps what is freed in pieces below 32 MB, some 0.7 GB here, so the runs are large beside that.
    """
    torch.set_num_threads(1)
    trained(describe(Layout(), LLAMA, micro=1, length=32))  # libraries, pools, caches
    before = psutil.Process().memory_info().rss
    trained(work)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


@pytest.mark.parametrize("name", LARGE)
def test_resident_memory_grows_as_predicted(name: str) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_growth, args=(LARGE[name], there))
    process.start()
    assert here.poll(900), "no answer"
    growth = here.recv()
    process.join()
    if dist.is_initialized():
        dist.destroy_process_group()
    predicted = plan_stage(LARGE[name], 0, on_cpu=True).total("train")
    assert predicted >= 1e9
    assert predicted == pytest.approx(growth, rel=0.20)


def least(name: str) -> dict[str, int]:
    """GPU counts that a preset's comment states, by kind of GPU."""
    text = preset_files(conf_folder())[name].read_text(encoding="utf-8")
    found = re.search(r"Least for \w+: (\d+) GPUs? of 80 GB", text)
    larger = re.search(r"(\d+) of 141 GB", text)
    assert found, name
    return {"h100": int(found.group(1)), **({"h200": int(larger.group(1))} if larger else {})}


def shipped() -> list[str]:
    return sorted(
        name for name in preset_files(conf_folder()) if name.startswith(("flan", "gpt", "llama", "mixtral", "qwen"))
    )


@pytest.mark.parametrize("name", shipped())
def test_presets_need_the_gpus_that_they_say_and_no_fewer(name: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    algorithm = "ilql" if name.endswith("_ilql") else "ppo"
    own = PlanConfig(algorithm=algorithm)
    config, gpus = command.compose_run(own, [f"+conf={name}"])
    for gpu, count in least(name).items():
        whole = Cluster.of(ClusterConfig(gpu=gpu), gpus)
        work = work_of(module_of(algorithm), config, own, gpus, config.model.vocab_size)
        start = make_plan(work, whole, Rates(whole.gpu.products, 0.0))
        assert suggest(replace(start, cluster=Cluster.of(ClusterConfig(gpu=gpu), count)), 1)
        if count > 1:
            assert not suggest(replace(start, cluster=Cluster.of(ClusterConfig(gpu=gpu), count // 2)), 1)
