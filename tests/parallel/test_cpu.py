"""The CPU adapter: what it stands in for fails in stock Megatron, and works with it."""

import inspect
import logging
import traceback
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarl.errors import UnavailableError
from megarl.parallel import cpu
from megarl.parallel.grid import start_world
from tests.refusals import refused
from tests.worlds import Worlds

Probe = Callable[[], object]


# --- what Megatron does unasked, one probe per patch ------------------------------------------------------------------


def gradient_buffers() -> None:
    """torch.cuda.current_device as the device of a gradient buffer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    model = torch.nn.Linear(2, 2)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    assert wrapped.buffers[0].grad_data.device.type == "cpu"


def checkpoint_writer() -> None:
    """torch.cuda.synchronize before tensors are written."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.preload_tensors([], non_blocking=True)


def tied_embedding() -> None:
    """Tensor.cuda where the last stage takes over the first stage's embedding. In a world of two."""
    from megatron.core import parallel_state
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Tied(LanguageModule):
        def shared_embedding_or_output_weight(self) -> torch.Tensor:
            return self.embedding.word_embeddings.weight if self.pre_process else self.output_layer.weight

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32
    )
    model = Tied(config, ProcessGroupCollection.use_mpu_process_groups())
    model.share_embeddings_and_output_weights = True
    model.pre_process, model.post_process = dist.get_rank() == 0, dist.get_rank() == 1
    table = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(table.weight, 3.0)
    model.embedding, model.output_layer = SimpleNamespace(word_embeddings=table), table
    model.setup_embeddings_and_output_layer()
    assert torch.equal(table.weight, torch.full((2, 2), 3.0))


def seeds() -> None:
    """CudaRNGStatesTracker.add: a named stream per tensor-parallel rank, the default stream seeded as asked."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model_parallel_cuda_manual_seed(5, tp_rank=1, ep_rank=0, etp_rank=0, force_reset_rng=True)
    tracker = get_cuda_rng_tracker()
    assert torch.equal(torch.rand(3), expected)  # adding streams has not moved it
    assert "model-parallel-rng" in tracker.get_states()
    with pytest.raises(ValueError, match="already exists"):
        tracker.add("model-parallel-rng", 99)


def reading_the_generator() -> None:
    """_get_cuda_rng_state: recomputation notes the state before the forward pass."""
    from megatron.core.tensor_parallel import checkpoint

    x = torch.ones(4, requires_grad=True)
    checkpoint(torch.nn.functional.relu, False, x).sum().backward()
    assert torch.equal(x.grad, torch.ones(4))


def setting_the_generator() -> None:
    """_set_cuda_rng_state, which stock Megatron only queues until there is CUDA: what was drawn is drawn again."""
    from megatron.core.tensor_parallel import random

    state = torch.get_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    if not torch.equal(torch.rand(3), first):
        raise RuntimeError("without CUDA the state was not set")


def schedule() -> None:
    """Token counters of the pipeline schedules."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Doubling(MegatronModule):
        model_type = None

        def set_input_tensor(self, tensor: Any) -> None:
            pass

    def step(batches: Iterator[torch.Tensor], model: Any) -> Any:
        batch = next(batches)
        return batch * 2, lambda output: (output.sum(), {"sum": output.sum().item()})

    parallel_state.initialize_model_parallel()
    run = get_forward_backward_func()
    results = run(
        forward_step_func=step,
        data_iterator=iter([torch.ones(2), torch.ones(3)]),
        model=Doubling(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)),
        num_microbatches=2,
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
    )
    assert [result["sum"] for result in results] == [4.0, 6.0]


def gradient_norm() -> None:
    """The buffer in which norms are reduced."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    gradients = [torch.tensor([3.0, -4.0])]
    assert get_grad_norm_fp32(gradients, norm_type=torch.inf, grad_stats_parallel_group=dist.group.WORLD) == 4.0


def clipping() -> None:
    """The check of a gradient's type."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, -4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, -0.8]))


