"""The description of a model in a run, which building, planning, saving and restoring use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.models.adapter_spec import ADAPTER, AdapterSpec
from megarl.models.heads import head_of

if TYPE_CHECKING:
    from megarl.models.exchange.adapters import StoredAdapter
    from megarl.models.exchange.source import Source


@dataclass(frozen=True)
class Role:
    """A model in a run.

    Attributes:
        name: policy, critic and so on; the prefix of its tensors' names in checkpoints.
        model: its shape.
        vocab_size: size of its vocabulary.
        heads: `lm` and names from `heads.HEADS`, `q` once for each Q head. Without `lm` (a separate critic, a reward
            model), there is no output layer.
        optim: optimizer settings; None for a model that only computes forward passes.
        lr_key: the configuration key that messages suggest to lower.
        source: the stored model whose weights it starts from. None: random weights.
        about: its purpose, one line in the output of `python -m megarl.plan`.
        swaps_with: the role whose weights it replaces while it computes; its own weights wait in host memory.
            None: its weights stay on the device.
        follows: whether its weights are those that the policy had earlier, so that checkpoints must have them.
        head_std: standard deviation of the initial weights of heads that the source lacks. None: that of the head.
        adapter: the adapters beside its weights; None: there are none.
        base: the role whose weights beside its adapters it uses. None: it has its own.
        adapter_source: the stored adapter whose factors it starts from. None: factors that change nothing.
        has_copy: for a role that swaps, whether its weights are copied. Those of new adapters that change nothing are
            not: they are switched off.
    """

    name: str
    model: ModelConfig
    vocab_size: int
    heads: tuple[str, ...] = ("lm",)
    optim: OptimConfig | None = None
    lr_key: str = "optim.lr"
    source: Source | None = field(default=None, repr=False, compare=False)
    about: str = field(default="", repr=False, compare=False)
    swaps_with: str | None = None
    follows: bool = False
    head_std: float | None = None
    adapter: AdapterSpec | None = None
    base: str | None = None
    adapter_source: StoredAdapter | None = field(default=None, repr=False, compare=False)
    has_copy: bool = True

    @property
    def trains(self) -> bool:
        """Whether the model has an optimizer."""
        return self.optim is not None

    @property
    def scores(self) -> bool:
        """Whether the model is a reward model of a run that trains another."""
        return "score" in self.heads and not self.trains

    @property
    def saved(self) -> bool:
        """Whether checkpoints contain its weights. A frozen role is built again from its source."""
        return self.trains or self.follows

    @property
    def on_device(self) -> bool:
        """Whether it has a separate engine whose weights stay on the device."""
        return self.swaps_with is None

    def is_trainable(self, parameter: str) -> bool:
        """Return whether a parameter trains, by its global name.

        With `model.num_layers_unfrozen`, only that many of the last layers, the final norm and the heads train. The
        embedding counts as below the layers, also if it is tied to the output. With adapters, these and the heads
        train.
        """
        head = head_of(parameter)
        if head is not None:
            return head.trainable
        if self.adapter is not None:
            return ADAPTER in parameter
        unfrozen = self.model.num_layers_unfrozen
        if unfrozen < 0:
            return True
        _, _, rest = parameter.partition("decoder.layers.")
        if rest:
            return int(rest.partition(".")[0]) >= self.model.layers - unfrozen
        return not parameter.startswith("embedding.")
