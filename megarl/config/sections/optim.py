"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf
from megarl.config.offers import Refusal

WITH_MOMENTUM = ("muon", "rmsprop", "sgd")
MUON_MOMENTUM = 0.95


def momentum_in_force(kind: str, momentum: float | None) -> float:
    """Return `optim.momentum`, or what null stands for with a kind of optimizer."""
    if momentum is not None:
        return momentum
    return MUON_MOMENTUM if kind == "muon" else 0.0


@dataclass
class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    kind: str = leaf(
        "adamw",
        "Kind of optimizer: AdamW; adamw8bit, which stores both moments of weights in one byte a value each instead of "
        "four, in float32 for biases and norms, so that layouts agree less closely; Lion, which has one moment; Muon, "
        "which orthogonalises the momentum of matrices of the layers and of adapters, has one moment for these, and "
        "uses AdamW for all else; RMSprop (not centered); SGD. All use the decoupled weight decay of AdamW. The "
        "defaults of optim.lr suit AdamW, adamw8bit and Muon; Lion needs a learning rate 3 to 10 times smaller, SGD a "
        "larger one. A step of Muon costs 20 r^2 c + 10 r^3 floating-point operations, in float32, for a matrix of r x "
        "c values with r <= c; tensor- and data-parallel ranks share the matrices out, and send every value there and "
        "back.",
        ("adamw", "adamw8bit", "lion", "muon", "rmsprop", "sgd"),
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
    momentum: float | None = leaf(
        None,
        "Momentum of RMSprop and SGD, as in torch: the fraction of the last update that is added to the next (0: no "
        "momentum, and no memory for it). In Muon, the decay rate of the mean of gradients that is orthogonalised; it "
        "must be above 0. null: 0.95 with optim.kind=muon, else 0. It must be null or 0 with the other kinds, which "
        "have optim.beta1.",
        at_least=0,
        below=1,
    )
    beta1: float = leaf(
        0.9,
        "Decay rate of AdamW's first moment, also in adamw8bit and for all that Muon does not orthogonalise. In Lion, "
        "the weight of the momentum in an update. No effect with optim.kind=rmsprop or sgd.",
        at_least=0,
        below=1,
    )
    beta2: float = leaf(
        0.95,
        "Decay rate of the mean of squared gradients, in all kinds of AdamW, in Muon where it uses AdamW, and in "
        "RMSprop (torch's alpha). In Lion, the decay rate of the momentum, 0.99 as published. No effect with "
        "optim.kind=sgd.",
        at_least=0,
        below=1,
    )
    eps: float = leaf(
        1e-8,
        "Constant added to the denominator in AdamW, in Muon where it uses AdamW, and in RMSprop. No effect with "
        "optim.kind=lion or sgd.",
        above=0,
    )
    clip_grad: float = leaf(
        1.0, "Maximum norm of the whole gradient; a larger gradient is scaled down to it (0: no clipping).", at_least=0
    )

    @property
    def momentum_in_force(self) -> float:
        """The momentum, with the default of the kind where it is null."""
        return momentum_in_force(self.kind, self.momentum)

    def check(self) -> None:
        """Refuse momentum with kinds that have another, and Muon without it."""
        if (self.momentum or 0) > 0 and self.kind not in WITH_MOMENTUM:
            raise Refusal(
                f"optim.momentum={self.momentum:g} has no effect with optim.kind={self.kind}, which has optim.beta1",
                {"optim.momentum": [None], "optim.kind": list(WITH_MOMENTUM)},
                key="optim.momentum",
                value=self.momentum,
            )
        if self.momentum == 0 and self.kind == "muon":
            raise Refusal(
                "optim.momentum=0 leaves nothing for optim.kind=muon to average",
                {"optim.momentum": [MUON_MOMENTUM]},
                key="optim.momentum",
                value=self.momentum,
            )
