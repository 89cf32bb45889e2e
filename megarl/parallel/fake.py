"""Any rank of any layout in one process, to count what a rank of a large world would store without that world.

Collectives of the fake process group do nothing: shapes and sizes are right, values are not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.errors import UnavailableError
from megarl.parallel import cpu
from megarl.parallel.grid import Grid
from megarl.parallel.layout import Layout
from megarl.parallel.megatron_versions import check_newer


@contextmanager
def fake_world(layout: Layout, rank: int = 0, device: str = "meta", *, default_device: bool = True) -> Iterator[Grid]:
    """Yield the grid as process `rank` of `layout` has it. Tensors made inside are on `device`: on "meta" they take no
    memory, on "cpu" they are real. Without `default_device`, only code that names a device explicitly is redirected,
    as on a GPU."""
    if dist.is_initialized():
        raise UnavailableError(
            "a process group is live in this process: plan in a process of its own", key="process group"
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    check_newer()
    if cpu.needed():
        cpu.install()
    place = torch.device(device)
    random_state = torch.get_rng_state()
    current_device, tensor_type = torch.cuda.current_device, torch.Tensor.type
    put_back = cpu.keep_random_states_on_cpu()  # also beside a GPU, as CUDA has no generator for this device
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    # device= of every buffer that Megatron makes
    torch.cuda.current_device = lambda: place  # type: ignore[assignment,return-value]
    torch.Tensor.type = _type_off_meta(tensor_type)  # type: ignore[method-assign]
    try:
        grid = Grid(layout, place)
        with place if default_device else nullcontext():
            yield grid
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        torch.cuda.current_device, torch.Tensor.type = current_device, tensor_type  # type: ignore[method-assign]
        put_back()
        torch.set_rng_state(random_state)


def rank_of(layout: Layout, *, tp: int = 0, dp: int = 0, pp: int = 0) -> int:
    """Return the rank with these coordinates: Megatron orders ranks by tp (fastest), then dp, then pp."""
    return tp + layout.tp * layout.cp * (dp + layout.dp * pp)


def _type_off_meta(tensor_type: Any) -> Any:
    """`Tensor.type`, with real type names for tensors on "meta": Megatron's optimizer groups parameters by it."""
    real = "torch.cuda." if torch.cuda.is_available() else "torch."

    def answer(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        found = tensor_type(self, *args, **options)
        return found.replace("torch.meta.", real) if isinstance(found, str) else found

    return answer
