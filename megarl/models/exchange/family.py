"""What is known of a family of published models: its configuration and its tensors, beside ours."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from megarl.config.schema import ModelConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.parameters import parameters
from megarl.models.exchange.views import Piece, Views, same

Json = dict[str, Any]

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
"""Names that configurations of transformers have for ours; the first of several is written."""

_NOT_SHAPE = ("path", "vocab_size", "dropout", "init_std", "num_layers_unfrozen")


class Entry(NamedTuple):
    """One of our parameters (`{}` stands for the layer) and the tensors that it is stored as."""

    ours: str
    theirs: tuple[str, ...]
    views: Views = same


def entry(ours: str, *theirs: str, views: Views = same) -> tuple[Entry, ...]:
    return (Entry(ours, theirs, views),)


def both(ours: str, *theirs: str, views: Views = same) -> tuple[Entry, ...]:
    """Weight and bias of a module (a bias that the model lacks is passed over)."""
    return tuple(
        Entry(f"{ours}.{kind}", tuple(f"{name}.{kind}" for name in theirs), views) for kind in ("weight", "bias")
    )


@dataclass(frozen=True)
class Mapped:
    """A parameter of one particular model: its whole shape, and the tensors that it is stored as."""

    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    views: Views
    model: ModelConfig

    def pieces(self, whole: torch.Tensor) -> list[Piece]:
        return self.views(whole, self.model)

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the other side stores, without making a tensor."""
        pieces = self.pieces(torch.empty(self.shape, device="meta"))
        return {name: piece.shape for name, piece in zip(self.theirs, pieces, strict=True)}


@dataclass(frozen=True)
class Family:
    """A family: one declarative file each, in `families/`.

    Attributes:
        name: the `model_type` of transformers.
        architectures: values of `architectures` in config.json; the first is written.
        prefix: what the names of a model without its output layer lack.
        entries: our parameters and theirs.
        read: config.json to the shape of our model; refuses what we cannot compute.
        write: the way back. Which models it can hold is found out by reading what it wrote.
        ignored: patterns of tensors that hold no weights, with the reason.
        renamed: names that other versions of transformers use, to the names in `entries`.
    """

    name: str
    architectures: tuple[str, ...]
    prefix: str
    entries: tuple[Entry, ...]
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], Json]
    ignored: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def model_config(self, config: Json) -> ModelConfig:
        try:
            model = self.read(config)
            model.vocab_size = int(config["vocab_size"])
        except KeyError as problem:
            raise CheckpointError(f"config.json of this {self.name} lacks {problem.args[0]!r}: restore it") from None
        except (TypeError, ValueError, ZeroDivisionError) as problem:
            raise CheckpointError(f"config.json of this {self.name} has a value that cannot be: {problem}") from None
        return model

    def hf_config(self, model: ModelConfig, vocab_size: int) -> Json:
        """What config.json says of the shape; token ids and dtype are the writer's."""
        config = {
            "architectures": [self.architectures[0]],
            "model_type": self.name,
            **self.write(model),
            "vocab_size": vocab_size,
            "tie_word_embeddings": model.tie_embeddings,
            "initializer_range": model.init_std,
        }
        difference = self.difference(model, config)
        if difference:
            raise ConfigError(f"a {self.name} cannot have {difference}: export as another family")
        return config

    def holds(self, model: ModelConfig) -> bool:
        return not self.difference(model, self.write(model) | {"tie_word_embeddings": model.tie_embeddings})

    def difference(self, model: ModelConfig, config: Json) -> str | None:
        """The first key of a model that does not survive being written as this family."""
        try:
            back = shape_of(self.model_config({"vocab_size": 1, **config}))
        except (CheckpointError, ConfigError) as problem:
            return str(problem)
        return next((f"model.{key}={value}" for key, value in shape_of(model).items() if back[key] != value), None)

    def mapping(self, model: ModelConfig, vocab_size: int) -> dict[str, Mapped]:
        """Our parameters of this model, each with what it is stored as."""
        known = {item.ours: item for item in self.entries}
        mapped = {}
        for name, shape in parameters(model, vocab_size).items():
            layer = re.match(r"decoder\.layers\.(\d+)\.", name)
            pattern = name if layer is None else name.replace(f".{layer[1]}.", ".{}.", 1)
            if pattern not in known:
                raise CheckpointError(f"a {self.name} has no place for {name}: export as another family")
            theirs = tuple(their.format(layer[1]) if layer else their for their in known[pattern].theirs)
            mapped[name] = Mapped(shape, theirs, known[pattern].views, model)
        return mapped

    def canonical(self, name: str, wanted: Mapping[str, Any]) -> str:
        """A stored name as `entries` has it, whichever version wrote it, with or without the output layer."""
        name = self.renamed.get(name, name)
        for candidate in (name, self.prefix + name):
            if candidate in wanted or self.reason_to_ignore(candidate):
                return candidate
        return name

    def reason_to_ignore(self, name: str) -> str | None:
        return next((why for pattern, why in self.ignored.items() if re.fullmatch(pattern, name)), None)


def shape_of(model: ModelConfig) -> Json:
    """All of a model's keys that shape its computation, each choice spelled in one way only."""
    shape = {key: value for key, value in asdict(model).items() if key not in _NOT_SHAPE}
    shape["num_kv_heads"] = model.num_kv_heads or model.num_heads
    shape["head_dim"] = model.head_dim or model.hidden_size // model.num_heads
    shape["ffn_size"] = model.ffn_size or 4 * model.hidden_size
    shape["rope_percent"] = int(shape["head_dim"] * model.rope_percent) / shape["head_dim"]
    unused = []
    if model.position != "rope":
        unused += [key for key in shape if key.startswith("rope_")]
    if model.position != "learned":
        unused.append("position_offset")
    if model.rope_scaling == "none":
        unused.append("rope_factor")
    if model.rope_scaling not in ("llama3", "yarn"):
        unused.append("rope_original_positions")
    if model.rope_scaling != "llama3":
        unused += ["rope_low_freq_factor", "rope_high_freq_factor"]
    return shape | dict.fromkeys(unused)


def activation(config: Json, key: str, default: str) -> str:
    """Our name of the activation that `key` names."""
    theirs = config.get(key, default)
    if theirs not in ACTIVATIONS:
        raise CheckpointError(f"config.json has {key}={theirs!r}, which megarl lacks: it has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def their_activation(model: ModelConfig) -> str:
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names.get(model.activation, model.activation)


def require(config: Json, key: str, value: Any, default: Any) -> None:
    """Refuse a variant that our model cannot compute."""
    found = config.get(key, default)
    if found != value:
        raise CheckpointError(f"config.json has {key}={found!r}, which megarl cannot compute: only {value!r}")


def share(rotated: int, head_dim: int) -> float:
    """The share of a head that is rotated, such that it comes out as `rotated` dimensions again."""
    percent = rotated / head_dim
    return percent if int(head_dim * percent) == rotated else math.nextafter(percent, 2.0)
