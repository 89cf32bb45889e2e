"""A family of published models: how its configuration and its tensors map to ours."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from megarl.config.leaf import leaves
from megarl.config.offers import either, read
from megarl.config.sections.model import ModelConfig
from megarl.config.shape import shape_problem
from megarl.config.values import LARGEST
from megarl.disk import shown
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.parameters import SCORE, parameters
from megarl.models.exchange.views import Piece, Views, same

Json = dict[str, Any]

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
"""Names in transformers configurations for our names; the first of several is written."""

CLASSIFIER = "ForSequenceClassification"
"""The end of the names of transformers' classes that score sequences."""

KINDS = ("model.encoder.num_layers", "model.experts.count")
"""Keys that encoder-decoders and mixtures of experts have alone."""

_NOT_SHAPE = (
    *("path", "vocab_size", "dropout", "init_std", "num_layers_unfrozen"),
    *("experts.balance", "experts.z_loss"),
)


class Lacking(NamedTuple):
    """Properties of a model that a family lacks: the keys in words, and the first key with its value."""

    words: str
    key: str | None
    value: Any


class Entry(NamedTuple):
    """One of our parameters and the tensors that it is stored as.

    Attributes:
        ours: its name; `{}` is the number of the layer, for an encoder-decoder within `encoder.layers` or
            `decoder.layers`, and a second one that of the expert.
        theirs: the stored names.
        views: how the stored tensors are contained in ours.
        gated: whether it is that of models with a gated MLP; None where that makes no difference.
    """

    ours: str
    theirs: tuple[str, ...]
    views: Views = same
    gated: bool | None = None


def entry(ours: str, *theirs: str, views: Views = same, gated: bool | None = None) -> tuple[Entry, ...]:
    """Return one entry as a tuple, so that entries can be concatenated."""
    return (Entry(ours, theirs, views, gated),)