def local_norm() -> None:
    """The accumulator of Megatron's own stand-in for Apex's multi-tensor norm."""
    from megatron.core.utils import local_multi_tensor_l2_norm

    norm, _ = local_multi_tensor_l2_norm(0, None, [[torch.tensor([3.0]), torch.tensor([4.0])]], False)
    assert norm.item() == 5.0


def optimizer_scale() -> None:
    """The loss scale that every optimizer makes."""
    from megatron.core.optimizer.optimizer import FP32Optimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    assert FP32Optimizer(adam, OptimizerConfig(), lambda *_: None).get_loss_scale().item() == 1.0


def distributed_optimizer_groups() -> None:
    """The type checks that sort parameters by precision."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

    wide, narrow = (torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    first_half = {"param": SimpleNamespace(start=0, end=2)}
    group: dict[str, Any] = {"params": [wide, narrow], "orig_group": {}}
    DistributedOptimizer._build_model_and_main_param_groups(
        [{"any": [{"param_map": {wide: first_half, narrow: first_half}}]}],
        {wide: (0, "any", 0), narrow: (0, "any", 0)},
        [group],
        OptimizerConfig(),
    )
    assert [(main.dtype, main.numel()) for main in group["orig_group"]["params"]] == [(torch.float32, 2)] * 2


def exchanged_shards() -> None:
    """The buffer into which another rank's shard of a checkpoint is received."""
    from megatron.core.dist_checkpointing.exchange_utils import _get_empty_tensor_for_exchange
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    shard = ShardedTensor.from_rank_offsets("key", torch.zeros(3))
    tensor, _ = _get_empty_tensor_for_exchange("id", {}, {"id": shard}, {})
    assert tensor.device.type == "cpu"


# probe: (processes, where in Megatron stock fails)
PROBES: dict[Probe, tuple[int, str]] = {
    gradient_buffers: (1, "distributed/param_and_grad_buffer.py"),
    checkpoint_writer: (1, "dist_checkpointing/strategies/filesystem_async.py"),
    tied_embedding: (2, "models/common/language_module/language_module.py"),
    seeds: (1, "tensor_parallel/random.py"),
    reading_the_generator: (1, "tensor_parallel/random.py"),
    setting_the_generator: (1, ""),
    schedule: (1, "pipeline_parallel/schedules.py"),
    gradient_norm: (1, "optimizer/clip_grads.py"),
    clipping: (1, "optimizer/clip_grads.py"),
    local_norm: (1, "megatron/core/utils.py"),
    optimizer_scale: (1, "optimizer/optimizer.py"),
    distributed_optimizer_groups: (1, "optimizer/distrib_optimizer.py"),
    exchanged_shards: (1, "dist_checkpointing/exchange_utils.py"),
}


def outcome(probe: Probe, adapted: bool) -> tuple[str, str]:
    """What the probe raised ("" if nothing) and the last line of Megatron's that was running."""
    if adapted:
        start_world()
    else:
        assert not cpu._installed
    try:
        probe()
    except Exception as problem:
        frames = [frame.filename for frame in traceback.extract_tb(problem.__traceback__)]
        inside = [name for name in frames if "/megatron/core/" in name]
        return f"{type(problem).__name__}: {problem}", inside[-1] if inside else ""
    return "", ""


