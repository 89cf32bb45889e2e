"""The description of a model in a run, from which it is built and planned."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.schema import ModelConfig, OptimConfig
from megarl.models.heads import head_of


@dataclass(frozen=True)
class Role:
    """A model in a run.

    Attributes:
        name: policy, critic and so on; the names of its tensors in checkpoints begin with it.
        model: its shape, and with `model.path` where its weights come from.
        vocab_size: entries of its vocabulary.
        heads: `lm` and names of `heads.HEADS`, `q` once for each Q head. Without `lm` (a separate critic), the output
            layer does not train.
        optim: None for a model that only evaluates.
        total_steps: optimizer steps of the whole run, for the learning rate.
        lr_key: the configuration key that messages say to lower.
    """

    name: str
    model: ModelConfig
    vocab_size: int
    heads: tuple[str, ...] = ("lm",)
    optim: OptimConfig | None = None
    total_steps: int = 0
    lr_key: str = "optim.lr"

    def is_trainable(self, parameter: str) -> bool:
        """Return whether a parameter trains, by its global name.

        With `model.num_layers_unfrozen`, only so many of the last layers, the final norm and the heads do. The
        embedding counts as below the layers, also where it is tied to the output.
        """
        head = head_of(parameter)
        if head is not None:
            return head.trainable
        if parameter.startswith("output_layer.") and "lm" not in self.heads:
            return False
        unfrozen = self.model.num_layers_unfrozen
        if unfrozen < 0:
            return True
        _, _, rest = parameter.partition("decoder.layers.")
        if rest:
            return int(rest.partition(".")[0]) >= self.model.num_layers - unfrozen
        return not parameter.startswith("embedding.")