def both(ours: str, *theirs: str, views: Views = same) -> tuple[Entry, ...]:
    """Return entries for weight and bias of a module (a bias that the model lacks is ignored)."""
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
        """Return views of our whole tensor, one for each stored tensor."""
        return self.views(whole, self.model)

    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors, without allocating one."""
        pieces = self.pieces(torch.empty(self.shape, device="meta"))
        return {name: piece.shape for name, piece in zip(self.theirs, pieces, strict=True)}


@dataclass(frozen=True)
class Family:
    """A family: one declarative file each, in `families/`.

    Attributes:
        name: the `model_type` of transformers.
        architectures: values of `architectures` in config.json; the first is written.
        prefix: prefix of tensor names that is missing in models without an output layer.
        entries: our parameters and the stored ones.
        read: converts config.json to the shape of our model; raises for what megarl cannot compute.
        write: the inverse of `read`. Whether a family can represent a model is tested by reading what it wrote.
        ignored: patterns of stored tensors that are not weights, with the reason.
        renamed: names from other versions of transformers, mapped to the names in `entries`.
        trunk: transformers' class of the layers without an output layer, as which a reward model is written if
            transformers has no class with a score head like ours; its score head is then beside the weights.
    """

    name: str
    architectures: tuple[str, ...]
    prefix: str
    entries: tuple[Entry, ...]
    read: Callable[[Json], ModelConfig]
    write: Callable[[ModelConfig], Json]
    ignored: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    trunk: str | None = None

    def model_config(self, config: Json) -> ModelConfig:
        """Convert a config.json to the shape of our model; raise `CheckpointError` for missing or invalid values."""
        where = f"config.json of this {self.name}"
        check_values(config, where)
        try:
            model = self.read(config)
            model.vocab_size = config["vocab_size"]
        except KeyError as problem:
            raise CheckpointError(
                f"{where} lacks {problem.args[0]!r}: restore it", key=problem.args[0], where=where
            ) from None
        except (TypeError, ValueError, ArithmeticError, AttributeError) as problem:
            raise CheckpointError(f"{where} has a value that cannot be: {problem}", where=where) from None
        return checked(model, where)

    @property
    def classifier(self) -> str:
        """Transformers' class of a reward model of this family."""
        return self.trunk or re.sub("(ForCausalLM|LMHeadModel)$", CLASSIFIER, self.architectures[0])

    def hf_config(self, model: ModelConfig, vocab_size: int, *, scores: bool = False) -> Json:
        """Return the shape's keys of config.json, with `scores` of a reward model; the writer adds token ids and
        dtype."""
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}} if scores else {}
        config = {
            "architectures": [self.classifier if scores else self.architectures[0]],
            **labels,
            "model_type": self.name,
            **self.write(model),
            "vocab_size": vocab_size,
            "tie_word_embeddings": model.tie_embeddings,
            "initializer_range": model.init_std,
        }
        lost = self.difference(model, config)
        if lost:
            raise ConfigError(
                f"a {self.name} cannot have {lost.words}: export as another family", key=lost.key, value=lost.value
            )
        return config

    def holds(self, model: ModelConfig) -> bool:
        """Return whether this family can represent the model."""
        return self.lacks(model) is None

    def difference(self, model: ModelConfig, config: Json) -> Lacking | None:
        """Return the keys of a model that change when it is written as this family and read again."""
        try:
            back = shape_of(self.model_config({"vocab_size": 1, **config}))
        except (CheckpointError, ConfigError) as problem:
            if problem.key in KINDS:
                return _lacking(model, [problem.key.removeprefix("model.")])
            if model.activation in ACTIVATIONS.values():
                return Lacking(str(problem), problem.key, problem.value)
            rest = self.lacks(replace(model, activation="gelu"))
            words = f"model.activation={model.activation}" + (f" and {rest.words}" if rest else "")
            return Lacking(words, "model.activation", model.activation)
        lost = [key for key, value in shape_of(model).items() if back[key] != value]
        if not lost:
            return None
        for kind in (key.removeprefix("model.") for key in KINDS):
            if kind in lost and None in (read(model, kind), back[kind]):
                lost = [kind]  # the others follow from it
        if "experts.dense_layers" in lost:
            lost = [key for key in lost if key != "ffn_size"]  # the width of these layers
        return _lacking(model, lost)

    def lacks(self, model: ModelConfig) -> Lacking | None:
        """Return the properties of a model that this family lacks; None if it can represent it."""
        return self.difference(model, self.write(model) | {"tie_word_embeddings": model.tie_embeddings})

    def entries_of(self, model: ModelConfig) -> dict[str, Entry]:
        """Return the entries of a model's parameters by our names."""
        return {item.ours: item for item in self.entries if item.gated in (None, model.is_gated)}

    def mapping(self, model: ModelConfig, vocab_size: int, *, scores: bool = False) -> dict[str, Mapped]:
        """Return our parameters of this model by name, each with the tensors that it is stored as. With `scores`, it
        has a score head in the place of the output layer, which is among them unless the family has a `trunk`."""
        known = self.entries_of(model)
        mapped = {}
        if scores and self.trunk is None:
            mapped[SCORE] = Mapped((1, model.hidden_size), ("score.weight",), same, model)
        for name, shape in parameters(model, vocab_size, output=not scores).items():
            pattern, *numbers = _pattern(name, model)
            if pattern not in known:
                raise CheckpointError(f"a {self.name} cannot store {name}: export as another family", key=name)
            theirs = tuple(their.format(*numbers) for their in known[pattern].theirs)
            mapped[name] = Mapped(shape, theirs, known[pattern].views, model)
        return mapped

    def canonical(self, name: str, wanted: Mapping[str, Any]) -> str:
        """Return the name in `entries` of a stored tensor, from any version, with or without the output layer."""
        name = self.renamed.get(name, name)
        for candidate in (name, self.prefix + name):
            if candidate in wanted or self.reason_to_ignore(candidate):
                return candidate
        return name

    def reason_to_ignore(self, name: str) -> str | None:
        """Return why a stored tensor is not a weight; None if it is one."""
        return next((why for pattern, why in self.ignored.items() if re.fullmatch(pattern, name)), None)


def _lacking(model: ModelConfig, keys: list[str]) -> Lacking:
    """Return these keys of a model, without `model.`, as properties that a family lacks."""
    words = " and ".join(f"model.{key}={either([read(model, key)])}" for key in keys)
    return Lacking(words, f"model.{keys[0]}", read(model, keys[0]))


def _pattern(name: str, model: ModelConfig) -> tuple[str, int, int]:
    """Return the name in `entries` of one of our parameters, the number of its layer in its part of the model, and that
    of its expert."""
    layer = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if layer is None:
        return name, 0, 0
    expert = re.search(r"\.local_experts\.(\d+)\.", layer[2])
    rest = re.sub(r"(\.local_experts\.)\d+\.", r"\1{}.", layer[2])
    number, which = int(layer[1]) - model.encoder_layers, int(expert[1]) if expert else 0
    if number < 0:
        return f"encoder.layers.{{}}.{rest}", int(layer[1]), which
    return f"decoder.layers.{{}}.{rest}", number, which


def shape_of(model: ModelConfig) -> Json:
    """Return all of a model's keys that shape its computation, with one canonical spelling for each choice.

    Keys of a section are dotted. Keys without effect are None.
    """
    shape = {leaf.key: read(model, leaf.key) for leaf in leaves(ModelConfig) if leaf.key not in _NOT_SHAPE}
    shape["num_kv_heads"] = model.kv_heads
    shape["head_dim"] = model.head_width
    shape["ffn_size"] = model.ffn_width
    if model.experts is not None:
        shape["experts.ffn_size"] = model.expert_width
        shape["experts.dense_layers"] = sorted(model.experts.dense_layers)
        if not model.experts.dense_layers:
            shape["ffn_size"] = None
    shape["rope_percent"] = int(shape["head_dim"] * model.rope_percent) / shape["head_dim"]
    unused = []
    if model.position != "rope":
        unused += [key for key in shape if key.startswith("rope_")]
    if model.position != "learned":
        unused.append("position_offset")
    if shape["rope_scaling.kind"] not in ("llama3", "yarn"):
        unused.append("rope_scaling.original_positions")
    if shape["rope_scaling.kind"] != "llama3":
        unused += ["rope_scaling.low_freq_factor", "rope_scaling.high_freq_factor"]
    return shape | dict.fromkeys(unused)