@pytest.fixture(scope="module")
def stock() -> Iterator[Worlds]:
    """Processes in which the adapter is never switched on."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_each_patch_is_needed(stock: Worlds, probe: Probe) -> None:
    size, where = PROBES[probe]
    problem, place = stock.run(size, outcome, probe, False)[0]
    # Megatron's check of a gradient's type is an assertion without words.
    assert "cuda" in problem.lower() or (probe is clipping and problem.startswith("AssertionError"))
    assert place.endswith(where)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_each_patch_works(worlds: Worlds, probe: Probe) -> None:
    size, _ = PROBES[probe]
    assert worlds.run(size, outcome, probe, True) == [("", "")] * size


# --- random numbers ---------------------------------------------------------------------------------------------------


def forked_draws() -> tuple[bool, bool, list[str]]:
    """Whether a fork goes on where the last one stopped, whether it leaves the outside alone, and what was logged."""
    from megatron.core.tensor_parallel import random

    start_world()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(random.__name__).addHandler(handler)
    torch.manual_seed(1)
    random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
    tracker = random.get_cuda_rng_tracker()
    outside = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with tracker.fork():
            draws.append(torch.rand(4))
    untouched = torch.equal(torch.get_rng_state(), outside)
    whole = torch.rand(8, generator=torch.Generator().manual_seed(1 + 2718))
    logging.getLogger(random.__name__).removeHandler(handler)
    return torch.equal(torch.cat(draws), whole), untouched, messages


def test_a_fork_is_a_stream_of_its_own(worlds: Worlds) -> None:
    continues, untouched, messages = worlds.run(1, forked_draws)[0]
    assert continues
    assert untouched
    assert not messages  # one line per dropout layer and step, otherwise


def recomputed_dropout() -> bool:
    """Whether a recomputed layer drops in the backward pass what it dropped in the forward pass, plain and forked."""
    from megatron.core.tensor_parallel import checkpoint, random

    start_world()
    random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        with random.get_cuda_rng_tracker().fork():
            x = torch.nn.functional.dropout(x, 0.5)
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(64, requires_grad=True)
    output = checkpoint(layer, False, x)
    torch.rand(7)  # what comes between must not matter
    output.sum().backward()
    # Of a product with ones, the gradient is the mask that was used.
    return bool(torch.equal(x.grad, output)) and 0 < int((output == 0).sum()) < 64


def test_recomputation_repeats_the_draws_of_the_forward_pass(worlds: Worlds) -> None:
    assert worlds.run(1, recomputed_dropout) == [True]


# --- constants --------------------------------------------------------------------------------------------------------


def cuda_constants(adapted: bool) -> dict[str, list[str]]:
    """Per patched module, the functions that hold a name of CUDA's among their constants."""
    if adapted:
        start_world()
    names = {"cuda", "torch.cuda.FloatTensor", "torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"}

    def holds(constant: Any) -> bool:
        if isinstance(constant, types.CodeType):
            return any(holds(inner) for inner in constant.co_consts)
        return any(holds(item) for item in constant) if isinstance(constant, tuple) else constant in names

    found: dict[str, list[str]] = {}
    for name in cpu._MODULES_WITH_CUDA_CONSTANTS:
        module = import_module(name)
        owners = [module, *(kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == name)]
        found[name] = []
        for owner in owners:
            for member in vars(owner).values():
                function = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
                if inspect.isfunction(function) and function.__module__ == name and holds(function.__code__):
                    found[name].append(function.__qualname__)
    return found


def test_no_function_of_a_patched_module_names_cuda(worlds: Worlds, stock: Worlds) -> None:
    before, after = stock.run(1, cuda_constants, False)[0], worlds.run(1, cuda_constants, True)[0]
    assert all(before.values())  # a module without such constants has no place in the list
    assert not any(after.values())


# --- when it may be switched on ---------------------------------------------------------------------------------------


def test_it_cannot_be_switched_on_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.cuda.current_device, torch.Tensor.cuda
    assert not cpu.needed()
    with refused(UnavailableError, key="CUDA"):
        cpu.install()
    assert (torch.cuda.current_device, torch.Tensor.cuda) == before
    assert not cpu._installed


def installed_twice() -> bool:
    start_world()
    before = torch.cuda.current_device, torch.Tensor.cuda
    cpu.install()
    return (torch.cuda.current_device, torch.Tensor.cuda) == before


def test_switching_it_on_again_changes_nothing(worlds: Worlds) -> None:
    assert worlds.run(1, installed_twice) == [True]
