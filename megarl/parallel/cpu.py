"""Adapter that lets megatron-core run without CUDA.

It is switched on once per process. It refuses to run beside a GPU. Nothing here changes the behaviour on a GPU. Each
patch names the line of Megatron that needs it, and `megatron_versions.NAMES` lists the private names that are replaced.
"""

import logging
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch

from megarl.errors import UnavailableError

# Modules whose functions contain the CUDA device or a CUDA tensor type as a constant.
_MODULES_WITH_CUDA_CONSTANTS = (
    "megatron.core.pipeline_parallel.schedules",  # token counters made with device="cuda"
    "megatron.core.optimizer.clip_grads",  # grad norm and overflow buffers, type() checks
    "megatron.core.optimizer.optimizer",  # type() checks that sort parameters by precision
    "megatron.core.optimizer.distrib_optimizer",  # the same
    "megatron.core.dist_checkpointing.exchange_utils",  # buffers for exchanging shards
    "megatron.core.utils",  # local norm accumulators
)
_CONSTANTS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

_installed = False


def needed() -> bool:
    """Return whether no CUDA device is present."""
    return not torch.cuda.is_available()


def installed() -> bool:
    """Return whether the adapter is switched on in this process, which cannot be undone."""
    return _installed


def install() -> None:
    """Switch the adapter on (idempotent). Raises beside a GPU."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise UnavailableError(
            "the CPU adapter cannot be switched on where CUDA is present: run on the GPU", key="CUDA"
        )
    _patch_torch_cuda()
    keep_random_states_on_cpu()
    from megatron.core.tensor_parallel import random

    # There is one generator for all states, so Megatron would warn about every forked dropout mask.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    for name in _MODULES_WITH_CUDA_CONSTANTS:
        for function in _functions(import_module(name)):
            function.__code__ = _on_cpu(function.__code__)
    _installed = True


def _patch_torch_cuda() -> None:
    """Replace functions that raise without CUDA and that Megatron calls unconditionally; no other code can use them."""
    # device= of every collective, p2p and gradient buffer
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    # after batched p2p and in the checkpoint writer
    torch.cuda.synchronize = lambda device=None: None
    # before a reduction of gradients waits for CUDA graphs (param_and_grad_buffer.py, from 0.19)
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,return-value]
    # tied embeddings (language_module.py) and exchanged shards (exchange_utils.py)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def keep_random_states_on_cpu() -> Callable[[], None]:
    """Make Megatron's RNG tracker and activation recomputation store the CPU generator's states instead of CUDA's.

    Returns a function that undoes this.
    """
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def add(self: Any, name: str, seed: int) -> None:
        if name in self.states_:
            raise ValueError(f"random state {name} already exists")
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        self.seeds_.add(seed)
        torch.set_rng_state(before)
        self._is_initialized = True

    def use(getter: Any, setter: Any, adder: Any) -> None:
        random._get_cuda_rng_state, random._set_cuda_rng_state = getter, setter
        random.CudaRNGStatesTracker.add = adder

    before = (random._get_cuda_rng_state, random._set_cuda_rng_state, random.CudaRNGStatesTracker.add)
    use(get_state, set_state, add)
    return lambda: use(*before)


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Yield every function and method that `module` itself defines."""
    owners: list[Any] = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for owner in owners:
        if isinstance(owner, type) and owner.__module__ != module.__name__:
            continue
        for value in vars(owner).values():
            inner: Any = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            inner = inner.fget if isinstance(inner, property) else inner
            while hasattr(inner, "__wrapped__"):  # functions under decorators such as torch.no_grad
                inner = inner.__wrapped__
            if isinstance(inner, types.FunctionType) and inner.__module__ == module.__name__:
                yield inner


def _on_cpu(value: Any) -> Any:
    """Return `value` (a constant, a tuple, or code with nested functions) with CUDA's names replaced by the CPU's."""
    if isinstance(value, str):
        return _CONSTANTS.get(value, value)
    if isinstance(value, tuple):
        return tuple(_on_cpu(item) for item in value)
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=_on_cpu(value.co_consts))
    return value