_WHOLE = (
    *("num_hidden_layers", "n_layer", "num_layers", "hidden_size", "n_embd", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "num_query_groups", "head_dim", "kv_channels", "intermediate_size", "n_inner", "ffn_dim"),
    *("ffn_hidden_size", "max_position_embeddings", "n_positions", "rotary_dim", "vocab_size", "sliding_window"),
    *("word_embed_proj_dim", "original_max_position_embeddings", "max_window_layers", "override_vocab_size"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
    *(
        "shared_expert_intermediate_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
    ),
)
_REAL = (
    *("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon", "rope_theta", "rotary_emb_base"),
    *("rotary_pct", "rotary_base", "rotary_percentage", "seq_len_interpolation_factor", "init_method_std", "factor"),
    *("low_freq_factor", "high_freq_factor", "partial_rotary_factor", "beta_fast", "beta_slow", "attention_factor"),
    *("mscale", "mscale_all_dim"),
)
_FLAG = (
    *(
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "norm_topk_prob",
        "enable_bias",
        "use_sliding_window",
        "bias",
        "qkv_bias",
    ),
    *("use_parallel_residual", "do_layer_norm_before", "share_embeddings_and_output_weights", "qk_layernorm"),
    *("rotary_interleaved", "scale_positional_embedding", "bias_activation_fusion", "openai_gelu", "truncate"),
)
_TEXT = ("hidden_act", "activation_function", "activation", "rope_type", "type", "normalization")
_NESTED = ("rope_scaling", "rope_parameters")


def check_values(config: Json, where: str) -> None:
    """Raise for a value of a wrong type for its key, which is the same in all families; null is allowed here."""
    for key, value in config.items():
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        wants = {
            key in _WHOLE and not (whole and 0 <= value < 2**31): "a whole number below 2**31",
            key in _REAL and not ((whole or isinstance(value, float)) and abs(value) <= LARGEST): "a number",
            key in _FLAG and not isinstance(value, bool): "true or false",
            key in _TEXT and not isinstance(value, str): "text",
            key in _NESTED and not isinstance(value, dict): "a mapping",
        }
        if True in wants:
            raise CheckpointError(
                f"{where} has {key}={shown(repr(value))}, which is not {wants[True]}: restore it",
                key=key,
                value=value,
                where=where,
            )
        if key in _NESTED:
            check_values(value, f"{key} in {where}")


def checked(model: ModelConfig, where: str) -> ModelConfig:
    """Return the model read from a file, with false for flags that are null there; raise if it cannot be built."""
    for leaf in leaves(ModelConfig):
        if leaf.type == "bool" and "." not in leaf.key and getattr(model, leaf.key) is None:
            setattr(model, leaf.key, False)
    problem = shape_problem(model)
    if problem:
        raise CheckpointError(
            f"{where} describes a model that cannot be built: {problem}",
            key=problem.key,
            value=problem.value,
            where=where,
        )
    return model


def activation(config: Json, key: str, default: str) -> str:
    """Return our name of the activation in `config[key]`."""
    theirs = config.get(key, default)
    if theirs not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json has {key}={shown(repr(theirs))}, which megarl lacks: choose from {', '.join(ACTIVATIONS)}",
            key=key,
            value=theirs,
            where="config.json",
            offers={key: ACTIVATIONS},
        )
    return ACTIVATIONS[theirs]


def their_activation(model: ModelConfig) -> str:
    """Return the name that transformers uses for the model's activation."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return names.get(model.activation, model.activation)


def require(config: Json, key: str, value: Any, default: Any) -> None:
    """Raise unless a key has the one value that our model can compute."""
    found = config.get(key, default)
    if found != value:
        raise unsupported(key, found, value)


def unsupported(key: str, found: Any, only: Any, *, of: str = "") -> CheckpointError:
    """Return the error for a value that our model cannot compute; `of` is a prefix of the key."""
    return CheckpointError(
        f"config.json has {of}{key}={shown(repr(found))}, which megarl cannot compute: only {only!r}",
        key=key,
        value=found,
        where="config.json",
        offers={key: [only]},
    )


def share(rotated: int, head_dim: int) -> float:
    """Return the fraction of a head that is rotated, which multiplies back to exactly `rotated` dimensions."""
    percent = rotated / head_dim
    return percent if int(head_dim * percent) == rotated else math.nextafter(percent, 2.0)
