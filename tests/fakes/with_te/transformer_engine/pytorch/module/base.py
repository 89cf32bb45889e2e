import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn

EXTRA_STATE = "MEGARL_TEST_EXTRA_STATE"  # set: layers have extra state that is not empty, as with FP8


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    raise AssertionError("asked for with fused gradient accumulation only")


class WithExtraState(nn.Module):
    """Extra state is bytes in a tensor on the CPU, none of them without FP8."""

    scale = 1.0

    def get_extra_state(self) -> Tensor:
        if EXTRA_STATE not in os.environ:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"scale": self.scale})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        self.scale = pickle.loads(state.numpy().tobytes())["scale"]


class TransformerEngineBaseModule(WithExtraState):
    """What all layers with a product have in common."""

    def check_input(self, x: Tensor) -> None:
        for name, parameter in self.named_parameters():
            assert x.dtype == parameter.dtype, (
                "Data types for parameters must match when outside of autocasted region. "
                f" Found input dtype: {x.dtype} and {name!r} dtype: {parameter.dtype}"
            )


def set_tensor_model_parallel_attributes(tensor: Any, is_parallel: bool, dim: int, stride: int) -> None:
    assert not hasattr(tensor, "tensor_model_parallel")
    tensor.tensor_model_parallel, tensor.partition_dim, tensor.partition_stride = is_parallel, dim, stride
