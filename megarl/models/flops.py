"""Model FLOPs: the number of floating-point operations per token, from the shape of the model.

This counts what the mathematics needs, not what a machine executes: neither recomputed activations nor the attention
of masked-out pairs. It is the usual numerator of model FLOPs utilisation (MFU).
"""

from megarl.config.sections.model import ModelConfig
from megarl.models.adapter_spec import SHARED_LINEARS, AdapterSpec, Parts

_PER_WEIGHT = 2  # a multiplication and an addition
_FORWARD_AND_BACKWARD = 3  # the backward pass has two products per forward product: for the inputs and for the weights


def flops_per_token(model: ModelConfig, vocab_size: float, length: float, adapter: AdapterSpec | None = None) -> float:
    """Return the operations of forward and backward pass per token of a sequence.

    Per token, with `keys` the mean number of tokens attended to (`mean_keys`):

        forward  = 2 * weights of the matrix products (each layer's and the output layer's)
                 + 4 * layers * heads * head_dim * keys         (queries x keys, attention x values)
        training = 3 * forward

    This is the familiar 6 * weights + 12 * layers * hidden * length / 2. Layers below `model.num_layers_unfrozen`
    run forward only. Embedding look-ups, norms, activations, biases and the softmax are not counted. Of a mixture of
    experts, the weights are those that compute a token (`layer_weights`).

    With adapters, frozen weights need no gradients, so that their products count twice instead of three times; those of
    the adapters count three times. DoRA's lengths of rows are not counted.

    Args:
        model: shape of the model.
        vocab_size: rows of the output layer, without padding for the layout; fewer if it is not applied everywhere.
        length: tokens of a sequence. For several sequences (or packed documents), the mean weighted by tokens,
            sum(length**2) / sum(length), is exact up to the constant term.
        adapter: the adapters beside the frozen weights of the model.
    """
    attention = 4 * model.num_heads * _head_dim(model) * mean_keys(length, model.sliding_window)
    output = _PER_WEIGHT * model.hidden_size * vocab_size
    trained = layers_with_gradients(model, adapter)
    frozen = model.num_layers - trained
    with_gradients = _PER_WEIGHT * weights_of_layers(model, frozen)
    forward_only = _PER_WEIGHT * weights_of_layers(model) - with_gradients
    total = _FORWARD_AND_BACKWARD * (with_gradients + trained * attention) + forward_only + frozen * attention
    if adapter is not None:
        total += _FORWARD_AND_BACKWARD * _PER_WEIGHT * adapter_weights(model, adapter) - with_gradients
    last = (_FORWARD_AND_BACKWARD if adapter is None else _FORWARD_AND_BACKWARD - 1) * output
    return float(total + last)


def forward_flops_per_token(
    model: ModelConfig, vocab_size: float, length: float, adapter: AdapterSpec | None = None
) -> float:
    """Return the operations of a forward pass per token of a sequence; see `flops_per_token`."""
    attention = 4 * model.num_heads * _head_dim(model) * mean_keys(length, model.sliding_window)
    total = _PER_WEIGHT * weights_of_layers(model) + model.num_layers * attention
    if adapter is not None:
        total += _PER_WEIGHT * adapter_weights(model, adapter)
    return float(total + _PER_WEIGHT * model.hidden_size * vocab_size)


def encoder_decoder_flops(
    model: ModelConfig, vocab_size: float, prompt: float, response: float, adapter: AdapterSpec | None = None
) -> tuple[float, float]:
    """Return the operations of a forward pass, and of forward and backward pass, over a prompt that the encoder of an
    encoder-decoder reads and a response of its decoder.

    Per token of the prompt, the encoder's layers and the decoder's projections to keys and values of its cross
    attention; per token of the response, the decoder's layers without these, attention to both, and the output layer.
    Layers without gradients run forward only. With adapters, frozen weights need no gradients.
    """
    parts = flops_of_parts(model, vocab_size, prompt, response, adapter)
    return sum(forward for forward, _ in parts), sum(both for _, both in parts)


