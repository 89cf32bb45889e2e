"""Heads on the last hidden state besides the output layer: state values, scores of whole sequences, and values of every
possible next token.

`HEADS` maps the names that roles use to classes. Each class states how its parameters are initialised, whether they
train, and which layer is as wide as the vocabulary. `head_of` finds the class from a parameter's name.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megarl.models.config import GPTConfig
from megarl.models.linear import affine
from megarl.parallel.vocab import VocabShard, VocabStats, padded_vocab, token_outputs, vocab_stats


class ValueHead(nn.Module):
    """Linear(h, 2h), ReLU, Linear(2h, 1).

    Its weights start as those of torch's linear layers do, as in trlX. With a narrow inner and a zero outer layer
    the critic lags in the first phases, and its error can cost the policy the only good action of a state; docs/ppo.md
    has the measurements.

    It is replicated on every tensor-parallel rank: all ranks have the same states and compute the same gradient.
    """

    attribute: ClassVar[str] = "value_head"  # the model's attribute, which is the prefix of its parameters' names
    starts_as: ClassVar[str] = "value_head"  # the attribute of the head whose initial weights it shares
    trainable: ClassVar[bool] = True
    vocabulary_wide: ClassVar[str | None] = None  # the layer with a row for every token of the vocabulary
    dtype: ClassVar[torch.dtype | None] = None  # None: the model's dtype

    @staticmethod
    def std(weight: Tensor) -> float:
        """Return the standard deviation of a weight's initial values: that of torch's linear layers."""
        return linear_std(weight)

    def __init__(self, config: GPTConfig, count: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.inner = nn.Linear(config.hidden_size, 2 * config.hidden_size, **place)
        self.outer = nn.Linear(2 * config.hidden_size, 1, **place)

    def forward(self, states: Tensor) -> Tensor:
        """Return the values [...] in float32 for states [..., hidden]."""
        inner = torch.relu(affine(states, self.inner.weight, self.inner.bias))
        return affine(inner, self.outer.weight, self.outer.bias).squeeze(-1).float()


class ScoreHead(nn.Module):
    """Linear(h, 1) without a bias: how good all tokens up to a position are. It is that of transformers' models for
    sequence classification.

    It is replicated on every tensor-parallel rank, like the value head.
    """

    attribute: ClassVar[str] = "score_head"
    starts_as: ClassVar[str] = "score_head"
    trainable: ClassVar[bool] = True
    vocabulary_wide: ClassVar[str | None] = None
    dtype: ClassVar[torch.dtype | None] = None

    @staticmethod
    def std(weight: Tensor) -> float:
        """Return the standard deviation of the weight's initial values, as in InstructGPT."""
        return float((weight.shape[1] + 1) ** -0.5)

    def __init__(self, config: GPTConfig, count: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        place = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.outer = nn.Linear(config.hidden_size, 1, bias=False, **place)

    def forward(self, states: Tensor) -> Tensor:
        """Return the scores [...] for states [..., hidden], computed in float32: near 10, bf16 has steps of 1/16."""
        return affine(states.float(), self.outer.weight.float(), None).squeeze(-1)


class QHead(MegatronModule):
    """Linear(h, 2h), ReLU, Linear(2h, vocabulary): the value of choosing each token in a state.

    Both layers are split over the tensor-parallel ranks, the second one like the output layer. All ranks receive the
    same states [n, hidden]. Their gradient is this rank's partial sum; the caller must sum it over the group.
    """

    def __init__(self, config: GPTConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        wide = 2 * config.hidden_size
        self.inner = self._columns(config.hidden_size, wide)
        self.outer = self._columns(wide, padded_vocab(config.vocab_size, tp_group.size()))

    def stats(self, states: Tensor, tokens: Tensor, shard: VocabShard) -> VocabStats:
        """Return statistics over the values of all tokens in each state; `target_logits` are those of `tokens` [n]."""
        return vocab_stats(self._wide(states), self.outer.weight, tokens, shard, bias=self.outer.bias)

    @torch.no_grad()
    def values_of(self, states: Tensor, tokens: Tensor, shard: VocabShard) -> Tensor:
        """Return the values [n] of `tokens` [n] in float32, without a gradient and without computing other tokens'."""
        return token_outputs(self._wide(states), self.outer.weight, tokens, shard, bias=self.outer.bias)

    @torch.no_grad()
    def values(self, states: Tensor, shard: VocabShard) -> Tensor:
        """Return the values [n, valid] of this shard's tokens in float32."""
        valid = slice(0, shard.valid)
        weight, bias = self.outer.weight[valid].to(states.dtype), self.outer.bias[valid].to(states.dtype)
        return affine(self._wide(states), weight, bias).float()

    def _wide(self, states: Tensor) -> Tensor:
        """Return the inner activations [n, 2 x hidden] in the states' dtype; target heads have float32 weights."""
        weight, bias = self.inner.weight.to(states.dtype), self.inner.bias.to(states.dtype)
        part = torch.relu(affine(states, weight, bias))
        whole: Tensor = all_gather_last_dim_from_tensor_parallel_region(part, self.tp_group)
        return whole

    def _columns(self, inputs: int, outputs: int) -> ColumnParallelLinear:
        """Create Megatron's layer as a container of sharded weights; its forward is not used."""
        return ColumnParallelLinear(
            inputs, outputs, config=self.config, init_method=self.config.init_method, tp_group=self.tp_group
        )


class QHeads(MegatronModule):
    """One or two Q heads, by index."""

    attribute: ClassVar[str] = "q_heads"
    starts_as: ClassVar[str] = "q_heads"
    trainable: ClassVar[bool] = True
    vocabulary_wide: ClassVar[str | None] = "outer"
    dtype: ClassVar[torch.dtype | None] = None

    @staticmethod
    def std(weight: Tensor) -> float:
        """Return the standard deviation of a weight's initial values: that of torch's linear layers."""
        return linear_std(weight)

    def __init__(self, config: GPTConfig, count: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        for number in range(count):
            self.add_module(str(number), QHead(config, tp_group))

    def __iter__(self) -> Iterator[QHead]:
        yield from self.children()  # type: ignore[misc]

    def smallest(self, states: Tensor, shard: VocabShard) -> Tensor:
        """Return the values [n, valid] of this shard's tokens, the minimum over the heads."""
        return torch.stack([head.values(states, shard) for head in self]).amin(dim=0)


class TargetQHeads(QHeads):
    """Moving averages of the Q heads, which start with the same weights. They are float32, because steps of a small
    alpha would be rounded away in bf16."""

    attribute = "target_q_heads"
    trainable = False
    dtype = torch.float32

    def __init__(self, config: GPTConfig, count: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config, count, tp_group)
        for parameter in self.parameters():
            parameter.moves = True  # type: ignore[attr-defined]  # copies of the model are told of every change

    @torch.no_grad()
    def move(self, heads: QHeads, alpha: float) -> None:
        """Polyak averaging: move every target weight by `alpha` towards the weight that it tracks."""
        for target, parameter in zip(self.parameters(), heads.parameters(), strict=True):
            target.lerp_(parameter.to(target.dtype), alpha)


Head = ValueHead | ScoreHead | QHeads
HEADS: dict[str, type[Head]] = {"value": ValueHead, "score": ScoreHead, "q": QHeads, "target_q": TargetQHeads}
"""Head classes by name. Every model has the output layer, `lm`, not listed here. A model with `q` has `target_q`."""


def head_of(parameter: str) -> type[Head] | None:
    """Return the class of the head that a parameter belongs to, by its global name; None for the trunk."""
    return next((head for head in HEADS.values() if parameter.startswith(f"{head.attribute}.")), None)


def heads_in(parameters: Iterable[str]) -> tuple[str, ...]:
    """Return the heads that parameters belong to, by their global names, in the form that a role uses.

    A model with a score head has no output layer.
    """
    names = list(parameters)
    if any(head_of(name) is ScoreHead for name in names):
        return ("score",)
    heads = ["value"] if any(head_of(name) is ValueHead for name in names) else []
    numbers = {name.split(".")[1] for name in names if head_of(name) is TargetQHeads}
    return ("lm", *heads, *["q"] * len(numbers))


def is_vocabulary_wide(parameter: str) -> bool:
    """Return whether a parameter of a head has a row for every token of the vocabulary."""
    head = head_of(parameter)
    return head is not None and head.vocabulary_wide is not None and f".{head.vocabulary_wide}." in parameter


def linear_std(weight: Tensor, tp: int = 1) -> float:
    """Return the standard deviation of the initial weights of torch's linear layers, from the number of inputs, which
    may be split over `tp` ranks."""
    return float((3 * weight.shape[1] * tp) ** -0.5)
