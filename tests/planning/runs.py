"""Small runs on CPUs, described to the planner and really done, with what torch allocated meanwhile."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megarl.config.preset_files import preset_files
from megarl.config.resources import conf_folder
from megarl.config.sections.adapter import AdapterConfig
from megarl.config.sections.model import EncoderConfig, ExpertsConfig, ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.adapters import new_spec
from megarl.models.roles import Role
from megarl.modules.losses import count_targets, cross_entropy
from megarl.modules.ppo import PPO
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.microbatches import MicrobatchPlan
from megarl.parallel.rows import Microbatch, Rows
from megarl.planning.memory import plan_stage
from megarl.planning.shards import build_shard
from megarl.planning.work import Work
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling
from megarl.rollout.resharded import for_generation
from tests.e2e.runs import run_ppo
from tests.planning.allocations import recorded
from tests.worlds import Worlds

GPT2 = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "mlp_bias": True, "qkv_bias": True}
NEOX = {"norm": "layernorm", "activation": "gelu_tanh", "parallel_residual": "two_norms", "rope_percent": 0.25}
LLAMA = {"activation": "swiglu", "num_kv_heads": 2}
T5 = {"activation": "geglu", "position": "relative", "encoder": EncoderConfig(num_layers=4, start_id=0)}
MIXTURE = {**LLAMA, "experts": ExpertsConfig(count=8, chosen=2, ffn_size=512)}
SHARED = {**LLAMA, "experts": ExpertsConfig(count=4, chosen=2, shared_ffn_size=512, dense_layers=[0], normalise=False)}
VOCAB = 2048
WITHIN = 0.10


def policy_of(model: ModelConfig, vocab_size: int = VOCAB, heads: tuple[str, ...] = ("lm",)) -> Role:
    """A policy that trains."""
    return Role("policy", model, vocab_size, heads, optim=OptimConfig())


def describe(
    layout: Layout,
    shape: dict[str, Any],
    *,
    micro: int = 4,
    accumulation: int = 1,
    length: int = 512,
    loss_tokens: int | None = None,
    recompute: str = "none",
    precision: str = "fp32",
    rollouts: int = 0,
    algorithm: str = "sft",
) -> Work:
    """A 4-layer model of 256 channels in a layout; `loss_tokens` of a sequence are the response."""
    model = ModelConfig(**{"num_layers": 4, "hidden_size": 256, "num_heads": 8, "max_positions": 1024, **shape})
    response = loss_tokens or length
    return Work(
        algorithm=algorithm,
        roles=(policy_of(model),),
        model=model,
        parallel=ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            cp=layout.cp,
            ep=layout.ep,
            sequence_parallel=layout.sequence_parallel,
            recompute=recompute,
        ),
        layout=layout,
        vocab_size=VOCAB,
        precision=precision,
        micro=micro,
        global_batch=micro * accumulation * layout.dp,
        steps=1,
        length=length,
        loss_tokens=response,
        encoded=length - response,
        rollouts=rollouts,
        rescored=rollouts > 0,
        prompt=length - response,
        response=response,
        longest=response,
        slots=rollouts,
    )


def with_adapter(work: Work, **settings: Any) -> Work:
    """The same run with adapters on its policy."""
    spec = new_spec(AdapterConfig(**settings), work.model, None)
    policy, *others = work.roles
    return replace(work, adapter=spec, roles=(replace(policy, adapter=spec), *others))


@dataclass(frozen=True)
class Measured:
    """Bytes on one rank: at the fullest moment, and what an engine with its optimizer holds afterwards."""

    stage: int
    peak: int
    held: int


def trained(work: Work, packed: int = 1) -> Measured:
    """Build an engine, take one step, forget it; `packed` sequences fill a bin."""
    grid = Grid(work.layout, start_world())
    with recorded() as allocations:
        engine = _engine(grid, work)
        batches = [_batch(work, packed) for _ in range(work.accumulation)]

        engine.train_step(batches, cross_entropy, count_targets)
        engine.apply_gradients()
        del batches
        gc.collect()
    measured = Measured(grid.pp_rank, allocations.peak, allocations.left)
    grid.close()
    return measured


def trained_packed(work: Work) -> Measured:
    """What `trained` does, with sequences of which four fill a bin."""
    return trained(work, packed=4)


def assert_predicted(worlds: Worlds, phase: str, run: Callable[[Work], Measured], work: Work) -> None:
    """Do a run and compare the bytes of one rank of each stage with those of its plan."""
    seen = {measured.stage: measured for measured in worlds.run(work.layout.world_size, run, work)}
    for stage, measured in seen.items():
        plan = plan_stage(work, stage, on_cpu=True)
        assert plan.total(phase) == pytest.approx(measured.peak, rel=WITHIN)
        use = plan.uses[phase][0]
        if work.layout.world_size == 1:  # gloo's own buffers are released where nobody counts
            assert use.weights + use.gradients + use.optimizer == pytest.approx(measured.held, rel=0.01)


def built(work: Work) -> Measured:
    """Build the engines of all roles, each beside the frozen weights of its base."""
    grid = Grid(work.layout, start_world())
    engines: dict[str, Engine] = {}
    with recorded() as allocations:
        for role in work.roles:
            base = None if role.base is None else engines[role.base]
            engines[role.name] = build_engine(
                role, grid, work.parallel, precision=work.precision, seed=1, total_steps=1, base=base
            )
        gc.collect()
    measured = Measured(grid.pp_rank, allocations.peak, allocations.left)
    grid.close()
    return measured


def generated(work: Work) -> Measured:
    """Build an engine, draw `rollouts` responses of the full length."""
    grid = Grid(work.layout, start_world())
    with recorded() as allocations:
        engine = _engine(grid, work)
        reshard = for_generation(engine, work.rollout_layout)
        if reshard is not None:
            reshard.refresh()
            gc.collect()
        generator = Generator(
            engine if reshard is None else reshard.engine, -1, seed=1, limits=Limits(slots=work.slots)
        )
        prompts = [tuple(range(n, n + work.prompt)) for n in range(work.rollouts)]  # an encoder reads each once
        generator.generate(
            [Request(n, 0, prompt, Sampling(max_new_tokens=work.response)) for n, prompt in enumerate(prompts)]
        )
        generator.close()
        gc.collect()
    if reshard is not None:
        reshard.close()
    measured = Measured(grid.pp_rank, allocations.peak, allocations.left)
    grid.close()
    return measured


def moved(work: Work) -> tuple[int, list[int], list[int]]:
    """This rank's stage; bytes of every rank's copy in `rollout.engine.layout`, always and while weights move."""
    grid = Grid(work.layout, start_world())
    reshard = for_generation(_engine(grid, work), work.rollout_layout)
    assert reshard is not None
    reshard.close()
    stage = grid.pp_rank
    grid.close()
    return stage, reshard.weight_bytes, reshard.peak_bytes


def watched(run_dir: Path, *overrides: str) -> set[str]:
    """Run PPO; the phases, of those after generation, in which there is a cache."""
    found: set[str] = set()

    def watch(method: Any, phase: str) -> Any:
        def call(self: PPO, rows: Rows) -> Any:
            if self.source.generator.cache is not None:
                found.add(phase)
            return method(self, rows)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, phase in (("_evaluate", "score"), ("_train", "train")):
            patch.setattr(PPO, name, watch(getattr(PPO, name), phase))
        run_ppo(run_dir, *overrides)
    return found


def scored(work: Work) -> Measured:
    """Build an engine, ask it for log-probs."""
    grid = Grid(work.layout, start_world())
    with recorded() as allocations:
        engine = _engine(grid, work)
        batches = [_batch(work) for _ in range(work.rollouts // work.micro)]
        engine.forward(
            batches,
            lambda model, output, batch: {
                "logprobs": model.logprobs(output, batch.targets, batch.target_mask).logprobs
            },
        )
    measured = Measured(grid.pp_rank, allocations.peak, allocations.left)
    grid.close()
    return measured


def _engine(grid: Grid, work: Work) -> Engine:
    engine = build_shard(grid, work, work.roles[0])
    for _, parameter in engine.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    gc.collect()
    return engine


def _batch(work: Work, packed: int = 1) -> Microbatch:
    """A microbatch that reads `work.length` tokens of each bin: all but the last of each row, or of the decoder the
    start token."""
    encoded, _ = work.read
    length = work.length // packed + (0 if encoded else 1)
    mask = torch.zeros(work.micro * packed, length)
    mask[:, length - work.loss_tokens :] = 1.0
    tokens = torch.randint(0, work.vocab_size, mask.shape)
    rows = Rows(tokens, torch.full((len(mask),), length), mask)
    prompts = torch.full((work.micro,), encoded) if encoded else None
    together = None if packed == 1 else torch.arange(len(mask)) // packed
    plan = MicrobatchPlan(
        rows.lengths,
        Layout(),
        0,
        per_microbatch=work.micro,
        share_bins=False,
        prompts=prompts,
        keep_together=together,
    )
    (batch,) = plan.microbatches(rows)
    assert tuple(batch.tokens.shape) == (work.micro, work.read[1])
    return batch


def presets_of_large_models() -> list[str]:
    """The shipped presets that give a model and the GPUs it runs on."""
    found = {name: yaml.safe_load(path.read_text()) for name, path in preset_files(conf_folder()).items()}
    return sorted(name for name, preset in found.items() if preset.get("trainer", {}).get("accelerator") == "gpu")
