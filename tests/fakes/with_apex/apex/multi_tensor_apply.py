from collections.abc import Callable
from typing import Any

from torch import Tensor


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor | None, lists: list[list[Tensor]], *args: Any
) -> Any:
    return op(2048 * 32, noop_flag, lists, *args)
