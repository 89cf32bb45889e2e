from collections.abc import Callable, Iterable
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tests.fakes.lists import adam, multi_tensor_l2norm, multi_tensor_scale

__all__ = ["FusedAdam", "FusedSGD", "multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale"]


class FusedSGD:
    """A name that Megatron imports."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its steps in a whole number per group, which is absent before the first."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode
        assert not any((amsgrad, capturable, master_weights, use_decoupled_grad, store_param_remainders))
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def initialize_state(self, param: Tensor, store_param_remainders: bool) -> None:
        for name in ("exp_avg", "exp_avg_sq"):
            self.state[param][name] = torch.zeros_like(param, dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A state is made anew from every entry, which must be one that it knows."""
        super().load_state_dict(state_dict)
        saved = deepcopy(state_dict["param_groups"])
        ids = chain.from_iterable(group["params"] for group in saved)
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        parameters = dict(zip(ids, own, strict=True))
        for key, state in state_dict["state"].items():
            self.state[parameters[key]] = {name: _known(name, value.float().clone()) for name, value in state.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, grad_scaler: Any = None) -> Any:
        for group in self.param_groups:
            if not group["params"]:
                continue
            bias_correction = 1 if group["bias_correction"] else 0
            group["step"] = group["step"] + 1 if "step" in group else 1
            multi_tensor_applier(
                _adam,
                None,
                self._lists(group),
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                bias_correction,
                group["weight_decay"],
            )

    def _lists(self, group: dict[str, Any]) -> list[list[Tensor]]:
        lists: list[list[Tensor]] = [[], [], [], []]
        for parameter in group["params"]:
            if not self.state[parameter]:
                self.initialize_state(parameter, False)
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype == torch.float32
            for tensors, tensor in zip(
                lists, (parameter.grad, parameter, state["exp_avg"], state["exp_avg_sq"]), strict=True
            ):
                tensors.append(tensor)
        return lists


def _known(name: str, value: Tensor) -> Tensor:
    assert name in ("exp_avg", "exp_avg_sq", "master_param"), f"{name} is no state of this optimizer"
    return value


def _adam(chunk_size: int, noop_flag: Tensor | None, lists: list[list[Tensor]], *settings: Any) -> None:
    adam(lists, *settings)


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag: Tensor | None, lists: list[list[Tensor]], *args: Any
) -> Any:
    if any(len(tensors) != len(lists[0]) for tensors in lists):
        raise RuntimeError("Expected aligned multi-tensor lists.")
    return op(2048 * 32, noop_flag, lists, *args)
