"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf


@dataclass
class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

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
    weight_decay: float = leaf(0.01, "Decoupled weight decay. It does not apply to norms and biases.", at_least=0)
    beta1: float = leaf(0.9, "Decay rate of Adam's first moment.", at_least=0, below=1)
    beta2: float = leaf(0.95, "Decay rate of Adam's second moment.", at_least=0, below=1)
    eps: float = leaf(1e-8, "Constant added to the denominator in Adam.", above=0)
    clip_grad: float = leaf(
        1.0, "Maximum norm of the whole gradient; a larger gradient is scaled down to it (0: no clipping).", at_least=0
    )