def flops_of_parts(
    model: ModelConfig, vocab_size: float, prompt: float, response: float, adapter: AdapterSpec | None = None
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return what `encoder_decoder_flops` does for the encoder, and for the decoder with the output layer."""
    width = model.num_heads * _head_dim(model)
    crossed = cross_weights(model)
    weights = {
        "encoder": prompt * _PER_WEIGHT * layer_weights(model),
        "decoder": _PER_WEIGHT * (response * (layer_weights(model) + crossed) + prompt * crossed),
    }
    attention = {
        "encoder": 4 * width * prompt * prompt,
        "decoder": 4 * width * response * (mean_keys(response) + prompt),
    }
    output = response * _PER_WEIGHT * model.hidden_size * vocab_size
    trained = layers_with_gradients(model, adapter)
    per_product = 2 if adapter is None else 1  # products of the backward pass: frozen weights need no gradients
    of_decoder = min(trained, model.num_layers)

    def of_part(part: str, layers: int, with_gradients: int, last: float) -> tuple[float, float]:
        factors = 0.0 if adapter is None else flops_of_factors(model, adapter, part, prompt, response)
        forward = layers * (weights[part] + attention[part]) + with_gradients * factors + last
        backward = with_gradients * (per_product * weights[part] + 2 * (attention[part] + factors)) + per_product * last
        return float(forward), float(forward + backward)

    return (
        of_part("encoder", model.encoder_layers, trained - of_decoder, 0.0),
        of_part("decoder", model.num_layers, of_decoder, output),
    )


def flops_of_factors(model: ModelConfig, adapter: AdapterSpec, part: str, prompt: float, response: float) -> float:
    """Return the operations of a forward pass of the adapters in a layer of the encoder or decoder."""
    total = 0.0
    for name, parts in adapter.parts.items():
        if name.startswith(f"{part}."):
            reads_prompt = part == "encoder" or parts.place == "cross_attention.linear_kv"
            total += (prompt if reads_prompt else response) * _PER_WEIGHT * _factor_weights(model, parts, adapter.rank)
    return total


def layers_with_gradients(model: ModelConfig, adapter: AdapterSpec | None = None) -> int:
    """Return the number of the model's last layers that have trainable parameters."""
    if adapter is not None:
        return model.layers - adapter.first_adapted
    return model.layers if model.num_layers_unfrozen < 0 else model.num_layers_unfrozen


def adapter_weights(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Return the weights of the products of all adapters, of which each layer may have others."""
    layers = (adapter.at(layer).values() for layer in range(model.layers))
    return sum(_factor_weights(model, parts, adapter.rank) for found in layers for parts in found)


def _factor_weights(model: ModelConfig, parts: Parts, rank: int) -> int:
    columns = {"linear_proj": _head_dim(model) * model.num_heads, "linear_fc2": model.ffn_width}
    width = columns.get(parts.place.rpartition(".")[2], model.hidden_size)
    if parts.place == SHARED_LINEARS["shared_experts.linear_fc2"]:
        width = model.experts.shared_ffn_size if model.experts and model.experts.shared_ffn_size else width
    return rank * (len(parts.modules) * width + sum(len(rows) for rows in parts.rows))


def layer_weights(model: ModelConfig, layer: int = 0) -> int:
    """Return the weights of one layer's matrix products that compute a token: query, key, value and output projections,
    and the MLP's. With a mixture of experts instead: the router's, those of the experts that a token is sent to, and
    those of the shared expert with its gate.

    Args:
        model: shape of the model.
        layer: number of the layer, from 0: some may have no experts.
    """
    attention = model.hidden_size * _head_dim(model) * (2 * model.num_heads + 2 * model.kv_heads)
    if model.experts is None or not model.has_experts(layer):
        return attention + _mlp_weights(model, model.ffn_width)
    router = model.hidden_size * int(model.experts.count or 0)
    shared = model.experts.shared_ffn_size
    always = 0 if shared is None else _mlp_weights(model, shared) + model.hidden_size
    return attention + router + model.experts.chosen * expert_weights(model) + always


def weights_of_layers(model: ModelConfig, first: int = 0) -> int:
    """Return the weights of `layer_weights` of the layers from number `first` to the last of a model without an
    encoder."""
    return sum(layer_weights(model, layer) for layer in range(first, model.num_layers))


def expert_weights(model: ModelConfig) -> int:
    """Return the weights of one expert of one layer."""
    return _mlp_weights(model, model.expert_width)


def expert_layers(model: ModelConfig, first: int = 0) -> int:
    """Return how many layers from number `first` on have experts."""
    return sum(model.has_experts(layer) for layer in range(first, model.num_layers))


def idle_weights(model: ModelConfig) -> int:
    """Return the weights of the experts that do not compute a token, of all layers; 0 without experts."""
    if model.experts is None:
        return 0
    return expert_layers(model) * (int(model.experts.count or 0) - model.experts.chosen) * expert_weights(model)


def _mlp_weights(model: ModelConfig, width: int) -> int:
    return (3 if model.is_gated else 2) * model.hidden_size * width


def cross_weights(model: ModelConfig) -> int:
    """Return the weights of a decoder layer's projections to queries and outputs of its attention to an encoder, and as
    many to keys and values; 0 without an encoder."""
    return 0 if model.encoder is None else 2 * model.hidden_size * model.num_heads * _head_dim(model)


def mean_keys(length: float, window: int | None = None) -> float:
    """Return the mean number of tokens that a token attends to, including itself, over a causal sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    # The first `window` tokens see 1, 2, ..., window; all later ones see `window`.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _head_dim(model: ModelConfig) -> int:
    return model.head_width
