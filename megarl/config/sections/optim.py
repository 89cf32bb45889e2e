"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf
from megarl.config.offers import Refusal


@dataclass
class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    kind: str = leaf(
        "adamw",
        "Kind of optimizer: AdamW, RMSprop (not centered), or SGD. All three use the decoupled weight decay of AdamW. "
        "The defaults of optim.lr suit AdamW; SGD needs a larger one.",
        ("adamw", "rmsprop", "sgd"),
    )
    lr: float = leaf(1e-3, "Peak learning rate.", at_least=0)
    min_lr_ratio: float = leaf(
        0.1,
        "Learning rate at the end of the schedule, as a share of optim.lr. No effect with optim.schedule=constant.",
        at_least=0,
        at_most=1,
    )
    warmup_steps: int = leaf(
        10, "Optimizer steps over which the learning rate rises linearly from 0 to optim.lr.", at_least=0
    )
    schedule: str = leaf("cosine", "How the learning rate decays after the warm-up.", ("constant", "linear", "cosine"))
    weight_decay: float = leaf(
        0.01,
        "Decoupled weight decay: before each step, weights are multiplied by 1 - learning rate * optim.weight_decay. "
        "It does not apply to norms and biases.",
        at_least=0,
    )
    momentum: float = leaf(
        0.0,
        "Momentum of RMSprop and SGD, as in torch: the fraction of the last update that is added to the next. 0: no "
        "momentum, and no memory for it. It must be 0 with optim.kind=adamw, which has optim.beta1.",
        at_least=0,
        below=1,
    )
    beta1: float = leaf(
        0.9, "Decay rate of AdamW's first moment. No effect with other values of optim.kind.", at_least=0, below=1
    )
    beta2: float = leaf(
        0.95,
        "Decay rate of the mean of squared gradients, in AdamW and in RMSprop (torch's alpha). No effect with "
        "optim.kind=sgd.",
        at_least=0,
        below=1,
    )
    eps: float = leaf(
        1e-8, "Constant added to the denominator in AdamW and in RMSprop. No effect with optim.kind=sgd.", above=0
    )
    clip_grad: float = leaf(
        1.0, "Maximum norm of the whole gradient; a larger gradient is scaled down to it (0: no clipping).", at_least=0
    )

    def check(self) -> None:
        """Refuse momentum with AdamW, which has its own."""
        if self.momentum > 0 and self.kind == "adamw":
            raise Refusal(
                f"optim.momentum={self.momentum:g} has no effect with optim.kind=adamw, which has optim.beta1",
                {"optim.momentum": [0.0], "optim.kind": ["rmsprop", "sgd"]},
                key="optim.momentum",
                value=self.momentum,
            )
