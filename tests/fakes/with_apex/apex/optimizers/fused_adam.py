from collections.abc import Callable, Iterable
from typing import Any

import amp_C
import torch

from apex.multi_tensor_apply import multi_tensor_applier


class FusedAdam(torch.optim.Optimizer):
    """AdamW that counts its steps in a whole number per group, which is absent before the first."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert adam_w_mode
        assert not any((amsgrad, capturable, master_weights))
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            if not group["params"]:
                continue
            bias_correction = 1 if group["bias_correction"] else 0
            group["step"] = group["step"] + 1 if "step" in group else 1
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            states = [self.state[parameter] for parameter in trained]
            lists = [
                [parameter.grad for parameter in trained],
                trained,
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
            ]
            multi_tensor_applier(
                amp_C.multi_tensor_adam,
                None,
                lists,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["step"],
                1,
                bias_correction,
                group["weight_decay"],
            )
